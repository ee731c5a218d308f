# SPDX-License-Identifier: Apache-2.0
"""Tables of the first and last tokens of a prefix, against sets of positions."""

import random

import pytest
import torch

from vllm_longspec.attention.partial import PartialTables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 400
LENGTHS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 0, 255, 256, 398, 399]


@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("sinks", [0, 1, 32, 33])
@pytest.mark.parametrize("budget", [1, 16, 17, 100, 1000])
def test_parts_are_the_blocks_of_the_first_and_of_the_last_tokens(block_size, sinks, budget):
    source = random.Random(sinks * 1000 + budget)
    max_num_blocks = -(-MAX_MODEL_LEN // block_size)
    ids = [[source.randrange(1, 2**31 - 1) for _ in range(max_num_blocks)] for _ in LENGTHS]
    tables = PartialTables.allocate(sinks, budget, block_size, len(LENGTHS) + 1, MAX_MODEL_LEN, DEVICE)
    tables.block_table.fill_(-5)
    tables.lens.fill_(-5)
    part, lens = tables.write(
        torch.tensor(ids, dtype=torch.int32, device=DEVICE),
        torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
    )
    for request, length in enumerate(LENGTHS):
        tokens = {*range(min(sinks, length)), *range(max(0, length - budget), length)}
        blocks = sorted({token // block_size for token in tokens})
        expected = [ids[request][block] for block in blocks]
        assert part[request].tolist() == expected + [0] * (part.shape[1] - len(blocks))
        # All blocks but the last are full.
        in_last = length - blocks[-1] * block_size if blocks else 0
        assert lens[request] == max(0, len(blocks) - 1) * block_size + in_last <= tables.max_len
        if length <= sinks + budget:
            assert lens[request] == length
    # What stands after the batch is left alone.
    assert (tables.block_table[len(LENGTHS)] == -5).all() and tables.lens[len(LENGTHS)] == -5


def test_tables_have_room_for_the_part_and_no_more():
    tables = PartialTables.allocate(32, 1024, 16, 4, 131072, DEVICE)
    assert tables.max_len == (2 + 65) * 16
    # vLLM's tables end with 128 tokens.
    assert tables.block_table.shape == (4, 72)
    assert tables.num_bytes == 4 * 4 * (72 + 1)
    assert PartialTables.allocate(32, 1024, 16, 4, 100, DEVICE).max_len == 7 * 16
