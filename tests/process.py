# SPDX-License-Identifier: Apache-2.0
"""A process of its own for every engine of the tests.

Engines of one process share what vLLM tears down with the first that ends, and what a first engine leaves behind must
not explain what a second one does.
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

# Forks of a process that has imported vLLM start at once; CUDA does not outlive a fork.
_CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_CONTEXT.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.gpu.model_runner"])
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Processes that vLLM starts say where they are when they are aborted, as this one does.
    "PYTHONFAULTHANDLER": "1",
    # On a GPU Triton rounds float32 to TF32 unless it is told not to.
    "TRITON_F32_DEFAULT": "ieee",
}


def run_alone(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}, seconds: float = 600
) -> tuple[Any, str]:
    """Calls `function` in a process of its own.

    Returns what it returned, which must be fit for JSON, and all that it printed.

    Raises:
        AssertionError: it failed, or was not done after so many seconds; with the end of what it printed. What hangs
            prints last where all of its processes and threads are.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        settings = {**os.environ, **_ENVIRONMENT, **environment}
        process = _CONTEXT.Process(target=_call, args=(function, arguments, settings, result, log))
        process.start()
        try:
            process.join(seconds)
            hangs = process.is_alive()
        finally:
            if process.is_alive():
                _abort(process.pid)
            process.join()
        printed = log.read_text(errors="replace") if log.exists() else ""
        if hangs:
            raise AssertionError(f"the engine was not done after {seconds:g} s:\n{printed[-20000:]}")
        if process.exitcode != 0:
            raise AssertionError(f"the engine stopped with {process.exitcode}:\n{printed[-6000:]}")
        return json.loads(result.read_text()), printed


def _abort(pid: int) -> None:
    """Ends a process and all that it has started; one after the other, so that what each prints stays together."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.send_signal(signal.SIGABRT)
        member.resume()
        for _ in range(50):
            if _has_ended(member):
                break
            time.sleep(0.1)
        else:
            member.kill()


def _has_ended(process: psutil.Process) -> bool:
    # Its parent takes note of a child's end later than that.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, str], result: Path, log: Path
) -> None:
    # What was imported before the fork is no garbage. A starting engine collects a dozen times, and would search it.
    gc.freeze()
    os.environ.update(settings)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(file=2)
    result.write_text(json.dumps(function(*arguments)))
