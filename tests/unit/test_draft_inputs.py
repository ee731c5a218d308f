# SPDX-License-Identifier: Apache-2.0
"""Which blocks a step of MagicDec's draft attends, and where it writes, against sets of positions; how it is split."""

import importlib
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_longspec.options import PartialAttention
from vllm_longspec.proposers.interface import Roots
from vllm_longspec.proposers.magicdec.inputs import DraftInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 400
# Slots of the last blocks need more than 32 bits.
MAX_BLOCK = 2**31 - 1


def attended_blocks(part: PartialAttention, block_size: int, position: int) -> list[int]:
    """Places in a request's table of the blocks with one of the tokens to attend, by looking at each token."""
    tokens = {*range(part.sinks), *range(position + 1 - part.budget, position + 1)}
    return sorted({token // block_size for token in tokens if 0 <= token <= position})


def write(inputs: DraftInputs, step: int, slots: list[int], roots: list[int], tables: torch.Tensor) -> torch.Tensor:
    """Returns the tokens that were given."""
    tokens = torch.arange(len(slots), device=DEVICE) + 7
    positions = torch.tensor(roots, device=DEVICE)
    root = Roots(tokens, positions, positions.int())
    inputs.write(step, tokens, torch.tensor(slots, device=DEVICE), root, tables)
    return tokens


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("sinks", [0, 1, 32, 33])
@pytest.mark.parametrize("budget", [1, 16, 17, 100, 1000])
def test_the_part_is_the_blocks_of_the_first_and_of_the_last_tokens(block_size, sinks, budget):
    source = random.Random(sinks * 1000 + budget)
    part = PartialAttention(sinks, budget)
    # Whole blocks and one more or less, short requests, the last position, and two that only pad the batch.
    roots = [0, 1, 15, 16, 31, 32, 33, 63, 64, 100, 127, 128, 129, 200, 0, 255, 256, 397, 398, 399, 0]
    slots = [-1 if i in (14, 20) else i for i in range(len(roots))]
    max_num_blocks = -(-MAX_MODEL_LEN // block_size)
    ids = [[source.randrange(1, MAX_BLOCK) for _ in range(max_num_blocks)] for _ in roots]
    inputs = DraftInputs.allocate(part, block_size, len(roots) + 1, MAX_MODEL_LEN, 3, DEVICE)
    # A table is a part of a wider tensor, as in an engine.
    tables = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    for step in range(3):
        inputs.block_tables.fill_(-5)
        tokens = write(inputs, step, slots, roots, tables)
        for request, (slot, root) in enumerate(zip(slots, roots, strict=True)):
            table = inputs.block_tables[0, request].tolist()
            found = [tensor[request].item() for tensor in (inputs.input_ids, inputs.positions, inputs.seq_lens)]
            if slot < 0:
                assert found == [0, 0, 1] and table == [0] * len(table)
                assert inputs.slot_mapping[0, request] == -1
                continue
            position = min(root + step, MAX_MODEL_LEN - 1)
            blocks = attended_blocks(part, block_size, position)
            num_attended = (len(blocks) - 1) * block_size + position % block_size + 1
            assert found == [tokens[request].item(), position, num_attended]
            assert table[: len(blocks)] == [ids[request][block] for block in blocks]
            assert table[len(blocks) :] == [0] * (len(table) - len(blocks))
            own = ids[request][position // block_size] * block_size + position % block_size
            assert inputs.slot_mapping[0, request] == (own if root + step < MAX_MODEL_LEN else -1)
            assert num_attended <= inputs.max_seq_len
    # What stands after the batch is left alone.
    assert (inputs.block_tables[0, len(roots)] == -5).all() and inputs.slot_mapping[0, len(roots)] == -1


def test_a_request_that_is_no_longer_than_the_part_attends_everything():
    part = PartialAttention(32, 64)
    inputs = DraftInputs.allocate(part, 16, 1, MAX_MODEL_LEN, 3, DEVICE)
    table = torch.arange(1, 26, dtype=torch.int32, device=DEVICE)[None]
    for root in range(32 + 64):
        write(inputs, 0, [0], [root], table)
        assert inputs.seq_lens[0] == root + 1
        assert inputs.block_tables[0, 0, : root // 16 + 1].tolist() == list(range(1, root // 16 + 2))


def test_tables_have_room_for_the_part_and_no_more():
    inputs = DraftInputs.allocate(PartialAttention(32, 1024), 16, 4, 131072, 3, DEVICE)
    # The last 1,024 tokens touch 65 blocks unless they begin with one.
    assert inputs.max_seq_len == (2 + 65) * 16
    # vLLM's tables end with 128 tokens.
    assert inputs.block_tables.shape == (1, 4, 72)
    assert inputs.num_bytes == 4 * (4 + 8 + 8 + 4 + 72 * 4)
    # A short `max_model_len` needs fewer.
    assert DraftInputs.allocate(PartialAttention(32, 1024), 16, 4, 100, 3, DEVICE).max_seq_len == 7 * 16


@pytest.mark.parametrize("block_size", [16, 32])
def test_where_layers_have_tables_of_their_own_none_is_written(block_size):
    recent, scored = (
        DraftInputs.allocate(PartialAttention(32, 100, selection), block_size, 3, MAX_MODEL_LEN, 5, DEVICE)
        for selection in ("recent", "scores")
    )
    assert scored.block_tables.shape == (5, *recent.block_tables.shape[1:])
    assert scored.num_bytes - recent.num_bytes == 4 * recent.block_tables.nbytes
    scored.block_tables.fill_(-5)
    tables = torch.arange(1, 1 + 3 * 25, dtype=torch.int32, device=DEVICE).view(3, 25)
    for inputs in (recent, scored):
        write(inputs, 2, [0, 1, -1], [17, 370, 0], tables)
    assert (scored.block_tables == -5).all()
    for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
        assert torch.equal(getattr(scored, name), getattr(recent, name)), name


@pytest.mark.parametrize(
    ("settings", "num_kv_heads", "max_seq_len", "most_splits"),
    [
        ({}, 8, 1061, {1: 32, 11: 32, 12: 1, 16: 1, 64: 1}),
        ({}, 1, 1061, {64: 32, 93: 1}),
        # One long request among short ones is split.
        ({}, 8, 4133, {1: 32, 12: 32, 64: 32}),
        # Without full graphs, and on GPUs before Hopper, FlashAttention itself decides.
        ({"use_full_cuda_graph": False}, 8, 1061, {1: 0, 64: 0}),
        ({"aot_schedule": False}, 8, 1061, {1: 0, 64: 0}),
    ],
)
def test_a_batch_that_keeps_the_gpu_busy_is_not_split(monkeypatch, settings, num_kv_heads, max_seq_len, most_splits):
    name = "vllm_longspec.attention.flash"
    if not torch.cuda.is_available():
        # What the module imports; vLLM defines it for GPUs only.
        monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.flash_attn_varlen_func", None, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    flash = importlib.import_module(name)
    monkeypatch.setattr(flash, "num_multiprocessors", lambda device: 132)
    builder = object.__new__(flash.TreeFlashAttentionMetadataBuilder)
    attention_config = SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32)
    vars(builder).update(
        device=torch.device("cuda"), num_heads_kv=num_kv_heads, attention_config=attention_config, max_num_splits=0
    )
    vars(builder).update({"use_full_cuda_graph": True, "aot_schedule": True} | settings)
    found = {}
    # A large batch leaves nothing behind for the next one.
    for num_reqs in sorted(most_splits, reverse=True):
        builder.expect_equal_lengths(num_reqs, max_seq_len)
        found[num_reqs] = builder.max_num_splits
    assert found == most_splits
