# SPDX-License-Identifier: Apache-2.0
"""The draft's state: self-attention K and V of the last tokens of every request.

It is a function of the last token ids alone, so it is recomputed whenever it is missing; see docs/design.md#window.
"""

from typing import NamedTuple

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.model import WINDOW_SIZE, GlideForCausalLM
from vllm_longspec.proposers.glide.window_attention import write_window

# Up to WINDOW_SIZE tokens per request are rebuilt at a time; more requests would only take more memory.
MAX_REBUILD_REQS = 8
# One size for any number of tokens, so that no prompt triggers compilation.
TOKEN_BLOCK = 64


class TokenRows(NamedTuple):
    """Tokens that the draft embeds and projects in one pass: the roots, if a draft follows, then settled tokens.

    Of so few rows each kernel takes longer to launch than to run, so the roots have no pass of their own.
    """

    tokens: torch.Tensor  # int64 [num_rows]
    positions: torch.Tensor  # int64 [num_rows]
    # int64 [num_rows] req_state_idx of the window that keeps K and V; -1 for none: of roots and padding
    expanded_idx_mapping: torch.Tensor


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
        """Adds the tokens that the last step emitted. Where a draft follows, its first level does that instead."""
        rows = list_settled(token_ids, idx_mapping, root_positions, num_new, max_new)
        keys, values, table = self.model.window_kv(rows.tokens, rows.positions)
        write_window(self.kv, keys, values, rows.expanded_idx_mapping, rows.positions, table)

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


def list_settled(
    token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] by req_state_idx
    idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for padding
    root_positions: torch.Tensor,  # int64 [num_reqs]
    num_new: torch.Tensor,  # int32 [num_reqs] tokens right before the root to list
    max_new: int,  # upper bound of num_new
    root_tokens: torch.Tensor | None = None,  # int64 [num_reqs]; with them the roots are the first num_reqs rows
    max_position: int = 0,  # roots are clamped to it, as nodes are
) -> TokenRows:
    """The settled tokens of each request, padded to `max_new`, and before all of them perhaps the roots."""
    num_reqs = idx_mapping.shape[0]
    num_rows = num_reqs * (max_new if root_tokens is None else 1 + max_new)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=idx_mapping.device)
    rows = TokenRows(tokens, torch.empty_like(tokens), torch.empty_like(tokens))
    block = triton.next_power_of_2(max_new) if interpreting() else TOKEN_BLOCK
    _settled_tokens_kernel[(num_reqs, triton.cdiv(max_new, block))](
        token_ids,
        token_ids.stride(0),
        idx_mapping,
        root_tokens,
        root_positions,
        num_new,
        *rows,
        max_new,
        max_position,
        BLOCK=block,
    )
    return rows


@triton.jit(do_not_specialize=["max_new", "max_position"])
def _settled_tokens_kernel(
    token_ids_ptr,  # [max_num_reqs, max_model_len]
    token_ids_stride,
    idx_mapping_ptr,  # int64 [num_reqs]
    root_tokens_ptr,  # int64 [num_reqs], or None: roots are not listed
    root_positions_ptr,  # int64 [num_reqs]
    num_new_ptr,  # int32 [num_reqs]
    tokens_ptr,  # int64 [num_rows]: [num_reqs] roots, if they are listed, then [num_reqs, max_new]
    positions_ptr,  # int64 [num_rows]
    expanded_idx_mapping_ptr,  # int64 [num_rows]
    max_new,
    max_position,
    BLOCK: tl.constexpr,
):
    """Lists the last `num_new` tokens before each root, the latest first, padded to `max_new` by req_state_idx -1."""
    request = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    root_position = tl.load(root_positions_ptr + request)
    first_row = 0
    if root_tokens_ptr is not None:
        first_row = tl.num_programs(0)
        tl.store(tokens_ptr + request, tl.load(root_tokens_ptr + request))
        tl.store(positions_ptr + request, tl.minimum(root_position, max_position))
        tl.store(expanded_idx_mapping_ptr + request, -1)
    position = root_position - 1 - offset
    # Padding has no tokens.
    num_new = tl.where(req_state_idx >= 0, tl.load(num_new_ptr + request), 0)
    is_new = (offset < num_new) & (position >= 0)
    position = tl.maximum(position, 0)
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + position, mask=is_new, other=0)
    index = first_row + request * max_new + offset
    is_index = offset < max_new
    tl.store(tokens_ptr + index, token.to(tl.int64), mask=is_index)
    tl.store(positions_ptr + index, position, mask=is_index)
    tl.store(expanded_idx_mapping_ptr + index, tl.where(is_new, req_state_idx, -1), mask=is_index)
