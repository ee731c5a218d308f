# SPDX-License-Identifier: Apache-2.0
"""The measured speeds: a file of JSON lines, one measurement each, with all that is needed to read it alone.

Lines are appended as they are measured, so that an interrupted run keeps what it has, and files of several runs can be
put one behind the other. Where something was measured again, the last line counts.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed.systems import VLLM_SYSTEMS

Record = dict[str, Any]

# Measurements that agree in these are the same measurement.
_IDENTITY = ("kind", "model", "system", "acceptance", "options", "engine", "temperature", "context", "batch")


def identity(record: Record) -> str:
    """What tells a measurement from others. The plugin's commit counts for the plugin's systems only."""
    machine = record["environment"]
    keys = [record.get(name) for name in _IDENTITY] + [machine["device"], machine["vllm"]]
    if record["system"] not in VLLM_SYSTEMS:
        keys.append(machine["commit"])
    return json.dumps(keys, sort_keys=True)


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(paths: Iterable[Path]) -> list[Record]:
    """The measurements of all files in their order; none for a file that is not there."""
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
