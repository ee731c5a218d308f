# SPDX-License-Identifier: Apache-2.0
"""The trees of the running requests: how a tree is represented, where it is kept, how a batch sees it.

A tree has `num_rows = 1 + num_nodes` rows. Row 0 is the root, the last sampled token, whose K and V are not in the
target's cache yet. Rows 1.. are the drafted nodes, highest cumulative log-probability first, parents before children,
so every prefix of the list is a tree (see `vllm_longspec/tree/order.py`). A chain is shorter than that: the rows after
it hold no node, and as nothing is their parent the walk never comes to them.

vLLM lays a request's draft tokens out one after the other: row i gets the KV slot of linear position root + i. The
token's true position is root + depth, and that is what RoPE and the sampler must see. `lay_out_trees` writes it over
the linear one once the slots have been computed.
"""

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

MASK_BITS = 32

# The token of a row that holds no node. vLLM's scheduler takes it for padding: it ends the draft tokens that a grammar
# is advanced over.
NO_TOKEN = -1


@dataclass
class TreeState:
    """The tree of every request that runs, by request-state slot, like vLLM's `RequestState`.

    All tensors are int32 and live as long as the engine, so kernels and CUDA graphs can hold on to them.
    """

    # [max_num_reqs] whether the request takes a chain (1) instead of a tree (0)
    takes_chain: torch.Tensor
    # [max_num_reqs, num_rows] row of the parent; -1 for row 0 and for rows that hold no node
    parent_rows: torch.Tensor
    # [max_num_reqs, num_rows] 0 for the root
    depths: torch.Tensor
    # [max_num_reqs, num_rows, num_words] bit r is set when row r is this row or an ancestor of it
    ancestor_masks: torch.Tensor
    # [max_num_reqs, num_rows, num_words] the masks of the batch in flight, by batch position
    batch_ancestor_masks: torch.Tensor
    # [max_num_reqs] cached tokens before the root, by batch position
    batch_prefix_lens: torch.Tensor
    # [max_num_reqs, max_depth + 1] rows of the last walk, by batch position; column 0 is the root
    batch_path_rows: torch.Tensor

    @classmethod
    def allocate(cls, max_num_reqs: int, num_nodes: int, max_depth: int, device: torch.device) -> "TreeState":
        num_rows = 1 + num_nodes
        num_words = triton.cdiv(num_rows, MASK_BITS)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        ancestor_masks = zeros(max_num_reqs, num_rows, num_words)
        # Until a request has been drafted for, its rows know no ancestor but the root.
        ancestor_masks[:, :, 0] = 1
        return cls(
            takes_chain=zeros(max_num_reqs),
            parent_rows=zeros(max_num_reqs, num_rows) - 1,
            depths=zeros(max_num_reqs, num_rows),
            ancestor_masks=ancestor_masks,
            batch_ancestor_masks=zeros(max_num_reqs, num_rows, num_words),
            batch_prefix_lens=zeros(max_num_reqs),
            batch_path_rows=zeros(max_num_reqs, max_depth + 1),
        )

    def add_requests(
        self,
        slots: torch.Tensor,  # [num_added] int64
        takes_chain: torch.Tensor,  # [num_added] int32
    ) -> None:
        """Lets new requests into their slots: until they are drafted for, their rows hold no node."""
        self.takes_chain[slots] = takes_chain
        self.parent_rows.index_fill_(0, slots, -1)

    @property
    def num_rows(self) -> int:
        return self.parent_rows.shape[1]


@triton.jit
def _lay_out_trees_kernel(
    input_ids_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    query_start_loc_ptr,  # [num_reqs + 1]
    seq_lens_ptr,  # [num_reqs]
    idx_mapping_ptr,  # [num_reqs]
    depths_ptr,  # [max_num_reqs, num_rows]
    ancestor_masks_ptr,  # [max_num_reqs, num_rows, num_words]
    batch_ancestor_masks_ptr,  # [max_num_reqs, num_rows, num_words]
    batch_prefix_lens_ptr,  # [max_num_reqs]
    num_tree_reqs,
    num_rows,
    mask_elements,  # num_rows * num_words
    ROWS: tl.constexpr,
    MASK_ELEMENTS: tl.constexpr,
):
    batch_idx = tl.program_id(0)
    query_start = tl.load(query_start_loc_ptr + batch_idx)
    query_len = tl.load(query_start_loc_ptr + batch_idx + 1) - query_start
    prefix_len = tl.load(seq_lens_ptr + batch_idx) - query_len
    tl.store(batch_prefix_lens_ptr + batch_idx, prefix_len)
    if batch_idx >= num_tree_reqs:
        return

    slot = tl.load(idx_mapping_ptr + batch_idx)
    root_position = prefix_len.to(tl.int64)
    row = tl.arange(0, ROWS)
    depth = tl.load(depths_ptr + slot * num_rows + row, mask=row < query_len, other=0)
    tl.store(positions_ptr + query_start + row, root_position + depth, mask=row < query_len)
    # Rows that hold no token are run like all others, so their embedding must be there.
    token = tl.load(input_ids_ptr + query_start + row, mask=row < query_len, other=0)
    tl.store(input_ids_ptr + query_start + row, tl.maximum(token, 0), mask=row < query_len)

    element = tl.arange(0, MASK_ELEMENTS)
    mask = tl.load(ancestor_masks_ptr + slot * mask_elements + element, mask=element < mask_elements)
    tl.store(batch_ancestor_masks_ptr + batch_idx * mask_elements + element, mask, mask=element < mask_elements)


def lay_out_trees(
    tree: TreeState,
    num_tree_reqs: int,
    # [num_reqs] int64, batch position -> slot; the tree requests lead the batch
    idx_mapping: torch.Tensor,
    # [num_padded_reqs + 1] int32
    query_start_loc: torch.Tensor,
    # [num_padded_reqs] int32, computed tokens plus the query's; 0 for requests that only pad a CUDA graph's batch
    seq_lens: torch.Tensor,
    # [num_tokens] int32, overwritten where a tree request's row has no token
    input_ids: torch.Tensor,
    # [num_tokens] int64, overwritten in the tree requests' rows
    positions: torch.Tensor,
) -> None:
    """Gives every row of the leading `num_tree_reqs` requests its true position and publishes their ancestor masks.

    The length of the prefix is published for every request, so that one which only pads the batch has none to attend.
    A request may hold fewer rows than its tree (a token budget or `max_model_len` cut the list); a prefix of the list
    is a tree of its own, so nothing else changes.
    """
    num_words = tree.ancestor_masks.shape[2]
    _lay_out_trees_kernel[(seq_lens.shape[0],)](
        input_ids,
        positions,
        query_start_loc,
        seq_lens,
        idx_mapping,
        tree.depths,
        tree.ancestor_masks,
        tree.batch_ancestor_masks,
        tree.batch_prefix_lens,
        num_tree_reqs,
        tree.num_rows,
        tree.num_rows * num_words,
        ROWS=triton.next_power_of_2(tree.num_rows),
        MASK_ELEMENTS=triton.next_power_of_2(tree.num_rows * num_words),
    )
