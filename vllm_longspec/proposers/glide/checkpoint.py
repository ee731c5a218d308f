# SPDX-License-Identifier: Apache-2.0
"""Recognises a GLIDE draft by `architectures` in its config.json, or by its parameter names.

A draft is a local folder, or a repository of the Hugging Face hub or its cache (also with HF_HUB_OFFLINE=1). Only
headers and indices are read, and never the weights of other kinds of draft.
"""

import errno
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from vllm import envs
from vllm.logger import init_logger

from vllm_longspec.targets.families import FAMILIES

# Below vLLM's logger, whose handlers it uses.
logger = init_logger(f"vllm.{__name__}")

_PREFIXES = ("", "glide.", "model.")
_REQUIRED = frozenset(
    {f"self_attn.{projection}_proj.weight" for projection in "qkvo"}
    | {f"cross_attn.{projection}_proj.weight" for projection in "qo"}
    | {f"mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")}
    | {f"{name}_layernorm.weight" for name in ("input", "post_self_attention", "post_cross_attention")}
)
_OPTIONAL = frozenset(
    {f"self_attn.{projection}_proj.bias" for projection in "qkv"}
    # In every published checkpoint, but unused.
    | {f"cross_attn.{projection}_proj.{kind}" for projection in "kv" for kind in ("weight", "bias")}
    | {"cross_attn.q_proj.bias"}
)
# No other kind of draft has both under one prefix.
_MARKERS = ("self_attn.q_proj.weight", "cross_attn.q_proj.weight")

_NAMES_SHOWN = 3

# What LongSpec's training code writes, a format that vLLM does not load.
PICKLED_NAME = "draft_model_weights.pth"

# vLLM can download models from these, but parameter names cannot be read without a download.
_OBJECT_STORAGE = ("s3://", "gs://", "az://")

_CACHE_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Parameter name -> shape; None where only the name is known.
Shapes = Mapping[str, tuple[int, ...] | None]


class NoGlideDraftError(Exception):
    """A model that is not recognised as a GLIDE draft, with the reason and the way out in one line.

    An error only if the user asks for a GLIDE draft; other kinds of draft are left to vLLM.
    """


class UnseenDraftError(NoGlideDraftError):
    """A model whose files cannot be read from here, or not enough of them."""


class _UnreadableError(Exception):
    """A file of a checkpoint exists but cannot be used, with the reason and the way out in one line."""


@dataclass(frozen=True)
class DraftCheckpoint:
    """The checkpoint of a GLIDE draft."""

    model: str
    architecture: str  # a value of FAMILIES
    config: dict[str, Any]  # config.json
    # Without the prefix of the names; empty if they cannot be read without a download.
    shapes: Shapes = field(default_factory=dict)


def inspect_draft(model: str, revision: str | None = None) -> DraftCheckpoint | None:
    """As `read_draft`, but None if `model` is not recognised as a GLIDE draft."""
    try:
        return read_draft(model, revision)
    except NoGlideDraftError:
        return None


def read_draft(model: str, revision: str | None = None, *, expected: bool = False) -> DraftCheckpoint:
    """Reads the checkpoint of a draft.

    Args:
        model: a local folder or a repository of the Hugging Face hub.
        revision: branch, tag or commit of the repository.
        expected: whether the user asks for a GLIDE draft, so that weights may be downloaded to recognise it.

    Raises:
        NoGlideDraftError: `model` is not recognised as a GLIDE draft.
        ValueError: a GLIDE draft is of an unknown family, has missing or unexpected parameters, or files that cannot be
            read or are unsafe (pickled code, an index that names other files), or must be converted first.
    """
    if revision is not None and not isinstance(revision, str):
        raise NoGlideDraftError(f"revision must be a string, got {revision!r}: give it in quotes")
    if (pickled := _pickled_draft(model)) is not None:
        raise ValueError(
            f"draft {pickled} is what LongSpec's training code writes: make a draft of it with vllm-longspec convert "
            f"{pickled} --target TARGET --out FOLDER, and give that folder"
        )
    repository = _Repository(model, revision)
    try:
        config = repository.read_json("config.json")
    except _UnreadableError as error:
        if prefix_of(repository.readable_shapes()) is not None:
            raise ValueError(f"draft {model} is a GLIDE draft, but {error}") from None
        raise NoGlideDraftError(f"{model} is not known to be one, {error}") from None
    if config is None:
        if prefix_of(repository.readable_shapes()) is not None:
            raise ValueError(
                f"draft {model} has the parameters of a GLIDE draft, but no config.json: copy its target's there"
            )
        if repository.obstacle is not None:
            raise UnseenDraftError(f"{model} {repository.obstacle}")
        raise NoGlideDraftError(f"{model} is not one, it has no config.json")
    architectures = config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    named = any(architecture in FAMILIES.values() for architecture in architectures)
    try:
        shapes = repository.parameter_shapes(download_weights=expected or named or not architectures)
    except _UnreadableError as error:
        if named:
            raise ValueError(f"draft {model} is a GLIDE draft, but {error}") from None
        raise NoGlideDraftError(f"{model} is not known to be one, {error}") from None
    prefix = prefix_of(shapes)
    if not named and prefix is None:
        if shapes or repository.obstacle is None:
            raise NoGlideDraftError(f"{model} is not one")
        raise UnseenDraftError(f"{model} {repository.obstacle}")

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"draft {model} is a GLIDE draft of model_type {model_type!r} in its config.json, but the families "
            f"supported are {', '.join(FAMILIES)}: serve without it"
        )
    # Without shapes, names are checked when weights are loaded.
    if shapes:
        check_names(model, shapes, prefix or "")
    shapes = {name.removeprefix(prefix or ""): shape for name, shape in shapes.items()}
    return DraftCheckpoint(model, FAMILIES[model_type], config, shapes)


def find_file(model: str, file_name: str, revision: str | None = None) -> Path | None:
    """The path of an optional file of a checkpoint; None if it does not exist."""
    repository = _Repository(model, revision)
    path = repository._find(file_name)
    # Warns only if the file may exist; offline, the cache is expected to be complete.
    if path is None and repository.obstacle is not None and not huggingface_hub.constants.is_offline_mode():
        logger.warning("%s of draft %s is not used: the draft %s.", file_name, model, repository.obstacle)
    return path


def weight_files(folder: str) -> list[Path]:
    """The files of weights in a local folder, of one format only, as vLLM reads them."""
    from vllm.model_executor.model_loader.weight_utils import filter_files_not_needed_for_inference

    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        files = sorted(str(path) for path in Path(folder).glob(pattern))
        if pattern != "*.safetensors":
            files = filter_files_not_needed_for_inference(files)
        if files:
            return [Path(file) for file in files]
    return []


def _pickled_draft(model: str) -> str | None:
    """The path of a draft that must be converted first, if `model` is one or the folder of one and has nothing else."""
    if os.path.isfile(model) and model.endswith(".pth"):
        return model
    path = os.path.join(model, PICKLED_NAME)
    return path if os.path.isfile(path) and not weight_files(model) else None


def prefix_of(names: Iterable[str]) -> str | None:
    """What a GLIDE draft's parameter names begin with in this checkpoint; None if it has no such parameters."""
    known = set(names)
    return next((prefix for prefix in _PREFIXES if all(prefix + marker in known for marker in _MARKERS)), None)


def check_names(model: str, names: Iterable[str], prefix: str) -> None:
    """Raises ValueError if parameters of a GLIDE draft are missing, or others are there."""
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
    """The files of a checkpoint. A missing file is None, not an error.

    `obstacle` says why files could not be looked for, in one line with the way out.
    """

    def __init__(self, model: str, revision: str | None):
        self.model = model
        self.revision = revision
        self.is_local = os.path.isdir(model)
        # `model` may also be the name of a method or of a proposer class, which are not looked up on the hub.
        self.is_remote = not self.is_local and model.count("/") == 1 and not envs.VLLM_USE_MODELSCOPE
        self.obstacle: str | None = None
        if self.is_local and not os.access(model, os.R_OK | os.X_OK):
            self.obstacle = "is a folder that may not be read: change its permissions"
        elif not self.is_local and not self.is_remote:
            self.obstacle = _location_obstacle(model)

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
        """Shapes of the parameters in local files; empty if there are none or they cannot be read."""
        if not self.is_local:
            return {}
        try:
            return self.parameter_shapes(download_weights=False)
        except _UnreadableError:
            return {}

    def parameter_shapes(self, download_weights: bool) -> Shapes:
        """Shapes of all parameters, from headers and indices; empty if they cannot be read without a download.

        With `download_weights` a .bin file, which has no header, is downloaded to the cache, where vLLM finds it later.
        Raises `_UnreadableError` for a damaged or unsafe file.
        """
        named_by_index: dict[str, None] = {}
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if content := self.read_json(index):
                named_by_index = _names_in_index(index, content)
                break
        if self.is_local:
            return {name: shape for file in weight_files(self.model) for name, shape in _shapes_in_file(file).items()}
        return named_by_index or self._shapes_in_remote_file(download_weights)

    def _shapes_in_remote_file(self, download_weights: bool) -> Shapes:
        if not self.is_remote:
            return {}
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            if cached := self._find_cached(file_name):
                return _shapes_in_file(cached)
        if self.obstacle is not None:
            return {}
        try:
            header = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.model, "model.safetensors", revision=self.revision
            )
            return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
        except Exception as error:
            self._record_obstacle(error)
        weights = self._find("pytorch_model.bin") if download_weights else None
        return _shapes_in_file(weights) if weights else {}

    def _find(self, file_name: str) -> Path | None:
        if self.is_local:
            path = Path(self.model) / file_name
            # Unlike `Path.is_file`, it does not raise in an unreadable folder.
            return path if os.path.isfile(path) else None
        if not self.is_remote:
            return None
        if cached := self._find_cached(file_name):
            return cached
        if self.obstacle is not None:
            # Each request to a hub that does not answer waits for a timeout.
            return None
        try:
            return Path(huggingface_hub.hf_hub_download(self.model, file_name, revision=self.revision))
        except Exception as error:
            self._record_obstacle(error)
            return None

    def _record_obstacle(self, error: Exception) -> None:
        # The first one is the cause of most others.
        self.obstacle = self.obstacle or _hub_obstacle(self.model, self.revision, error)

    def _find_cached(self, file_name: str) -> Path | None:
        try:
            cached = huggingface_hub.try_to_load_from_cache(self.model, file_name, revision=self.revision)
        except ValueError:  # not a valid name of a repository
            return None
        return Path(cached) if isinstance(cached, str) else None


def _location_obstacle(model: str) -> str:
    """Why `model` is neither a local folder nor a repository, and the way out."""
    if "://" in model:
        place = "in object storage" if model.lower().startswith(_OBJECT_STORAGE) else "an address"
        return f"is {place}, where no GLIDE draft is looked for: copy it to a local folder and give that"
    if os.path.exists(model):
        return "is a file: give the folder that it lies in"
    if envs.VLLM_USE_MODELSCOPE and model.count("/") == 1:
        return (
            "is no local folder, and no GLIDE draft is looked for on ModelScope (VLLM_USE_MODELSCOPE): download it and "
            "give its folder"
        )
    return "is neither a local folder nor the name of a repository: check it, OWNER/NAME is the name of a repository"


def _hub_obstacle(model: str, revision: str | None, error: Exception) -> str | None:
    """Why a file of a repository could not be looked for, and the way out; None if it does not exist."""
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        # Not in the cache; the cause is why the hub could not be asked.
        cause = error.__cause__
        error = cause if isinstance(cause, Exception) else hub_errors.OfflineModeIsEnabled()
    if isinstance(error, hub_errors.EntryNotFoundError | hub_errors.NotASafetensorsRepoError):
        return None
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    at = "" if revision is None else f" at revision {revision}"
    if isinstance(error, hub_errors.HFValidationError):
        return "is neither a local folder nor a possible name of a repository: check it"
    if isinstance(error, hub_errors.GatedRepoError):
        return (
            "is a gated repository: ask for access on its page of the Hugging Face hub, and give your token in HF_TOKEN"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            "is neither a local folder nor a repository that the Hugging Face hub shows to this user: check the name, "
            "and for a private repository give your token in HF_TOKEN"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"has no revision {revision!r}: give one of its branches, tags or commits"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return (
            f"is not in the cache of the Hugging Face hub{at}, and the hub is not asked (HF_HUB_OFFLINE): download it "
            "first, or unset HF_HUB_OFFLINE"
        )
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"cannot be read with this user's access to the Hugging Face hub (status {status}): check HF_TOKEN"
        return f"could not be read from the Hugging Face hub, which answered with status {status}: try again later"
    if isinstance(error, hub_errors.SafetensorsParsingError):
        return f"has a model.safetensors that is damaged ({reason}): export it again"
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in _CACHE_IS_FULL):
        return (
            f"cannot be put into the cache of the Hugging Face hub ({reason}): make room there, or move it with HF_HOME"
        )
    return (
        f"is not in the cache of the Hugging Face hub{at}, and the hub could not be asked ({reason}): check the "
        "network and HF_ENDPOINT, or give a local folder"
    )


def _names_in_index(file_name: str, index: dict[str, Any]) -> dict[str, None]:
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise _UnreadableError(f"the weight_map of its {file_name} is no JSON object: download or export it again")
    for name, file in weight_map.items():
        # A path could name any file of this machine.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {"/", "\\", "\0"}:
            raise _UnreadableError(
                f"its {file_name} has {name} in {file!r}, which is no file name: an index may name files beside it only"
            )
    return dict.fromkeys(weight_map)


def _shapes_in_file(path: Path) -> Shapes:
    if not path.is_file():
        raise _UnreadableError(f"its {path.name} is no file: download or export it again")
    if not os.access(path, os.R_OK):
        raise _UnreadableError(f"its {path.name} may not be read: change its permissions")
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

    # `safe_open` checks that the tensors fill the file, and so detects truncation.
    with safe_open(path, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _pickled_shapes(path: Path) -> Shapes:
    import torch

    # The format before PyTorch 1.6 cannot be memory-mapped.
    is_mappable = zipfile.is_zipfile(path)
    weights = torch.load(path, map_location="meta", weights_only=True, mmap=is_mappable)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise pickle.UnpicklingError
    return {name: tuple(weight.shape) for name, weight in weights.items()}
