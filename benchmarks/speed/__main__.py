# SPDX-License-Identifier: Apache-2.0
"""Milliseconds a token of plain vLLM, vLLM's EAGLE-3 and n-gram drafts, and this plugin, on one GPU in one invocation.

    python -m benchmarks.speed [--models qwq-32b] [--systems plain,default] [--contexts 1024,16384] [--batches 1,4]

Full-size models have random weights, and as many tokens a step as `--acceptances` says: a step's cost does not depend
on what is accepted. A folder with a trained target/, draft/ and prompts.jsonl, or `pair` for the one that ships, is
measured as it is. The system `given` is this plugin with the options of `--given`, whichever they are. Every cell
(system, context, batch) becomes a line of `--out` as soon as it is measured; what is there already is left out, so an
interrupted run goes on where it stopped. `python -m benchmarks.speed.report` makes tables and plots of it.

One engine runs for each system, and what adapts to acceptance has adapted to the cells before. Cells that are longer
than the model's positions, or whose KV cache does not fit, are recorded as skipped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.reporting import environment
from benchmarks.server import exit_on_signals
from benchmarks.shapes import SHAPES
from benchmarks.speed.runs import EngineFailed, Plan, check, run
from benchmarks.speed.systems import SYSTEMS, Model, NotMeasurable, check_system

MODELS = ["qwq-32b", "llama-3-8b-262k", "pair"]
CONTEXTS = [1024, 16384, 31744, 131072]
BATCHES = [1, 4, 16, 64]
ACCEPTANCES = [2.5, 3.2, 3.82]
SMOKE = {
    "models": ["toy"],
    "systems": ["plain", "eagle3", "default", "gamma4"],
    "contexts": [96, 160],
    "batches": [1, 2],
    "acceptances": [3.82],
    "tokens": 8,
    "repeats": 1,
}


def main() -> None:
    arguments = parse_arguments()
    plan = Plan(
        contexts=sorted(arguments.contexts),
        batches=sorted(arguments.batches),
        acceptances=arguments.acceptances,
        temperatures=arguments.temperatures,
        tokens=arguments.tokens,
        repeats=arguments.repeats,
        passes=arguments.passes,
        engine=arguments.engine,
        deadline=time.time() + arguments.minutes * 60,
        again=arguments.again,
        out=arguments.out,
        started=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        machine=environment(arguments.commit),
    )
    print(json.dumps(plan.machine))
    failures = []
    # An engine that would start in vain is not started.
    start_seconds = 0.0
    for name in arguments.models:
        model = Model.find(name)
        for system in arguments.systems:
            if time.time() + start_seconds >= plan.deadline:
                continue
            try:
                took = run(plan, model, system, arguments.given)
                start_seconds = max(start_seconds, took)
            except NotMeasurable as reason:
                print(f"{model.name} {system}: {reason}")
                if isinstance(reason, EngineFailed):
                    failures.append(system)
    if arguments.cross_check:
        system, context, batch = arguments.cross_check
        model = Model.find(arguments.models[0])
        check(plan, model, system, arguments.given, int(context), int(batch))
    if time.time() + start_seconds >= plan.deadline:
        print("The time is up; the same command goes on where this one stopped.")
    sys.exit(f"failed: {', '.join(failures)}" if failures else 0)


def parse_arguments() -> argparse.Namespace:
    def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [convert(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=listed(str), default=MODELS, help=f"{', '.join(SHAPES)}, pair, folders")
    add(
        "--systems",
        type=listed(check_system),
        help=f"{', '.join(SYSTEMS)}, default@K, crossN, gammaN, magicdecN (the named ones, given only with --given)",
    )
    add("--contexts", type=listed(int), default=CONTEXTS, help="tokens of a prompt")
    add("--batches", type=listed(int), default=BATCHES, help="requests that decode together")
    add("--acceptances", type=listed(float), default=ACCEPTANCES, help="tokens a step, for random weights")
    add("--temperatures", type=listed(float), default=[0.0])
    add("--tokens", type=int, default=128, help="tokens to decode for each request")
    add("--repeats", type=int, default=3, help="times that a batch is decoded; trained weights decode every prompt")
    add("--passes", type=int, default=1, help="times that an engine measures all its cells, to see what is disturbed")
    add("--given", type=json.loads, help="JSON of the options of system given; frequent_tokens may be how many")
    add("--engine", type=json.loads, default={}, help="JSON of more arguments for every engine")
    add("--minutes", type=float, default=1e6, help="start no cell after so many minutes")
    add("--again", action="store_true", help="measure what has been measured, too")
    add("--commit", help="the plugin's commit, where there is no git repository")
    add("--out", type=Path, default=RESULTS / "speed.jsonl")
    add(
        "--cross-check",
        nargs=3,
        metavar=("SYSTEM", "CONTEXT", "BATCH"),
        help="run vLLM's own `bench latency` and `bench serve` once on this cell, which must have been measured",
    )
    add("--smoke", action="store_true", help="a toy model, to try everything without a GPU; other options still count")
    if "--smoke" in sys.argv:
        parser.set_defaults(**SMOKE)
    arguments = parser.parse_args()
    if arguments.systems is None:
        arguments.systems = [system for system in SYSTEMS if system != "given" or arguments.given is not None]
    if "given" in arguments.systems and arguments.given is None:
        parser.error("--systems given needs its options: give them with --given")
    return arguments


if __name__ == "__main__":
    exit_on_signals()
    try:
        main()
    except NotMeasurable as reason:
        sys.exit(str(reason))
