# SPDX-License-Identifier: Apache-2.0
"""Stage "draft": beam search.

Every level is the best of all (parent, token) pairs by cumulative log-probability (LongSpec, arXiv:2502.17421, section
3.3), which at temperatures above 0 includes the noise of the target's draws (`vllm_longspec/tree/coupling.py`). The
draft's layer runs once per level, on the nodes of the level before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.attention_splits import AttentionSplits
from vllm_longspec.proposers.glide.fp8_inputs import some_rows
from vllm_longspec.proposers.glide.growing_trees import GrowingTrees
from vllm_longspec.proposers.glide.model import GlideForCausalLM
from vllm_longspec.proposers.glide.rotation import RotaryTable
from vllm_longspec.proposers.glide.window import TokenRows
from vllm_longspec.proposers.glide.window_attention import window_attention, write_window
from vllm_longspec.tree.best_children import best_of_rows, best_of_rows_in_pytorch
from vllm_longspec.tree.coupling import LevelNoise, TargetNoise
from vllm_longspec.tree.shape import TreeShape

# (query [num_tokens, num_heads, head_size], width and depth of the level) -> output, the same shape
CrossAttention = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass
class _LevelAttention:
    """Attention of the nodes of one level: a `GlideAttention`."""

    trees: GrowingTrees
    depth: int
    window_kv: torch.Tensor
    idx_mapping: torch.Tensor
    attend_target: CrossAttention
    scale: float  # factor of the scores

    @property
    def width(self) -> int:
        return self.trees.shape.width(self.depth)

    def self_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        table: RotaryTable | None,
    ) -> torch.Tensor | AttentionSplits:
        def by_request(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (-1, self.width))

        attended = window_attention(
            by_request(query),
            by_request(key),
            by_request(value),
            self.window_kv,
            self.idx_mapping,
            self.trees.root_positions,
            by_request(positions),
            table,
            self.trees.node_kv,
            self.trees.masks,
            self.trees.first_row(self.depth),
            self.depth,
            self.scale,
        )
        return attended if isinstance(attended, AttentionSplits) else attended.view(query.shape)

    def cross_attention(self, query: torch.Tensor) -> torch.Tensor:
        return self.attend_target(query, self.width, self.depth)


@dataclass
class _RootAttention(_LevelAttention):
    """Attention of the roots, behind which the settled tokens come that the windows lack."""

    expanded_idx_mapping: torch.Tensor  # of `TokenRows`

    def self_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        table: RotaryTable | None,
    ) -> torch.Tensor | AttentionSplits:
        # Roots are skipped, not sliced off: Triton would compile the kernel again for addresses of another alignment.
        write_window(self.window_kv, key, value, self.expanded_idx_mapping, positions, table)
        end = self.idx_mapping.shape[0]
        return super().self_attention(query[:end], key[:end], value[:end], positions[:end], table)


def grow_trees(
    model: GlideForCausalLM,
    shape: TreeShape,
    rows: TokenRows,  # the roots, then the settled tokens that the windows lack
    root_positions: torch.Tensor,  # int64 [num_reqs]
    idx_mapping: torch.Tensor,  # int64 [num_reqs]
    window_kv: torch.Tensor,  # [max_num_reqs, window, K or V, num_kv_heads, head_size], brought up to date
    cross_attention: CrossAttention,
    max_position: int,  # the last one of the rotary embedding
    noise: TargetNoise | None = None,
) -> GrowingTrees:
    trees = GrowingTrees(shape, root_positions, window_kv, max_position)
    tokens, positions, log_probs = rows.tokens, rows.positions, trees.plant()
    for depth, width in enumerate(shape.levels, start=1):
        level = trees, depth - 1, window_kv, idx_mapping, cross_attention, model.multipliers.attention
        attention = _RootAttention(*level, rows.expanded_idx_mapping) if depth == 1 else _LevelAttention(*level)
        hidden = model(tokens, positions, attention)
        level_noise = None if noise is None else LevelNoise(noise, idx_mapping, root_positions, depth - 1)
        choices, choice_log_probs = _best_of_nodes(model, hidden, log_probs, width, level_noise)
        tokens, positions, log_probs = trees.add_level(depth, choices, choice_log_probs, model.token_ids)
    return trees


def _best_of_nodes(
    model: GlideForCausalLM,
    hidden: torch.Tensor | QuantizedActivation,  # [num_reqs * width, hidden_size]
    log_probs: torch.Tensor,  # [num_reqs, width] cumulative, of the parents
    num_children: int,
    noise: LevelNoise | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `best_of_rows` does; tokens are choices of the draft's vocabulary."""
    num_reqs, width = log_probs.shape
    chosen = []
    choose = best_of_rows_in_pytorch if interpreting() else best_of_rows
    # Bounds the memory of logits as vLLM does.
    chunk = max(1, get_max_chunk_logits(model.draft_vocab_size) // width)
    for start in range(0, num_reqs, chunk):
        logits = model.compute_logits(some_rows(hidden, slice(start * width, (start + chunk) * width)))
        chosen.append(
            choose(
                logits,
                log_probs[start : start + chunk],
                num_children,
                None if noise is None else noise.of_requests(start, start + chunk),
                model.token_ids,
            )
        )
    if len(chosen) == 1:
        return chosen[0]
    choices, choice_log_probs = (torch.cat(column) for column in zip(*chosen, strict=True))
    return choices, choice_log_probs
