# SPDX-License-Identifier: Apache-2.0
"""The draft's whole state: self-attention K and V of the last tokens of every running request.

It is a pure function of the last token ids, because the draft's layer is the first and only one. So it never grows
with the context, there is no draft prefill, and whatever loses it (preemption, a prefix-cache hit, a chunked prompt)
is answered by computing it again from the ids.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.model import WINDOW_SIZE, GlideForCausalLM
from vllm_longspec.proposers.glide.window_attention import write_window

# A rebuild of one request is up to 512 tokens wide; more requests at a time than this would only need more memory.
MAX_REBUILD_REQS = 8
# The same for one new token and for a whole window, so that no prompt finds a kernel to be compiled.
TOKEN_BLOCK = 64


class DraftWindow:
    """A ring of K and V per req_state_idx: position p is at entry p % WINDOW_SIZE."""

    def __init__(self, max_num_reqs: int, model: GlideForCausalLM, dtype: torch.dtype, device: torch.device):
        self.model = model
        # [max_num_reqs, WINDOW_SIZE, K or V, num_kv_heads, head_size]
        self.kv = torch.zeros(
            max_num_reqs,
            WINDOW_SIZE,
            2,
            model.self_attn.num_kv_heads,
            model.self_attn.head_size,
            dtype=dtype,
            device=device,
        )

    @property
    def bytes_per_request(self) -> int:
        return self.kv[0].numel() * self.kv.element_size()

    def append(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] text by req_state_idx
        idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for a request that only pads the batch
        root_positions: torch.Tensor,  # int64 [num_reqs]; the root itself belongs to the tree, not to the window
        num_new: torch.Tensor,  # int32 [num_reqs] tokens right before the root that the window lacks
        max_new: int,  # no request has more
    ) -> None:
        """Adds the tokens that the last step settled."""
        num_reqs = idx_mapping.shape[0]
        tokens = torch.empty(num_reqs * max_new, dtype=torch.int64, device=idx_mapping.device)
        positions, expanded_idx_mapping = torch.empty_like(tokens), torch.empty_like(tokens)
        block = triton.next_power_of_2(max_new) if interpreting() else TOKEN_BLOCK
        _settled_tokens_kernel[(num_reqs, triton.cdiv(max_new, block))](
            token_ids,
            token_ids.stride(0),
            idx_mapping,
            root_positions,
            num_new,
            tokens,
            positions,
            expanded_idx_mapping,
            max_new,
            BLOCK=block,
        )
        keys, values = self.model.window_kv(tokens, positions)
        write_window(self.kv, keys, values, expanded_idx_mapping, positions)

    def rebuild(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
        idx_mapping: torch.Tensor,  # int64 [num_reqs]
        root_positions: torch.Tensor,  # int64 [num_reqs]
        max_root_position: int,
    ) -> None:
        """Computes the windows of requests that have none, from their last token ids."""
        width = min(WINDOW_SIZE, max_root_position)
        for start in range(0, idx_mapping.shape[0], MAX_REBUILD_REQS):
            chunk = slice(start, start + MAX_REBUILD_REQS)
            num_new = torch.full_like(idx_mapping[chunk], width, dtype=torch.int32)
            self.append(token_ids, idx_mapping[chunk], root_positions[chunk], num_new, width)


@triton.jit(do_not_specialize=["max_new"])
def _settled_tokens_kernel(
    token_ids_ptr,  # [max_num_reqs, max_model_len]
    token_ids_stride,
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    num_new_ptr,  # int32 [num_reqs]
    tokens_ptr,  # int64 [num_reqs, max_new]
    positions_ptr,  # int64 [num_reqs, max_new]
    expanded_idx_mapping_ptr,  # int64 [num_reqs, max_new]
    max_new,
    BLOCK: tl.constexpr,
):
    """The last `num_new` tokens before each root, the latest first; in the others -1, for which nothing is written.

    So shapes do not depend on how much was accepted.
    """
    request = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    position = tl.load(root_positions_ptr + request) - 1 - offset
    # A request that only pads the batch (-1) has no text.
    num_new = tl.where(req_state_idx >= 0, tl.load(num_new_ptr + request), 0)
    is_new = (offset < num_new) & (position >= 0)
    position = tl.maximum(position, 0)
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + position, mask=is_new, other=0)
    index = request * max_new + offset
    is_index = offset < max_new
    tl.store(tokens_ptr + index, token.to(tl.int64), mask=is_index)
    tl.store(positions_ptr + index, position, mask=is_index)
    tl.store(expanded_idx_mapping_ptr + index, tl.where(is_new, req_state_idx, -1), mask=is_index)
