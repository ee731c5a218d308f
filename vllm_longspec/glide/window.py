# SPDX-License-Identifier: Apache-2.0
"""The draft's whole state: self-attention K and V of the last tokens of every running request.

It is a pure function of the last token ids, because the draft's layer is the first and only one. So it never grows
with the context, there is no draft prefill, and whatever loses it (preemption, a prefix-cache hit, a chunked prompt)
is answered by computing it again from the ids.
"""

import torch

from vllm_longspec.glide.model import WINDOW_SIZE, GlideForCausalLM
from vllm_longspec.glide.window_attention import write_window

# A rebuild of one request is up to 512 tokens wide; more requests at a time than this would only need more memory.
MAX_REBUILD_REQS = 8


class DraftWindow:
    """A ring of K and V per request-state slot: position p is at entry p % WINDOW_SIZE."""

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
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] text of every slot
        slots: torch.Tensor,  # int64 [num_reqs]; -1 for a request that only pads the batch
        root_positions: torch.Tensor,  # int64 [num_reqs]; the root itself belongs to the tree, not to the window
        num_new: torch.Tensor,  # [num_reqs] tokens right before the root that the window lacks
        max_new: int,  # no request has more
    ) -> None:
        """Adds the tokens that the last step settled."""
        offsets = torch.arange(max_new, device=slots.device)
        positions = root_positions[:, None] - 1 - offsets
        lacking = (offsets < num_new[:, None]) & (positions >= 0) & (slots >= 0)[:, None]
        positions = positions.clamp(min=0)
        # A request that only pads the batch (slot -1) has no text.
        tokens = torch.where(lacking, token_ids[slots[:, None], positions], 0)
        keys, values = self.model.window_kv(tokens.flatten(), positions.flatten())
        # Slot -1 writes nothing, which keeps the shapes independent of how much was accepted.
        written_slots = torch.where(lacking, slots[:, None], -1)
        write_window(self.kv, keys, values, written_slots.flatten(), positions.flatten())

    def rebuild(
        self,
        token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
        slots: torch.Tensor,  # int64 [num_reqs]
        root_positions: torch.Tensor,  # int64 [num_reqs]
        max_root_position: int,
    ) -> None:
        """Computes the windows of requests that have none, from their last token ids."""
        width = min(WINDOW_SIZE, max_root_position)
        for start in range(0, slots.shape[0], MAX_REBUILD_REQS):
            chunk = slice(start, start + MAX_REBUILD_REQS)
            num_new = torch.full_like(slots[chunk], width)
            self.append(token_ids, slots[chunk], root_positions[chunk], num_new, width)
