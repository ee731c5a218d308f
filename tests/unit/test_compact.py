# SPDX-License-Identifier: Apache-2.0
"""Stage "compact": caches of several layouts, dtypes and block sizes against a gather from a clone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import tree as oracle
from vllm_longspec.tree.compact import KVCacheTable, compact_kv_caches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_BLOCKS, MAX_NUM_BLOCKS = 12, 4


def make_caches(num_layers, num_kv_heads, block_size, row_size, dtype, layout):
    """Caches of random bits, of logical shape [num_blocks, num_kv_heads, block_size, row_size]."""
    size = torch.empty(0, dtype=dtype).element_size()
    heads, tokens = (num_kv_heads, block_size) if layout == "HND" else (block_size, num_kv_heads)
    caches = []
    for _ in range(num_layers):
        bits = torch.randint(0, 256, (NUM_BLOCKS, heads, tokens, row_size * size), dtype=torch.uint8)
        cache = bits.to(DEVICE).view(dtype)
        caches.append(cache if layout == "HND" else cache.transpose(1, 2))
    return caches


def make_block_tables(num_reqs):
    """Requests' blocks, in no order, no block twice."""
    blocks = torch.randperm(NUM_BLOCKS)[: num_reqs * MAX_NUM_BLOCKS]
    return blocks.view(num_reqs, MAX_NUM_BLOCKS).to(DEVICE, torch.int32)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def check(caches, first_positions, paths, max_depth, width=16):
    """Compacts, and compares every bit of every cache with the reference."""
    block_tables = make_block_tables(len(paths))
    expected = [oracle.compact(cache, block_tables.long(), first_positions, paths) for cache in caches]
    path_rows = torch.full((len(paths), width), -1, dtype=torch.int32, device=DEVICE)
    for request, path in enumerate(paths):
        path_rows[request, : len(path)] = torch.tensor(path, dtype=torch.int32)
    compact_kv_caches(
        KVCacheTable(caches),
        block_tables,
        torch.tensor(first_positions, dtype=torch.int32, device=DEVICE),
        path_rows,
        torch.tensor([len(path) for path in paths], dtype=torch.int32, device=DEVICE),
        max_depth=max_depth,
    )
    for cache, moved in zip(caches, expected, strict=True):
        assert torch.equal(bits(cache), bits(moved))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_moves_accepted_rows(block_size, dtype, layout):
    torch.manual_seed(0)
    caches = make_caches(2, 2, block_size, 48, dtype, layout)
    # The second path starts in the last slot of a block and ends two blocks further; the third has nothing to move.
    first_positions = [3, block_size - 1, 0]
    paths = [[0, 2, 3, 9], [0, 1, 4, block_size + 2], [0]]
    before = [cache.clone() for cache in caches]
    check(caches, first_positions, paths, max_depth=5)
    assert not any(torch.equal(bits(cache), bits(old)) for cache, old in zip(caches, before, strict=True))


@st.composite
def batches(draw):
    paths = []
    for _ in range(draw(st.integers(1, 3))):
        nodes = draw(st.sets(st.integers(1, 30), max_size=6))
        # No row at all: a request whose prompt is not finished.
        paths.append([0, *sorted(nodes)] if draw(st.booleans()) or nodes else [])
    first_positions = [draw(st.integers(0, 16 * MAX_NUM_BLOCKS - 31)) for _ in paths]
    return first_positions, paths


@settings(max_examples=40, deadline=None)
@given(batches())
def test_any_path(batch):
    torch.manual_seed(0)
    first_positions, paths = batch
    check(make_caches(1, 1, 16, 16, torch.bfloat16, "NHD"), first_positions, paths, max_depth=6)


def test_layers_in_one_allocation():
    # As vLLM lays out caches of several layers in one tensor: a layer's blocks lie far apart.
    torch.manual_seed(0)
    whole = torch.randn(NUM_BLOCKS, 3, 2, 16, 32, device=DEVICE)
    check([whole[:, layer] for layer in range(3)], [5], [[0, 3, 7]], max_depth=4)


def test_moves_max_depth_rows_at_most():
    # What a stale `num_emitted` may hold must not lead to reads past the path.
    (cache,) = make_caches(1, 1, 16, 16, torch.float32, "NHD")
    before = cache.clone()
    path_rows = torch.tensor([[0, 2, 4]], dtype=torch.int32, device=DEVICE)
    block_tables = torch.arange(4, dtype=torch.int32, device=DEVICE)[None]
    compact_kv_caches(
        KVCacheTable([cache]),
        block_tables,
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        path_rows,
        torch.tensor([3], dtype=torch.int32, device=DEVICE),
        max_depth=1,
    )
    before[0, :, 1] = before[0, :, 2].clone()
    assert torch.equal(bits(cache), bits(before))


def test_refuses_what_it_cannot_move():
    good = torch.zeros(4, 2, 16, 32, device=DEVICE)
    with pytest.raises(ValueError, match="no KV cache"):
        KVCacheTable([])
    with pytest.raises(ValueError, match="layer 1: the KV cache has shape"):
        KVCacheTable([good, good[:, :1]])
    with pytest.raises(ValueError, match="layer 2: the KV cache has strides"):
        KVCacheTable([good, good, torch.zeros(4, 16, 2, 32, device=DEVICE).transpose(1, 2)])
    with pytest.raises(ValueError, match="layer 1: the KV cache has dtype"):
        KVCacheTable([good, good.bfloat16()])
    with pytest.raises(ValueError, match="layer 0: a KV cache must have shape"):
        KVCacheTable([good[0]])
    with pytest.raises(ValueError, match="layer 0: a KV cache must have shape"):
        KVCacheTable([good.transpose(2, 3)])
    with pytest.raises(ValueError, match=r"layer 0: a KV cache of torch\.float64"):
        KVCacheTable([good.double()])
    path_rows = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="a path of depth 3 does not fit 3 path rows"):
        compact_kv_caches(KVCacheTable([good]), path_rows, path_rows[0], path_rows, path_rows[0], max_depth=3)
