# SPDX-License-Identifier: Apache-2.0
"""Stage "verify": each row of a tree attends its ancestors, and the result is merged with the prefix attention's.

The prefix, with nearly all of the keys, needs no mask and has a kernel of its own: FlashAttention, or
`vllm_longspec/attention/prefix.py`. What is left is a masked square of at most 256 rows, below.

**Mask.** Row i of request r attends row k if bit k % 32 of word k // 32 of `ancestor_masks[r, i]` is set: i itself and
its ancestors. The bits of rows beyond the request's query are ignored, because a list of nodes may be cut anywhere.

**K and V are read from the cache,** not from the layer's own K and V tensors, because later steps and plain decoding
read them there; with a cache of lower precision than the layer the two differ, and then so would the tokens.

**Merge.** The running softmax of the tree starts as if the prefix were one key with score `lse_prefix` and value
`output`. That equals the mean of both attentions weighted by their sums of exponentiated scores (Dao et al.,
"Flash-Decoding for long-context inference", 2023), without a second normalisation or special cases for an empty part.
"""

import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

from vllm_longspec.attention.cache_scales import CacheScales, as_stored
from vllm_longspec.attention.prefix import (
    TileSizes,
    attend_tile,
    choose_tile_sizes,
    dot_dtype,
    load_keys_values,
    load_scales,
    packed_rows,
    scale_arguments,
)
from vllm_longspec.interpreter import interpreting


def num_multiprocessors(device: torch.device) -> int:
    """Of the device; 1 without a GPU, where programs run one after the other."""
    return current_platform.num_compute_units(device.index or 0) if device.type == "cuda" else 1


def choose_tree_tiles(
    max_query_len: int, group: int, num_groups: int, padded_head_size: int, dtype: torch.dtype, device: torch.device
) -> TileSizes:
    """Tile sizes for `num_groups` squares (one for each KV head of each request) of `max_query_len` query tokens.

    A square is small and bound by latency: few rows per program, enough programs for all multiprocessors, and all keys
    of an ordinary tree at once.
    """
    num_rows = max_query_len * group
    if interpreting() or dtype == torch.float32 or padded_head_size > 128:
        return choose_tile_sizes(num_rows, max_query_len, padded_head_size, dtype)
    for rows in (64, 32, 16):
        if triton.cdiv(num_rows, rows) * num_groups >= num_multiprocessors(device):
            break
    keys = max(16, min(triton.next_power_of_2(max_query_len), 64 if rows == 64 else 128))
    return TileSizes(rows, keys, num_warps=4)


# The stride of `prefix_lse` is the number of tokens, which changes with the batch and must not trigger recompilation.
@triton.jit(do_not_specialize=["lse_head_stride"])
def _tree_attention_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    query_token_stride,
    query_head_stride,
    kv_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE]
    kv_block_stride,
    kv_head_stride,
    kv_offset_stride,
    slot_mapping_ptr,  # [num_tokens]
    query_start_loc_ptr,  # [num_reqs + 1]
    masks_ptr,  # [num_reqs, num_rows, num_words]
    masks_request_stride,
    masks_row_stride,
    lse_ptr,  # [num_heads, num_tokens]
    lse_head_stride,
    output_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    output_token_stride,
    output_head_stride,
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

    tree_row, head = packed_rows(tile, kv_head, GROUP, ROWS)
    is_row = tree_row < query_len
    token = (query_start + tree_row).to(tl.int64)
    dim = tl.arange(0, PADDED_HEAD_SIZE)
    row_mask = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    query_row = token * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_row[:, None] + dim[None, :], mask=row_mask, other=0.0).to(DOT_DTYPE)

    # Continues the prefix's softmax. For an empty prefix FlashAttention 2 returns +inf, all others -inf.
    lse = tl.load(lse_ptr + head.to(tl.int64) * lse_head_stride + token, mask=is_row, other=float("-inf"))
    has_prefix = tl.abs(lse) != float("inf")
    score_max = tl.where(has_prefix, lse, float("-inf"))
    weight_sum = has_prefix.to(tl.float32)
    output_row = token * output_token_stride + head * output_head_stride
    output_tile_ptr = output_ptr + output_row[:, None] + dim[None, :]
    # In units of the stored values, like the products that are added to it.
    weighted_sum = tl.load(output_tile_ptr, mask=row_mask & has_prefix[:, None], other=0.0).to(tl.float32) / value_scale

    mask_ptr = masks_ptr + request.to(tl.int64) * masks_request_stride + tree_row * masks_row_stride
    for start in range(0, query_len, KEYS):
        key_row = start + tl.arange(0, KEYS)
        # Rows that pad a CUDA graph's batch have slot -1.
        slot = tl.load(slot_mapping_ptr + query_start + key_row, mask=key_row < query_len, other=-1)
        is_key = slot >= 0
        key, value = load_keys_values(
            kv_cache_ptr,
            kv_block_stride,
            kv_head_stride,
            kv_offset_stride,
            kv_head,
            slot // BLOCK_SIZE,
            slot % BLOCK_SIZE,
            is_key,
            HEAD_SIZE,
            PADDED_HEAD_SIZE,
            DOT_DTYPE,
        )
        is_pair = is_row[:, None] & is_key[None, :]
        word = tl.load(mask_ptr[:, None] + (key_row // 32)[None, :], mask=is_pair, other=0)
        attends = ((word >> (key_row % 32)[None, :]) & 1) != 0
        score_max, weight_sum, weighted_sum = attend_tile(
            query, key, value, scale, attends, score_max, weight_sum, weighted_sum
        )

    # The sum is 0 only for padding: a row attends itself.
    divisor = tl.where(weight_sum > 0.0, weight_sum, 1.0)
    result = (weighted_sum * value_scale / divisor[:, None]).to(output_ptr.dtype.element_ty)
    tl.store(output_tile_ptr, result, mask=row_mask)


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size], K then V
    slot_mapping: torch.Tensor,  # int64 [num_tokens]; -1 for padding, which no row attends
    query_start_loc: torch.Tensor,  # int32 [num_reqs + 1]
    ancestor_masks: torch.Tensor,  # int32 [at least num_reqs, num_rows, num_words] by batch position
    max_query_len: int,  # upper bound on a request's rows; none has more than num_rows
    scale: float,  # factor of the scores
    prefix_lse: torch.Tensor,  # float32 [num_heads, num_tokens] log-sum-exp; infinite, of either sign, without prefix
    output: torch.Tensor,  # [num_tokens, num_heads, head_size] the prefix attention; overwritten with the merged one
    scales: CacheScales | None = None,  # of a quantised cache, and of the query if it is quantised too
) -> None:
    """Lets every row attend its ancestors and itself, and merges that into the prefix attention's result.

    Heads, dtypes, strides and `query_start_loc` are as in `prefix_attention`; the last dimensions of `ancestor_masks`
    and `prefix_lse` are contiguous. The cache already holds the rows' K and V. `output` is not read without a prefix.
    """
    kv_cache = as_stored(kv_cache)
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    padded_head_size = triton.next_power_of_2(head_size)
    num_reqs = query_start_loc.shape[0] - 1
    tiles = choose_tree_tiles(
        max_query_len, group, num_kv_heads * num_reqs, padded_head_size, output.dtype, query.device
    )
    grid = (triton.cdiv(max_query_len * group, tiles.rows), num_kv_heads, num_reqs)
    _tree_attention_kernel[grid](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        slot_mapping,
        query_start_loc,
        ancestor_masks,
        ancestor_masks.stride(0),
        ancestor_masks.stride(1),
        prefix_lse,
        prefix_lse.stride(0),
        output,
        output.stride(0),
        output.stride(1),
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
