# SPDX-License-Identifier: Apache-2.0
"""The tree of every request, indexed by req_state_idx, as in vLLM's `RequestState`.

A tree has `num_rows = 1 + num_nodes` rows. Row 0 is the root, the last sampled token, whose K and V are not in the
target's cache yet. Rows 1.. are the drafted nodes in the order of `vllm_longspec/tree/order.py`: every prefix of them
is a tree. The rows of a new request hold no node until its first draft; they are no row's children, so the walk does
not reach them.
"""

from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv

MASK_BITS = 32

# The token of a row that holds no node. vLLM pads lists of draft tokens with it.
NO_TOKEN = -1


@dataclass
class TreeState:
    """int32 tensors but for one, allocated once for the engine because CUDA graphs keep their addresses."""

    log_cutoffs: torch.Tensor  # float32 [max_num_reqs] of `vllm_longspec/tree/coupling.py`
    parent_rows: torch.Tensor  # [max_num_reqs, num_rows] -1 for the root and for rows that hold no node
    depths: torch.Tensor  # [max_num_reqs, num_rows] 0 for the root
    # [max_num_reqs, num_rows, num_words] bit r is set if row r is this row or an ancestor of it
    ancestor_masks: torch.Tensor

    @classmethod
    def allocate(cls, max_num_reqs: int, num_nodes: int, device: torch.device) -> "TreeState":
        num_rows = 1 + num_nodes

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        ancestor_masks = zeros(max_num_reqs, num_rows, cdiv(num_rows, MASK_BITS))
        # Before the first draft the root is the only ancestor of every row.
        ancestor_masks[:, :, 0] = 1
        return cls(
            log_cutoffs=torch.full((max_num_reqs,), float("-inf"), device=device),
            parent_rows=zeros(max_num_reqs, num_rows) - 1,
            depths=zeros(max_num_reqs, num_rows),
            ancestor_masks=ancestor_masks,
        )

    def add_requests(
        self,
        req_state_indices: torch.Tensor,  # [num_added] int64
        log_cutoffs: torch.Tensor,  # [num_added] float32
    ) -> None:
        """Sets up the rows of new requests, which hold no node until the first draft."""
        self.log_cutoffs[req_state_indices] = log_cutoffs
        self.parent_rows.index_fill_(0, req_state_indices, -1)

    @property
    def num_rows(self) -> int:
        return self.parent_rows.shape[1]
