# SPDX-License-Identifier: Apache-2.0
"""Stage "compact": moves the accepted nodes' K and V to the slots right after the root.

During verification row i of a request is at linear position first + i of the KV cache. The accepted rows are a path
with gaps; afterwards emitted token i must be at position first + i, as in plain decoding, for later steps and the
prefix cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.triton_utils import tl, triton


class KVCacheTable:
    """Addresses and layout of the KV caches of all layers, so that one kernel launch covers every layer.

    A cache has the logical shape [num_blocks, num_kv_heads, block_size, 2 * head_size] (K, then V), any dtype of 1, 2
    or 4 bytes and a contiguous last dimension. Dtype, strides and block tables must be the same in every layer, and the
    addresses must not change.

    Raises:
        ValueError: no layer, a layer (named by its index) that differs from layer 0, or another layout or dtype.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]):
        if not kv_caches:
            raise ValueError("there is no KV cache to compact")
        first = kv_caches[0]
        if first.dim() != 4 or first.stride(3) != 1:
            raise ValueError(
                "layer 0: a KV cache must have shape [num_blocks, num_kv_heads, block_size, 2 * head_size] with a "
                f"contiguous last dimension, not shape {tuple(first.shape)} with strides {first.stride()}"
            )
        if first.element_size() not in (1, 2, 4):
            raise ValueError(f"layer 0: a KV cache of {first.dtype} cannot be moved")
        for layer, kv_cache in enumerate(kv_caches):
            for name, found, expected in (
                ("shape", tuple(kv_cache.shape), tuple(first.shape)),
                ("strides", kv_cache.stride(), first.stride()),
                ("dtype", kv_cache.dtype, first.dtype),
                ("device", kv_cache.device, first.device),
            ):
                if found != expected:
                    raise ValueError(f"layer {layer}: the KV cache has {name} {found}, layer 0 has {expected}")

        self.num_layers = len(kv_caches)
        _, self.num_kv_heads, self.block_size, self.row_size = first.shape
        self.strides = first.stride()
        # Rows are copied bitwise, so only the size of an element matters.
        self.element_type: Any = {1: tl.int8, 2: tl.int16, 4: tl.int32}[first.element_size()]
        self.pointers = torch.tensor(
            [kv_cache.data_ptr() for kv_cache in kv_caches], dtype=torch.int64, device=first.device
        )


def compact_kv_caches(
    kv_caches: KVCacheTable,
    block_tables: torch.Tensor,  # int32 [num_reqs, max_num_blocks] by batch position
    first_positions: torch.Tensor,  # int32 or int64 [num_reqs] linear position of row 0, i.e. tokens before it
    path_rows: torch.Tensor,  # int32 [num_reqs, width] of `walk_tree`
    num_emitted: torch.Tensor,  # int32 [num_reqs] of `walk_tree`
    max_depth: int,  # depth of the deepest node of any tree, the most rows that one request can have accepted
) -> None:
    """Moves K and V of every accepted row, in every layer, from position first + path_rows[r, i] to first + i.

    The accepted rows are path_rows[r, 1] to path_rows[r, num_emitted[r] - 1]. A request that emitted one token, or none
    because its prompt is not finished, is left alone. The last dimension of every tensor must be contiguous.

    Raises:
        ValueError: `path_rows` has no room for max_depth + 1 rows.
    """
    num_reqs, width = path_rows.shape
    if width < max_depth + 1:
        raise ValueError(f"a path of depth {max_depth} does not fit {width} path rows")
    _compact_kv_caches_kernel[(num_reqs, kv_caches.num_layers, kv_caches.num_kv_heads)](
        kv_caches.pointers,
        *kv_caches.strides[:3],
        block_tables,
        block_tables.stride(0),
        first_positions,
        path_rows,
        path_rows.stride(0),
        num_emitted,
        max_depth,
        BLOCK_SIZE=kv_caches.block_size,
        ROW_SIZE=kv_caches.row_size,
        ROW_BLOCK=triton.next_power_of_2(kv_caches.row_size),
        ELEMENT_TYPE=kv_caches.element_type,
    )


@triton.jit
def _compact_kv_caches_kernel(
    kv_cache_pointers_ptr,
    block_stride,
    head_stride,
    token_stride,
    block_tables_ptr,
    block_tables_stride,
    first_positions_ptr,
    path_rows_ptr,
    path_rows_stride,
    num_emitted_ptr,
    max_depth,
    BLOCK_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ELEMENT_TYPE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    num_emitted = tl.load(num_emitted_ptr + request)
    if num_emitted <= 1:
        return

    # Each layer's cache is a tensor of its own, so the table holds addresses as integers.
    kv_cache_ptr = tl.load(kv_cache_pointers_ptr + layer).to(tl.pointer_type(ELEMENT_TYPE))
    kv_cache_ptr += head * head_stride
    block_tables_ptr += request * block_tables_stride
    path_rows_ptr += request * path_rows_stride
    first = tl.load(first_positions_ptr + request)
    element = tl.arange(0, ROW_BLOCK)
    is_element = element < ROW_SIZE

    # Rows on a path strictly increase, so path_rows[i] >= i, and the moves need no barrier:
    # - a row is overwritten only after it was read. An element has the same lane for every i, so one thread does both;
    # - no row is read that was written here: step i reads row path_rows[i] >= i, and only rows before i are written.
    for i in range(1, tl.minimum(num_emitted, max_depth + 1)):
        row = tl.load(path_rows_ptr + i)
        if row != i:
            source = _position_offset(block_tables_ptr, first + row, block_stride, token_stride, BLOCK_SIZE)
            target = _position_offset(block_tables_ptr, first + i, block_stride, token_stride, BLOCK_SIZE)
            moved = tl.load(kv_cache_ptr + source + element, mask=is_element)
            tl.store(kv_cache_ptr + target + element, moved, mask=is_element)


@triton.jit
def _position_offset(block_table_ptr, position, block_stride, token_stride, BLOCK_SIZE: tl.constexpr):
    """Offset of a linear position's row in a head's cache, in elements."""
    block = tl.load(block_table_ptr + position // BLOCK_SIZE).to(tl.int64)
    return block * block_stride + (position % BLOCK_SIZE).to(tl.int64) * token_stride
