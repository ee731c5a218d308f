# SPDX-License-Identifier: Apache-2.0
"""The trees of the batch in flight, by batch position, like vLLM's `InputBatch`."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.state import TreeState


@dataclass
class TreeBatch:
    """All tensors are int32 and live as long as the engine, so kernels and CUDA graphs can hold on to them."""

    # [max_num_reqs, num_rows, num_words] as in `TreeState`
    ancestor_masks: torch.Tensor
    # [max_num_reqs] cached tokens before the root
    prefix_lens: torch.Tensor
    # [max_num_reqs, max_depth + 1] rows of the last walk; column 0 is the root
    path_rows: torch.Tensor

    @classmethod
    def allocate(cls, state: TreeState, max_depth: int) -> "TreeBatch":
        return cls(
            ancestor_masks=torch.zeros_like(state.ancestor_masks),
            prefix_lens=torch.zeros_like(state.takes_chain),
            path_rows=state.takes_chain.new_zeros(len(state.takes_chain), max_depth + 1),
        )
