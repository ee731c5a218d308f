# SPDX-License-Identifier: Apache-2.0
"""All that the READMEs quote of a GPU, measured on the GPUs of one machine side by side.

    python -m benchmarks.everything [--gpus 4] [--only qwq,pair] [--out .data/measured] [--commit COMMIT]

What is compared runs on one GPU, one after the other, in a chain of commands; a chain that finds no free GPU waits for
one. All of it takes two hours of an H200, divided by their number at best. Every command writes its results and its
log into `--out`; one that fails is reported, and the chain goes on. `--list` prints the commands instead, and `--only`
takes some of them.

The pair of a real size needs the data that `benchmarks/realsize/README.md` prepares, and is left out without it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from benchmarks import ROOT

# Of trained weights.
AS_IT_COMES = "plain,ngram,default,gamma4,default@24"
# Beside what the speed measurement does without options. QwQ-32B has 32,768 positions, and vLLM's own benchmarks run at
# the first acceptance.
TWICE = "--repeats 2"
QWQ = f"--contexts 1024,16384,31744 {TWICE} --acceptances 3.82,3.2,2.5 --cross-check tuned 16384 1"


@dataclass(frozen=True)
class Step:
    name: str
    # Arguments of Python.
    command: list[str]


def chains(out: Path, data: Path, commit: str | None) -> list[list[Step]]:
    labelled = f"--commit {commit}" if commit else ""
    pair = out / "realsize-pair"

    def step(name: str, module: str, arguments: str) -> Step:
        return Step(name, ["-m", f"benchmarks.{module}", *shlex.split(arguments)])

    def speed(name: str, model: str | Path, systems: str, arguments: str) -> Step:
        results = f"--again {labelled} --out {out / name}.jsonl"
        return step(name, "speed", f"--models {model} --systems {systems} {arguments} {results}")

    def profile(system: str, batch: int) -> Step:
        name = f"profile-qwq-32b-{system}-16k-b{batch}"
        return step(name, "profile_steps", f"--system {system} --batch {batch} {labelled} --out {out / name}.json")

    train = f"--data {data} --out {pair} --only"
    real_size = [
        step("realsize-target", "training.realsize", f"{train} target"),
        step("realsize-draft", "training.realsize", f"{train} draft"),
        speed("realsize", pair, AS_IT_COMES, "--contexts 2048,8192,16064 --batches 1 --temperatures 0,1"),
    ]
    qwq, llama = "qwq-32b", "llama-3-8b-262k"
    return [
        [
            speed("qwq", qwq, "plain,tuned,eagle3,ngram,default,gamma4,unquantised", QWQ),
            step("kernels", "kernels", f"{labelled} --out {out / 'kernels.json'}"),
        ],
        [
            *(real_size if data.is_dir() else []),
            speed("pair", "pair", AS_IT_COMES, "--contexts 2048 --batches 1,4 --temperatures 0,1"),
        ],
        [speed("llama", llama, "plain,tuned,eagle3,unquantised", TWICE)],
        [
            speed("llama-others", llama, "plain,ngram,default,gamma4", TWICE),
            profile("plain", 1),
            profile("tuned", 1),
            profile("tuned", 4),
        ],
        [step("gpu_check", "check_gpu", f"--skip-32b {labelled} --out {out / 'gpu_check.json'}")],
    ]


def run_chain(steps: list[Step], gpus: "Queue[int]", num_gpus: int, out: Path) -> list[str]:
    """Runs the steps on one GPU, with a share of the cores; returns the names of those that fail."""
    gpu = gpus.get()
    failed = []
    cores = sorted(os.sched_getaffinity(0))
    share = cores[gpu * len(cores) // num_gpus : (gpu + 1) * len(cores) // num_gpus] or cores
    for step in steps:
        started = time.time()
        with (out / f"{step.name}.log").open("w") as log:
            finished = subprocess.run(
                ["taskset", "-c", ",".join(map(str, share)), sys.executable, *step.command],
                cwd=ROOT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        print(f"GPU {gpu}: {step.name}, {time.time() - started:.0f} s, rc {finished.returncode}", flush=True)
        if finished.returncode != 0:
            failed.append(step.name)
    gpus.put(gpu)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4, help="how many there are")
    parser.add_argument(
        "--data", type=Path, default=ROOT / ".data" / "realsize", help="text for the pair of a real size"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".data" / "measured")
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of commands, as --list shows them")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    planned = chains(arguments.out.resolve(), arguments.data.resolve(), arguments.commit)
    if arguments.only:
        known = {step.name for chain in planned for step in chain}
        if unknown := set(arguments.only) - known:
            parser.error(f"there is no {', '.join(sorted(unknown))}: give some of {', '.join(sorted(known))}")
        planned = [[step for step in chain if step.name in arguments.only] for chain in planned]
    if arguments.list:
        for number, chain in enumerate(planned):
            for step in chain:
                print(f"{number} {step.name}: python {shlex.join(step.command)}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus: Queue[int] = Queue()
    for gpu in range(arguments.gpus):
        gpus.put(gpu)
    with ThreadPoolExecutor(len(planned)) as pool:
        runs = [pool.submit(run_chain, chain, gpus, arguments.gpus, arguments.out) for chain in planned if chain]
        failed = [name for run in runs for name in run.result()]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
