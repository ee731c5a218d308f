# SPDX-License-Identifier: Apache-2.0
"""The draft's state: self-attention K and V of the last tokens of every request.

It is a function of the last token ids alone, so it is recomputed whenever it is missing; see docs/design.md#window.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.model import WINDOW_SIZE, GlideForCausalLM
from vllm_longspec.proposers.glide.window_attention import write_window

# Up to WINDOW_SIZE tokens per request are rebuilt at a time; more requests would only take more memory.
MAX_REBUILD_REQS = 8
# One size for `append` and `rebuild`, so that no prompt triggers compilation.
TOKEN_BLOCK = 64


class DraftWindow:
    """A ring buffer of K and V per req_state_idx: position p is at entry p % WINDOW_SIZE."""

    def __init__(self, max_num_reqs: int, model: GlideForCausalLM, dtype: torch.dtype, device: torch.device):
        self.model = model
        # [max_num_reqs, WINDOW_SIZE, K or V, num_kv_heads, head_size]
        shape = (max_num_reqs, WINDOW_SIZE, 2, model.self_attn.num_kv_heads, model.self_attn.head_size)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def bytes_per_request(self) -> int:
        return self.kv[0].numel() * self.kv.element_size()

    def append(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] by req_state_idx
        idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for padding
        root_positions: torch.Tensor,  # int64 [num_reqs]; the root itself is not added
        num_new: torch.Tensor,  # int32 [num_reqs] tokens right before the root to add
        max_new: int,  # upper bound of num_new
    ) -> None:
        """Adds the tokens that the last step emitted."""
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
        keys, values, table = self.model.window_kv(tokens, positions)
        write_window(self.kv, keys, values, expanded_idx_mapping, positions, table)

    def rebuild(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
        idx_mapping: torch.Tensor,  # int64 [num_reqs]
        root_positions: torch.Tensor,  # int64 [num_reqs]
        max_root_position: int,
    ) -> None:
        """Computes whole windows from the last token ids."""
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
    """Lists the last `num_new` tokens before each root, the latest first, padded to `max_new` by req_state_idx -1."""
    request = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    position = tl.load(root_positions_ptr + request) - 1 - offset
    # Padding has no tokens.
    num_new = tl.where(req_state_idx >= 0, tl.load(num_new_ptr + request), 0)
    is_new = (offset < num_new) & (position >= 0)
    position = tl.maximum(position, 0)
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + position, mask=is_new, other=0)
    index = request * max_new + offset
    is_index = offset < max_new
    tl.store(tokens_ptr + index, token.to(tl.int64), mask=is_index)
    tl.store(positions_ptr + index, position, mask=is_index)
    tl.store(expanded_idx_mapping_ptr + index, tl.where(is_new, req_state_idx, -1), mask=is_index)
