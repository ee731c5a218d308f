# SPDX-License-Identifier: Apache-2.0
"""Makes a draft that vLLM loads of the file that LongSpec's training code writes (`draft_model_weights.pth`).

    vllm-longspec convert checkpoint-last --target Qwen/QwQ-32B-Preview --out my-draft

That file has the parameters of the draft's layer and nothing else: sizes and family are the target's. The result is a
folder with config.json and model.safetensors, laid out as the published drafts are.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from vllm_longspec.proposers.glide.checkpoint import (
    PICKLED_NAME,
    DraftCheckpoint,
    check_names,
    find_file,
    prefix_of,
)
from vllm_longspec.proposers.glide.fit import check_fit
from vllm_longspec.targets.families import FAMILIES, WRAPPERS

# Of the whole model's parameters, as the trainer keeps them, those of the draft.
_TRAINED_PREFIX = "draft_model."


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
        ValueError: a file cannot be used, the target's family has no GLIDE drafts, or the draft does not fit it.
    """
    from safetensors.torch import save_file

    if out.exists():
        raise ValueError(f"--out {out} exists already: give a new folder")
    config_path = find_file(target, "config.json", revision)
    if config_path is None:
        raise ValueError(f"target {target} has no config.json that can be read: give its folder, or check the name")
    config = json.loads(config_path.read_text())
    if set(config.get("architectures") or ()) & set(WRAPPERS):
        # The draft's target is the language model inside.
        config = config["text_config"]
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"target {target} has model_type {model_type!r}, but the families with GLIDE drafts are "
            f"{', '.join(FAMILIES)}: give the target that the draft was trained for"
        )
    weights = _read_weights(path)
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) != 1:
        raise ValueError(f"{path} has weights of {', '.join(sorted(map(str, dtypes)))}: save them in one dtype")
    # A quantised target says how its own weights are stored.
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config |= {"architectures": [FAMILIES[model_type]], "dtype": str(dtypes.pop()).removeprefix("torch.")}
    draft = DraftCheckpoint(
        str(out), FAMILIES[model_type], config, {name: tuple(weight.shape) for name, weight in weights.items()}
    )
    check_fit(draft, _Target(target, _text_config(target, config_path)))
    out.mkdir(parents=True)
    # Copies, since safetensors refuses tensors that share memory.
    save_file({name: weight.clone() for name, weight in weights.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return draft


def _read_weights(path: Path) -> dict[str, Any]:
    import torch

    file = path / PICKLED_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give {PICKLED_NAME}, or the folder that it lies in")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds more than tensors, or is no checkpoint: pickled code is never run; save the draft's "
            "state_dict alone"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is damaged ({reason}): save or copy it again") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError(f"{file} holds more than tensors by name: save the draft's state_dict alone")
    if any(name.startswith(_TRAINED_PREFIX) for name in weights):
        weights = {
            name.removeprefix(_TRAINED_PREFIX): weight
            for name, weight in weights.items()
            if name.startswith(_TRAINED_PREFIX)
        }
    prefix = prefix_of(weights)
    check_names(str(file), weights, prefix or "")
    return {name.removeprefix(prefix or ""): weight for name, weight in weights.items()}


def _text_config(target: str, path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent).get_text_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the config.json of target {target} cannot be used ({reason}): check --target") from None
