# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions that something was measured with."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def environment(packages: tuple[str, ...] = ("torch", "triton", "vllm")) -> dict[str, str]:
    # Asked without PyTorch: a process that has touched the GPU keeps some of its memory.
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        device, driver = answer.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError):
        device, driver = platform.machine(), "none"
    versions = {name: _version(name) for name in packages}
    return {"device": device, "driver": driver, "python": platform.python_version(), **versions}


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
