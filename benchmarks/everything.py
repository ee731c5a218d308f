# SPDX-License-Identifier: Apache-2.0
"""All that the README and the documents quote of a GPU, measured on the GPUs of one machine side by side.

    python -m benchmarks.everything [--gpus 4] [--only qwq-32b,pair] [--out .data/measured] [--commit COMMIT]

What is compared runs on one GPU, one after the other, in a chain of commands; a chain that finds no free GPU waits for
one, and one that needs more GPUs than there are is left out. All of it takes the better part of a day of an H200,
divided by their number at best. Every command writes its results and its log into `--out`; one that fails is reported,
and the chain goes on. `--list` prints the commands instead, `--only` takes some of them, and after `--minutes` those of
`benchmarks.speed` start no further cell.

The pair of a real size needs the data that `benchmarks/realsize/README.md` prepares, and is left out without it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition

from benchmarks import ROOT

# Shapes with random weights; the last was picked last, and nothing was set by looking at it.
DENSE = ("qwq-32b", "llama-3-8b-262k", "qwen2.5-7b", "qwen3-32b", "llama-3.2-3b")
MOE = "qwen3-30b-a3b"
QWQ, LLAMA = DENSE[:2]
# As LongSpec's paper reports for QwQ-32B-Preview. 256 tokens are 67 steps: a head that learns its tokens and the number
# of nodes that pays have settled after some twenty.
AT_3_82 = "--acceptances 3.82 --tokens 256 --repeats 2"
ALL_CELLS = "--contexts 1024,16384,65536,131072 --batches 1,4,8,16,64"
# The engine's own share of the memory would not do for four requests of 128k.
LARGE_CACHE = f"--engine '{{\"kv_cache_memory_bytes\": {76 << 30}}}'"
# Of trained weights.
AS_IT_COMES = "plain,ngram,default,gamma4,default@24"
# Seconds that each recipe and the EAGLE-3 head are trained for.
TRAINING_SECONDS = 300


@dataclass(frozen=True)
class Step:
    name: str
    # Arguments of Python.
    command: list[str]


@dataclass(frozen=True)
class Chain:
    """Commands whose figures are compared with each other."""

    steps: list[Step]
    num_gpus: int = 1


def chains(out: Path, data: Path, commit: str | None, minutes: float | None = None) -> list[Chain]:
    labelled = f"--commit {commit}" if commit else ""
    until = f"--minutes {minutes:g}" if minutes else ""
    pair = out / "realsize-pair"

    def step(name: str, module: str, arguments: str) -> Step:
        return Step(name, ["-m", f"benchmarks.{module}", *shlex.split(arguments)])

    def speed(name: str, model: str | Path, systems: str, arguments: str) -> Step:
        results = f"--again {labelled} {until} --out {out / name}.jsonl"
        return step(name, "speed", f"--models {model} --systems {systems} {arguments} {results}")

    def shape(model: str, systems: str = "plain,eagle3,default,gamma4,ngram") -> Step:
        return speed(model, model, systems, f"{ALL_CELLS} {AT_3_82}")

    def profile(model: str, system: str, batch: int) -> Step:
        name = f"profile-{model}-{system}-16k-b{batch}"
        arguments = f"--model {model} --system {system} --batch {batch} {labelled} --out {out / name}.json"
        return step(name, "profile_steps", arguments)

    def bench(batch: int) -> Step:
        name = f"bench-242m-b{batch}"
        prompts = ",".join(str(pair / f"code-{length}k.jsonl") for length in (8, 16))
        arguments = (
            f"bench --target {pair / 'target'} --draft {pair / 'draft'} --workload {prompts} --temperatures 0,1 "
            f"--methods vanilla,seq,tree,magicdec --peers ngram,eagle3={pair / 'eagle3'} --batch {batch} "
            f"--output-len 256 --ignore-eos --warmups 1 --out {out / name}"
        )
        return Step(name, ["-m", "vllm_longspec", *shlex.split(arguments)])

    train = f"--data {data} --out {pair} --only"
    recipes = f"--pair {pair} --data {data} --seconds {TRAINING_SECONDS}"
    drafts = "draft-longspec draft-default draft-one-depth eagle3"
    real_size = [
        step("realsize-target", "training.realsize", f"{train} target"),
        step("realsize-draft", "training.realsize", f"{train} draft"),
        step("eagle3", "training.eagle3", recipes),
        bench(1),
        bench(4),
        speed("realsize", pair, AS_IT_COMES, "--contexts 2048,8192,16064 --batches 1 --temperatures 0,1"),
        speed(
            "realsize-cross",
            pair,
            "plain,default,cross1024,cross4096",
            "--contexts 16064 --batches 1 --temperatures 0,1",
        ),
        step("recipes", "training.recipes", f"{recipes} --recipes longspec default one-depth"),
        step("served", "training.served", f"--pair {pair} --drafts {drafts} {labelled} --out {out / 'served.json'}"),
    ]
    self_drafting = [
        speed(
            "magicdec",
            LLAMA,
            "magicdec4,plain",
            f"--contexts 16384,32768,131072 --batches 4,16 --acceptances 3.71 --tokens 96 --repeats 2 {LARGE_CACHE}",
        ),
        speed(
            "magicdec-adaptive",
            LLAMA,
            "magicdec,plain",
            "--contexts 1024,16384,131072 --batches 1,16,64 --acceptances 3.71,1.6 --tokens 96 --repeats 2 "
            + LARGE_CACHE,
        ),
        speed(
            "cross",
            LLAMA,
            "plain,default,cross1024,cross4096",
            f"--contexts 16384,65536,131072 --batches 1,4,16 {AT_3_82} {LARGE_CACHE}",
        ),
    ]
    teaching = [
        step("teacher", "training.teacher", f"--shape {LLAMA} {labelled} --out {out / 'teacher.json'}"),
        step(
            "long-samples",
            "training.long_samples",
            f"--shape llama-3.2-1b --teachers hf vllm {labelled} --out {out / 'long-samples.json'}",
        ),
    ]
    return [
        *(Chain([shape(model)]) for model in DENSE),
        # An EAGLE-3 head with experts in the target has not been tried.
        Chain([shape(MOE, "plain,default,gamma4,ngram")]),
        Chain(
            [
                speed(
                    f"{QWQ}-2-gpus",
                    QWQ,
                    "plain,eagle3,default,gamma4",
                    f"{ALL_CELLS} {AT_3_82} --engine '{{\"tensor_parallel_size\": 2}}'",
                )
            ],
            num_gpus=2,
        ),
        Chain(self_drafting),
        *([Chain(real_size)] if data.is_dir() else []),
        Chain([speed("pair", "pair", AS_IT_COMES, "--contexts 2048 --batches 1,4 --temperatures 0,1"), *teaching]),
        Chain(
            [
                *(profile(model, system, 1) for model in (QWQ, LLAMA) for system in ("plain", "default", "eagle3")),
                profile(QWQ, "default", 4),
                step("kernels", "kernels", f"{labelled} --out {out / 'kernels.json'}"),
            ]
        ),
        Chain([step("gpu_check", "check_gpu", f"--skip-32b {labelled} --out {out / 'gpu_check.json'}")]),
    ]


class Gpus:
    """Those of the machine, of which chains take some and give them back."""

    def __init__(self, count: int):
        self.free = list(range(count))
        self.changed = Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[list[int]]:
        """Waits until so many are free."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
        try:
            yield taken
        finally:
            with self.changed:
                self.free = sorted(self.free + taken)
                self.changed.notify_all()


def run_chain(chain: Chain, gpus: Gpus, num_gpus: int, out: Path) -> list[str]:
    """Runs the steps on GPUs of their own, with a share of the cores; returns the names of those that fail."""
    failed = []
    cores = sorted(os.sched_getaffinity(0))
    with gpus.take(chain.num_gpus) as taken:
        share = [
            core for gpu in taken for core in cores[gpu * len(cores) // num_gpus : (gpu + 1) * len(cores) // num_gpus]
        ]
        names = ",".join(map(str, taken))
        for step in chain.steps:
            started = time.time()
            with (out / f"{step.name}.log").open("w") as log:
                finished = subprocess.run(
                    ["taskset", "-c", ",".join(map(str, share or cores)), sys.executable, *step.command],
                    cwd=ROOT,
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": names},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            print(f"GPU {names}: {step.name}, {time.time() - started:.0f} s, rc {finished.returncode}", flush=True)
            if finished.returncode != 0:
                failed.append(step.name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4, help="how many there are")
    parser.add_argument(
        "--data", type=Path, default=ROOT / ".data" / "realsize", help="text for the pair of a real size"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".data" / "measured")
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--minutes", type=float, help="of each benchmarks.speed, which then starts no further cell")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of commands, as --list shows them")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    planned = chains(arguments.out.resolve(), arguments.data.resolve(), arguments.commit, arguments.minutes)
    if arguments.only:
        known = {step.name for chain in planned for step in chain.steps}
        if unknown := set(arguments.only) - known:
            parser.error(f"there is no {', '.join(sorted(unknown))}: give some of {', '.join(sorted(known))}")
        planned = [
            replace(chain, steps=[step for step in chain.steps if step.name in arguments.only]) for chain in planned
        ]
    planned = [chain for chain in planned if chain.steps]
    if arguments.list:
        for number, chain in enumerate(planned):
            for step in chain.steps:
                print(f"{number} {step.name}: python {shlex.join(step.command)}")
        return
    too_large = [step.name for chain in planned if chain.num_gpus > arguments.gpus for step in chain.steps]
    if too_large:
        print(f"left out, more than {arguments.gpus} GPUs are needed: {', '.join(too_large)}", flush=True)
        planned = [chain for chain in planned if chain.num_gpus <= arguments.gpus]
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = Gpus(arguments.gpus)
    with ThreadPoolExecutor(max(1, len(planned))) as pool:
        runs = [pool.submit(run_chain, chain, gpus, arguments.gpus, arguments.out) for chain in planned]
        failed = [name for run in runs for name in run.result()]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
