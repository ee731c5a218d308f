# SPDX-License-Identifier: Apache-2.0
"""Stage "lay out": gives the rows of trees their true positions, and the batch its ancestor masks.

vLLM lays a request's draft tokens out one after the other: row i gets the KV slot of linear position root + i. The
token's true position is root + depth, and that is what RoPE and the sampler must see. It is written over the linear one
once the slots have been computed.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.state import TreeState


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

    req_state_idx = tl.load(idx_mapping_ptr + batch_idx)
    root_position = prefix_len.to(tl.int64)
    row = tl.arange(0, ROWS)
    depth = tl.load(depths_ptr + req_state_idx * num_rows + row, mask=row < query_len, other=0)
    tl.store(positions_ptr + query_start + row, root_position + depth, mask=row < query_len)
    # Rows that hold no token are run like all others, so their embedding must be there.
    token = tl.load(input_ids_ptr + query_start + row, mask=row < query_len, other=0)
    tl.store(input_ids_ptr + query_start + row, tl.maximum(token, 0), mask=row < query_len)

    element = tl.arange(0, MASK_ELEMENTS)
    mask = tl.load(ancestor_masks_ptr + req_state_idx * mask_elements + element, mask=element < mask_elements)
    tl.store(batch_ancestor_masks_ptr + batch_idx * mask_elements + element, mask, mask=element < mask_elements)


def lay_out_trees(
    state: TreeState,
    batch: TreeBatch,
    num_tree_reqs: int,
    # [num_reqs] int64, batch position -> req_state_idx; the tree requests lead the batch
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
    num_words = state.ancestor_masks.shape[2]
    _lay_out_trees_kernel[(seq_lens.shape[0],)](
        input_ids,
        positions,
        query_start_loc,
        seq_lens,
        idx_mapping,
        state.depths,
        state.ancestor_masks,
        batch.ancestor_masks,
        batch.prefix_lens,
        num_tree_reqs,
        state.num_rows,
        state.num_rows * num_words,
        ROWS=triton.next_power_of_2(state.num_rows),
        MASK_ELEMENTS=triton.next_power_of_2(state.num_rows * num_words),
    )
