# SPDX-License-Identifier: Apache-2.0
"""State of the trees while they are drafted level by level.

Nodes are numbered in draft order; row 0 is the root, row i + 1 is node i. Each level is added by `add_level`. Unless it
is the last, its nodes then run through the draft's layer, whose attention writes their K and V into `node_kv`.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.tree.best_children import best_of_request, request_arguments
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.state import MASK_BITS

ROOT_BLOCK = 128


class GrowingTrees:
    def __init__(
        self,
        shape: TreeShape,
        root_positions: torch.Tensor,  # int64 [num_reqs]
        window_kv: torch.Tensor,  # [max_num_reqs, window, K or V, num_kv_heads, head_size], for its dtype and sizes
        max_position: int,  # positions are clamped; nodes past it are never verified
    ):
        num_reqs, num_nodes, device = root_positions.shape[0], shape.num_nodes, root_positions.device
        # Nodes of the last level do not run through the layer.
        max_rows = shape.num_rows - shape.levels[-1]
        self.shape = shape
        self.root_positions = root_positions
        self.max_position = max_position
        # [num_reqs, num_nodes] token, cumulative log-probability, and number of the parent node, -1 for the root
        self.tokens = torch.empty(num_reqs, num_nodes, dtype=torch.int64, device=device)
        self.log_probs = torch.empty(num_reqs, num_nodes, dtype=torch.float32, device=device)
        self.parents = torch.empty(num_reqs, num_nodes, dtype=torch.int32, device=device)
        # [num_reqs, max_rows, K or V, num_kv_heads, head_size]
        self.node_kv = window_kv.new_empty(num_reqs, max_rows, *window_kv.shape[2:])
        # [num_reqs, max_rows, num_words] ancestor masks over rows
        num_words = triton.cdiv(max_rows, MASK_BITS)
        self.masks = torch.empty(num_reqs, max_rows, num_words, dtype=torch.int32, device=device)

    def plant(self) -> torch.Tensor:
        """Adds the roots. Returns their log-probabilities, float32 [num_reqs, 1]."""
        num_reqs = self.root_positions.shape[0]
        log_probs = torch.empty(num_reqs, 1, dtype=torch.float32, device=self.root_positions.device)
        _plant_kernel[(triton.cdiv(num_reqs, ROOT_BLOCK),)](
            log_probs,
            self.masks,
            self.masks.stride(0),
            num_reqs,
            self.masks.shape[2],
            BLOCK=ROOT_BLOCK,
        )
        return log_probs

    def first_row(self, depth: int) -> int:
        return sum(map(self.shape.width, range(depth)))

    def add_level(
        self,
        depth: int,
        choices: torch.Tensor,  # int64 [num_reqs * width above, num_kept] the best of each parent, as `best_of_rows`
        choice_log_probs: torch.Tensor,  # float32 [num_reqs * width above, num_kept] cumulative
        token_ids: torch.Tensor | None,  # int64 [draft_vocab_size] token of each choice; None if choices are tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds the best of these as the nodes at `depth`, 1 or more; the levels above must have been added.

        Returns the nodes' tokens and positions, each int64 [num_reqs * width], and their cumulative log-probabilities,
        float32 [num_reqs, width].
        """
        num_reqs, width = self.root_positions.shape[0], self.shape.width(depth)
        tokens = torch.empty(num_reqs * width, dtype=torch.int64, device=choices.device)
        positions = torch.empty_like(tokens)
        log_probs = torch.empty(num_reqs, width, dtype=torch.float32, device=choices.device)
        num_kept = choices.shape[1]
        _add_level_kernel[(num_reqs,)](
            choices,
            choice_log_probs,
            token_ids,
            self.root_positions,
            tokens,
            positions,
            log_probs,
            self.tokens,
            self.log_probs,
            self.parents,
            self.masks,
            *self.masks.stride()[:2],
            width,
            self.tokens.shape[1],
            self.first_row(depth),
            self.first_row(depth - 1),
            depth,
            self.max_position,
            num_kept,
            # Nodes of the last level have no rows.
            self.masks.shape[2] if depth < self.shape.max_depth else 0,
            **request_arguments(self.shape.width(depth - 1), num_kept, width),
        )
        return tokens, positions, log_probs


# They differ between batches and trees and must not trigger recompilation.
@triton.jit(do_not_specialize=["masks_request_stride", "num_reqs", "num_words"])
def _plant_kernel(
    log_probs_ptr,  # float32 [num_reqs, 1]
    masks_ptr,  # int32 [num_reqs, max_rows, num_words]
    masks_request_stride,
    num_reqs,
    num_words,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_request = request < num_reqs
    tl.store(log_probs_ptr + request, tl.zeros([BLOCK], tl.float32), mask=is_request)
    for word in range(0, num_words):
        # A loop's index is no tensor in the interpreter.
        own = (tl.zeros([BLOCK], tl.int32) + word == 0).to(tl.int32)
        tl.store(masks_ptr + request * masks_request_stride + word, own, mask=is_request)


# They differ between levels and trees and must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        *("masks_request_stride", "masks_row_stride", "width", "num_nodes", "first_row", "first_parent_row", "depth"),
        *("max_position", "num_kept", "num_words", "num_candidates"),
    ]
)
def _add_level_kernel(
    choices_ptr,  # int64 [num_reqs, num_candidates]
    choice_log_probs_ptr,  # float32 [num_reqs, num_candidates]
    token_ids_ptr,  # int64 [draft_vocab_size] or None
    root_positions_ptr,  # int64 [num_reqs]
    level_tokens_ptr,  # int64 [num_reqs, width]
    level_positions_ptr,  # int64 [num_reqs, width]
    level_log_probs_ptr,  # float32 [num_reqs, width]
    tree_tokens_ptr,  # int64 [num_reqs, num_nodes]
    tree_log_probs_ptr,  # float32 [num_reqs, num_nodes]
    tree_parents_ptr,  # int32 [num_reqs, num_nodes]
    masks_ptr,  # int32 [num_reqs, max_rows, num_words]
    masks_request_stride,
    masks_row_stride,
    width,
    num_nodes,
    first_row,
    first_parent_row,
    depth,
    max_position,
    num_kept,
    num_words,  # of the level's masks, 0 if they are not written
    num_candidates,
    CANDIDATES: tl.constexpr,
    CHILDREN_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHILDREN_BLOCK)
    is_node = index < width
    in_level = request * width + index
    parent, token, log_prob = best_of_request(
        choices_ptr,
        choice_log_probs_ptr,
        request,
        num_kept,
        width,
        num_candidates,
        CANDIDATES,
        CHILDREN_BLOCK,
    )
    parent_row = first_parent_row + parent
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + token, mask=is_node, other=0)
    position = tl.minimum(tl.load(root_positions_ptr + request) + depth, max_position)
    tl.store(level_tokens_ptr + in_level, token, mask=is_node)
    tl.store(level_positions_ptr + in_level, position, mask=is_node)
    tl.store(level_log_probs_ptr + in_level, log_prob, mask=is_node)

    row = first_row + index
    in_tree = request * num_nodes + row - 1
    tl.store(tree_tokens_ptr + in_tree, token, mask=is_node)
    tl.store(tree_log_probs_ptr + in_tree, log_prob, mask=is_node)
    tl.store(tree_parents_ptr + in_tree, (parent_row - 1).to(tl.int32), mask=is_node)

    masks_ptr += request * masks_request_stride
    for word in range(0, num_words):
        ancestors = tl.load(masks_ptr + parent_row * masks_row_stride + word, mask=is_node, other=0)
        own = tl.where(row // 32 == word, 1 << (row % 32), 0)
        tl.store(masks_ptr + row * masks_row_stride + word, ancestors | own, mask=is_node)
