# SPDX-License-Identifier: Apache-2.0
"""A draft as it is saved, and what of its target it is used with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_longspec.proposers.glide.checkpoint import (
    DraftCheckpoint,
    NoGlideDraftError,
    prefix_of,
    read_draft,
    weight_files,
)
from vllm_longspec.proposers.glide.fit import check_fit
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.target import SharedTarget


@dataclass(frozen=True)
class TargetVocabulary:
    """A `Vocabulary` of two matrices."""

    embedding: Tensor  # [vocab_size, hidden_size]
    weight: Tensor  # [vocab_size, hidden_size] of the head
    logit_scale: float  # factor of the logits

    @classmethod
    def of(cls, shared: SharedTarget, device: str, dtype: torch.dtype) -> "TargetVocabulary":
        moved = shared.to(device, dtype)
        return cls(moved.embedding, moved.head, moved.logit_scale)

    def embed(self, ids: Tensor) -> Tensor:
        """float32 [..., hidden_size]"""
        return torch.nn.functional.embedding(ids, self.embedding).float()

    def head(self, hidden: Tensor) -> Tensor:
        """float32 [..., vocab_size]"""
        return self.logit_scale * torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight).float()


class NamedConfig(NamedTuple):
    """A target as `check_fit` reads it."""

    model: str
    hf_text_config: Any


def check_draft(draft: str, target: str, config: Any) -> DraftCheckpoint:
    """The checkpoint of a draft that fits a target.

    Raises:
        ValueError: there is no draft, or it does not fit.
    """
    try:
        checkpoint = read_draft(draft, expected=True)
    except NoGlideDraftError as error:
        raise ValueError(f"--draft is no GLIDE draft: {error}") from None
    check_fit(checkpoint, NamedConfig(target, config))
    return checkpoint


def load_draft(checkpoint: DraftCheckpoint, config: Any, device: str) -> GlideLayer:
    """The draft in float32.

    Args:
        config: the target's
    """
    import huggingface_hub
    from safetensors.torch import load_file

    folder = checkpoint.model
    if not Path(folder).is_dir():
        folder = huggingface_hub.snapshot_download(folder)
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            weights |= load_file(file)
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
    prefix = prefix_of(weights) or ""
    glide = GlideLayer(config)
    absent = glide.load_state_dict({name.removeprefix(prefix): each for name, each in weights.items()}, strict=False)
    for name in absent.missing_keys:
        # Biases, and projections that are not used: `read_draft` has checked all others.
        torch.nn.init.zeros_(glide.get_parameter(name))
    return glide.float().to(device).eval().requires_grad_(False)
