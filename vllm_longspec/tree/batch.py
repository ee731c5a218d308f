# SPDX-License-Identifier: Apache-2.0
"""The trees of the current step, indexed by batch position, as in vLLM's `InputBatch`."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.state import TreeState


@dataclass
class TreeBatch:
    """int32 tensors but for one, allocated once for the engine because CUDA graphs keep their addresses."""

    idx_mapping: torch.Tensor  # int64 [max_num_reqs] req_state_idx; -1 for requests without a tree and for padding
    ancestor_masks: torch.Tensor  # [max_num_reqs, num_rows, num_words] as in `TreeState`
    prefix_lens: torch.Tensor  # [max_num_reqs] cached tokens before the root
    path_rows: torch.Tensor  # [max_num_reqs, max_depth + 1] rows of the last walk; column 0 is the root

    @classmethod
    def allocate(cls, state: TreeState, max_depth: int) -> "TreeBatch":
        max_num_reqs = len(state.parent_rows)
        return cls(
            idx_mapping=torch.full_like(state.parent_rows[:, 0], -1, dtype=torch.int64),
            ancestor_masks=torch.zeros_like(state.ancestor_masks),
            prefix_lens=state.parent_rows.new_zeros(max_num_reqs),
            path_rows=state.parent_rows.new_zeros(max_num_reqs, max_depth + 1),
        )
