# SPDX-License-Identifier: Apache-2.0
"""What was measured, as files: a cell is one method on one workload at one temperature.

A cell is written when it is complete, so a run that is stopped keeps its cells and can go on with the others. A folder
has one run: what its cells share, and what decides whether they can be compared, is in its settings.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_longspec.bench.methods import Method
from vllm_longspec.bench.prompts import Chosen, Prompt
from vllm_longspec.training.generate import read_settings, write_atomically

_MANIFEST = "run.json"
_CELLS = "cells"


@dataclass
class Answer:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)  # tokens of each chunk of the stream, its empty ones left out
    # Draft tokens verified and accepted, step by step; None where the server does not say. A step without draft tokens
    # is not among them.
    drafted: list[int] | None = None
    accepted: list[int] | None = None


class Key(NamedTuple):
    """What tells a cell from others."""

    method: str
    workload: str
    temperature: float


@dataclass
class Cell:
    key: Key
    speculative_config: dict[str, Any] | None
    environment: dict[str, str]
    # Of the prompts' token ids: only the same can be compared.
    prompts: str
    # What the prompts are, and what was left out.
    description: str
    result: dict[str, Any]  # of `vllm bench`
    answers: list[Answer]
    # Of the server, where requests have no metrics of their own.
    is_speculative: bool

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "key": self.key._asdict(), "answers": [vars(answer) for answer in self.answers]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Cell":
        answers = [Answer(**answer) for answer in value["answers"]]
        return cls(**{**value, "key": Key(**value["key"]), "answers": answers})


def digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([prompt.token_ids for prompt in prompts]).encode()).hexdigest()


# Of `vllm bench`'s report, what is kept: of its lists those with one number for each request.
_KEPT = (
    "duration",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    "output_throughput",
    "input_lens",
    "output_lens",
    "ttfts",
    "latencies",
    *(f"{what}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for what in ("mean", "median", "p50", "p99")),
)


def cell_of(
    key: Key,
    method: Method,
    environment: dict[str, str],
    chosen: Chosen,
    result: dict[str, Any],
    answers: list[Answer],
) -> Cell:
    names = [*_KEPT, *(name for name in result if name.startswith("spec_decode_"))]
    kept = {name: result[name] for name in names if name in result}
    is_speculative = method.speculative_config is not None or "spec_decode_num_drafts" in result
    return Cell(
        key,
        method.speculative_config,
        environment,
        digest(chosen.prompts),
        chosen.describe(),
        kept,
        answers,
        is_speculative,
    )


class Store:
    """The folder of a run.

    Args:
        settings: what all cells share, as JSON has it.
        resume: go on with a run that is there.

    Raises:
        ValueError: there is something else, a run that is not to be resumed, or one with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool):
        self.folder = folder
        manifest = folder / _MANIFEST
        if not manifest.exists() or not any((folder / _CELLS).glob("*.json")):
            # A run that measured nothing binds nobody to its settings.
            if not manifest.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"--out {folder} has something that is no run of this command: give another folder")
            (folder / _CELLS).mkdir(parents=True, exist_ok=True)
            write_atomically(manifest, json.dumps({"settings": settings}, indent=2) + "\n")
            return
        if not resume:
            raise ValueError(f"--out {folder} has a run: go on with it by --resume, or give another folder")
        # As they are read back.
        wanted, found = json.loads(json.dumps(settings)), read_settings(manifest)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"--resume with {name} {json.dumps(value)}, but the run in {folder} has "
                    f"{json.dumps(found.get(name))}: give the same, or another folder"
                )

    def _path(self, key: Key) -> Path:
        # The workload may be a path.
        workload = re.sub(r"[^\w.-]+", "_", key.workload)
        # What is readable may be the same of two keys.
        tag = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
        return self.folder / _CELLS / f"{key.method}-{workload}-t{key.temperature:g}-{tag}.json"

    def add(self, cell: Cell) -> None:
        write_atomically(self._path(cell.key), json.dumps(cell.to_json()) + "\n")

    def has(self, key: Key, method: Method, prompts: Sequence[Prompt]) -> bool:
        """Whether a cell was measured.

        Raises:
            ValueError: with another configuration or other prompts, or the file is another cell's.
        """
        path = self._path(key)
        if not path.exists():
            return False
        cell = Cell.from_json(json.loads(path.read_text()))
        for what, is_same in (
            ("method, workload or temperature", cell.key == key),
            ("method", cell.speculative_config == method.speculative_config),
            ("set of prompts", cell.prompts == digest(prompts)),
        ):
            if not is_same:
                raise ValueError(f"--resume: {path} was measured with another {what}: give another folder by --out")
        return True

    def all(self, methods: Sequence[str], workloads: Sequence[str]) -> list[Cell]:
        """All cells of the run, by workload and method: these first and in this order."""

        def place(name: str, names: Sequence[str]) -> tuple[int, str]:
            return (names.index(name), "") if name in names else (len(names), name)

        cells = [Cell.from_json(json.loads(path.read_text())) for path in (self.folder / _CELLS).glob("*.json")]
        return sorted(
            cells,
            key=lambda cell: (
                cell.key.temperature,
                place(cell.key.workload, workloads),
                place(cell.key.method, methods),
            ),
        )
