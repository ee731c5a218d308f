# SPDX-License-Identifier: Apache-2.0
"""The tree of every running request, by req_state_idx, like vLLM's `RequestState`.

A tree has `num_rows = 1 + num_nodes` rows. Row 0 is the root, the last sampled token, whose K and V are not in the
target's cache yet. Rows 1.. are the drafted nodes, highest cumulative log-probability first, parents before children,
so every prefix of the list is a tree (see `vllm_longspec/tree/order.py`). A chain is shorter than that: the rows after
it hold no node, and as nothing is their parent the walk never reaches them.
"""

from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv

MASK_BITS = 32

# The token of a row that holds no node. vLLM's scheduler takes it for padding: it ends the draft tokens that a grammar
# is advanced over.
NO_TOKEN = -1


@dataclass
class TreeState:
    """All tensors are int32 and live as long as the engine, so kernels and CUDA graphs can hold on to them."""

    # [max_num_reqs] whether the request takes a chain (1) instead of a tree (0)
    takes_chain: torch.Tensor
    # [max_num_reqs, num_rows] row of the parent; -1 for row 0 and for rows that hold no node
    parent_rows: torch.Tensor
    # [max_num_reqs, num_rows] 0 for the root
    depths: torch.Tensor
    # [max_num_reqs, num_rows, num_words] bit r is set when row r is this row or an ancestor of it
    ancestor_masks: torch.Tensor

    @classmethod
    def allocate(cls, max_num_reqs: int, num_nodes: int, device: torch.device) -> "TreeState":
        num_rows = 1 + num_nodes

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        ancestor_masks = zeros(max_num_reqs, num_rows, cdiv(num_rows, MASK_BITS))
        # Until a request has been drafted for, its rows know no ancestor but the root.
        ancestor_masks[:, :, 0] = 1
        return cls(
            takes_chain=zeros(max_num_reqs),
            parent_rows=zeros(max_num_reqs, num_rows) - 1,
            depths=zeros(max_num_reqs, num_rows),
            ancestor_masks=ancestor_masks,
        )

    def add_requests(
        self,
        req_state_indices: torch.Tensor,  # [num_added] int64
        takes_chain: torch.Tensor,  # [num_added] int32
    ) -> None:
        """Lets new requests in: until they are drafted for, their rows hold no node."""
        self.takes_chain[req_state_indices] = takes_chain
        self.parent_rows.index_fill_(0, req_state_indices, -1)

    @property
    def num_rows(self) -> int:
        return self.parent_rows.shape[1]
