# SPDX-License-Identifier: Apache-2.0
"""Unmasked attention of the rows of a tree to their request's prefix, in Triton.

Used where FlashAttention is not available: float32, other devices, and Triton's interpreter. The result comes with its
log-sum-exp, for `vllm_longspec/attention/tree.py` to merge; that module shares the functions of a tile below.

The rows of a tile are (query token, query head) pairs of one KV head's group, so that a tile reads each K and V once
for the group, as in FlashAttention ("packed GQA"). The softmax takes one pass over the keys with a running maximum and
sum in float32 (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
2022).
"""

from typing import NamedTuple

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.attention.cache_scales import CacheScales, as_stored
from vllm_longspec.interpreter import interpreting

# The smallest side of a tl.dot operand.
MIN_TILE = 16
# In the interpreter an operation on a tile is one NumPy call, so few large tiles are fastest.
INTERPRETER_ROWS = 2048
INTERPRETER_KEYS = 512


class TileSizes(NamedTuple):
    """Size of a tile of scores, and its number of warps."""

    rows: int  # (query token, head of the group) pairs
    keys: int
    num_warps: int


def choose_tile_sizes(num_rows: int, num_keys: int, padded_head_size: int, dtype: torch.dtype) -> TileSizes:
    """Tile sizes for `num_rows` packed rows against at most `num_keys` keys.

    On a GPU the limits are registers, for a tile's float32 result, and shared memory, for its K and V.
    `padded_head_size` is the head size rounded up to a power of two.
    """
    if interpreting():
        max_rows, max_keys, num_warps = INTERPRETER_ROWS, INTERPRETER_KEYS, 4
    elif dtype == torch.float32:
        # IEEE float32 products use no tensor cores and keep operands in registers; larger tiles or fewer warps spill.
        max_rows, max_keys, num_warps = 16, 32, 8
    else:
        max_rows = max_keys = 64 if padded_head_size <= 128 else 32
        num_warps = 4

    def fit(size: int, limit: int) -> int:
        return max(MIN_TILE, min(triton.next_power_of_2(size), limit))

    return TileSizes(fit(num_rows, max_rows), fit(num_keys, max_keys), num_warps)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of tl.dot; products are summed in float32.

    The interpreter multiplies the bit patterns of bfloat16 operands as integers, so it gets float32.
    """
    if interpreting():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def scale_arguments(scales: CacheScales | None, num_kv_heads: int) -> tuple[torch.Tensor | int | None, ...]:
    """The arguments of `load_scales` between `scale` and `kv_head`."""
    arguments: tuple[torch.Tensor | int | None, ...] = ()
    for scale in (scales.query, scales.key, scales.value) if scales is not None else (None, None, None):
        arguments += (None, 0) if scale is None else (scale, scale.expand(num_kv_heads).stride(0))
    return arguments


@triton.jit
def packed_rows(tile, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Query token (within its request) and query head of each row of a tile."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row // GROUP, kv_head * GROUP + row % GROUP


@triton.jit
def load_keys_values(
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * HEAD_SIZE]
    block_stride,
    head_stride,
    offset_stride,
    kv_head,
    block,  # [KEYS]
    offset,  # [KEYS] position in the block
    is_key,  # [KEYS] the others are not read
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """K and V of one tile, [KEYS, PADDED_HEAD_SIZE] each, zero where masked."""
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    # A cache can hold more than 2**31 elements.
    start = block.to(tl.int64) * block_stride + kv_head.to(tl.int64) * head_stride + offset.to(tl.int64) * offset_stride
    ptr = kv_cache_ptr + start[:, None] + dim[None, :]
    mask = is_key[:, None] & (dim < HEAD_SIZE)[None, :]
    key = tl.load(ptr, mask=mask, other=0.0)
    value = tl.load(ptr + HEAD_SIZE, mask=mask, other=0.0)
    return key.to(DOT_DTYPE), value.to(DOT_DTYPE)


@triton.jit
def load_scales(
    scale,  # factor of the scores
    query_scale_ptr,  # [] or [num_kv_heads]; None where the query is not quantised
    query_scale_stride,  # 0 where one scale serves all heads
    key_scale_ptr,  # likewise, None where the cache is not quantised
    key_scale_stride,
    value_scale_ptr,
    value_scale_stride,
    kv_head,
):
    """Factors of a KV head's scores and of its values.

    Scaling products instead of operands is cheaper, and exact: every operand dtype can represent fp8 values.
    """
    value_scale = 1.0
    if query_scale_ptr is not None:
        scale *= tl.load(query_scale_ptr + kv_head * query_scale_stride)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head * key_scale_stride)
        value_scale = tl.load(value_scale_ptr + kv_head * value_scale_stride)
    return scale, value_scale


@triton.jit
def attend_tile(
    query,  # [ROWS, PADDED_HEAD_SIZE]
    key,  # [KEYS, PADDED_HEAD_SIZE]
    value,  # [KEYS, PADDED_HEAD_SIZE]
    scale,
    attends,  # [ROWS, KEYS] or [1, KEYS]
    score_max,  # float32 [ROWS] greatest score so far; -inf for none
    weight_sum,  # float32 [ROWS] sum of exp(score - score_max)
    weighted_sum,  # float32 [ROWS, PADDED_HEAD_SIZE] sum of exp(score - score_max) * value
):
    """Adds a tile of keys to the running softmax of every row; returns its new state."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(attends, score, float("-inf"))
    new_max = tl.maximum(score_max, tl.max(score, axis=1))
    # Avoids inf - inf in a row that has had no key yet.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp(score - reference[:, None])
    rescale = tl.exp(score_max - reference)
    weight_sum = weight_sum * rescale + tl.sum(weight, axis=1)
    weighted_sum = weighted_sum * rescale[:, None]
    weighted_sum = tl.dot(weight.to(value.dtype), value, acc=weighted_sum, input_precision="ieee")
    return new_max, weight_sum, weighted_sum


# The stride of `lse` is the number of tokens, which changes with the batch and must not trigger recompilation.
@triton.jit(do_not_specialize=["lse_head_stride"])
def _prefix_attention_kernel(
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
    output_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    output_token_stride,
    output_head_stride,
    lse_ptr,  # [num_heads, num_tokens]
    lse_head_stride,
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
    DOT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    if tile * ROWS >= query_len * GROUP:
        return
    prefix_len = tl.load(prefix_lens_ptr + request)
    scale, value_scale = load_scales(
        scale,
        query_scale_ptr,
        query_scale_stride,
        key_scale_ptr,
        key_scale_stride,
        value_scale_ptr,
        value_scale_stride,
        kv_head,
    )

    query_token, head = packed_rows(tile, kv_head, GROUP, ROWS)
    is_row = query_token < query_len
    token = (query_start + query_token).to(tl.int64)
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    row_mask = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    query_row = token * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_row[:, None] + dim[None, :], mask=row_mask, other=0.0).to(DOT_DTYPE)

    score_max = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    weighted_sum = tl.zeros([ROWS, PADDED_HEAD_SIZE], tl.float32)
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    for start in range(0, prefix_len, KEYS):
        position = start + tl.arange(0, KEYS)
        is_key = position < prefix_len
        block = tl.load(block_table_row_ptr + position // BLOCK_SIZE, mask=is_key, other=0)
        key, value = load_keys_values(
            kv_cache_ptr,
            kv_block_stride,
            kv_head_stride,
            kv_offset_stride,
            kv_head,
            block,
            position % BLOCK_SIZE,
            is_key,
            HEAD_SIZE,
            PADDED_HEAD_SIZE,
            DOT_DTYPE,
        )
        score_max, weight_sum, weighted_sum = attend_tile(
            query, key, value, scale, is_key[None, :], score_max, weight_sum, weighted_sum
        )

    # The sum is at least 1 unless the prefix is empty; then the result is 0 and its log-sum-exp is -inf.
    divisor = tl.where(prefix_len > 0, weight_sum, 1.0)
    output_row = token * output_token_stride + head * output_head_stride
    result = (weighted_sum * value_scale / divisor[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + output_row[:, None] + dim[None, :], result, mask=row_mask)
    tl.store(lse_ptr + head.to(tl.int64) * lse_head_stride + token, score_max + tl.log(divisor), mask=is_row)


def prefix_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size], K then V
    block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks]
    prefix_lens: torch.Tensor,  # int32 [num_reqs] cached tokens that every query of the request attends
    query_start_loc: torch.Tensor,  # int32 [num_reqs + 1]
    max_query_len: int,  # upper bound
    scale: float,  # factor of the scores
    output: torch.Tensor,  # [num_tokens, num_heads, head_size], written; 0 where the prefix is empty
    lse: torch.Tensor,  # float32 [num_heads, num_tokens], written; -inf where the prefix is empty
    scales: CacheScales | None = None,  # of a quantised cache, and of the query if it is quantised too
) -> None:
    """Lets every query token attend all of its request's prefix, and writes the result and its log-sum-exp.

    Query head h reads KV head h // (num_heads / num_kv_heads). `query` and `kv_cache` are float16, bfloat16 or float32,
    or fp8 with `scales`, `output` is one of the first three; their last dimensions, and those of `block_table` and
    `lse`, are contiguous. Other strides are free.

    A request may have no tokens. Tokens from `query_start_loc[-1]` on, of requests without a tree, are neither read nor
    written. The log-sum-exp is natural. No bound on the prefix lengths has to be known on the host.
    """
    kv_cache = as_stored(kv_cache)
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    padded_head_size = triton.next_power_of_2(head_size)
    tiles = choose_tile_sizes(max_query_len * group, block_table.shape[1] * block_size, padded_head_size, output.dtype)
    grid = (triton.cdiv(max_query_len * group, tiles.rows), num_kv_heads, query_start_loc.shape[0] - 1)
    _prefix_attention_kernel[grid](
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
        output,
        output.stride(0),
        output.stride(1),
        lse,
        lse.stride(0),
        scale,
        *scale_arguments(scales, num_kv_heads),
        GROUP=group,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        BLOCK_SIZE=block_size,
        DOT_DTYPE=dot_dtype(output.dtype),
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        num_warps=tiles.num_warps,
    )
