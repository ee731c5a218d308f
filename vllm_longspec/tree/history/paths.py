# SPDX-License-Identifier: Apache-2.0
"""The drafted tokens from the root to every row of a step."""

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from vllm_longspec.tree.state import TreeState

BLOCK = 64


@dataclass(frozen=True)
class Paths:
    """int32 tensors."""

    # [num_logits, max_depth] the tokens of a row's ancestors below the root, then its own. What is past the row's depth
    # is undefined.
    tokens: torch.Tensor
    # [num_logits] 0 for the root and for rows that hold no node
    depths: torch.Tensor


def gather_paths(ctx: LogitsContext, state: TreeState, max_depth: int) -> Paths:
    """The paths of all rows of a step or of some of its requests.

    A request may have any number of rows, from its root alone to `state.num_rows`: every prefix of a tree is a tree.

    Args:
        ctx: rows, requests and tokens: `expanded_idx_mapping`, `expanded_local_pos` and `input_ids`, each [num_logits].
        max_depth: depth of the deepest node of any tree.
    """
    num_logits = ctx.input_ids.shape[0]
    tokens = torch.empty(num_logits, max_depth, dtype=torch.int32, device=ctx.input_ids.device)
    depths = tokens.new_empty(num_logits)
    _gather_paths_kernel[(triton.cdiv(num_logits, BLOCK),)](
        ctx.expanded_idx_mapping,
        ctx.expanded_local_pos,
        ctx.input_ids,
        state.parent_rows,
        state.parent_rows.stride(0),
        state.depths,
        state.depths.stride(0),
        tokens,
        depths,
        num_logits,
        max_depth,
        BLOCK=BLOCK,
    )
    return Paths(tokens, depths)


class FollowsPaths:
    """For a subclass of one of vLLM's sampling states: takes the place of `replaced`, with its tensors."""

    def __init__(self, replaced: object, tree_state: TreeState, max_depth: int):
        vars(self).update(vars(replaced))
        self.tree_state = tree_state
        self.max_depth = max_depth

    def paths(self, ctx: LogitsContext) -> Paths:
        return gather_paths(ctx, self.tree_state, self.max_depth)


@triton.jit(do_not_specialize=["num_logits"])
def _gather_paths_kernel(
    expanded_idx_mapping_ptr,
    expanded_local_pos_ptr,
    input_ids_ptr,
    parent_rows_ptr,
    parent_rows_stride,
    depths_ptr,
    depths_stride,
    path_tokens_ptr,
    path_depths_ptr,
    num_logits,
    max_depth,
    BLOCK: tl.constexpr,
):
    logits_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = logits_row < num_logits
    req_state_idx = tl.load(expanded_idx_mapping_ptr + logits_row, mask=exists, other=0).to(tl.int64)
    row = tl.load(expanded_local_pos_ptr + logits_row, mask=exists, other=0)
    parent_rows_ptr += req_state_idx * parent_rows_stride
    root = logits_row - row

    parent = tl.load(parent_rows_ptr + row, mask=exists, other=-1)
    is_node = parent >= 0
    depth = tl.load(depths_ptr + req_state_idx * depths_stride + row, mask=is_node, other=0)
    tl.store(path_depths_ptr + logits_row, depth, mask=exists)
    path_tokens_ptr += logits_row * max_depth + depth - 1
    for i in range(0, max_depth):
        token = tl.load(input_ids_ptr + root + row, mask=is_node)
        tl.store(path_tokens_ptr - i, token, mask=is_node)
        row = tl.where(is_node, parent, 0)
        parent = tl.load(parent_rows_ptr + row, mask=is_node, other=-1)
        is_node = parent >= 0


@triton.jit
def token_at(
    committed_ptr,  # int32 [max_model_len] a request's prompt and emitted tokens
    path_ptr,  # int32 [max_depth] a row's path, from its first token on
    total_len,  # number of committed tokens
    position,  # less than total_len and the row's depth; negative for no token, -1
):
    """The token at `position` of a row's history."""
    is_committed = position < total_len
    committed = tl.load(committed_ptr + position, mask=is_committed & (position >= 0), other=-1)
    drafted = tl.load(path_ptr + position - total_len, mask=position >= total_len, other=0)
    return tl.where(is_committed, committed, drafted)
