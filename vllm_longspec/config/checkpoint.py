# SPDX-License-Identifier: Apache-2.0
"""Recognises a GLIDE draft by what is in its checkpoint: `architectures` in config.json, or its parameter names.

A name of a repository or a folder says nothing. Everything here works from a local folder, from the Hugging Face cache
(also with HF_HUB_OFFLINE=1) and from the hub, and reads headers and indices only, never the weights of a draft that
somebody else's code will load.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

# The families of GLIDE drafts: `model_type` of the draft's config.json and the architecture it is served as.
# All of them are served by vllm_longspec.glide.model.GlideForCausalLM.
FAMILIES = {
    "llama": "LlamaGlideDecoderLayer",
    "qwen2": "Qwen2GlideDecoderLayer",
}

_PREFIXES = ("", "glide.", "model.")
_REQUIRED = frozenset(
    {f"self_attn.{projection}_proj.weight" for projection in "qkvo"}
    | {f"cross_attn.{projection}_proj.weight" for projection in "qo"}
    | {f"mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")}
    | {f"{name}.weight" for name in ("input_layernorm", "post_self_attention_layernorm")}
    | {"post_cross_attention_layernorm.weight"}
)
_OPTIONAL = frozenset(
    {f"self_attn.{projection}_proj.bias" for projection in "qkv"}
    # k_proj and v_proj of the cross-attention are part of every published checkpoint and used by no equation.
    | {f"cross_attn.{projection}_proj.{kind}" for projection in "kv" for kind in ("weight", "bias")}
    | {"cross_attn.q_proj.bias"}
)
# Both at one level of the checkpoint's name space: no other kind of draft has them there.
_MARKERS = ("self_attn.q_proj.weight", "cross_attn.q_proj.weight")

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class DraftCheckpoint:
    """A checkpoint that holds a GLIDE draft."""

    model: str
    # the architecture it is served as, one of FAMILIES
    architecture: str
    # config.json
    config: dict[str, Any]


def inspect_draft(model: str, revision: str | None = None) -> DraftCheckpoint | None:
    """Looks at a draft: a GLIDE checkpoint, or None for whatever else `model` is.

    Args:
        model: A local folder or a repository of the Hugging Face hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        ValueError: for a GLIDE draft of an unknown family, or with missing or unexpected parameters.
    """
    repository = _Repository(model, revision)
    config = repository.read_json("config.json")
    if config is None:
        return None
    named = any(architecture in FAMILIES.values() for architecture in config.get("architectures") or ())
    names = repository.parameter_names(download_weights=named or not config.get("architectures"))
    prefix = _prefix(names)
    if not named and prefix is None:
        return None

    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"draft {model} is a GLIDE draft of model_type {model_type!r} in its config.json, but the families "
            f"supported are {', '.join(FAMILIES)}: serve without it"
        )
    # A repository whose names cannot be had cheaply is checked when its weights are loaded.
    if names:
        _check_names(model, names, prefix or "")
    return DraftCheckpoint(model, FAMILIES[model_type], config)


def find_file(model: str, file_name: str, revision: str | None = None) -> Path | None:
    """A file that lies beside the weights of a checkpoint; None when it is not there."""
    return _Repository(model, revision)._find(file_name)


def _prefix(names: Iterable[str]) -> str | None:
    known = set(names)
    return next((prefix for prefix in _PREFIXES if all(prefix + marker in known for marker in _MARKERS)), None)


def _check_names(model: str, names: Iterable[str], prefix: str) -> None:
    names = set(names)
    expected = {prefix + name for name in _REQUIRED}
    for kind, wrong in (
        ("lacks", expected - names),
        ("has unexpected", names - expected - {prefix + name for name in _OPTIONAL}),
    ):
        if wrong:
            shown = ", ".join(sorted(wrong)[:_NAMES_SHOWN])
            more = f" and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
            raise ValueError(
                f"draft {model} {kind} parameters: {shown}{more}; a GLIDE draft is one decoder layer with self_attn, "
                "cross_attn, mlp and three layernorms, saved without the target's weights"
            )


class _Repository:
    """The files of a checkpoint, wherever they are. What is not there or cannot be read is None, never an error."""

    def __init__(self, model: str, revision: str | None):
        self.model = model
        self.revision = revision
        self.is_local = os.path.isdir(model)
        # Method names and dotted paths of proposer classes are not worth a question to the hub.
        self.is_remote = not self.is_local and model.count("/") == 1

    def read_json(self, file_name: str) -> dict[str, Any] | None:
        path = self._find(file_name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def parameter_names(self, download_weights: bool) -> set[str]:
        """Names of all parameters, from headers and indices; empty when there is no cheap way to know.

        Args:
            download_weights: Whether a hub repository with nothing but a .bin file, which has no header, is worth
                downloading. It ends up in the cache, where vLLM finds it when it loads the draft.
        """
        if self.is_local:
            # The order in which vLLM looks for weights.
            files = sorted(Path(self.model).glob("*.safetensors")) or sorted(Path(self.model).glob("*.bin"))
            return {name for file in files for name in _names_in_file(file)}
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if content := self.read_json(index):
                return set(content.get("weight_map", ()))
        return self._names_in_remote_file(download_weights)

    def _names_in_remote_file(self, download_weights: bool) -> set[str]:
        if not self.is_remote:
            return set()
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            if cached := self._find_cached(file_name):
                return _names_in_file(cached)
        try:
            header = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.model, "model.safetensors", revision=self.revision
            )
            return set(header.tensors)
        except Exception:  # no such file, no network, no header
            pass
        weights = self._find("pytorch_model.bin") if download_weights else None
        return _names_in_file(weights) if weights else set()

    def _find(self, file_name: str) -> Path | None:
        if self.is_local:
            path = Path(self.model) / file_name
            return path if path.is_file() else None
        if not self.is_remote:
            return None
        if cached := self._find_cached(file_name):
            return cached
        try:
            return Path(huggingface_hub.hf_hub_download(self.model, file_name, revision=self.revision))
        except Exception:  # no such file or repository, no network
            return None

    def _find_cached(self, file_name: str) -> Path | None:
        try:
            cached = huggingface_hub.try_to_load_from_cache(self.model, file_name, revision=self.revision)
        except ValueError:  # not a name that the hub could have
            return None
        return Path(cached) if isinstance(cached, str) else None


def _names_in_file(path: Path) -> set[str]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as weights:
                return set(weights.keys())
        import torch

        return set(torch.load(path, map_location="meta", weights_only=True, mmap=True))
    except Exception:
        # Whatever is wrong with the file, vLLM's loader says it better, and it may belong to no GLIDE draft at all.
        return set()
