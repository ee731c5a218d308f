# SPDX-License-Identifier: Apache-2.0
"""A process of its own for every engine of the tests.

A process can hold only one engine at a time, and what a first engine leaves behind must not explain what a second one
does.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# Forks of a process that has imported vLLM start at once; CUDA does not outlive a fork.
_CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_CONTEXT.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.gpu.model_runner"])
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a GPU Triton rounds float32 to TF32 unless it is told not to.
    "TRITON_F32_DEFAULT": "ieee",
}


def run_alone(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}) -> tuple[Any, str]:
    """Calls `function` in a process of its own.

    Returns what it returned, which must be fit for JSON, and all that it printed.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        settings = {**os.environ, **_ENVIRONMENT, **environment}
        process = _CONTEXT.Process(target=_call, args=(function, arguments, settings, result, log))
        process.start()
        process.join()
        printed = log.read_text(errors="replace") if log.exists() else ""
        if process.exitcode != 0:
            raise AssertionError(f"the engine stopped with {process.exitcode}:\n{printed[-6000:]}")
        return json.loads(result.read_text()), printed


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, str], result: Path, log: Path
) -> None:
    os.environ.update(settings)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result.write_text(json.dumps(function(*arguments)))
