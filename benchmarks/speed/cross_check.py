# SPDX-License-Identifier: Apache-2.0
"""vLLM's own `vllm bench latency` and `vllm bench serve` on a cell that has been measured.

`bench latency` times whole batches. With the prompts in the prefix cache that is what `engine.py` times before it takes
off the prompts' time. `bench serve` reports the time a token of requests that come over HTTP.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import PAIR
from benchmarks.server import serve
from benchmarks.speed.records import Record

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
# Random weights have no tokenizer, and the benchmarks insist on one.
TOKENIZER = ["--tokenizer", str(PAIR / "target")]
ITERATIONS = 3


def run(settings: dict[str, Any], measured: Record, environment: dict[str, str], logs: Path) -> Iterator[Record]:
    """Yields what each benchmark says beside what was measured, in milliseconds."""
    arguments = [*_arguments(settings), *TOKENIZER]
    tokens = measured["tokens"]
    seconds = [each["prompt_seconds"] + tokens * each["ms_per_token"] / 1000 for each in measured["rounds"]]
    yield {
        "benchmark": "latency",
        "benchmark_ms": _latency(settings["model"], arguments, measured, environment, logs),
        "measured_ms": round(1000 * statistics.median(seconds), 1),
    }
    yield {
        "benchmark": "serve",
        "benchmark_ms": _serve(settings["model"], arguments, measured, environment, logs),
        "measured_ms": measured["ms_per_token"],
    }


def _latency(model: str, arguments: list[str], measured: Record, environment: dict[str, str], logs: Path) -> float:
    """Milliseconds of a whole batch, its prompts being cached, by the median iteration."""
    out = logs / "bench-latency.json"
    lengths = ["--input-len", str(measured["context"]), "--output-len", str(1 + measured["tokens"])]
    lengths += ["--batch-size", str(measured["batch"]), "--num-iters-warmup", "2", "--num-iters", str(ITERATIONS)]
    command = [*VLLM, "bench", "latency", "--model", model, *arguments, *lengths]
    _log_of([*command, "--disable-detokenize", "--output-json", str(out)], environment, logs / "bench-latency.log")
    return round(1000 * json.loads(out.read_text())["percentiles"]["50"], 1)


def _serve(model: str, arguments: list[str], measured: Record, environment: dict[str, str], logs: Path) -> float:
    """Milliseconds a token after the first, by the median request."""
    batch = measured["batch"]
    with serve("bench-serve", *arguments, target=model, defaults=[]) as server:
        lengths = ["--random-input-len", str(measured["context"]), "--random-output-len", str(1 + measured["tokens"])]
        command = [*VLLM, "bench", "serve", "--model", model, *TOKENIZER, "--port", str(server.port), *lengths]
        command += ["--dataset-name", "random", "--ignore-eos", "--max-concurrency", str(batch)]
        command += ["--num-prompts", str(ITERATIONS * batch), "--num-warmups", str(batch), "--temperature", "0"]
        command += ["--save-result", "--result-dir", str(logs), "--result-filename", "bench-serve.json"]
        _log_of(command, environment, logs / "bench-serve.log")
    return round(json.loads((logs / "bench-serve.json").read_text())["median_tpot_ms"], 3)


def _log_of(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("w") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)


def _arguments(settings: dict[str, Any]) -> list[str]:
    """The settings of an LLM as options of the command line."""
    arguments = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("model", "skip_tokenizer_init", "disable_log_stats"):
            continue
        if value is True:
            arguments.append(option)
        elif value is not False:
            arguments += [option, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return arguments
