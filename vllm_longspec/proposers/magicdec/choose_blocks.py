# SPDX-License-Identifier: Apache-2.0
"""The blocks of a draft step in each layer: the first, the chosen, and the last.

A choice is made from the scores of `block_scores.py`, and kept. A draft step's block table is made of it when the
step's position is known: the last blocks run up to the one of that position, and are more where fewer were chosen. So a
table has as many blocks, and the step attends as many tokens, in every layer and with or without a choice, and all
layers can share what an attention backend computes from lengths. All but the last block are full.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.attention.partial import num_left_out
from vllm_longspec.proposers.magicdec.block_scores import Refresh, is_due

# Units that one program can rank, in registers.
MAX_UNITS = 16384


def blocks_per_unit(max_model_len: int, block_size: int) -> int:
    """Consecutive blocks that are chosen as one: a power of two, 1 unless there are more than MAX_UNITS blocks."""
    return triton.next_power_of_2(triton.cdiv(triton.cdiv(max_model_len, block_size), MAX_UNITS))


@triton.jit(
    do_not_specialize=["interval", "phase", "min_prefix_len", "max_age", "num_sinks", "num_recent", "num_units"]
)
def _choose_blocks_kernel(
    scores_ptr,  # [num_reqs, max_num_units]
    scores_stride,
    prefix_lens_ptr,  # [num_reqs]
    idx_mapping_ptr,  # [num_reqs]
    verified_len_ptr,  # [max_num_reqs]
    chosen_at_ptr,  # [max_num_reqs]
    interval,
    phase,
    min_prefix_len,
    max_age,
    blocks_ptr,  # [max_num_reqs, num_units * BLOCKS_PER_UNIT]
    blocks_stride,
    num_blocks_ptr,  # [max_num_reqs]
    num_sinks,
    num_recent,
    num_units,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS_PER_UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    request = tl.program_id(0)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    if req_state_idx < 0:
        return
    prefix_len = tl.load(prefix_lens_ptr + request)
    verified_len = tl.load(verified_len_ptr + req_state_idx)
    if IS_LAST:
        # After all warps have read it; the step's other layers have.
        tl.debug_barrier()
        tl.store(verified_len_ptr + req_state_idx, prefix_len)
    chosen_at = tl.load(chosen_at_ptr + req_state_idx)
    if not is_due(req_state_idx, verified_len, prefix_len, chosen_at, interval, phase, min_prefix_len, max_age):
        return

    unit = tl.arange(0, UNITS)
    first = tl.cdiv(num_sinks, BLOCKS_PER_UNIT)
    end = tl.maximum(prefix_len - num_recent, 0) // (BLOCK_SIZE * BLOCKS_PER_UNIT)
    is_candidate = (unit >= first) & (unit < end)
    score = tl.load(scores_ptr + request.to(tl.int64) * scores_stride + unit, mask=is_candidate, other=0.0)
    # The bits of a positive float order as the float does.
    bits = tl.where(is_candidate, score.to(tl.int32, bitcast=True), -1)
    wanted = tl.minimum(num_units, tl.maximum(end - first, 0))

    # The greatest threshold that enough units reach is the last chosen score. Found bit by bit.
    threshold = tl.zeros([], tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        higher = threshold | bit
        threshold = tl.where(tl.sum((bits >= higher).to(tl.int32)) >= wanted, higher, threshold)
        bit >>= 1
    is_above = bits > threshold
    is_equal = bits == threshold
    # Of equal units the later ones.
    num_equal = wanted - tl.sum(is_above.to(tl.int32))
    num_equal_after = tl.sum(is_equal.to(tl.int32)) - tl.cumsum(is_equal.to(tl.int32), axis=0)
    is_chosen = is_above | (is_equal & (num_equal_after < num_equal))
    place = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    row_ptr = blocks_ptr + req_state_idx * blocks_stride
    for index in tl.static_range(BLOCKS_PER_UNIT):
        tl.store(row_ptr + place * BLOCKS_PER_UNIT + index, unit * BLOCKS_PER_UNIT + index, mask=is_chosen)
    tl.store(num_blocks_ptr + req_state_idx, wanted * BLOCKS_PER_UNIT)
    tl.store(chosen_at_ptr + req_state_idx, prefix_len)


def choose_blocks(
    scores: torch.Tensor,  # float32 [num_reqs, max_num_units] of `block_scores`; not negative
    prefix_lens: torch.Tensor,  # int32 [num_reqs]
    refresh: Refresh,
    num_sinks: int,  # first blocks, which a table has anyway
    num_recent: int,  # last tokens, which are not chosen either
    block_size: int,
    unit_blocks: int,  # blocks of a unit
    blocks: torch.Tensor,  # int32 [max_num_reqs, num_chosen], written by req_state_idx: ascending blocks of a request
    num_blocks: torch.Tensor,  # int32 [max_num_reqs], written: how many
    is_last_layer: bool,  # of the step, which keeps the lengths that were verified
) -> None:
    """Chooses, for the requests that are due, the units with the highest scores; of equal ones the later.

    Units that are in part among the first or the last blocks are not chosen. If there are no more others than
    `num_chosen` has room for, all are. What is not due keeps its choice. The same scores give the same choice, and no
    shape depends on lengths. `scores` and `blocks` are contiguous in their last dimension.
    """
    max_num_units = scores.shape[1]
    assert max_num_units <= MAX_UNITS and blocks.shape[1] % unit_blocks == 0
    units = triton.next_power_of_2(max_num_units)
    _choose_blocks_kernel[(refresh.idx_mapping.shape[0],)](
        scores,
        scores.stride(0),
        prefix_lens,
        refresh.idx_mapping,
        refresh.verified_len,
        refresh.chosen_at,
        refresh.interval,
        refresh.phase,
        refresh.min_prefix_len,
        refresh.max_age,
        blocks,
        blocks.stride(0),
        num_blocks,
        num_sinks,
        num_recent,
        blocks.shape[1] // unit_blocks,
        BLOCK_SIZE=block_size,
        BLOCKS_PER_UNIT=unit_blocks,
        UNITS=units,
        IS_LAST=is_last_layer,
        # 16 units a thread.
        num_warps=max(1, min(32, units // 512)),
    )


@triton.jit(do_not_specialize=["num_sinks", "budget", "max_age"])
def _shortened_tables_kernel(
    block_table_ptr,  # [num_reqs, max_num_blocks]
    block_table_stride,
    idx_mapping_ptr,  # [num_reqs]
    positions_ptr,  # [num_reqs]
    blocks_ptr,  # [num_layers, max_num_reqs, num_chosen]
    blocks_layer_stride,
    blocks_request_stride,
    num_blocks_ptr,  # [num_layers, max_num_reqs]
    num_blocks_stride,
    chosen_at_ptr,  # [num_layers, max_num_reqs], with the strides of num_blocks
    max_age,
    tables_ptr,  # [num_layers, num_reqs, width]
    tables_layer_stride,
    tables_request_stride,
    width,
    num_sinks,
    budget,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    entry = tl.arange(0, WIDTH)
    table_ptr = tables_ptr + layer * tables_layer_stride + request * tables_request_stride + entry
    if req_state_idx < 0:
        tl.store(table_ptr, tl.zeros([WIDTH], tl.int32), mask=entry < width)
        return
    position = tl.load(positions_ptr + request).to(tl.int32)
    last = position // BLOCK_SIZE
    num_skipped = num_left_out(position + 1, num_sinks, budget, BLOCK_SIZE)

    num_chosen = tl.load(num_blocks_ptr + layer * num_blocks_stride + req_state_idx)
    chosen_at = tl.load(chosen_at_ptr + layer * num_blocks_stride + req_state_idx)
    # There would be a gap between what was chosen from and the last blocks.
    num_chosen = tl.where(position - chosen_at > max_age, 0, num_chosen)
    row_ptr = blocks_ptr + layer * blocks_layer_stride + req_state_idx * blocks_request_stride
    chosen = tl.load(row_ptr + entry, mask=entry < num_chosen, other=0)
    # With n chosen blocks before them, the last blocks begin at num_sinks + num_skipped + n. So chosen block i, counted
    # from 0, is one of the last blocks itself unless it lies before those that begin at n = i + 1.
    is_before = (entry < num_chosen) & (chosen - entry <= num_sinks + num_skipped)
    end = num_sinks + tl.sum(is_before.to(tl.int32))
    is_chosen = (entry >= num_sinks) & (entry < end)
    block = tl.where(entry < num_sinks, entry, entry + num_skipped)
    block = tl.where(is_chosen, tl.load(row_ptr + entry - num_sinks, mask=is_chosen, other=0), block)

    is_entry = entry + num_skipped <= last
    physical = tl.load(block_table_ptr + request * block_table_stride + block, mask=is_entry, other=0)
    tl.store(table_ptr, physical, mask=entry < width)


def shortened_tables(
    block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks]
    idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for padding
    positions: torch.Tensor,  # int64 [num_reqs] of the rows of a draft step
    num_sinks: int,  # first blocks
    budget: int,  # tokens besides
    block_size: int,
    blocks: torch.Tensor,  # int32 [num_layers, max_num_reqs, num_chosen] of `choose_blocks`
    num_blocks: torch.Tensor,  # int32 [num_layers, max_num_reqs]
    chosen_at: torch.Tensor,  # int32 [num_layers, max_num_reqs] lengths of the prefixes that were chosen from
    max_age: int,  # tokens; an older choice counts as none
    tables: torch.Tensor,  # int32 [num_layers, num_reqs, width], written
) -> None:
    """Writes the block table of a draft step in each layer: in ascending order and none twice, the first blocks, chosen
    blocks and the last ones up to that of the row's position; zeros after them and for padding.

    With s = max(0, max(0, position + 1 - budget) // block_size - num_sinks) blocks left out, whatever was chosen, a row
    attends position + 1 - s * block_size tokens. Without a choice the table is that of the last `budget` tokens, from
    the block on in which they begin. `block_table`, `blocks` and `tables` are contiguous in their last dimension;
    `width` is at least num_sinks + ceil((budget - 1) / block_size) + 1, or max_num_blocks.
    """
    num_layers, num_reqs, width = tables.shape
    _shortened_tables_kernel[(num_reqs, num_layers)](
        block_table,
        block_table.stride(0),
        idx_mapping,
        positions,
        blocks,
        blocks.stride(0),
        blocks.stride(1),
        num_blocks,
        num_blocks.stride(0),
        chosen_at,
        max_age,
        tables,
        tables.stride(0),
        tables.stride(1),
        width,
        num_sinks,
        budget,
        BLOCK_SIZE=block_size,
        WIDTH=triton.next_power_of_2(width),
        num_warps=max(1, min(4, width // 64)),
    )
