# SPDX-License-Identifier: Apache-2.0
"""Stage "walk": follows the target's own tokens down the tree.

The walk starts at the root. While the token that the target sampled at the current row is the token of one of its
children, that child is accepted and becomes the current row. Every emitted token is thus the target's own sample given
the tokens before it, so the output has exactly the target's distribution, whatever was drafted.
"""

import torch
from vllm.triton_utils import tl, triton


def walk_tree(
    sampled: torch.Tensor,  # int64 [num_logits] the target's own next token at every row
    row_tokens: torch.Tensor,  # int32 or int64 [num_logits] the token in every row; the root's is not read
    cu_num_logits: torch.Tensor,  # int32 [num_reqs + 1] first row of each request, then the number of rows
    idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for a request with only a root
    parent_rows: torch.Tensor,  # int32 [max_num_reqs, num_rows] by req_state_idx; -1 for the root
    emitted: torch.Tensor,  # int64 [num_reqs, width], written
    num_emitted: torch.Tensor,  # int32 [num_reqs], written: 1 to max_depth + 1; 0 for a request without rows
    path_rows: torch.Tensor,  # int32 [num_reqs, width], written
    max_depth: int,  # depth of the deepest node of any tree, the most steps of a walk
) -> None:
    """Accepts the drafted tokens that the target sampled too.

    `emitted` gets the accepted tokens, then the token sampled where the walk stopped, and `path_rows` the row at which
    each of them was sampled: 0, then the accepted nodes' rows, strictly increasing. Both are filled up with -1.

    A request may have any number of rows, from its root alone (it emits one token; its tree state is not read) to
    `num_rows`. Of two children with the same token, which no draft produces, the lower row is accepted. The last
    dimension of every tensor must be contiguous.

    Raises:
        ValueError: `emitted` and `path_rows` differ in width or have no room for max_depth + 1 tokens.
    """
    width = emitted.shape[1]
    if path_rows.shape[1] != width or width < max_depth + 1:
        raise ValueError(
            f"a walk of depth {max_depth} does not fit {width} emitted tokens and {path_rows.shape[1]} path rows"
        )
    num_rows = parent_rows.shape[1]
    _walk_tree_kernel[(idx_mapping.shape[0],)](
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
def _walk_tree_kernel(
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
    sampled_ptr += first
    row_tokens_ptr += first

    # Rows past the request's last one have no parent: the tree in the state may have more rows than were scheduled.
    row = tl.arange(0, ROW_BLOCK)
    is_node = (row > 0) & (row < num_rows)
    row_token = tl.load(row_tokens_ptr + row, mask=is_node, other=-1).to(tl.int64)
    parent_row = tl.load(parent_rows_ptr + req_state_idx * parent_rows_stride + row, mask=is_node, other=-1)

    index = tl.arange(0, EMITTED_BLOCK)
    emitted = tl.full([EMITTED_BLOCK], -1, tl.int64)
    path_row = tl.full([EMITTED_BLOCK], -1, tl.int32)
    num_emitted = 0
    current = 0
    walking = num_rows > 0
    for step in range(0, max_depth + 1):
        token = tl.load(sampled_ptr + current, mask=walking, other=-1)
        is_next = index == tl.where(walking, step, -1)
        emitted = tl.where(is_next, token, emitted)
        path_row = tl.where(is_next, current, path_row)
        num_emitted += walking.to(tl.int32)
        is_accepted = (parent_row == current) & (row_token == token)
        child = tl.min(tl.where(is_accepted, row, ROW_BLOCK), axis=0)
        walking = walking & (child < ROW_BLOCK)
        current = tl.where(walking, child, 0)

    tl.store(emitted_ptr + request * emitted_stride + index, emitted, mask=index < width)
    tl.store(path_rows_ptr + request * path_rows_stride + index, path_row, mask=index < width)
    tl.store(num_emitted_ptr + request, num_emitted)
