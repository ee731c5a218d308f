# SPDX-License-Identifier: Apache-2.0
"""State of the trees while they are drafted level by level.

Nodes are numbered in draft order; row 0 is the root, row i + 1 is node i. Each level is added by `add_level`. Unless it
is the last, its nodes then run through the draft's layer, which calls `add_keys_values`.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.proposers.glide.window_attention import write_nodes
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.state import MASK_BITS


class GrowingTrees:
    def __init__(
        self,
        shape: TreeShape,
        root_positions: torch.Tensor,  # int64 [num_reqs]
        window_kv: torch.Tensor,  # [max_num_reqs, window, K or V, num_kv_heads, head_size], for its dtype and sizes
    ):
        num_reqs, num_nodes, device = root_positions.shape[0], shape.num_nodes, root_positions.device
        # Nodes of the last level do not run through the layer.
        max_rows = shape.num_rows - shape.levels[-1]
        self.shape = shape
        self.root_positions = root_positions
        # [num_reqs, num_nodes] token, cumulative log-probability, and number of the parent node, -1 for the root
        self.tokens = torch.empty(num_reqs, num_nodes, dtype=torch.int64, device=device)
        self.log_probs = torch.empty(num_reqs, num_nodes, dtype=torch.float32, device=device)
        self.parents = torch.empty(num_reqs, num_nodes, dtype=torch.int32, device=device)
        # [num_reqs, max_rows, K or V, num_kv_heads, head_size]
        self.node_kv = window_kv.new_empty(num_reqs, max_rows, *window_kv.shape[2:])
        # [num_reqs, max_rows, num_words] ancestor masks over rows
        num_words = triton.cdiv(max_rows, MASK_BITS)
        self.masks = torch.zeros(num_reqs, max_rows, num_words, dtype=torch.int32, device=device)
        self.masks[:, 0, 0] = 1

    def first_row(self, depth: int) -> int:
        return sum(map(self.shape.width, range(depth)))

    def add_keys_values(
        self,
        depth: int,
        key: torch.Tensor,  # [num_reqs * width, num_kv_heads, head_size]
        value: torch.Tensor,  # the same
    ) -> None:
        """Stores the K and V of the nodes at `depth`; depth 0 is the root."""
        first_row = self.first_row(depth)
        write_nodes(self.node_kv[:, first_row : first_row + self.shape.width(depth)], key, value)

    def add_level(
        self,
        depth: int,
        parents: torch.Tensor,  # int64 [num_reqs, width] within the level above
        choices: torch.Tensor,  # int64 [num_reqs, width]
        log_probs: torch.Tensor,  # float32 [num_reqs, width] cumulative
        token_ids: torch.Tensor | None,  # int64 [draft_vocab_size] token of each choice; None if choices are tokens
        max_position: int,  # positions are clamped; nodes past it are never verified
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the nodes at `depth`, 1 or more; the levels above must have been added.

        Returns the nodes' tokens and positions, each int64 [num_reqs * width].
        """
        num_reqs, width = parents.shape
        tokens = torch.empty(num_reqs * width, dtype=torch.int64, device=parents.device)
        positions = torch.empty_like(tokens)
        _add_level_kernel[(num_reqs,)](
            parents,
            choices,
            log_probs,
            token_ids,
            self.root_positions,
            tokens,
            positions,
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
            max_position,
            WRITES_MASKS=depth < self.shape.max_depth,
            NUM_WORDS=self.masks.shape[2],
            WIDTH_BLOCK=triton.next_power_of_2(width),
            num_warps=1,
        )
        return tokens, positions


# They differ between levels and must not trigger recompilation.
@triton.jit(do_not_specialize=["width", "num_nodes", "first_row", "first_parent_row", "depth", "max_position"])
def _add_level_kernel(
    parents_ptr,  # int64 [num_reqs, width]
    choices_ptr,  # int64 [num_reqs, width]
    log_probs_ptr,  # float32 [num_reqs, width]
    token_ids_ptr,  # int64 [draft_vocab_size] or None
    root_positions_ptr,  # int64 [num_reqs]
    level_tokens_ptr,  # int64 [num_reqs, width]
    level_positions_ptr,  # int64 [num_reqs, width]
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
    WRITES_MASKS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WIDTH_BLOCK)
    is_node = index < width
    in_level = request * width + index
    parent_row = first_parent_row + tl.load(parents_ptr + in_level, mask=is_node, other=0)
    token = tl.load(choices_ptr + in_level, mask=is_node, other=0)
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + token, mask=is_node, other=0)
    position = tl.minimum(tl.load(root_positions_ptr + request) + depth, max_position)
    tl.store(level_tokens_ptr + in_level, token, mask=is_node)
    tl.store(level_positions_ptr + in_level, position, mask=is_node)

    row = first_row + index
    in_tree = request * num_nodes + row - 1
    tl.store(tree_tokens_ptr + in_tree, token, mask=is_node)
    tl.store(tree_log_probs_ptr + in_tree, tl.load(log_probs_ptr + in_level, mask=is_node), mask=is_node)
    tl.store(tree_parents_ptr + in_tree, (parent_row - 1).to(tl.int32), mask=is_node)

    if WRITES_MASKS:
        masks_ptr += request * masks_request_stride
        for word in tl.static_range(NUM_WORDS):
            ancestors = tl.load(masks_ptr + parent_row * masks_row_stride + word, mask=is_node, other=0)
            own = tl.where(row // 32 == word, 1 << (row % 32), 0)
            tl.store(masks_ptr + row * masks_row_stride + word, ancestors | own, mask=is_node)
