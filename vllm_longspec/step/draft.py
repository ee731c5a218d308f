# SPDX-License-Identifier: Apache-2.0
"""Stage 1, draft: grow a tree of likely continuations, one level at a time, by beam search.

Level 1 is the best continuations of the root; each next level is the best of all (parent, token) pairs by cumulative
log-probability (LongSpec, arXiv:2502.17421, section 3.3). The draft's layer runs once per level, on the nodes of the
level before. Nodes are numbered in the order in which they are drawn; row = number + 1, row 0 is the root.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.triton_utils import triton
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_longspec.glide.best_children import best_children, best_children_in_pytorch
from vllm_longspec.glide.model import GlideForCausalLM
from vllm_longspec.glide.window_attention import window_attention
from vllm_longspec.interpreter import interpreting
from vllm_longspec.tree import MASK_BITS

# (query [num_tokens, num_heads, head_size], width of a level) -> attended, the same shape
CrossAttention = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass
class DraftedTree:
    """A batch of trees in draft order: level by level, parents before children."""

    tokens: torch.Tensor  # int64 [num_reqs, num_drafted]
    log_probs: torch.Tensor  # float32 [num_reqs, num_drafted] cumulative
    parents: torch.Tensor  # int32 [num_reqs, num_drafted] number of the parent node, -1 for the root


class _LevelAttention:
    """What the nodes of one level attend to: the window and their ancestors, and the target's cache."""

    def __init__(self, trees: "_GrowingTrees", first_row: int, width: int, depth: int, cross_attention: CrossAttention):
        self.trees = trees
        self.first_row = first_row
        self.width = width
        self.depth = depth
        self._cross_attention = cross_attention

    def self_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        trees = self.trees
        num_reqs = trees.root_positions.shape[0]
        level = slice(self.first_row, self.first_row + self.width)
        trees.node_kv[:, level, 0] = key.view(num_reqs, self.width, *key.shape[1:])
        trees.node_kv[:, level, 1] = value.view(num_reqs, self.width, *value.shape[1:])
        return window_attention(
            query.view(num_reqs, self.width, *query.shape[1:]),
            trees.window_kv,
            trees.slots,
            trees.root_positions,
            trees.node_kv,
            trees.masks,
            self.first_row,
            self.depth,
            query.shape[-1] ** -0.5,
        ).view(query.shape)

    def cross_attention(self, query: torch.Tensor) -> torch.Tensor:
        return self._cross_attention(query, self.width)


class _GrowingTrees:
    """What a level reads of the levels before it."""

    def __init__(
        self,
        window_kv: torch.Tensor,
        slots: torch.Tensor,
        root_positions: torch.Tensor,
        levels: tuple[int, ...],
    ):
        num_reqs = slots.shape[0]
        # The last level's nodes are only ever drawn, never run through the layer.
        max_rows = 1 + sum(levels[:-1])
        num_words = triton.cdiv(max_rows, MASK_BITS)
        self.window_kv = window_kv
        self.slots = slots
        self.root_positions = root_positions
        # [num_reqs, max_rows, K or V, num_kv_heads, head_size]
        self.node_kv = window_kv.new_empty(num_reqs, max_rows, *window_kv.shape[2:])
        # [num_reqs, max_rows, num_words] ancestor masks over rows in draft order
        self.masks = torch.zeros(num_reqs, max_rows, num_words, dtype=torch.int32, device=slots.device)
        self.masks[:, 0, 0] = 1
        rows = torch.arange(max_rows, device=slots.device)
        # [max_rows, num_words] the bit of each row; bit 31 becomes the sign when int64 narrows to int32, as it should
        self.row_bits = torch.zeros(max_rows, num_words, dtype=torch.int32, device=slots.device)
        self.row_bits[rows, rows // MASK_BITS] = (1 << (rows % MASK_BITS)).to(torch.int32)

    def add_level(self, parent_rows: torch.Tensor, first_row: int) -> None:
        """Masks of a new level: its parents' with its own bit."""
        width = parent_rows.shape[1]
        level = slice(first_row, first_row + width)
        index = parent_rows[:, :, None].expand(-1, -1, self.masks.shape[2])
        self.masks[:, level] = self.masks.gather(1, index) | self.row_bits[level]


def grow_trees(
    model: GlideForCausalLM,
    levels: tuple[int, ...],
    root_tokens: torch.Tensor,  # int64 [num_reqs]
    root_positions: torch.Tensor,  # int64 [num_reqs]
    slots: torch.Tensor,  # int64 [num_reqs]
    window_kv: torch.Tensor,  # [max_num_reqs, window, K or V, num_kv_heads, head_size], up to date
    cross_attention: CrossAttention,
    max_position: int,  # the rotary embedding knows none beyond
) -> DraftedTree:
    """Drafts a tree of shape `levels` for every request."""
    num_reqs = root_tokens.shape[0]
    trees = _GrowingTrees(window_kv, slots, root_positions, levels)

    tokens = root_tokens[:, None]
    log_probs = torch.zeros(num_reqs, 1, dtype=torch.float32, device=slots.device)
    # [max_depth, num_reqs] Nodes past the last position are cut off before they are verified; here they must only not
    # be out of range.
    depths = torch.arange(len(levels), device=slots.device)[:, None]
    positions_by_depth = (root_positions + depths).clamp(max=max_position)
    drawn: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    first_row, width = 0, 1
    for depth, next_width in enumerate(levels):
        attention = _LevelAttention(trees, first_row, width, depth, cross_attention)
        # vLLM's rotary kernels read positions one after the other, so an expanded view would not do.
        positions = positions_by_depth[depth, :, None].expand(-1, width).contiguous().flatten()
        hidden = model(tokens.flatten(), positions, attention)
        parents, tokens, log_probs = _best_children(model, hidden, log_probs, next_width)
        parent_rows = first_row + parents
        drawn.append((tokens, log_probs, parent_rows - 1))
        first_row, width = first_row + width, next_width
        if depth < len(levels) - 1:
            trees.add_level(parent_rows, first_row)
    return DraftedTree(
        tokens=torch.cat([level[0] for level in drawn], dim=1),
        log_probs=torch.cat([level[1] for level in drawn], dim=1),
        parents=torch.cat([level[2] for level in drawn], dim=1).to(torch.int32),
    )


def _best_children(
    model: GlideForCausalLM,
    hidden: torch.Tensor,  # [num_reqs * width, hidden_size]
    log_probs: torch.Tensor,  # [num_reqs, width] cumulative, of the parents
    num_children: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `num_children` (parent, token) pairs of every request.

    Returns parent within the level, token and cumulative log-probability, each [num_reqs, num_children].
    """
    num_reqs, width = log_probs.shape
    chosen = []
    choose = best_children_in_pytorch if interpreting() else best_children
    # Logits over the vocabulary are large; a slice of the batch at a time bounds them as vLLM does.
    chunk = max(1, get_max_chunk_logits(model.draft_vocab_size) // width)
    for start in range(0, num_reqs, chunk):
        logits = model.compute_logits(hidden[start * width : (start + chunk) * width])
        parents, tokens, best = choose(logits, log_probs[start : start + chunk], num_children)
        chosen.append((parents, model.to_token_ids(tokens), best))
    if len(chosen) == 1:
        return chosen[0]
    parents, tokens, best = (torch.cat(column) for column in zip(*chosen, strict=True))
    return parents, tokens, best
