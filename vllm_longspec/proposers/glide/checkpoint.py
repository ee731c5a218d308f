# SPDX-License-Identifier: Apache-2.0
"""Recognises a GLIDE draft by what is in its checkpoint: `architectures` in config.json, or its parameter names.

A name of a repository or a folder says nothing. Everything here works from a local folder, from the Hugging Face cache
(also with HF_HUB_OFFLINE=1) and from the hub, and reads headers and indices only, never the weights of a draft that
somebody else's code will load.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub

# The families of GLIDE drafts: `model_type` of the draft's config.json and the architecture it is served as.
# All of them are served by vllm_longspec.proposers.glide.model.GlideForCausalLM.
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

# Parameter name -> shape; None where only the name is known.
Shapes = Mapping[str, tuple[int, ...] | None]


class _UnreadableError(Exception):
    """A file of a checkpoint that is there and cannot be used, with the reason and the way out in one line."""


@dataclass(frozen=True)
class DraftCheckpoint:
    """A checkpoint that holds a GLIDE draft."""

    model: str
    # the architecture it is served as, one of FAMILIES
    architecture: str
    # config.json
    config: dict[str, Any]
    # of its parameters, without their prefix; empty where reading them would mean downloading them
    shapes: Shapes = field(default_factory=dict)


def inspect_draft(model: str, revision: str | None = None) -> DraftCheckpoint | None:
    """Looks at a draft: a GLIDE checkpoint, or None for whatever else `model` is.

    Args:
        model: A local folder or a repository of the Hugging Face hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        ValueError: in one line, for a GLIDE draft of an unknown family, with missing or unexpected parameters, or with
            files that cannot be read or must not be (pickled code, an index that points elsewhere).
    """
    repository = _Repository(model, revision)
    try:
        config = repository.read_json("config.json")
    except _UnreadableError as error:
        # Whose draft this is, only the parameters can tell now.
        if _prefix(repository.readable_shapes()) is not None:
            raise ValueError(f"draft {model} is a GLIDE draft, but {error}") from None
        return None
    if config is None:
        if _prefix(repository.readable_shapes()) is not None:
            raise ValueError(
                f"draft {model} has the parameters of a GLIDE draft, but no config.json: copy its target's there"
            )
        return None
    architectures = config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    named = any(architecture in FAMILIES.values() for architecture in architectures)
    try:
        shapes = repository.parameter_shapes(download_weights=named or not architectures)
    except _UnreadableError as error:
        if named:
            raise ValueError(f"draft {model} is a GLIDE draft, but {error}") from None
        # Whatever is wrong with the file, it may belong to no GLIDE draft at all.
        return None
    prefix = _prefix(shapes)
    if not named and prefix is None:
        return None

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"draft {model} is a GLIDE draft of model_type {model_type!r} in its config.json, but the families "
            f"supported are {', '.join(FAMILIES)}: serve without it"
        )
    # A repository whose names cannot be had cheaply is checked when its weights are loaded.
    if shapes:
        _check_names(model, shapes, prefix or "")
    shapes = {name.removeprefix(prefix or ""): shape for name, shape in shapes.items()}
    return DraftCheckpoint(model, FAMILIES[model_type], config, shapes)


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
    """The files of a checkpoint, wherever they are. What is not there is None, never an error."""

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
        except OSError as error:
            raise _UnreadableError(f"its {file_name} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise _UnreadableError(f"its {file_name} is not JSON: download or export it again") from None
        if not isinstance(content, dict):
            raise _UnreadableError(f"its {file_name} holds no JSON object: download or export it again")
        return content

    def readable_shapes(self) -> Shapes:
        """The parameters as far as local files tell; empty when they cannot be read."""
        if not self.is_local:
            return {}
        try:
            return self.parameter_shapes(download_weights=False)
        except _UnreadableError:
            return {}

    def parameter_shapes(self, download_weights: bool) -> Shapes:
        """Shapes of all parameters, from headers and indices; empty when there is no cheap way to know.

        Args:
            download_weights: Whether a hub repository with nothing but a .bin file, which has no header, is worth
                downloading. It ends up in the cache, where vLLM finds it when it loads the draft.

        Raises:
            _UnreadableError: a file of weights or an index is damaged or unsafe.
        """
        named_by_index: dict[str, None] = {}
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if content := self.read_json(index):
                named_by_index = _names_in_index(index, content)
                break
        if self.is_local:
            # The order in which vLLM looks for weights. A file may be a link, as all files of the hub's cache are.
            files = sorted(Path(self.model).glob("*.safetensors")) or sorted(Path(self.model).glob("*.bin"))
            return {name: shape for file in files for name, shape in _shapes_in_file(file).items()}
        return named_by_index or self._shapes_in_remote_file(download_weights)

    def _shapes_in_remote_file(self, download_weights: bool) -> Shapes:
        if not self.is_remote:
            return {}
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            if cached := self._find_cached(file_name):
                return _shapes_in_file(cached)
        try:
            header = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.model, "model.safetensors", revision=self.revision
            )
            return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
        except Exception:  # no such file, no network, no header
            pass
        weights = self._find("pytorch_model.bin") if download_weights else None
        return _shapes_in_file(weights) if weights else {}

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


def _names_in_index(file_name: str, index: dict[str, Any]) -> dict[str, None]:
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise _UnreadableError(f"the weight_map of its {file_name} is no JSON object: download or export it again")
    for name, file in weight_map.items():
        # Shards lie beside their index. A path could name any file of this machine.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {"/", "\\", "\0"}:
            raise _UnreadableError(
                f"its {file_name} has {name} in {file!r}, which is no file name: an index may name files beside it only"
            )
    return dict.fromkeys(weight_map)


def _shapes_in_file(path: Path) -> Shapes:
    if not path.is_file():
        raise _UnreadableError(f"its {path.name} is no file: download or export it again")
    try:
        return _safetensors_shapes(path) if path.suffix == ".safetensors" else _pickled_shapes(path)
    except pickle.UnpicklingError:
        raise _UnreadableError(
            f"its {path.name} holds more than tensors, or is no checkpoint: pickled code is never run; export it as "
            "safetensors"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _UnreadableError(f"its {path.name} is damaged ({reason}): download or export it again") from None


def _safetensors_shapes(path: Path) -> Shapes:
    from safetensors import safe_open

    # Opening checks that the header's tensors fill the file, so one that was cut short is noticed here.
    with safe_open(path, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _pickled_shapes(path: Path) -> Shapes:
    import torch

    # Files in PyTorch's format from before 1.6 cannot be mapped, only read.
    is_mappable = zipfile.is_zipfile(path)
    weights = torch.load(path, map_location="meta", weights_only=True, mmap=is_mappable)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise pickle.UnpicklingError
    return {name: tuple(weight.shape) for name, weight in weights.items()}
