# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run. Each is a folder that `vllm serve --speculative-model` takes, with the trainer's state inside.

A folder is written under another name, flushed to the disk and renamed, so that one that is there is whole, whenever
the run is killed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "checkpoints"
# Files of the draft in the run's own folder, in the order in which they are put there.
EXPORTED = ("model.safetensors", "config.json")
_STATE = Path("trainer") / "state.pt"
_NAME = re.compile(r"step-(\d+)")


def write_draft(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """config.json and model.safetensors, in the layout of the published drafts."""
    saved = {name: weight.detach().to("cpu", dtype).contiguous().clone() for name, weight in weights.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save(
    run: Path,
    step: int,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes a checkpoint of a run and removes all but the last `keep`.

    Args:
        run: the run's folder
        config: config.json of the draft
        weights: float32 by name; the state has them too, since the draft's are rounded to `dtype`

    Raises:
        ValueError: it cannot be written, with the way out; earlier checkpoints stay.
    """
    folder = run / FOLDER
    name = f"step-{step:08d}"
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        (temporary / _STATE).parent.mkdir(parents=True, exist_ok=True)
        write_draft(temporary, config, weights, dtype)
        # Of a file that PyTorch opens itself, its errors do not say what the system says.
        with (temporary / _STATE).open("wb") as file:
            torch.save({**state, "weights": {name: weight.cpu() for name, weight in weights.items()}}, file)
        for path in (*(each for each in temporary.rglob("*") if each.is_file()), temporary / _STATE.parent, temporary):
            _flush(path)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        temporary.rename(folder / name)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = newest(run)
        kept = "no earlier one is there" if last is None else f"{last} is whole, and --resume goes on from there"
        raise ValueError(
            f"the checkpoint {folder / name} cannot be written ({_reason(error)}): make room; {kept}"
        ) from None
    for old in _all(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder / name


def export(run: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The trained draft in the run's own folder. Raises ValueError where it cannot be written."""
    temporary = run / f".draft.{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_draft(temporary, config, weights, dtype)
        for name in EXPORTED:
            _flush(temporary / name)
            (temporary / name).replace(run / name)
        _flush(run)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the draft cannot be written to {run} ({_reason(error)}): make room, and give --resume"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    return next(reversed(_all(run)), None)


def read_state(checkpoint: Path, mapped: bool = False) -> dict[str, Any]:
    """What `save` was given, with `weights`, on the CPU. Raises ValueError where it is damaged.

    Args:
        mapped: whether tensors are read from the file when they are used
    """
    try:
        return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint / _STATE} is damaged ({reason}): remove {checkpoint}, and resume") from None


def run_of(draft: Path) -> Path:
    """The folder of the run that a draft is the result or a checkpoint of, if it is that of a run."""
    folder = draft.absolute().parent
    return folder.parent if folder.name == FOLDER else draft


def clean(run: Path) -> None:
    """Removes what a run that was killed had begun to write."""
    for folder in (run, run / FOLDER):
        for path in folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(".draft.*"):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What the system said, if it did: PyTorch ends a file that could not be written with an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return " ".join(str(error).split())


def _all(run: Path) -> list[Path]:
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
