# SPDX-License-Identifier: Apache-2.0
"""The cells of one engine: which of them are still to be measured, the engine's settings, and its process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server import ENVIRONMENT, ON_CPU
from benchmarks.speed import cross_check
from benchmarks.speed.engine import most_tokens
from benchmarks.speed.records import Record, append, identity, read
from benchmarks.speed.systems import Decoding, Model, NotMeasurable, check_system, prepare, target_folder

# vLLM may run past the last token by a tree and a step.
SLACK = 512
# In its interpreter, Triton copies what a kernel is given, so a small cache is a fast one.
CPU_SETTINGS = {
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 << 20,
    "gpu_memory_utilization": 0.1,
    "distributed_executor_backend": "uni",
}


class EngineFailed(NotMeasurable):
    """What should have run."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    contexts: list[int]
    batches: list[int]
    acceptances: list[float]
    temperatures: list[float]
    tokens: int
    repeats: int
    passes: int
    # More arguments of the engine, as the user gave them.
    engine: dict[str, Any]
    deadline: float
    again: bool
    out: Path
    # When this run started, which tells it from others.
    started: str
    machine: dict[str, str]


def run(plan: Plan, model: Model, system: str, given: dict[str, Any] | None) -> float:
    """Measures the cells of one engine that are still to be measured. Returns how long it took to start.

    Raises:
        NotMeasurable: the system cannot decode the model.
        EngineFailed: it can, and did not.
    """
    # How many nodes are verified follows what an engine starts with: as many as all acceptances can be had of.
    decoding = prepare(model, system, max(plan.acceptances), given)
    base = record_of(plan, model, decoding)
    known = set() if plan.again else {identity(record) for record in read([plan.out])}
    cells: list[dict[str, Any]] = [
        cell
        # Plain decoding has no acceptance, and trained weights have their own.
        for acceptance in (plan.acceptances if decoding.acceptance is not None else [None])
        for temperature in plan.temperatures
        for context in plan.contexts
        for batch in plan.batches
        if identity(base | (cell := cell_of(acceptance, temperature, context, batch))) not in known
    ]
    measurable = []
    for wanted in cells:
        if (needed := positions_for(plan, wanted["context"])) <= model.num_positions:
            measurable.append(wanted)
            continue
        skipped = base | wanted | {"skipped": f"{needed} positions are needed, the model has {model.num_positions}"}
        append(plan.out, skipped)
        print(f"  {describe(skipped)}", flush=True)
    if not measurable:
        return 0.0
    job = {
        "record": base,
        "cells": measurable,
        "tokens": plan.tokens,
        "repeats": plan.repeats,
        "passes": plan.passes,
        "deadline": plan.deadline,
        "out": str(plan.out.resolve()),
        "trained": model.trained and str(model.trained),
        "vocab_size": model.config["vocab_size"],
        "llm": engine_settings(plan, model, decoding),
    }
    name = f"{model.name}-{system}"
    print(f"{name}: {len(measurable)} cells", flush=True)
    measured_before = len(read([plan.out]))
    log = plan.out.with_suffix(".logs") / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.engine"],
            input=json.dumps(job),
            text=True,
            env=process_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    measured = read([plan.out])[measured_before:]
    for record in measured:
        print(f"  {describe(record)}", flush=True)
    if finished.returncode != 0:
        raise EngineFailed(f"the engine failed, see {log}:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    return max((record["start_seconds"] for record in measured), default=0.0)


def check(plan: Plan, model: Model, system: str, given: dict[str, Any] | None, context: int, batch: int) -> None:
    """Runs vLLM's own benchmarks on a cell that has been measured, at the largest acceptance.

    Raises:
        NotMeasurable: the cell has not been measured.
    """
    decoding = prepare(model, check_system(system), max(plan.acceptances), given)
    base = record_of(plan, model, decoding) | cell_of(decoding.acceptance, 0.0, context, batch)
    measured = {identity(record): record for record in read([plan.out])}.get(identity(base))
    if measured is None or "skipped" in measured:
        raise NotMeasurable(f"{model.name} {system} has not been measured at context {context} and batch {batch}")
    settings = engine_settings(plan, model, decoding)
    for result in cross_check.run(settings, measured, process_environment(), plan.out.with_suffix(".logs")):
        append(plan.out, base | {"kind": "cross_check"} | result)
        print(f"  {json.dumps(result)}", flush=True)


def record_of(plan: Plan, model: Model, decoding: Decoding) -> Record:
    """What every record of an engine begins with."""
    return {
        "kind": "cell",
        "model": model.name,
        "system": decoding.system,
        "options": decoding.options,
        "engine": plan.engine,
        "run": plan.started,
        "environment": plan.machine,
    }


def cell_of(acceptance: float | None, temperature: float, context: int, batch: int) -> dict[str, Any]:
    return {"acceptance": acceptance, "temperature": temperature, "context": context, "batch": batch}


def positions_for(plan: Plan, context: int) -> int:
    """What the luckiest request needs."""
    return context + most_tokens(plan.tokens)


def engine_settings(plan: Plan, model: Model, decoding: Decoding) -> dict[str, Any]:
    """Arguments of vLLM's LLM: vLLM's defaults, but no more requests and positions than are measured."""
    needed = [positions_for(plan, context) for context in plan.contexts]
    longest = max(length for length in needed if length <= model.num_positions)
    # The same for every system and for most choices of contexts, since kernels look at it too.
    max_model_len = min(model.num_positions, 1 << (longest + SLACK - 1).bit_length())
    dtype = "float32" if ON_CPU else "bfloat16"
    settings: dict[str, Any] = {
        "model": str(target_folder(model)),
        "dtype": dtype,
        "load_format": "auto" if model.trained else "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max_model_len,
        "max_num_seqs": max(plan.batches),
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    if decoding.speculative_config is not None:
        settings["speculative_config"] = decoding.speculative_config
    return settings | (CPU_SETTINGS if ON_CPU else {}) | plan.engine


def process_environment() -> dict[str, str]:
    settings = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_F32_DEFAULT"}
    # `engine.py` sends its own functions to the engine's worker.
    settings["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if ON_CPU:
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return settings | os.environ


def describe(record: Record) -> str:
    place = f"context {record['context']:>6}  batch {record['batch']:>2}"
    if record["acceptance"] is not None:
        place += f"  acceptance {record['acceptance']:g}"
    if "skipped" in record:
        return f"{place}  skipped: {record['skipped']}"
    return (
        f"{place}  {record['ms_per_token']:8.3f} ms a token  {record['ms_per_step']:8.3f} ms a step  "
        f"{record['tokens_per_step']:.2f} tokens a step  {record['drafted_per_step']:.1f} drafted"
    )
