# SPDX-License-Identifier: Apache-2.0
"""The kernel of `shared_prefix.py` for Hopper GPUs, with the order of its instructions written out, in Gluon.

What limits that kernel is waiting: Triton asks for the next keys and values at the end of a tile's work and waits for
them right away. Here a tile of keys is asked for as soon as the tile that was in its place has been multiplied, two
tiles ahead, and a tile of values one ahead; they arrive while the softmax is taken. Two programs share a
multiprocessor, one warpgroup each: the tensor cores serve one while the other is at its softmax.

Gluon is the lower half of Triton: layouts, shared memory and barriers are explicit, and no interpreter runs it.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from vllm.triton_utils import LOG2E, LOGE2, triton

from vllm_longspec.attention.shared_prefix import (
    MIN_KEYS_PER_PART,
    PrefixParts,
    choose_num_parts,
    num_multiprocessors,
)

KEYS = 64
# Tiles of keys, and of values, that have a place in shared memory.
STAGES = 2
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 2

LN_2 = gl.constexpr(LOGE2)
# Gluon is young and has renamed these: the second name is that of Triton 3.6.
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
MIN_PART = gl.constexpr(MIN_KEYS_PER_PART.value)


def can_serve(query: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether the kernel can read this cache: a tile's keys must lie in one block."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.float16, torch.bfloat16)
        and kv_cache.dtype == query.dtype
        and query.shape[2] in (64, 128)
        and kv_cache.shape[2] % KEYS == 0
    )


@gluon.jit
def _fetch(
    descriptor,
    buffers,  # [STAGES, 1, 1, KEYS, HEAD_SIZE]
    barriers,  # [STAGES]
    slot,
    block_table_row_ptr,
    tile,
    end_tile,
    kv_head,
    column,
    TILES_PER_BLOCK: gl.constexpr,
):
    """Starts to copy a tile of keys or values into its place; what is past the last tile is not fetched."""
    exists = tile < end_tile
    block = gl.load(block_table_row_ptr + tile // TILES_PER_BLOCK, mask=exists, other=0)
    offset = tile % TILES_PER_BLOCK * descriptor.block_shape[2]
    mbarrier.expect(barriers.index(slot), descriptor.block_type.nbytes, pred=exists)
    copy_box(descriptor, [block, kv_head, offset, column], barriers.index(slot), buffers.index(slot), pred=exists)


@gluon.jit
def _softmax_step(score, score_max, weight_sum, log2_scale):
    """Weights of a tile's scores, how much older weights shrink, and the new running maximum and sum."""
    new_max = gl.maximum(score_max, gl.max(score, axis=1))
    exponent_max = new_max * log2_scale
    weight = gl.exp2(score * log2_scale - exponent_max[:, None])
    rescale = gl.exp2(score_max * log2_scale - exponent_max)
    return weight, rescale, new_max, weight_sum * rescale + gl.sum(weight, axis=1)


@gluon.jit(do_not_specialize=["lse_part_stride", "lse_head_stride", "num_parts"])
def _hopper_prefix_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_SIZE]
    query_token_stride,
    query_head_stride,
    kv_cache_descriptor,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE]
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
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_SIZE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, k_width=2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [WARPS, 1], [1, 0])
    OF_SCORES: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_RESULT: gl.constexpr = gl.SliceLayout(1, RESULT)
    TILES_PER_BLOCK: gl.constexpr = BLOCK_SIZE // KEYS
    DTYPE: gl.constexpr = kv_cache_descriptor.dtype

    # Programs start in the order of their numbers, tiles first: those that read the same keys run side by side.
    row_tile = gl.program_id(0)
    kv_head = gl.program_id(1) % NUM_KV_HEADS
    part = gl.program_id(1) // NUM_KV_HEADS
    request = gl.program_id(2)
    query_start = gl.load(query_start_loc_ptr + request)
    query_len = gl.load(query_start_loc_ptr + request + 1) - query_start
    prefix_len = gl.where(row_tile * ROWS < query_len * GROUP, gl.load(prefix_lens_ptr + request), 0)
    used_parts = gl.minimum(gl.maximum(prefix_len // MIN_PART, 1), gl.where(prefix_len > 0, num_parts, 0))
    num_tiles = prefix_len // KEYS
    first_tile = gl.minimum(part, used_parts) * num_tiles // gl.maximum(used_parts, 1)
    end_tile = gl.minimum(part + 1, used_parts) * num_tiles // gl.maximum(used_parts, 1)
    num_left = gl.where(part == used_parts - 1, prefix_len % KEYS, 0)
    # The tile of what is left over is fetched like the others.
    end_fetch = end_tile + (num_left > 0).to(gl.int32)

    key_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_SIZE], kv_cache_descriptor.layout)
    value_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, HEAD_SIZE], kv_cache_descriptor.layout)
    key_barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(key_barriers.index(index), count=1)
        mbarrier.init(value_barriers.index(index), count=1)
    fence_async_shared()
    table = block_table_ptr + request.to(gl.int64) * block_table_stride
    kv = kv_cache_descriptor
    for index in gl.static_range(STAGES):
        tile = first_tile + index
        _fetch(kv, key_buffers, key_barriers, index, table, tile, end_fetch, kv_head, 0, TILES_PER_BLOCK)
    for index in gl.static_range(STAGES - 1):
        tile = first_tile + index
        _fetch(kv, value_buffers, value_barriers, index, table, tile, end_fetch, kv_head, HEAD_SIZE, TILES_PER_BLOCK)

    row = row_tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, WIDE))
    token = (query_start + row // GROUP).to(gl.int64)
    query_row = token * query_token_stride + (kv_head * GROUP + row % GROUP) * query_head_stride
    query = gl.load(query_ptr + query_row[:, None] + dim[None, :], mask=(row // GROUP < query_len)[:, None], other=0.0)
    QUERIES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(DTYPE, [ROWS, HEAD_SIZE], QUERIES, query)
    fence_async_shared()
    synchronize()

    score_max = gl.full([ROWS], float("-inf"), gl.float32, layout=OF_SCORES)
    weight_sum = gl.full([ROWS], 0.0, gl.float32, layout=OF_SCORES)
    weighted_sum = warpgroup_mma_init(gl.full([ROWS, HEAD_SIZE], 0.0, gl.float32, layout=RESULT))
    no_score = gl.full([ROWS, KEYS], 0.0, gl.float32, layout=SCORES)
    slot = 0
    slot_before = STAGES - 1
    phase = 0
    for tile in range(first_tile, end_tile):
        mbarrier.wait(key_barriers.index(slot), phase)
        keys = key_buffers.index(slot).reshape([KEYS, HEAD_SIZE]).permute((1, 0))
        score = warpgroup_mma(queries, keys, no_score, use_acc=False, is_async=True)
        # Products are finished in order, so the one with the values of the tile before is finished too.
        score, older_sum = warpgroup_mma_wait(0, deps=[score, weighted_sum])
        synchronize()
        next_tile = tile + STAGES
        _fetch(kv, key_buffers, key_barriers, slot, table, next_tile, end_fetch, kv_head, 0, TILES_PER_BLOCK)
        _fetch(
            kv,
            value_buffers,
            value_barriers,
            slot_before,
            table,
            next_tile - 1,
            end_fetch,
            kv_head,
            HEAD_SIZE,
            TILES_PER_BLOCK,
        )
        weight, rescale, score_max, weight_sum = _softmax_step(score, score_max, weight_sum, log2_scale)
        older_sum = older_sum * gl.convert_layout(rescale, OF_RESULT)[:, None]
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        mbarrier.wait(value_barriers.index(slot), phase)
        values = value_buffers.index(slot).reshape([KEYS, HEAD_SIZE])
        weighted_sum = warpgroup_mma(weight, values, older_sum, is_async=True)
        slot_before = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1

    if num_left > 0:
        mbarrier.wait(key_barriers.index(slot), phase)
        keys = key_buffers.index(slot).reshape([KEYS, HEAD_SIZE]).permute((1, 0))
        score = warpgroup_mma(queries, keys, no_score, use_acc=False, is_async=True)
        score, older_sum = warpgroup_mma_wait(0, deps=[score, weighted_sum])
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        score = gl.where(key[None, :] < num_left, score, float("-inf"))
        weight, rescale, score_max, weight_sum = _softmax_step(score, score_max, weight_sum, log2_scale)
        older_sum = older_sum * gl.convert_layout(rescale, OF_RESULT)[:, None]
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        mbarrier.wait(value_barriers.index(slot), phase)
        values = value_buffers.index(slot).reshape([KEYS, HEAD_SIZE])
        # What is behind the prefix may be anything, and NaN would survive a weight of zero.
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, WIDE))
        values.store(gl.where((key < num_left)[:, None], values.load(WIDE), 0.0))
        fence_async_shared()
        synchronize()
        weighted_sum = warpgroup_mma(weight, values, older_sum, is_async=True)
    result = warpgroup_mma_wait(0, deps=[weighted_sum])

    row = row_tile * ROWS + gl.arange(0, ROWS, layout=OF_RESULT)
    dim = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, RESULT))
    token = (query_start + row // GROUP).to(gl.int64)
    head = kv_head * GROUP + row % GROUP
    # A part that is not used has nothing to say.
    is_row = row // GROUP < gl.where(part < used_parts, query_len, 0)
    score_max = gl.convert_layout(score_max, OF_RESULT)
    weight_sum = gl.convert_layout(weight_sum, OF_RESULT)
    lse_row = part.to(gl.int64) * lse_part_stride + head.to(gl.int64) * lse_head_stride + token
    gl.store(lse_ptr + lse_row, score_max * (log2_scale * LN_2) + gl.log(weight_sum), mask=is_row)
    output_row = part.to(gl.int64) * part_stride + token * output_token_stride + head * output_head_stride
    gl.store(
        outputs_ptr + output_row[:, None] + dim[None, :],
        (result / weight_sum[:, None]).to(outputs_ptr.dtype.element_ty),
        mask=is_row[:, None],
    )


def hopper_prefix_parts(
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
) -> PrefixParts:
    """The same as `shared_prefix_parts`, for caches that `can_serve` allows."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_reqs = query_start_loc.shape[0] - 1
    group = num_heads // num_kv_heads
    rows = 64 if max_query_len * group <= 64 else 128
    num_row_tiles = triton.cdiv(max_query_len * group, rows)
    if num_parts is None:
        num_slots = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(query.device)
        max_tiles = block_table.shape[1] * block_size // KEYS
        num_parts = choose_num_parts(num_row_tiles * num_kv_heads * num_reqs, num_slots, max_tiles)
    outputs = torch.empty(num_parts, num_tokens, num_heads, head_size, dtype=part_dtype, device=query.device)
    lse = torch.empty(num_parts, num_heads, num_tokens, dtype=torch.float32, device=query.device)
    box = [1, 1, KEYS, head_size]
    element_type = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[query.dtype]
    _hopper_prefix_kernel[(num_row_tiles, num_kv_heads * num_parts, num_reqs)](
        query,
        query.stride(0),
        query.stride(1),
        TensorDescriptor.from_tensor(kv_cache, box, gl.NVMMASharedLayout.get_default_for(box, element_type)),
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
        BLOCK_SIZE=block_size,
        ROWS=rows,
        KEYS=KEYS,
        STAGES=STAGES,
        WARPS=WARPS,
        num_warps=WARPS,
    )
    return PrefixParts(outputs, lse, prefix_lens)
