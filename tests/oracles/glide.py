# SPDX-License-Identifier: Apache-2.0
"""Plain reference for the GLIDE draft: the layer of `vllm_longspec/training/layer.py` on a whole text, in float64.

Nothing is shared with the draft that runs in vLLM but the checkpoints: there is no ring, no cache and no tree here.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from vllm_longspec.training.layer import GlideLayer

WINDOW = 512


class PlainDraft:
    """A draft, given as its parameters, with the embedding, the head and the sizes and rotation of its target."""

    def __init__(self, target: Path, draft: dict[str, torch.Tensor]):
        weights = load_file(target / "model.safetensors")
        self.embedding = weights["model.embed_tokens.weight"].double()
        # A tied target stores no head.
        self.head = weights.get("lm_head.weight", self.embedding).double()
        config = json.loads((target / "config.json").read_text())
        self.logits_scaling = config["logits_scaling"] if config["model_type"] == "granite" else 1.0
        self.layer = GlideLayer(SimpleNamespace(**config)).double()
        self.layer.load_state_dict(draft)

    @torch.inference_mode()
    def self_kv(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated self-attention keys, and values, of every token of a text: [len(text), num_kv_heads, head_size]."""
        embeddings = self.embedding[torch.tensor(text)][None]
        _, keys, values = self.layer.self_qkv(embeddings, torch.arange(len(text))[None])
        return keys[0], values[0]

    @torch.inference_mode()
    def next_log_probs(
        self,
        history_kv: tuple[torch.Tensor, torch.Tensor],  # what `self_kv` returns for the whole history
        paths: list[list[int]],  # of one length: tokens that follow the history, the root first
        target_keys: torch.Tensor,  # [num_keys, num_kv_heads, head_size] rotated, of the target's last layer
        target_values: torch.Tensor,  # likewise
    ) -> torch.Tensor:  # float64 [num_paths, vocab_size]
        """Log-probabilities of the token after each path.

        Self-attention at position p reaches back to p - 512; cross-attention sees the given keys.
        """
        num_paths, length, num_history = len(paths), len(paths[0]), len(history_kv[0])
        positions = torch.arange(num_history + length)
        distance = positions[num_history:, None] - positions
        past_keys, past_values = (part.expand(num_paths, -1, -1, -1) for part in history_kv)
        hidden, _ = self.layer(
            self.embedding[torch.tensor(paths)],
            positions[None, num_history:],
            self_mask=((distance >= 0) & (distance <= WINDOW))[None],
            cross_keys=target_keys.double().expand(num_paths, -1, -1, -1),
            cross_values=target_values.double().expand(num_paths, -1, -1, -1),
            cross_mask=torch.ones(1, length, len(target_keys), dtype=torch.bool),
            past_self_kv=(past_keys, past_values),
        )
        return (hidden[:, -1] @ self.head.T / self.logits_scaling).log_softmax(-1)
