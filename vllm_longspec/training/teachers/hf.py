# SPDX-License-Identifier: Apache-2.0
"""A target in Transformers as the teacher: the reference, and the one for CPUs.

Every layer gets its keys and values back as it made them, so a text is computed as without a cache; those of the last
layer are kept. Logits are never computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from vllm_longspec.training.layer import inverse_frequencies, rope_type_of
from vllm_longspec.training.target import SharedTarget
from vllm_longspec.training.teachers import Lesson, Sample

# Padding may be this part of what is computed at once.
_MOST_PADDING = 0.2


class LastLayerCache(Cache):
    """Keeps what the last layer gives it, and nothing of the others.

    Transformers takes a text without a cache for several ones where its positions have gaps; with a cache it does not.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.last = num_layers - 1
        self.keys: Tensor | None = None  # [batch, num_kv_heads, num_tokens, head_dim], rotated
        self.values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == self.last:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class HfTeacher:
    """Lessons by Transformers, on one device.

    Args:
        tokens_at_once: of samples that are computed together, where they are short; a longer one is computed alone
        compiled: whether to compile norms and MLPs, whose parts are otherwise kernels of their own
        way_out: what to do about a target that Transformers does not load

    Raises:
        ValueError: Transformers does not load the target.
    """

    def __init__(
        self,
        target: SharedTarget,
        device: torch.device | str,
        dtype: torch.dtype,
        tokens_at_once: int = 32768,
        compiled: bool = False,
        way_out: str = "mend its files, or give --teacher vllm",
    ) -> None:
        self.device, self.tokens_at_once = torch.device(device), tokens_at_once
        self.decoder = _load_decoder(target, dtype, self.device, way_out).to(self.device)
        self.num_layers = target.config.num_hidden_layers
        if rope_type_of(target.config) == "longrope":
            # As vLLM: one table for texts of all lengths, so that a key does not depend on what follows.
            rotary = self.decoder.rotary_emb
            rotary.register_buffer(
                "inv_freq", inverse_frequencies(target.config).float().to(self.device), persistent=False
            )
            rotary.rope_type = "default"
        if compiled:
            # A whole layer would be compiled once for each, since it knows its number.
            for module in self.decoder.modules():
                if type(module).__name__.endswith(("RMSNorm", "MLP")):
                    module.compile()

    def teach(self, samples: Iterable[Sample]) -> Iterator[Lesson]:
        for group in self._groups(samples):
            yield from self._lessons(group)

    def teach_batches(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Lesson]:
        for batch in batches:
            yield from self.teach(batch)

    def close(self) -> None:
        del self.decoder

    def _groups(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Samples that follow each other and are of similar lengths."""
        group: list[Sample] = []
        for sample in samples:
            lengths = [len(each.input_ids) for each in (*group, sample)]
            computed = max(lengths) * len(lengths)
            if group and (computed > self.tokens_at_once or sum(lengths) < (1 - _MOST_PADDING) * computed):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group

    @torch.no_grad()
    def _lessons(self, samples: Sequence[Sample]) -> Iterator[Lesson]:
        # No token sees the padding behind it.
        ids, positions = (
            torch.nn.utils.rnn.pad_sequence([getattr(sample, name) for sample in samples], batch_first=True)
            for name in ("input_ids", "positions")
        )
        cache = LastLayerCache(self.num_layers)
        output = self.decoder(
            input_ids=ids.to(self.device, non_blocking=True),
            position_ids=positions.to(self.device, non_blocking=True),
            past_key_values=cache,
            use_cache=True,
        )
        assert cache.keys is not None and cache.values is not None
        for index, sample in enumerate(samples):
            keys, values = (
                part[index, :, : len(sample.input_ids)].transpose(0, 1) for part in (cache.keys, cache.values)
            )
            rows = sample.rows.to(self.device, non_blocking=True)
            yield Lesson(sample, keys, values, output.last_hidden_state[index, rows])


def _load_decoder(target: SharedTarget, dtype: torch.dtype, device: torch.device, way_out: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if target.is_wrapper else AutoModelForCausalLM
    # A GPU reads the files itself: each process would otherwise hold the target in the host's memory first.
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        model: Any = kind.from_pretrained(target.folder, dtype=dtype, attn_implementation="sdpa", **placed)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Transformers does not load --target {target.name} ({reason}): {way_out}") from None
    model = model.eval().requires_grad_(False)
    return model.model.language_model if target.is_wrapper else model.model
