# SPDX-License-Identifier: Apache-2.0
"""The results of benchmarks: a file of JSON lines, one measurement each, with all that is needed to read it alone.

Lines are appended as they are measured, so that an interrupted run keeps what it has, and files of several runs can be
put one behind the other. Where something was measured again, the last line counts.
"""

import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from systems import ROOT, is_plugin_system

Record = dict[str, Any]

# Measurements that agree in these are the same measurement.
_IDENTITY = ("kind", "model", "system", "acceptance", "options", "engine", "temperature", "context", "batch")


def environment(commit: str | None) -> dict[str, str]:
    """The machine and the versions. `commit` names the plugin's where there is no git to ask."""
    # Asked without PyTorch: a process that has touched the GPU keeps some of its memory.
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        device, driver = _output_of(query).splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError):
        device, driver = platform.machine(), "none"
    if commit is None:
        try:
            commit = _output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"])
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return {
        "device": device,
        "driver": driver,
        "commit": commit,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "vllm")},
    }


def identity(record: Record) -> str:
    """What tells a measurement from others. The plugin's commit counts for the plugin's systems only."""
    machine = record["environment"]
    keys = [record.get(name) for name in _IDENTITY] + [machine["device"], machine["vllm"]]
    if is_plugin_system(record["system"]):
        keys.append(machine["commit"])
    return json.dumps(keys, sort_keys=True)


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(paths: Iterable[Path]) -> list[Record]:
    """The measurements of all files in their order; none for a file that is not there."""
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
