# SPDX-License-Identifier: Apache-2.0
"""The prefix kernel for Hopper GPUs, where there is one. Elsewhere only what it takes on is tested."""

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    ancestors,
    attend_slots,
    chain,
    make_batch,
    pack_masks,
    prefix_slots,
    relative_error,
    row_slots,
)
from vllm_longspec.attention.hopper_prefix import can_serve, hopper_prefix_parts
from vllm_longspec.step.verify import tree_attention

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")


@needs_hopper
@pytest.mark.parametrize("num_parts", [1, 3, 33])
@pytest.mark.parametrize("layout", ["tokens_first", "heads_first", "layers_interleaved"])
@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "block_size"),
    [(torch.bfloat16, 128, 10, 2, 64), (torch.float16, 128, 4, 1, 128), (torch.bfloat16, 64, 6, 2, 192)],
)
def test_prefix_and_tree_are_full_attention(
    dtype: torch.dtype, head_size: int, num_heads: int, num_kv_heads: int, block_size: int, layout: str, num_parts: int
) -> None:
    """Prefixes of no tile, of less than one, of full ones and of rests; several tiles of rows; a request without rows.

    Slots that hold no token are NaN, and so would be whatever was read of them.
    """
    prefix_lens, query_lens = [0, 1, 63, 64, 65, 255, 700, 1024, 1500], [3, 2, 40, 1, 16, 5, 33, 9, 4]
    batch = make_batch(
        prefix_lens, query_lens, num_heads, num_kv_heads, head_size, block_size, dtype, layout, "cuda", seed=num_parts
    )
    num_tokens = batch.query.shape[0]
    assert can_serve(batch.query, batch.kv_cache)
    parts = hopper_prefix_parts(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        batch.query_start_loc,
        batch.max_query_len,
        batch.scale,
        num_parts=num_parts,
    )
    trees = [ancestors(chain(40)) for _ in prefix_lens]
    output, _ = batch.empty_results(num_further_tokens=2)
    masks = pack_masks(trees, 40, "cuda")
    tree_attention(
        batch.query,
        batch.kv_cache,
        batch.slot_mapping,
        batch.query_start_loc,
        masks,
        batch.max_query_len,
        batch.scale,
        parts,
        output,
    )
    attended = []
    for request, tree in enumerate(trees):
        own, before = row_slots(batch, request), prefix_slots(batch, request)
        attended.append([before + [own[other] for other in tree[row]] for row in range(len(own))])
    expected, _ = attend_slots(batch, attended)
    assert relative_error(output[:num_tokens], expected) < TOLERANCE[dtype]
    assert output[num_tokens:].isnan().all()


@needs_hopper
def test_requests_without_a_query_are_harmless() -> None:
    batch = make_batch([600, 7, 20], [3, 0, 2], 4, 2, 128, 64, torch.bfloat16, "tokens_first", "cuda")
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.prefix_lens, batch.query_start_loc, 3, 0.1)
    expected = hopper_prefix_parts(*arguments, num_parts=2)
    batch.prefix_lens[1] = 1 << 30
    batch.block_table[1] = 1 << 30
    parts = hopper_prefix_parts(*arguments, num_parts=2)
    assert torch.equal(parts.outputs[:, :3], expected.outputs[:, :3])
    assert torch.equal(parts.lse[0], expected.lse[0])


def test_serves_only_what_it_can_read() -> None:
    def served(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
        query = torch.empty(1, 4, head_size, dtype=dtype, device="cuda" if IS_HOPPER else "cpu")
        return can_serve(query, torch.empty(2, 2, block_size, 2 * head_size, dtype=dtype, device=query.device))

    assert served(torch.bfloat16, 128, 64) == IS_HOPPER
    assert not served(torch.bfloat16, 128, 16)
    assert not served(torch.bfloat16, 80, 64)
    assert not served(torch.float32, 128, 64)
