# SPDX-License-Identifier: Apache-2.0
"""Files between an engine that captures and the process that it teaches.

Each rank of the engine writes a file for each part of a request that a step computes, first under another name and then
renamed: a file that can be seen is complete. Whoever reads it deletes it. A part may be computed again after a
preemption, with other bounds; what is written twice is equal.

    FOLDER/NAME/START-END.FIRST_HEAD.safetensors
        kv      [END - START, heads of this rank, 2 * head_size], K then V
        hidden  [rows within the part, hidden_size], of one rank only

A request says what it wants in the `extra_args` of its sampling parameters, see `CaptureRequest`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# The key of `SamplingParams.extra_args`.
EXTRA_ARGS = "longspec_capture"
_FAILURE = "failure"
_SUFFIX = ".safetensors"


class CaptureRequest(NamedTuple):
    """What is captured of a request: K and V of its first tokens, hidden states of some rows."""

    name: str  # of its folder
    num_tokens: int  # of its prompt
    rows: np.ndarray  # int64 [num_rows], increasing

    def to_extra_args(self) -> dict[str, Any]:
        """For `SamplingParams(extra_args=...)`. Rows are passed as ranges, of which long answers have few."""
        breaks = np.flatnonzero(np.diff(self.rows) != 1) + 1
        parts = [part for part in np.split(self.rows, breaks) if len(part)]
        ranges = [[int(part[0]), int(part[-1]) + 1] for part in parts]
        return {EXTRA_ARGS: {"name": self.name, "num_tokens": self.num_tokens, "rows": ranges}}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> "CaptureRequest | None":
        """None for a request that asks for nothing.

        Raises:
            ValueError: the name is not one of a folder in the spool.
        """
        given = (extra_args or {}).get(EXTRA_ARGS)
        if given is None:
            return None
        name = given["name"]
        if not isinstance(name, str) or not name.isalnum():
            raise ValueError(f"{EXTRA_ARGS} has the name {name!r}: give letters and digits only")
        ranges = [np.arange(start, end) for start, end in given["rows"]]
        return cls(name, given["num_tokens"], np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64))


class Part(NamedTuple):
    """What one rank has captured of a request in one step."""

    start: int  # of its rows in the request
    end: int
    first_head: int
    kv: torch.Tensor  # [end - start, num_heads, 2 * head_size] on the CPU
    hidden: torch.Tensor | None  # [num_rows, hidden_size] on the CPU


def write_part(folder: Path, part: Part) -> None:
    """Writes a part to the folder of its request, which exists unless nobody wants the part any more.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {"kv": part.kv} if part.hidden is None else {"kv": part.kv, "hidden": part.hidden}
    name = f"{part.start}-{part.end}.{part.first_head}{_SUFFIX}"
    unfinished = folder / f".{name}"
    try:
        save_file(tensors, unfinished)
        unfinished.rename(folder / name)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        if not folder.is_dir():
            return
        # Errors of safetensors are its own, whatever caused them.
        raise error if isinstance(error, OSError) else OSError(" ".join(str(error).split())) from error


def read_parts(folder: Path) -> Iterator[Part]:
    """Reads and deletes the parts that are complete by now, in any order."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.name.endswith(_SUFFIX):
            continue
        bounds, first_head = entry.name.removesuffix(_SUFFIX).split(".")
        start, end = bounds.split("-")
        tensors = load_file(entry.path)
        os.unlink(entry.path)
        yield Part(int(start), int(end), int(first_head), tensors["kv"], tensors.get("hidden"))


def write_failure(spool: Path, message: str) -> None:
    """Tells the reader why no more parts will come."""
    unfinished = spool / f".{_FAILURE}"
    unfinished.write_text(message)
    unfinished.rename(spool / _FAILURE)


def read_failure(spool: Path) -> str | None:
    try:
        return (spool / _FAILURE).read_text()
    except FileNotFoundError:
        return None
