# SPDX-License-Identifier: Apache-2.0
"""Makes a draft that vLLM loads of the file that LongSpec's training code writes (`draft_model_weights.pth`).

    vllm-longspec convert checkpoint-last --target Qwen/QwQ-32B-Preview --out my-draft

That file has the parameters of the draft's layer and nothing else: sizes and family are the target's. The result is a
folder with config.json and model.safetensors, laid out as the published drafts are.
"""

import argparse
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vllm import envs

from vllm_longspec.proposers.glide.checkpoint import (
    PICKLED_NAME,
    DraftCheckpoint,
    check_names,
    prefix_of,
)
from vllm_longspec.proposers.glide.fit import MAX_LAYERS, SIZES, check_fit
from vllm_longspec.targets.families import FAMILIES, WRAPPERS

# Of the whole model's parameters, as the trainer keeps them, those of the draft.
_TRAINED_PREFIX = "draft_model."

# What vLLM computes drafts in.
_DTYPES = ("float16", "bfloat16", "float32")


class _Target(NamedTuple):
    model: str
    hf_text_config: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help=f"{PICKLED_NAME}, or the folder that it lies in")
    parser.add_argument("--target", required=True, help="the target that the draft was trained for: folder or name")
    parser.add_argument("--revision", help="branch, tag or commit of the target's repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft, which must not exist yet")


def run(arguments: argparse.Namespace) -> None:
    draft = convert(arguments.path, arguments.target, arguments.out, arguments.revision)
    print(f"{draft.model}: {len(draft.shapes)} parameters, {draft.architecture}")
    print(f"vllm serve {arguments.target} --speculative-model {draft.model}")


def convert(path: Path, target: str, out: Path, revision: str | None = None) -> DraftCheckpoint:
    """Writes config.json and model.safetensors into the new folder `out`.

    Args:
        path: the pickled parameters, or the folder that they lie in. Pickled code is never run.
        target: whose config.json the draft's is made of, a local folder or a repository of the Hugging Face hub.

    Raises:
        ValueError: a file cannot be used, the target's family has no GLIDE drafts, the draft does not fit it, or `out`
            exists or cannot be written. Then nothing is left of `out`.
    """
    # A link that leads nowhere is in the way too.
    if os.path.lexists(out):
        raise ValueError(f"--out {out} exists already: give a new folder")
    target_config, read_config = read_target(target, revision)
    weights = _read_weights(path)
    (dtype,) = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    config = draft_config(read_config, dtype)
    (architecture,) = config["architectures"]
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    draft = DraftCheckpoint(str(path), architecture, config, shapes)
    check_fit(draft, _Target(target, target_config))
    _write(out, config, weights)
    return replace(draft, model=str(out))


def read_target(target: str, revision: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The config of a target, as transformers reads it, and its config.json; of the language model inside a wrapper.

    Raises:
        ValueError: it cannot be read, or is of a family without GLIDE drafts.
    """
    path = _config_path(target, revision)
    config = _read_config(target, path)
    return _text_config(target, path), config


def draft_config(target_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of a draft whose weights are of `dtype`, made of its target's."""
    # A quantised target says how its own weights are stored.
    kept = {name: value for name, value in target_config.items() if name not in ("quantization_config", "torch_dtype")}
    return kept | {"architectures": [FAMILIES[target_config["model_type"]]], "dtype": dtype}


def _write(out: Path, config: dict[str, Any], weights: Mapping[str, Any]) -> None:
    """Writes a complete folder, or leaves nothing behind."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    new_parents = [parent for parent in out.parents if not os.path.lexists(parent)]
    # Copies, since safetensors refuses tensors that share memory and views of other layouts.
    copies = {name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as temporary:
            # Temporary folders are their owner's alone; this one gets the permissions of any new folder.
            folder = Path(temporary) / "draft"
            folder.mkdir()
            save_file(copies, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        for parent in new_parents:
            if os.path.isdir(parent) and not os.listdir(parent):
                parent.rmdir()
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise ValueError(f"--out {out} cannot be written ({reason}): give a new folder in a writable place") from None


def _read_weights(path: Path) -> dict[str, Any]:
    import torch

    file = path / PICKLED_NAME if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise ValueError(f"there is no file {file}: give {PICKLED_NAME}, or the folder that it lies in")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds more than tensors, or is no checkpoint: pickled code is never run; save the draft's "
            "state_dict alone"
        ) from None
    except PermissionError:
        raise ValueError(f"{file} may not be read: change its permissions") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is damaged ({reason}): save or copy it again") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in weights.items()
    ):
        raise ValueError(f"{file} holds more than tensors by name: save the draft's state_dict alone")
    if any(name.startswith(_TRAINED_PREFIX) for name in weights):
        weights = {
            name.removeprefix(_TRAINED_PREFIX): weight
            for name, weight in weights.items()
            if name.startswith(_TRAINED_PREFIX)
        }
    prefix = prefix_of(weights)
    check_names(str(file), weights, prefix or "")
    for name, weight in sorted(weights.items()):
        if (kind := _unusable(weight)) is not None:
            raise ValueError(
                f"{file} has {name} as a {kind}, but a draft has dense tensors of {', '.join(_DTYPES)}: save the "
                "trained weights themselves in one of these"
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"{file} has NaN or infinite values in {name}, with which nothing can be drafted: training has "
                "diverged, take an earlier checkpoint"
            )
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) != 1:
        raise ValueError(f"{file} has weights of {', '.join(sorted(map(str, dtypes)))}: save them in one dtype")
    return {name.removeprefix(prefix or ""): weight for name, weight in weights.items()}


def _unusable(weight: Any) -> str | None:
    """What kind of tensor this is, if it cannot be a draft's weight."""
    import torch

    if weight.is_nested or weight.layout != torch.strided:
        return f"tensor of layout {weight.layout}"
    if weight.device.type != "cpu":
        return f"tensor of device {weight.device} without values"
    dtype = str(weight.dtype).removeprefix("torch.")
    return None if dtype in _DTYPES else f"tensor of {dtype}"


def _config_path(target: str, revision: str | None) -> Path:
    """The target's config.json in its folder, or in the cache of the hub, into which it is downloaded."""
    from transformers.utils import cached_file

    if os.path.isdir(target):
        path = os.path.join(target, "config.json")
        if not os.path.isfile(path):
            raise ValueError(f"--target {target} has no config.json that can be read: give the target's own folder")
        return Path(path)
    if envs.VLLM_USE_MODELSCOPE:
        raise ValueError(
            f"--target {target} is no local folder, and nothing is looked up on ModelScope (VLLM_USE_MODELSCOPE): "
            "download it and give its folder"
        )
    try:
        return Path(cached_file(target, "config.json", revision=revision))
    except Exception as error:
        raise ValueError(
            f"--target {target} has no config.json that can be read ({_one_line(error)}): give its folder, or check "
            "the name and --revision"
        ) from None


def _read_config(target: str, path: Path) -> dict[str, Any]:
    """config.json of a target of one of `FAMILIES`, with sizes that transformers can be given."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the config.json of --target {target} cannot be read ({error.strerror}): change its permissions"
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(
            f"the config.json of --target {target} is not JSON in UTF-8: download or export it again"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"the config.json of --target {target} holds no JSON object: download or export it again")
    architectures, text_config = config.get("architectures"), config.get("text_config")
    if (
        isinstance(architectures, list)
        and isinstance(text_config, dict)
        and any(each in WRAPPERS for each in architectures)
    ):
        # The draft's target is the language model inside.
        config = text_config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"--target {target} has model_type {model_type!r} in its config.json, but the families with GLIDE drafts "
            f"are {', '.join(FAMILIES)}: give a target of one of them"
        )
    for name in (*SIZES[1:], "num_hidden_layers"):
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(
                f"--target {target} has {name} {value!r} in its config.json, which is no size: download or export it "
                "again"
            )
    if (config.get("num_hidden_layers") or 1) > MAX_LAYERS:
        raise ValueError(
            f"--target {target} has num_hidden_layers {config['num_hidden_layers']} in its config.json, more than "
            f"{MAX_LAYERS}: download or export it again"
        )
    return config


def _text_config(target: str, path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent).get_text_config()
    except Exception as error:
        # transformers' own errors of validation are no ValueErrors.
        raise ValueError(
            f"the config.json of --target {target} cannot be used ({_one_line(error)}): download or export it again"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
