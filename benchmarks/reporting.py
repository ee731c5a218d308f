# SPDX-License-Identifier: Apache-2.0
"""What all results share: the machine that they were measured on, and tables."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks import ROOT


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


def markdown(rows: list[list[Any]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines) + "\n"


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
