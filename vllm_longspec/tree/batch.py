# SPDX-License-Identifier: Apache-2.0
"""The trees of the current step, indexed by batch position, as in vLLM's `InputBatch`."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.state import TreeState


@dataclass
class TreeBatch:
    """int32 tensors, allocated once for the engine because CUDA graphs keep their addresses."""

    ancestor_masks: torch.Tensor  # [max_num_reqs, num_rows, num_words] as in `TreeState`
    prefix_lens: torch.Tensor  # [max_num_reqs] cached tokens before the root
    path_rows: torch.Tensor  # [max_num_reqs, max_depth + 1] rows of the last walk; column 0 is the root

    @classmethod
    def allocate(cls, state: TreeState, max_depth: int) -> "TreeBatch":
        max_num_reqs = len(state.parent_rows)
        return cls(
            ancestor_masks=torch.zeros_like(state.ancestor_masks),
            prefix_lens=state.parent_rows.new_zeros(max_num_reqs),
            path_rows=state.parent_rows.new_zeros(max_num_reqs, max_depth + 1),
        )
