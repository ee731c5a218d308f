# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions that something was measured with."""

import itertools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def environment(packages: tuple[str, ...] = ("torch", "triton", "vllm")) -> dict[str, str]:
    # Asked without PyTorch: a process that has touched the GPU keeps some of its memory.
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        gpus = _visible([line.split(", ") for line in answer.splitlines()])
        device, driver = " + ".join(dict.fromkeys(name for name, _ in gpus)), gpus[0][1]
        number = len(gpus)
    except (OSError, subprocess.CalledProcessError, IndexError):
        device, driver, number = platform.machine(), "none", 0
    versions = {name: _version(name) for name in packages}
    python = platform.python_version()
    return {"device": device, "GPUs": str(number), "driver": driver, "python": python, **versions}


def _visible(gpus: list[list[str]]) -> list[list[str]]:
    """Those that CUDA_VISIBLE_DEVICES leaves, which nvidia-smi does not heed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    names = [name.strip() for name in visible.split(",")]
    if names[0].startswith(("GPU-", "MIG-")):
        # Of which kind they are is not known, how many is.
        return [gpus[0]] * len(names)
    # What follows the first that is none is hidden too.
    valid = itertools.takewhile(lambda name: name.isdecimal() and int(name) < len(gpus), names)
    return [gpus[int(name)] for name in valid]


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"
