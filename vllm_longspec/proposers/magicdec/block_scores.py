# SPDX-License-Identifier: Apache-2.0
"""How much of a verification's attention each part of the cached prefix gets.

A verification's queries are those of the next tokens, so what they attend is what the draft's next steps will attend.
FlashAttention returns no weights, only their log-sum-exp, so K is read once more:

    score of a unit = sum over query heads, rows and the unit's keys of exp(query · key * scale - log-sum-exp)

where a unit is one block of the cache, or some consecutive ones. The weights of a row and head sum to 1.

**What it costs.** Reading K of all heads is half of what attention reads. So a layer's scores of a request are due only
once in `interval` verified tokens, and its layers take turns: a step that emits n tokens reads n / (2 * interval) of
the cached K and V once more. Example: 16 requests of 32k tokens with the shape of Llama-3-8B (32 layers, 8 KV heads of
128, bfloat16) cache 69 GB. At 4.3 TB/s a verification takes 16 ms to read them and 4 ms for the weights, and each of
four drafted tokens 0.25 of that, 42 ms in all. With 4 tokens a step and an interval of 32 the scores read 4.3 GB:
1.0 ms. Measured on an H200, with the choice, it is 1.9 ms, 4.4% of the step (docs/performance.md#blocks-by-scores).

**No atomics.** A program sums over the heads and rows of its units itself, so a sum depends on nothing but its request.
Ranks hold other heads and may choose other blocks; what they draft comes from logits that they all have.
"""

from typing import NamedTuple

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.platform_utils import num_compute_units

from vllm_longspec.attention.cache_scales import CacheScales, as_stored
from vllm_longspec.attention.prefix import (
    choose_tile_sizes,
    dot_dtype,
    load_scales,
    packed_rows,
    scale_arguments,
)
from vllm_longspec.interpreter import interpreting

# Keys of a tile on a GPU. A tile's K is read head after head, the next while the last is multiplied.
KEYS = 128
PROGRAMS_PER_COMPUTE_UNIT = 2
# Lanes that deal out the work, one for each request. Smaller batches do not compile kernels of their own.
MIN_LANES = 256


class Refresh(NamedTuple):
    """When a layer's selection of a request is renewed: in its first verification, then whenever `interval` more tokens
    have been verified, and when it is more than `max_age` tokens old.
    """

    idx_mapping: torch.Tensor  # int64 [num_reqs] req_state_idx; -1 for padding
    verified_len: torch.Tensor  # int32 [max_num_reqs] length of the prefix at the last verification; 0 if none
    chosen_at: torch.Tensor  # int32 [max_num_reqs] length of the prefix that the layer's selection is of; 0 if none
    interval: int  # tokens
    phase: int  # of the layer; another one for each, so that they take turns
    min_prefix_len: int  # shorter prefixes have nothing to choose from
    max_age: int


@triton.jit
def is_due(
    req_state_idx,  # -1 for padding
    verified_len,
    prefix_len,
    chosen_at,
    interval,
    phase,
    min_prefix_len,
    max_age,
):
    """`Refresh` of one request, or of a vector of requests."""
    shift = phase + req_state_idx.to(tl.int32)
    turn = (prefix_len + shift) // interval != (verified_len + shift) // interval
    due = turn | (verified_len == 0) | (prefix_len - chosen_at > max_age)
    return (req_state_idx >= 0) & (prefix_len >= min_prefix_len) & due


# Strides that change with the batch and what differs between layers must not trigger recompilation.
@triton.jit(do_not_specialize=["lse_head_stride", "num_reqs", "interval", "phase", "min_prefix_len", "max_age"])
def _block_scores_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    query_token_stride,
    query_head_stride,
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE]
    kv_block_stride,
    kv_head_stride,
    kv_offset_stride,
    block_table_ptr,  # [num_reqs, max_num_blocks]
    block_table_stride,
    prefix_lens_ptr,  # [num_reqs]
    query_start_loc_ptr,  # [num_reqs + 1]
    lse_ptr,  # [num_heads, num_tokens]
    lse_head_stride,
    scores_ptr,  # [num_reqs, max_num_units]
    scores_stride,
    idx_mapping_ptr,  # [num_reqs]
    verified_len_ptr,  # [max_num_reqs]
    chosen_at_ptr,  # [max_num_reqs]
    interval,
    phase,
    min_prefix_len,
    max_age,
    num_reqs,
    num_kv_heads,
    scale,
    query_scale_ptr,  # [num_kv_heads]
    query_scale_stride,
    key_scale_ptr,
    key_scale_stride,
    value_scale_ptr,
    value_scale_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT_SIZE: tl.constexpr,
    PADDED_UNIT_SIZE: tl.constexpr,
    UNITS: tl.constexpr,  # of a tile
    DOT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    REQS: tl.constexpr,
):
    # The tiles of all requests that are due are dealt out to the programs, of which there are as many in any batch.
    lane = tl.arange(0, REQS)
    is_lane = lane < num_reqs
    lane_idx = tl.load(idx_mapping_ptr + lane, mask=is_lane, other=-1)
    lane_prefix_len = tl.load(prefix_lens_ptr + lane, mask=is_lane, other=0)
    verified_len = tl.load(verified_len_ptr + lane_idx, mask=lane_idx >= 0, other=0)
    chosen_at = tl.load(chosen_at_ptr + lane_idx, mask=lane_idx >= 0, other=0)
    due = is_due(lane_idx, verified_len, lane_prefix_len, chosen_at, interval, phase, min_prefix_len, max_age)
    num_tiles = tl.where(due, tl.cdiv(lane_prefix_len, UNITS * UNIT_SIZE), 0)
    ends = tl.cumsum(num_tiles, axis=0)
    for work in range(tl.program_id(0), tl.sum(num_tiles), tl.num_programs(0)):
        is_before = ends <= work
        request = tl.sum(is_before.to(tl.int32))
        tile = work - tl.max(tl.where(is_before, ends, 0))
        prefix_len = tl.load(prefix_lens_ptr + request)
        query_start = tl.load(query_start_loc_ptr + request)
        query_len = tl.load(query_start_loc_ptr + request + 1) - query_start

        # A unit's keys are padded to a power of two, so that a tile's can be summed by unit.
        key_index = tl.arange(0, UNITS * PADDED_UNIT_SIZE)
        in_unit = key_index % PADDED_UNIT_SIZE
        position = (tile * UNITS + key_index // PADDED_UNIT_SIZE) * UNIT_SIZE + in_unit
        is_key = (in_unit < UNIT_SIZE) & (position < prefix_len)
        block_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride + position // BLOCK_SIZE
        block = tl.load(block_ptr, mask=is_key, other=0)

        key_start = block.to(tl.int64) * kv_block_stride + (position % BLOCK_SIZE).to(tl.int64) * kv_offset_stride
        dim = tl.arange(0, PADDED_HEAD_SIZE)
        is_dim = dim < HEAD_SIZE
        key_mask = is_key[:, None] & is_dim[None, :]
        mass = tl.zeros([UNITS * PADDED_UNIT_SIZE], tl.float32)
        for kv_head in range(0, num_kv_heads):
            # A loop's index is no tensor in the interpreter. A cache can hold more than 2**31 elements.
            head_start = tl.cast(kv_head, tl.int64) * kv_head_stride
            key = tl.load(kv_cache_ptr + head_start + key_start[:, None] + dim[None, :], mask=key_mask, other=0.0)
            key = key.to(DOT_DTYPE)
            head_scale, _ = load_scales(
                scale,
                query_scale_ptr,
                query_scale_stride,
                key_scale_ptr,
                key_scale_stride,
                value_scale_ptr,
                value_scale_stride,
                kv_head,
            )
            for row_tile in tl.static_range(ROW_TILES):
                query_token, head = packed_rows(row_tile, kv_head, GROUP, ROWS)
                is_row = query_token < query_len
                token = (query_start + query_token).to(tl.int64)
                query_row = token * query_token_stride + head * query_head_stride
                query_ptrs = query_ptr + query_row[:, None] + dim[None, :]
                query = tl.load(query_ptrs, mask=is_row[:, None] & is_dim[None, :], other=0.0)
                # Rows that are not there weigh nothing.
                lse = tl.load(lse_ptr + head.to(tl.int64) * lse_head_stride + token, mask=is_row, other=float("inf"))
                score = tl.dot(query.to(DOT_DTYPE), tl.trans(key), input_precision="ieee") * head_scale
                mass += tl.sum(tl.exp(score - lse[:, None]), axis=0)

        mass = tl.where(is_key, mass, 0.0)
        unit = tile * UNITS + tl.arange(0, UNITS)
        tl.store(
            scores_ptr + request.to(tl.int64) * scores_stride + unit,
            tl.sum(tl.reshape(mass, [UNITS, PADDED_UNIT_SIZE]), axis=1),
            mask=unit * UNIT_SIZE < prefix_len,
        )


def num_programs(device: torch.device) -> int:
    """As many as run at the same time; the interpreter runs them one after the other."""
    return 1 if interpreting() else PROGRAMS_PER_COMPUTE_UNIT * num_compute_units(device.index or 0)


def block_scores(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size], K then V
    block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks]
    prefix_lens: torch.Tensor,  # int32 [num_reqs] cached tokens that every query of the request attended
    query_start_loc: torch.Tensor,  # int32 [num_reqs + 1]
    max_query_len: int,  # upper bound
    scale: float,  # factor of query · key
    lse: torch.Tensor,  # float32 [num_heads, num_tokens] natural, of the attention to the prefix
    refresh: Refresh,
    unit_size: int,  # tokens of a unit, a multiple of block_size
    scores: torch.Tensor,  # float32 [num_reqs, max_num_units], written
    scales: CacheScales | None = None,  # of a quantised cache, and of the query if it is quantised too
) -> None:
    """Writes the attention that each unit of the prefix got, of the requests whose scores are due.

    A unit's score is summed over all query heads and all rows of its request; the last unit may be partial. Units
    behind the prefix, and rows of requests that are not due, are not written.

    dtypes and strides are as in `vllm_longspec.attention.prefix.prefix_attention`. The grid depends on the device
    alone: it suits every batch that a CUDA graph will run, and a program without work ends after reading the lengths.
    """
    kv_cache = as_stored(kv_cache)
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_reqs = query_start_loc.shape[0] - 1
    # fp8 values are exact in bfloat16.
    dtype = query.dtype if query.dtype.itemsize > 1 else torch.bfloat16
    padded_head_size = triton.next_power_of_2(head_size)
    tiles = choose_tile_sizes(max_query_len * group, block_table.shape[1] * block_size, padded_head_size, dtype)
    keys = tiles.keys if interpreting() or dtype == torch.float32 else KEYS
    padded_unit_size = triton.next_power_of_2(unit_size)
    _block_scores_kernel[(num_programs(query.device),)](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        block_table,
        block_table.stride(0),
        prefix_lens,
        query_start_loc,
        lse,
        lse.stride(0),
        scores,
        scores.stride(0),
        refresh.idx_mapping,
        refresh.verified_len,
        refresh.chosen_at,
        refresh.interval,
        refresh.phase,
        refresh.min_prefix_len,
        refresh.max_age,
        num_reqs,
        num_kv_heads,
        scale,
        *scale_arguments(scales, num_kv_heads),
        GROUP=group,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        BLOCK_SIZE=block_size,
        UNIT_SIZE=unit_size,
        PADDED_UNIT_SIZE=padded_unit_size,
        UNITS=max(1, keys // padded_unit_size),
        DOT_DTYPE=dot_dtype(dtype),
        ROWS=tiles.rows,
        ROW_TILES=triton.next_power_of_2(triton.cdiv(max_query_len * group, tiles.rows)),
        REQS=triton.next_power_of_2(max(num_reqs, MIN_LANES)),
        num_warps=tiles.num_warps,
    )
