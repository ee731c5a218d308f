# SPDX-License-Identifier: Apache-2.0
"""Joins a path of tokens to a drafted tree, before it is ordered.

The path goes down the drafted tree as far as its tokens are there, and continues with nodes of its own: equal (parent,
token) pairs are one node. A node of both has the greater of its two log-probabilities. Both never increase from parent
to child, so the greater one does not either, and every prefix of the ordered list is a tree as before
(`vllm_longspec/tree/order.py`).
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.tree.block import block_of


def merge_path(
    draft_tokens: torch.Tensor,  # int64 [num_reqs, num_drafted] in draft order: every parent before its children
    log_probs: torch.Tensor,  # float32 [num_reqs, num_drafted] cumulative
    draft_parents: torch.Tensor,  # int32 [num_reqs, num_drafted] index in draft order, -1 for the root
    path_tokens: torch.Tensor,  # int64 [num_reqs, path_length] children of the root, of its child, ..; below 0: no node
    path_log_probs: torch.Tensor,  # float32 [num_reqs, path_length] cumulative
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The drafted nodes and then those of the path, as `order_tree` takes them.

    Returns tokens, log-probabilities and parents of num_drafted + path_length nodes for each request. The node of a
    path's token that is drafted already, or is none (the first token below 0 ends the path), is unused: its
    log-probability is minus infinity and its parent the root. Unused nodes come after all drafted ones, so they are not
    among the best `num_nodes` of a proposer that drafts so many. The last dimension of every tensor must be contiguous.
    """
    num_reqs, num_drafted = draft_tokens.shape
    path_length = path_tokens.shape[1]
    num_merged = num_drafted + path_length
    tokens = torch.empty(num_reqs, num_merged, dtype=torch.int64, device=draft_tokens.device)
    merged_log_probs = torch.empty_like(tokens, dtype=torch.float32)
    parents = torch.empty_like(tokens, dtype=torch.int32)
    _merge_path_kernel[(num_reqs,)](
        draft_tokens,
        draft_tokens.stride(0),
        log_probs,
        log_probs.stride(0),
        draft_parents,
        draft_parents.stride(0),
        path_tokens,
        path_tokens.stride(0),
        path_log_probs,
        path_log_probs.stride(0),
        tokens,
        merged_log_probs,
        parents,
        num_drafted,
        path_length,
        BLOCK=block_of(num_merged),
        num_warps=1,
    )
    return tokens, merged_log_probs, parents


# They differ between numbers of nodes and must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        *("draft_tokens_stride", "log_probs_stride", "draft_parents_stride", "num_drafted", "path_length")
    ]
)
def _merge_path_kernel(
    draft_tokens_ptr,
    draft_tokens_stride,
    log_probs_ptr,
    log_probs_stride,
    draft_parents_ptr,
    draft_parents_stride,
    path_tokens_ptr,
    path_tokens_stride,
    path_log_probs_ptr,
    path_log_probs_stride,
    merged_tokens_ptr,
    merged_log_probs_ptr,
    merged_parents_ptr,
    num_drafted,
    path_length,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    draft_tokens_ptr += request * draft_tokens_stride
    log_probs_ptr += request * log_probs_stride
    draft_parents_ptr += request * draft_parents_stride
    path_tokens_ptr += request * path_tokens_stride
    path_log_probs_ptr += request * path_log_probs_stride
    num_merged = num_drafted + path_length

    node = tl.arange(0, BLOCK)
    is_drafted = node < num_drafted
    step = node - num_drafted
    is_path = (step >= 0) & (step < path_length)
    token = tl.load(draft_tokens_ptr + node, mask=is_drafted, other=-1)
    log_prob = tl.load(log_probs_ptr + node, mask=is_drafted, other=float("-inf"))
    parent = tl.load(draft_parents_ptr + node, mask=is_drafted, other=-2)

    # Down the drafted tree. `current` is the deepest drafted node of the path, -1 for the root.
    current = -1
    num_shared = 0
    path_token = tl.load(path_tokens_ptr)
    child = tl.min(tl.where((parent == -1) & (token == path_token), node, BLOCK), axis=0)
    while child < BLOCK:
        path_log_prob = tl.load(path_log_probs_ptr + num_shared)
        # A log-probability that is NaN is the lesser one.
        is_raised = (node == child) & ~(log_prob >= path_log_prob)
        log_prob = tl.where(is_raised, path_log_prob, log_prob)
        current = child
        num_shared += 1
        path_token = tl.load(path_tokens_ptr + num_shared, mask=num_shared < path_length, other=-1)
        is_child = is_drafted & (parent == current) & (token == path_token) & (num_shared < path_length)
        child = tl.min(tl.where(is_child, node, BLOCK), axis=0)

    # The rest of the path, up to its first missing token.
    own_token = tl.load(path_tokens_ptr + step, mask=is_path, other=-1)
    first_missing = tl.min(tl.where(is_path & (own_token < 0), step, path_length), axis=0)
    is_own = is_path & (step >= num_shared) & (step < first_missing)
    own_log_prob = tl.load(path_log_probs_ptr + step, mask=is_own, other=float("-inf"))
    token = tl.where(is_path, tl.where(is_own, own_token, 0), token)
    log_prob = tl.where(is_path, own_log_prob, log_prob)
    parent = tl.where(is_path, tl.where(is_own, tl.where(step == num_shared, current, node - 1), -1), parent)

    is_merged = node < num_merged
    tl.store(merged_tokens_ptr + request * num_merged + node, token, mask=is_merged)
    tl.store(merged_log_probs_ptr + request * num_merged + node, log_prob, mask=is_merged)
    tl.store(merged_parents_ptr + request * num_merged + node, parent.to(tl.int32), mask=is_merged)
