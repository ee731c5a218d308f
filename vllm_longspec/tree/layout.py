# SPDX-License-Identifier: Apache-2.0
"""Stage "lay out": gives the rows of trees their true positions, and the batch its ancestor masks.

vLLM gives row i of a request the KV slot and position of the linear position root + i. RoPE and the sampler must get
the true position, root + depth, which replaces the linear one after the slot mapping has been computed.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.state import TreeState


# It differs between batches and must not trigger recompilation.
@triton.jit(do_not_specialize=["num_tree_reqs"])
def _lay_out_trees_kernel(
    input_ids_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    query_start_loc_ptr,  # [num_reqs + 1]
    seq_lens_ptr,  # [num_reqs]
    idx_mapping_ptr,  # [num_reqs]
    depths_ptr,  # [max_num_reqs, num_rows]
    ancestor_masks_ptr,  # [max_num_reqs, num_rows, num_words]
    batch_idx_mapping_ptr,  # [max_num_reqs]
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
        tl.store(batch_idx_mapping_ptr + batch_idx, -1)
        return

    req_state_idx = tl.load(idx_mapping_ptr + batch_idx)
    tl.store(batch_idx_mapping_ptr + batch_idx, req_state_idx)
    root_position = prefix_len.to(tl.int64)
    row = tl.arange(0, ROWS)
    depth = tl.load(depths_ptr + req_state_idx * num_rows + row, mask=row < query_len, other=0)
    tl.store(positions_ptr + query_start + row, root_position + depth, mask=row < query_len)
    # Rows without a token (-1) are part of the forward pass too and need a valid token id.
    token = tl.load(input_ids_ptr + query_start + row, mask=row < query_len, other=0)
    tl.store(input_ids_ptr + query_start + row, tl.maximum(token, 0), mask=row < query_len)

    element = tl.arange(0, MASK_ELEMENTS)
    mask = tl.load(ancestor_masks_ptr + req_state_idx * mask_elements + element, mask=element < mask_elements)
    tl.store(batch_ancestor_masks_ptr + batch_idx * mask_elements + element, mask, mask=element < mask_elements)


def lay_out_trees(
    state: TreeState,
    batch: TreeBatch,
    num_tree_reqs: int,
    idx_mapping: torch.Tensor,  # int64 [num_reqs], the tree requests lead the batch
    query_start_loc: torch.Tensor,  # int32 [num_padded_reqs + 1]
    seq_lens: torch.Tensor,  # int32 [num_padded_reqs], computed tokens plus the query's; 0 for padding requests
    input_ids: torch.Tensor,  # int32 [num_tokens], overwritten where a tree request's row has no token
    positions: torch.Tensor,  # int64 [num_tokens], overwritten in the tree requests' rows
) -> None:
    """Writes the true positions and the batch's indices and ancestor masks of the leading `num_tree_reqs` requests.

    Prefix lengths are written for every request, so that the prefix of a CUDA graph's padding requests is empty. A
    request may have fewer rows than its tree (cut by a token budget or `max_model_len`): a prefix of a tree is a tree.
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
        batch.idx_mapping,
        batch.ancestor_masks,
        batch.prefix_lens,
        num_tree_reqs,
        state.num_rows,
        state.num_rows * num_words,
        ROWS=triton.next_power_of_2(state.num_rows),
        MASK_ELEMENTS=triton.next_power_of_2(state.num_rows * num_words),
    )
