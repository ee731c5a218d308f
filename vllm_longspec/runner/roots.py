# SPDX-License-Identifier: Apache-2.0
"""Reads the roots of trees from vLLM's request states."""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.proposers.interface import Roots

BLOCK = 128


def read_roots(
    idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for padding
    num_computed_tokens: torch.Tensor,  # int32 [max_num_reqs], by req_state_idx
    last_sampled_tokens: torch.Tensor,  # int64 [max_num_reqs, 1], by req_state_idx
) -> Roots:
    """The roots of these requests; token 0 at position 0 for padding."""
    num_reqs = idx_mapping.shape[0]
    tokens, positions = torch.empty_like(idx_mapping), torch.empty_like(idx_mapping)
    prefix_lens = torch.empty_like(idx_mapping, dtype=torch.int32)
    _read_roots_kernel[(triton.cdiv(num_reqs, BLOCK),)](
        idx_mapping, num_computed_tokens, last_sampled_tokens, tokens, positions, prefix_lens, num_reqs, BLOCK=BLOCK
    )
    return Roots(tokens, positions, prefix_lens)


@triton.jit(do_not_specialize=["num_reqs"])
def _read_roots_kernel(
    idx_mapping_ptr,
    num_computed_tokens_ptr,
    last_sampled_tokens_ptr,
    tokens_ptr,
    positions_ptr,
    prefix_lens_ptr,
    num_reqs,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_request = request < num_reqs
    req_state_idx = tl.load(idx_mapping_ptr + request, mask=is_request, other=-1)
    token = tl.load(last_sampled_tokens_ptr + req_state_idx, mask=req_state_idx >= 0, other=0)
    position = tl.load(num_computed_tokens_ptr + req_state_idx, mask=req_state_idx >= 0, other=0)
    tl.store(tokens_ptr + request, token.to(tl.int64), mask=is_request)
    tl.store(positions_ptr + request, position.to(tl.int64), mask=is_request)
    tl.store(prefix_lens_ptr + request, position.to(tl.int32), mask=is_request)
