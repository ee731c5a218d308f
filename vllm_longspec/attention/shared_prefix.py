# SPDX-License-Identifier: Apache-2.0
"""Prefix attention whose tiles share what they read: for trees of more rows than one tile holds.

FlashAttention lets a tile of 128 rows read the prefix, and every further tile reads it again. The rows of a KV head's
group are soon more than that: 69 rows of a tree with 5 query heads each are 345. Here the grid is ordered so that all
tiles that need the same keys run at the same time; one of them fetches a key from memory, the others find it in the
cache. The prefix is split among programs ("flash-decoding": Dao et al., 2023), as many as fill the device. Each leaves
a part of the result, and whoever needs the whole merges the parts by their log-sum-exps.

So a layer costs two launches: this, and the tree attention, which starts its softmax from the parts
(`vllm_longspec/step/verify.py`). `shared_prefix_attention` merges them itself and stands in for `prefix_attention`.

How many parts there can be follows from the batch size and from the longest prefix that the block table can hold, so
shapes are fixed when a CUDA graph is captured. How many are used follows from each request's own prefix, on the device.
"""

from typing import NamedTuple

import torch
from vllm.platforms import current_platform
from vllm.triton_utils import LOG2E, LOGE2, tl, triton

from vllm_longspec.attention.prefix import choose_tile_sizes, dot_dtype, packed_rows
from vllm_longspec.interpreter import interpreting

LN_2 = tl.constexpr(LOGE2)
# A part of fewer keys costs more to write and to merge than it saves.
MIN_KEYS_PER_PART = tl.constexpr(256)
# No tile has more keys than a part.
MAX_TILE_KEYS = 256
MAX_PARTS = 64
# Parts that one step of a merge reads: enough for their loads to overlap, few enough for the registers.
MERGE_BLOCK = tl.constexpr(4)


class PrefixParts(NamedTuple):
    """What a batch's rows got from each part of their prefix."""

    outputs: torch.Tensor  # [num_parts, num_tokens, num_heads, head_size]
    lse: torch.Tensor  # float32 [num_parts, num_heads, num_tokens] natural logarithms
    # int32 [num_reqs]; says how many parts of a request are used. The others are undefined.
    prefix_lens: torch.Tensor


class PrefixTiles(NamedTuple):
    """The shape of a tile of scores and how a GPU runs it."""

    rows: int  # (query token, head of the group) pairs
    keys: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


def choose_tiles(num_rows: int, padded_head_size: int, dtype: torch.dtype) -> PrefixTiles:
    """Tiles for `num_rows` packed rows.

    On a GPU one warpgroup holds the result of 128 rows in its registers, and two programs share a multiprocessor: while
    one is at its softmax, the other has the tensor cores.
    """
    if interpreting() or dtype == torch.float32:
        tiles = choose_tile_sizes(num_rows, MAX_TILE_KEYS, padded_head_size, dtype)
        return PrefixTiles(tiles.rows, tiles.keys, tiles.num_warps, 2, 2)
    if padded_head_size > 128:
        return PrefixTiles(64, 32, 4, 3, 2)
    return PrefixTiles(64 if num_rows <= 64 else 128, 64, 4, 3, 2)


def choose_num_parts(num_programs: int, num_slots: int, max_tiles: int) -> int:
    """Parts of the prefix for `num_programs` programs a part, on a device that runs `num_slots` of them at a time.

    The time is that of the waves of programs, each as long as its tiles, and as long again as 6 tiles for writing and
    merging a part (64 KiB each way, where a tile reads 32 KiB that others read too).
    """

    def cost(num_parts: int) -> float:
        waves = -(-num_programs * num_parts // num_slots)
        return waves * (max_tiles / num_parts + 6)

    return min(range(1, max(1, min(MAX_PARTS, max_tiles)) + 1), key=cost)


@triton.jit
def num_used_parts(prefix_len, num_parts):
    """How many parts the prefix of a request is cut into; none if it is empty."""
    # As many keys in each as this make at least one full tile, so that no part but an only one is without.
    return tl.minimum(tl.maximum(prefix_len // MIN_KEYS_PER_PART, 1), tl.where(prefix_len > 0, num_parts, 0))


@triton.jit
def _attend_tile(
    query,  # [ROWS, PADDED_HEAD_SIZE]
    key,  # [KEYS, PADDED_HEAD_SIZE]
    value,  # [KEYS, PADDED_HEAD_SIZE]
    log2_scale,
    score_max,  # float32 [ROWS] greatest score so far, not scaled; -inf for none
    weight_sum,  # float32 [ROWS]
    weighted_sum,  # float32 [ROWS, PADDED_HEAD_SIZE]
    num_keys,
    IS_FULL: tl.constexpr,
):
    """Adds one tile of keys to the running softmax, which is taken in powers of two."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if not IS_FULL:
        score = tl.where(tl.arange(0, score.shape[1])[None, :] < num_keys, score, float("-inf"))
    new_max = tl.maximum(score_max, tl.max(score, axis=1))
    exponent_max = new_max * log2_scale
    weight = tl.exp2(score * log2_scale - exponent_max[:, None])
    rescale = tl.exp2(score_max * log2_scale - exponent_max)
    weight_sum = weight_sum * rescale + tl.sum(weight, axis=1)
    weighted_sum = weighted_sum * rescale[:, None]
    weighted_sum = tl.dot(weight.to(value.dtype), value, acc=weighted_sum, input_precision="ieee")
    return new_max, weight_sum, weighted_sum


# The number of tokens changes with the batch; the strides that follow from it must not compile the kernel anew.
@triton.jit(do_not_specialize=["lse_part_stride", "lse_head_stride", "num_parts"])
def _shared_prefix_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    query_token_stride,
    query_head_stride,
    kv_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE]
    kv_block_stride,
    kv_head_stride,
    kv_offset_stride,
    kv_cache_descriptor,  # of the same; None where a tile's keys are not in one block
    block_table_ptr,  # [num_reqs, max_num_blocks]
    block_table_stride,
    prefix_lens_ptr,  # [num_reqs]
    query_start_loc_ptr,  # [num_reqs + 1]
    outputs_ptr,  # [num_parts, num_tokens, num_heads, HEAD_SIZE]
    part_stride,
    output_token_stride,
    output_head_stride,
    lse_ptr,  # [num_parts, num_heads, num_tokens]
    lse_part_stride,
    lse_head_stride,
    num_parts,
    log2_scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Programs start in the order of their numbers, tiles first: those that read the same keys run side by side.
    tile = tl.program_id(0)
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    part = tl.program_id(1) // NUM_KV_HEADS
    request = tl.program_id(2)
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    # A program without rows goes on with an empty prefix: an early return would cost the others registers.
    prefix_len = tl.where(tile * ROWS < query_len * GROUP, tl.load(prefix_lens_ptr + request), 0)

    query_token, head = packed_rows(tile, kv_head, GROUP, ROWS)
    is_row = query_token < query_len
    token = (query_start + query_token).to(tl.int64)
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    is_dim = dim < HEAD_SIZE
    row_mask = is_row[:, None] & is_dim[None, :]
    query_row = token * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_row[:, None] + dim[None, :], mask=row_mask, other=0.0).to(DOT_DTYPE)

    # Full tiles are dealt out evenly; the keys that are left over belong to the last part. Parts that are not used get
    # nothing.
    used_parts = num_used_parts(prefix_len, num_parts)
    num_tiles = prefix_len // KEYS
    divisor = tl.maximum(used_parts, 1)
    first_tile = tl.minimum(part, used_parts) * num_tiles // divisor
    end_tile = tl.minimum(part + 1, used_parts) * num_tiles // divisor
    num_left = tl.where(part == used_parts - 1, prefix_len % KEYS, 0)

    score_max = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    weighted_sum = tl.zeros([ROWS, PADDED_HEAD_SIZE], tl.float32)
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    # A cache can hold more than 2**31 elements.
    kv_head_ptr = kv_cache_ptr + kv_head.to(tl.int64) * kv_head_stride
    for index in range(first_tile, end_tile):
        if kv_cache_descriptor is not None:
            block = tl.load(block_table_row_ptr + index // (BLOCK_SIZE // KEYS))
            offset = index % (BLOCK_SIZE // KEYS) * KEYS
            key = kv_cache_descriptor.load([block, kv_head, offset, 0]).reshape(KEYS, HEAD_SIZE)
            value = kv_cache_descriptor.load([block, kv_head, offset, HEAD_SIZE]).reshape(KEYS, HEAD_SIZE)
        else:
            position = index * KEYS + tl.arange(0, KEYS)
            block = tl.load(block_table_row_ptr + position // BLOCK_SIZE).to(tl.int64)
            row = block * kv_block_stride + (position % BLOCK_SIZE).to(tl.int64) * kv_offset_stride
            key_ptr = kv_head_ptr + row[:, None] + dim[None, :]
            if HEAD_SIZE == PADDED_HEAD_SIZE:
                key = tl.load(key_ptr)
                value = tl.load(key_ptr + HEAD_SIZE)
            else:
                key = tl.load(key_ptr, mask=is_dim[None, :], other=0.0)
                value = tl.load(key_ptr + HEAD_SIZE, mask=is_dim[None, :], other=0.0)
        score_max, weight_sum, weighted_sum = _attend_tile(
            query,
            key.to(DOT_DTYPE),
            value.to(DOT_DTYPE),
            log2_scale,
            score_max,
            weight_sum,
            weighted_sum,
            KEYS,
            IS_FULL=True,
        )
    if num_left > 0:
        place = tl.arange(0, KEYS)
        is_key = place < num_left
        position = num_tiles * KEYS + place
        block = tl.load(block_table_row_ptr + position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        row = block * kv_block_stride + (position % BLOCK_SIZE).to(tl.int64) * kv_offset_stride
        key_ptr = kv_head_ptr + row[:, None] + dim[None, :]
        # What is behind the prefix may be anything, and as a value NaN would survive a weight of zero.
        mask = is_key[:, None] & is_dim[None, :]
        key = tl.load(key_ptr, mask=mask, other=0.0)
        value = tl.load(key_ptr + HEAD_SIZE, mask=mask, other=0.0)
        score_max, weight_sum, weighted_sum = _attend_tile(
            query,
            key.to(DOT_DTYPE),
            value.to(DOT_DTYPE),
            log2_scale,
            score_max,
            weight_sum,
            weighted_sum,
            num_left,
            IS_FULL=False,
        )

    if part < used_parts:
        lse_row = part.to(tl.int64) * lse_part_stride + head.to(tl.int64) * lse_head_stride + token
        tl.store(lse_ptr + lse_row, score_max * (log2_scale * LN_2) + tl.log(weight_sum), mask=is_row)
        output_row = part.to(tl.int64) * part_stride + token * output_token_stride + head * output_head_stride
        result = (weighted_sum / weight_sum[:, None]).to(outputs_ptr.dtype.element_ty)
        tl.store(outputs_ptr + output_row[:, None] + dim[None, :], result, mask=row_mask)


@triton.jit
def merge_parts(
    outputs_ptr,  # [num_parts, num_tokens, num_heads, HEAD_SIZE]
    part_stride,
    output_row,  # [ROWS] elements from a part's start to the row
    lse_ptr,  # [num_parts, num_heads, num_tokens]
    lse_part_stride,
    lse_row,  # [ROWS] elements from a part's start to the row
    used_parts,
    is_row,  # [ROWS]
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
):
    """A running softmax that has seen all parts: greatest exponent, sum of weights, weighted sum of results."""
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    score_max = tl.full([output_row.shape[0]], float("-inf"), tl.float32)
    weight_sum = tl.zeros([output_row.shape[0]], tl.float32)
    weighted_sum = tl.zeros([output_row.shape[0], PADDED_HEAD_SIZE], tl.float32)
    for start in range(0, used_parts, MERGE_BLOCK):
        for index in tl.static_range(MERGE_BLOCK):
            part = start + index + tl.zeros_like(lse_row)
            exists = is_row & (part < used_parts)
            lse = tl.load(lse_ptr + part * lse_part_stride + lse_row, mask=exists, other=float("-inf"))
            output = tl.load(
                outputs_ptr + (part * part_stride + output_row)[:, None] + dim[None, :],
                mask=exists[:, None] & (dim < HEAD_SIZE)[None, :],
                other=0.0,
            ).to(tl.float32)
            new_max = tl.maximum(score_max, lse)
            # Without this, a row that has met no part yet would subtract infinity from infinity.
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp(lse - reference)
            rescale = tl.exp(score_max - reference)
            weight_sum = weight_sum * rescale + weight
            weighted_sum = weighted_sum * rescale[:, None] + output * weight[:, None]
            score_max = new_max
    return score_max, weight_sum, weighted_sum


@triton.jit(do_not_specialize=["lse_part_stride", "lse_head_stride", "merged_lse_stride", "num_parts"])
def _merge_parts_kernel(
    outputs_ptr,  # [num_parts, num_tokens, num_heads, HEAD_SIZE]
    part_stride,
    token_stride,
    head_stride,
    lse_ptr,  # [num_parts, num_heads, num_tokens]
    lse_part_stride,
    lse_head_stride,
    prefix_lens_ptr,  # [num_reqs]
    query_start_loc_ptr,  # [num_reqs + 1]
    merged_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    merged_token_stride,
    merged_head_stride,
    merged_lse_ptr,  # [num_heads, num_tokens]
    merged_lse_stride,
    num_parts,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    request = tl.program_id(1)
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    query_token, head = packed_rows(tl.program_id(0), 0, NUM_HEADS, ROWS)
    token = (query_start + query_token).to(tl.int64)
    is_row = query_token < query_len
    score_max, weight_sum, weighted_sum = merge_parts(
        outputs_ptr,
        part_stride,
        token * token_stride + head * head_stride,
        lse_ptr,
        lse_part_stride,
        head.to(tl.int64) * lse_head_stride + token,
        num_used_parts(tl.load(prefix_lens_ptr + request), num_parts),
        is_row,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
    )
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    # The sum is 0 for an empty prefix; then the result is 0 and its log-sum-exp is -inf.
    divisor = tl.where(weight_sum > 0.0, weight_sum, 1.0)
    merged_row = token * merged_token_stride + head * merged_head_stride
    tl.store(
        merged_ptr + merged_row[:, None] + dim[None, :],
        (weighted_sum / divisor[:, None]).to(merged_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < HEAD_SIZE)[None, :],
    )
    tl.store(merged_lse_ptr + head.to(tl.int64) * merged_lse_stride + token, score_max + tl.log(divisor), mask=is_row)


def shared_prefix_parts(
    # [num_tokens, num_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    kv_cache: torch.Tensor,
    # [num_reqs, max_num_blocks] int32
    block_table: torch.Tensor,
    # [num_reqs] int32, cached tokens that every query of the request attends
    prefix_lens: torch.Tensor,
    # [num_reqs + 1] int32
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    num_parts: int | None = None,
    part_dtype: torch.dtype = torch.float32,
    tiles: PrefixTiles | None = None,
) -> PrefixParts:
    """Lets every query token attend all of its request's prefix, in parts; arguments as in `prefix_attention`.

    `scale` is positive. Requests that hold no tree can follow: of tokens from `query_start_loc[-1]` on nothing is read,
    and the parts hold nothing that could be used.

    Args:
        num_parts: bound on the parts of a prefix; None chooses by the batch size and the width of the block table.
        part_dtype: of the parts' results.
        tiles: None chooses.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_reqs = query_start_loc.shape[0] - 1
    group = num_heads // num_kv_heads
    padded_head_size = triton.next_power_of_2(head_size)
    if tiles is None:
        tiles = choose_tiles(max_query_len * group, padded_head_size, query.dtype)
    num_row_tiles = triton.cdiv(max_query_len * group, tiles.rows)
    if num_parts is None:
        num_slots = tiles.programs_per_multiprocessor * num_multiprocessors(query.device)
        max_tiles = block_table.shape[1] * block_size // tiles.keys
        num_parts = choose_num_parts(num_row_tiles * num_kv_heads * num_reqs, num_slots, max_tiles)
    outputs = torch.empty(num_parts, num_tokens, num_heads, head_size, dtype=part_dtype, device=query.device)
    lse = torch.empty(num_parts, num_heads, num_tokens, dtype=torch.float32, device=query.device)
    # The device's copy engine moves whole tiles: it wants them in one block, and knows no padding of the head size.
    descriptor = None
    if block_size % tiles.keys == 0 and head_size == padded_head_size:
        from triton.tools.tensor_descriptor import TensorDescriptor

        descriptor = TensorDescriptor.from_tensor(kv_cache, [1, 1, tiles.keys, head_size])
    _shared_prefix_kernel[(num_row_tiles, num_kv_heads * num_parts, num_reqs)](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        descriptor,
        block_table,
        block_table.stride(0),
        prefix_lens,
        query_start_loc,
        outputs,
        *outputs.stride()[:3],
        lse,
        *lse.stride()[:2],
        num_parts,
        scale * LOG2E,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        BLOCK_SIZE=block_size,
        DOT_DTYPE=dot_dtype(query.dtype),
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return PrefixParts(outputs, lse, prefix_lens)


def shared_prefix_attention(
    # [num_tokens, num_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    kv_cache: torch.Tensor,
    # [num_reqs, max_num_blocks] int32
    block_table: torch.Tensor,
    # [num_reqs] int32, cached tokens that every query of the request attends
    prefix_lens: torch.Tensor,
    # [num_reqs + 1] int32
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    # [num_tokens, num_heads, head_size]
    output: torch.Tensor,
    # [num_heads, num_tokens] float32
    lse: torch.Tensor,
) -> None:
    """The same as `prefix_attention` in `vllm_longspec/attention/prefix.py`."""
    parts = shared_prefix_parts(query, kv_cache, block_table, prefix_lens, query_start_loc, max_query_len, scale)
    merge_prefix_parts(parts, query_start_loc, max_query_len, output, lse)


def merge_prefix_parts(
    parts: PrefixParts,
    # [num_reqs + 1] int32
    query_start_loc: torch.Tensor,
    max_query_len: int,
    # [num_tokens, num_heads, head_size]
    output: torch.Tensor,
    # [num_heads, num_tokens] float32
    lse: torch.Tensor,
) -> None:
    """Writes the prefix attention that the parts amount to: 0 and -inf where the prefix is empty."""
    num_heads, head_size = output.shape[1:]
    num_rows = max_query_len * num_heads
    rows = triton.next_power_of_2(num_rows) if interpreting() else 16
    _merge_parts_kernel[(triton.cdiv(num_rows, rows), parts.prefix_lens.shape[0])](
        parts.outputs,
        *parts.outputs.stride()[:3],
        parts.lse,
        *parts.lse.stride()[:2],
        parts.prefix_lens,
        query_start_loc,
        output,
        output.stride(0),
        output.stride(1),
        lse,
        lse.stride(0),
        parts.outputs.shape[0],
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=triton.next_power_of_2(head_size),
        ROWS=rows,
        num_warps=4,
    )


def num_multiprocessors(device: torch.device) -> int:
    """Of the device; 1 without a GPU, where one program runs after the other."""
    return current_platform.num_compute_units(device.index or 0) if device.type == "cuda" else 1
