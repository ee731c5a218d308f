# SPDX-License-Identifier: Apache-2.0
"""A target in Transformers as the teacher."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_longspec.training.draft import TargetVocabulary
from vllm_longspec.training.teachers import Lesson, Sample


class PlainTarget:
    """A `Teacher`: the whole text in one forward pass, of whose cache the last layer is kept."""

    def __init__(self, model: str, dtype: torch.dtype, device: str):
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        self.config = self.model.config.get_text_config()
        self.device = device

    def vocabulary(self) -> TargetVocabulary:
        return TargetVocabulary(
            self.model.get_input_embeddings().weight.detach(),
            self.model.get_output_embeddings().weight.detach(),
            # Granite's.
            1.0 / getattr(self.config, "logits_scaling", 1.0),
        )

    @torch.inference_mode()
    def teach(self, samples: Iterable[Sample]) -> Iterator[Lesson]:
        from transformers import DynamicCache

        last_layer = self.config.num_hidden_layers - 1

        class LastLayer(DynamicCache):
            kept: tuple[Tensor, Tensor]

            def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
                if layer_idx == last_layer:
                    self.kept = keys, values
                return keys, values

        for sample in samples:
            cache = LastLayer()
            hidden = self.model.model(
                sample.input_ids[None].to(self.device),
                position_ids=sample.positions[None].to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[0]
            # [kv_heads, tokens, head_size] -> [tokens, kv_heads, head_size]
            keys, values = (part[0].transpose(0, 1) for part in cache.kept)
            yield Lesson(sample, keys, values, hidden[sample.rows.to(self.device)])

    def close(self) -> None:
        del self.model
