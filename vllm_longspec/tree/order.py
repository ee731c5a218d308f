# SPDX-License-Identifier: Apache-2.0
"""Stage "order": lists the drafted nodes of a request by cumulative log-probability.

A node's log-probability is its parent's plus that of one more token, so it never exceeds its parent's. Every prefix of
the list is therefore a tree, and the best tree of its size: no k nodes have a higher sum of probabilities, which is the
expected acceptance length, than the k most probable. Cutting the list anywhere, as the scheduler does for its token
budget, leaves the best valid tree.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.tree.block import LANES, block_of


def order_tree(
    draft_tokens: torch.Tensor,  # int64 [num_reqs, num_drafted] in draft order: every parent before its children
    log_probs: torch.Tensor,  # float32 [num_reqs, num_drafted] natural log of the probability given the root
    draft_parents: torch.Tensor,  # int32 [num_reqs, num_drafted] index in draft order, -1 for the root
    idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for padding, for which nothing is written
    ordered_tokens: torch.Tensor,  # int64 [num_reqs, num_nodes], written in list order
    parent_rows: torch.Tensor,  # int32 [max_num_reqs, 1 + num_nodes], written; as in `TreeState`
    depths: torch.Tensor,  # int32 [max_num_reqs, 1 + num_nodes], written; likewise
    ancestor_masks: torch.Tensor,  # int32 [max_num_reqs, 1 + num_nodes, num_words], written; likewise
    max_depth: int,  # depth of the deepest drafted node, at least 1
) -> None:
    """Keeps the `num_nodes` most probable drafted nodes of each request and describes the tree that they form.

    Nodes are ranked by the least log-probability on their path from the root, NaN counting as minus infinity, and nodes
    of equal rank by draft order. For sound input this is their own log-probability; it keeps parents before children
    when a child is certain, when rounding lifts a child above its parent, or when the head produced NaN.

    The last dimension of every tensor must be contiguous.

    Raises:
        ValueError: more nodes are listed than drafted, or the tree state's rows are not the listed nodes and the root.
    """
    num_reqs, num_drafted = draft_tokens.shape
    num_nodes = ordered_tokens.shape[1]
    num_rows, num_words = ancestor_masks.shape[1:]
    if num_nodes > num_drafted:
        raise ValueError(f"cannot list {num_nodes} nodes of {num_drafted} drafted")
    if num_rows != num_nodes + 1 or num_rows > 32 * num_words:
        raise ValueError(f"{num_nodes} nodes do not fit ancestor masks of {num_rows} rows and {num_words} words")
    block = block_of(num_drafted)
    _order_tree_kernel[(num_reqs,)](
        draft_tokens,
        draft_tokens.stride(0),
        log_probs,
        log_probs.stride(0),
        draft_parents,
        draft_parents.stride(0),
        idx_mapping,
        ordered_tokens,
        ordered_tokens.stride(0),
        parent_rows,
        parent_rows.stride(0),
        depths,
        depths.stride(0),
        ancestor_masks,
        ancestor_masks.stride(0),
        ancestor_masks.stride(1),
        num_drafted,
        num_nodes,
        max_depth,
        NUM_WORDS=num_words,
        BLOCK=block,
        # All pairs of nodes are compared, in strips that fit into registers.
        STRIP=block if interpreting() else LANES,
        WORD_BLOCK=triton.next_power_of_2(num_words),
    )


# They differ between numbers of nodes and must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        *("draft_tokens_stride", "log_probs_stride", "draft_parents_stride", "num_drafted", "num_nodes", "max_depth")
    ]
)
def _order_tree_kernel(
    draft_tokens_ptr,
    draft_tokens_stride,
    log_probs_ptr,
    log_probs_stride,
    draft_parents_ptr,
    draft_parents_stride,
    idx_mapping_ptr,
    ordered_tokens_ptr,
    ordered_tokens_stride,
    parent_rows_ptr,
    parent_rows_stride,
    depths_ptr,
    depths_stride,
    ancestor_masks_ptr,
    ancestor_masks_stride,
    ancestor_masks_row_stride,
    num_drafted,
    num_nodes,
    max_depth,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIP: tl.constexpr,
    WORD_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    if req_state_idx < 0:
        return

    draft_tokens_ptr += request * draft_tokens_stride
    log_probs_ptr += request * log_probs_stride
    draft_parents_ptr += request * draft_parents_stride
    ordered_tokens_ptr += request * ordered_tokens_stride
    parent_rows_ptr += req_state_idx * parent_rows_stride
    depths_ptr += req_state_idx * depths_stride
    ancestor_masks_ptr += req_state_idx * ancestor_masks_stride

    node = tl.arange(0, BLOCK)
    is_node = node < num_drafted
    parent = tl.load(draft_parents_ptr + node, mask=is_node, other=-1)

    # Least log-probability and length of the path to each node. Reads only inputs: no barrier.
    least = _load_log_prob(log_probs_ptr, node, is_node, float("-inf"))
    depth = tl.full([BLOCK], 1, tl.int32)
    ancestor = parent
    for _ in range(1, max_depth):
        exists = ancestor >= 0
        log_prob = _load_log_prob(log_probs_ptr, ancestor, exists, float("inf"))
        least = tl.minimum(least, log_prob)
        depth += exists.to(tl.int32)
        ancestor = tl.load(draft_parents_ptr + ancestor, mask=exists, other=-1)

    # A node's index in the list: the number of nodes before it. Lanes past the last node hold -inf and the highest
    # indices, so they come last.
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, STRIP):
        other = start + tl.arange(0, STRIP)
        other_least = tl.gather(least, other, 0)[None, :]
        is_before = (other_least > least[:, None]) | (
            (other_least == least[:, None]) & (other[None, :] < node[:, None])
        )
        rank += tl.sum(is_before.to(tl.int32), axis=1)
    row = rank + 1

    # Bit 0 is the root's.
    word = tl.arange(0, WORD_BLOCK)[None, :]
    ancestor_mask = _row_bit(row, word) | (word == 0).to(tl.int32)
    ancestor = parent
    for _ in range(1, max_depth):
        exists = ancestor >= 0
        bit = _row_bit(tl.gather(row, tl.where(exists, ancestor, 0), 0), word)
        ancestor_mask |= tl.where(exists[:, None], bit, 0)
        ancestor = tl.load(draft_parents_ptr + ancestor, mask=exists, other=-1)
    parent_row = tl.where(parent >= 0, tl.gather(row, tl.where(parent >= 0, parent, 0), 0), 0)

    is_kept = is_node & (rank < num_nodes)
    token = tl.load(draft_tokens_ptr + node, mask=is_kept)
    tl.store(ordered_tokens_ptr + rank, token, mask=is_kept)
    tl.store(parent_rows_ptr + row, parent_row, mask=is_kept)
    tl.store(depths_ptr + row, depth, mask=is_kept)
    tl.store(
        ancestor_masks_ptr + row[:, None] * ancestor_masks_row_stride + word,
        ancestor_mask,
        mask=is_kept[:, None] & (word < NUM_WORDS),
    )
    tl.store(parent_rows_ptr, -1)
    tl.store(depths_ptr, 0)
    tl.store(ancestor_masks_ptr + word, (word == 0).to(tl.int32), mask=word < NUM_WORDS)


@triton.jit
def _load_log_prob(log_probs_ptr, node, mask, other):
    log_prob = tl.load(log_probs_ptr + node, mask=mask, other=other)
    return tl.where(log_prob != log_prob, float("-inf"), log_prob)


@triton.jit
def _row_bit(row, word):
    """The ancestor mask, int32 [n, num_words], with only the bit of `row` [n]; `word` is the range [1, num_words]."""
    return tl.where(row[:, None] // 32 == word, 1 << (row[:, None] % 32), 0)
