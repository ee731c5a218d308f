# SPDX-License-Identifier: Apache-2.0
"""Where trees begin, out of vLLM's request states.

The root of a tree is the last token of its request: sampled, but not yet seen by the target.
"""

from typing import NamedTuple

import torch
from vllm.triton_utils import tl, triton

BLOCK = 128


class Roots(NamedTuple):
    tokens: torch.Tensor  # int64 [num_reqs]
    positions: torch.Tensor  # int64 [num_reqs]
    # The tokens before the root, all of which the target has cached: int32 [num_reqs], the same numbers.
    prefix_lens: torch.Tensor


def read_roots(
    slots: torch.Tensor,  # int64 [num_reqs]; -1 for a request that only pads the batch
    num_computed_tokens: torch.Tensor,  # int32 [max_num_reqs], by slot
    last_sampled_tokens: torch.Tensor,  # int64 [max_num_reqs, 1], by slot
) -> Roots:
    """The roots of these requests; token 0 at position 0 for one that only pads the batch."""
    num_reqs = slots.shape[0]
    tokens, positions = torch.empty_like(slots), torch.empty_like(slots)
    prefix_lens = torch.empty_like(slots, dtype=torch.int32)
    _read_roots_kernel[(triton.cdiv(num_reqs, BLOCK),)](
        slots, num_computed_tokens, last_sampled_tokens, tokens, positions, prefix_lens, num_reqs, BLOCK=BLOCK
    )
    return Roots(tokens, positions, prefix_lens)


@triton.jit(do_not_specialize=["num_reqs"])
def _read_roots_kernel(
    slots_ptr,
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
    slot = tl.load(slots_ptr + request, mask=is_request, other=-1)
    token = tl.load(last_sampled_tokens_ptr + slot, mask=slot >= 0, other=0)
    position = tl.load(num_computed_tokens_ptr + slot, mask=slot >= 0, other=0)
    tl.store(tokens_ptr + request, token.to(tl.int64), mask=is_request)
    tl.store(positions_ptr + request, position.to(tl.int64), mask=is_request)
    tl.store(prefix_lens_ptr + request, position.to(tl.int32), mask=is_request)
