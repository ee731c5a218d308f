# SPDX-License-Identifier: Apache-2.0
"""Stage "walk" with synthetic acceptance, for timing models without their weights.

The rates are the user's (`vllm_longspec/tree/synthetic_rates.py`). Drafting, verification, sampling and compaction are
unchanged. Two things differ, because random weights make all tokens about equally probable:

- one of the deepest drafted paths is listed early. The most probable nodes of such a draft are the shallow ones, so a
  cut list would hold no path of the requested length;
- the walk follows that path and accepts its nodes at random.
"""

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

from vllm_longspec.tree.block import block_of


def list_a_path_early(
    log_probs: torch.Tensor,  # float32 [num_reqs, num_drafted] cumulative, at most 0; nodes level by level
    parents: torch.Tensor,  # int32 [num_reqs, num_drafted] index of each node's parent, -1 for the root
    levels: tuple[int, ...],  # nodes per level
    with_another: bool,  # whether another node is listed before the path
) -> torch.Tensor:  # float32 [num_reqs, num_drafted]
    """Log-probabilities by which the path to the first node of the last level comes first, or right after another node.

    That node, of level 1, leaves a gap: otherwise the accepted path would already be in place and compaction would move
    nothing. Both tensors must be contiguous.
    """
    num_reqs, num_drafted = log_probs.shape
    listed = torch.empty_like(log_probs)
    _list_a_path_early_kernel[(num_reqs,)](
        log_probs,
        parents,
        listed,
        num_drafted,
        num_drafted - levels[-1],
        len(levels),
        int(with_another),
        BLOCK=block_of(num_drafted),
    )
    return listed


# Triton specialises arguments of value 1 to constants, which a loop variable such as `node` must not be.
@triton.jit(do_not_specialize=["num_drafted", "first_of_last_level", "num_levels", "has_hole"])
def _list_a_path_early_kernel(
    log_probs_ptr,  # float32 [num_reqs, num_drafted]
    parents_ptr,  # int32 [num_reqs, num_drafted]
    listed_ptr,  # float32 [num_reqs, num_drafted]
    num_drafted,
    first_of_last_level,
    num_levels,
    has_hole,  # 0 or 1
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    log_probs_ptr += request * num_drafted
    parents_ptr += request * num_drafted
    listed_ptr += request * num_drafted

    index = tl.arange(0, BLOCK)
    is_drafted = index < num_drafted
    listed = tl.load(log_probs_ptr + index, mask=is_drafted)
    node = first_of_last_level
    for _ in range(1, num_levels):
        listed = tl.where(index == node, 1.0, listed)
        node = tl.load(parents_ptr + node)
    listed = tl.where(index == node, 1.0, listed)
    is_hole = (index == tl.where(node == 0, 1, 0)) & (has_hole != 0)
    listed = tl.where(is_hole, 2.0, listed)
    tl.store(listed_ptr + index, listed, mask=is_drafted)


def walk_synthetically(
    conditional_rates: torch.Tensor,  # float32 [max_depth] from 0 to 1, for depth 1, 2, .. max_depth
    seeds: torch.Tensor,  # int64 [max_num_reqs] by req_state_idx
    positions: torch.Tensor,  # int64 [num_logits] true position of every row
    depths: torch.Tensor,  # int32 [max_num_reqs, num_rows] by req_state_idx; 0 for the root and rows without a node
    sampled: torch.Tensor,  # int64 [num_logits] the target's own next token at every row
    row_tokens: torch.Tensor,  # int32 or int64 [num_logits] the token in every row
    cu_num_logits: torch.Tensor,  # int32 [num_reqs + 1]
    idx_mapping: torch.Tensor,  # int64 [num_reqs]
    parent_rows: torch.Tensor,  # int32 [max_num_reqs, num_rows]
    emitted: torch.Tensor,  # int64 [num_reqs, width], written
    num_emitted: torch.Tensor,  # int32 [num_reqs], written
    path_rows: torch.Tensor,  # int32 [num_reqs, width], written
) -> None:
    """Accepts drafted tokens at random along the first of the deepest paths of each request's rows.

    The node at depth d of that path is accepted with probability conditional_rates[d - 1] if its parent is, by the same
    random number as in vLLM: that of the request's seed and the position of the parent's row. A request with fewer rows
    than its tree may have no path of the requested depth and accepts less. A row without a token (below 0) is not
    accepted. Emitted are the tokens of the accepted rows, then the target's where the walk stops.

    The other arguments are as in `walk_tree`. The last dimension of every tensor must be contiguous.

    Raises:
        ValueError: `emitted` and `path_rows` differ in width or have no room for max_depth + 1 tokens.
    """
    max_depth = conditional_rates.shape[0]
    width = emitted.shape[1]
    if path_rows.shape[1] != width or width < max_depth + 1:
        raise ValueError(
            f"a walk of depth {max_depth} does not fit {width} emitted tokens and {path_rows.shape[1]} path rows"
        )
    num_rows = parent_rows.shape[1]
    _walk_synthetically_kernel[(idx_mapping.shape[0],)](
        conditional_rates,
        seeds,
        positions,
        depths,
        depths.stride(0),
        sampled,
        row_tokens,
        cu_num_logits,
        idx_mapping,
        parent_rows,
        parent_rows.stride(0),
        emitted,
        emitted.stride(0),
        num_emitted,
        path_rows,
        path_rows.stride(0),
        width,
        num_rows,
        max_depth,
        ROW_BLOCK=triton.next_power_of_2(num_rows),
        EMITTED_BLOCK=triton.next_power_of_2(width),
    )


@triton.jit
def _walk_synthetically_kernel(
    conditional_rates_ptr,
    seeds_ptr,
    positions_ptr,
    depths_ptr,
    depths_stride,
    sampled_ptr,
    row_tokens_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    parent_rows_ptr,
    parent_rows_stride,
    emitted_ptr,
    emitted_stride,
    num_emitted_ptr,
    path_rows_ptr,
    path_rows_stride,
    width,
    max_num_rows,
    max_depth,
    ROW_BLOCK: tl.constexpr,
    EMITTED_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    first = tl.load(cu_num_logits_ptr + request)
    num_rows = tl.load(cu_num_logits_ptr + request + 1) - first
    num_rows = tl.minimum(num_rows, tl.where(req_state_idx >= 0, max_num_rows, 1))
    seed = tl.load(seeds_ptr + req_state_idx, mask=req_state_idx >= 0, other=0)
    sampled_ptr += first
    row_tokens_ptr += first
    positions_ptr += first

    row = tl.arange(0, ROW_BLOCK)
    is_node = (row > 0) & (row < num_rows)
    parent_row = tl.load(parent_rows_ptr + req_state_idx * parent_rows_stride + row, mask=is_node, other=-1)
    depth = tl.load(depths_ptr + req_state_idx * depths_stride + row, mask=is_node, other=0)
    # The first of the deepest rows, and its ancestors.
    goal = tl.min(tl.where(depth == tl.max(depth, axis=0), row, ROW_BLOCK), axis=0)
    is_on_path = row == goal
    ancestor = goal
    for _ in range(0, max_depth):
        ancestor = tl.max(tl.where(row == ancestor, parent_row, -1), axis=0)
        is_on_path = is_on_path | (row == ancestor)

    index = tl.arange(0, EMITTED_BLOCK)
    emitted = tl.full([EMITTED_BLOCK], -1, tl.int64)
    path_row = tl.full([EMITTED_BLOCK], -1, tl.int32)
    num_emitted = 0
    current = 0
    walking = num_rows > 0
    for step in range(0, max_depth + 1):
        child = tl.min(tl.where(is_on_path & (parent_row == current), row, ROW_BLOCK), axis=0)
        child_token = tl.load(row_tokens_ptr + child, mask=walking & (child < ROW_BLOCK), other=-1).to(tl.int64)
        rate = tl.load(conditional_rates_ptr + step, mask=step < max_depth, other=0.0)
        position = tl.load(positions_ptr + current, mask=walking, other=0)
        is_accepted = walking & (child_token >= 0) & (tl_rand32(seed, position, includes_zero=False) < rate)
        own_token = tl.load(sampled_ptr + current, mask=walking, other=-1)
        is_next = index == tl.where(walking, step, -1)
        emitted = tl.where(is_next, tl.where(is_accepted, child_token, own_token), emitted)
        path_row = tl.where(is_next, current, path_row)
        num_emitted += walking.to(tl.int32)
        walking = is_accepted
        current = tl.where(walking, child, 0)

    tl.store(emitted_ptr + request * emitted_stride + index, emitted, mask=index < width)
    tl.store(path_rows_ptr + request * path_rows_stride + index, path_row, mask=index < width)
    tl.store(num_emitted_ptr + request, num_emitted)
