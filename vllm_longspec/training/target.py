# SPDX-License-Identifier: Apache-2.0
"""The frozen target as far as a draft shares it: its config, embedding, head, and the last layer's weights.

They are read from its safetensors by name, so that a target that is taught by another process is not loaded.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_longspec.proposers.glide.convert import draft_config, read_target
from vllm_longspec.targets.families import WRAPPERS
from vllm_longspec.targets.support import check_family, check_target
from vllm_longspec.training.layer import inverse_frequencies

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class SharedTarget:
    """What a draft shares with its target."""

    name: str  # as given
    folder: Path  # its files
    config: Any  # of transformers; of the language model inside a wrapper
    config_json: dict[str, Any]  # as its file has it
    embedding: Tensor  # [vocab_size, hidden_size]
    head: Tensor  # [vocab_size, hidden_size]; the embedding itself if tied
    is_wrapper: bool = False

    @property
    def logit_scale(self) -> float:
        """Logits are the head's product times this."""
        return 1.0 / self.config.logits_scaling if self.config.model_type == "granite" else 1.0

    @property
    def vocab_size(self) -> int:
        return len(self.embedding)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "SharedTarget":
        embedding = self.embedding.to(device, dtype)
        head = embedding if self.head is self.embedding else self.head.to(device, dtype)
        return SharedTarget(self.name, self.folder, self.config, self.config_json, embedding, head, self.is_wrapper)

    def draft_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of its draft."""
        return draft_config(self.config_json, str(dtype).removeprefix("torch."))

    def last_layer(self) -> dict[str, Tensor]:
        """Weights of the last decoder layer by their names in the layer, such as self_attn.q_proj.weight."""
        inner = f"layers.{self.config.num_hidden_layers - 1}."
        found = _read(self.folder, lambda name: inner in name)
        return {name.split(inner, 1)[1]: weight for name, weight in found.items()}


def check_served(target: str, revision: str | None = None) -> None:
    """Refuses targets whose drafts the plugin would not serve, by ValueError in one line."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        model_config = EngineArgs(
            model=target, revision=revision, skip_tokenizer_init=True, language_model_only=True
        ).create_model_config()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--target {target} is none that vLLM serves ({reason}): give another target") from None
    check_family(model_config)
    check_target(model_config)


def load_shared(target: str, revision: str | None = None) -> SharedTarget:
    """Reads config, embedding and head, on the CPU and in the dtype in which they are stored.

    Args:
        target: a local folder, or a repository of the Hugging Face hub, which is downloaded into its cache.

    Raises:
        ValueError: files are missing, the head is quantised, or the family, activation or RoPE has no drafts.
    """
    config, config_json = read_target(target, revision)
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"--target {target} has hidden_act {activation!r}, but drafts are trained with silu: give another target"
        )
    inverse_frequencies(config)
    folder = local_folder(target, revision)
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    weights = _read(folder, lambda name: name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")))
    # A multimodal wrapper may embed other things too.
    embeddings = [weight for name, weight in sorted(weights.items()) if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ValueError(f"--target {target} has {len(embeddings)} embeddings of tokens in its safetensors, not one")
    heads = [weight for name, weight in weights.items() if name.endswith("lm_head.weight")]
    if not heads and not config.tie_word_embeddings:
        raise ValueError(
            f"--target {target} has no lm_head.weight in its safetensors: a head that is quantised has no rows to "
            "train a draft with, give a target that leaves its head as it is"
        )
    if any(name.endswith("lm_head.bias") for name in weights):
        raise ValueError(f"--target {target} has a head with a bias, which drafts do not have: give another target")
    embedding = embeddings[0]
    head = embedding if config.tie_word_embeddings or not heads else heads[0]
    for name, weight in (("embedding", embedding), ("head", head)):
        if weight.dtype not in _FLOATS:
            raise ValueError(f"--target {target} has an {name} of {weight.dtype}: give one that is not quantised there")
    is_wrapper = any(each in WRAPPERS for each in architectures)
    return SharedTarget(target, folder, config, config_json, embedding, head, is_wrapper)


def load_tokenizer(target: SharedTarget) -> Any:
    """Raises ValueError where the target has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target.folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--target {target.name} has no tokenizer ({reason}): give input_ids as data") from None


def local_folder(target: str, revision: str | None = None) -> Path:
    if os.path.isdir(target):
        return Path(target)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                target, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--target {target} cannot be downloaded ({reason}): give its folder") from None


def _read(folder: Path, wanted: Any) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors whose names are wanted."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"--target {folder} has no safetensors: convert its weights first")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                found.update({name: weights.get_tensor(name) for name in weights.keys() if wanted(name)})  # noqa: SIM118
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} is damaged ({reason}): download or export it again") from None
    return found
