# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --speculative-model` as a user starts it: another process, the command line, HTTP, streaming."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo():
    """The demo serves the shipped pair twice, with and without its draft, and fails when the outputs differ."""
    finished = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--max-tokens", "24"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "The two outputs are identical, token for token." in finished.stdout
    steps = next(line for line in finished.stdout.splitlines() if line.strip().startswith("steps"))
    without, with_speculation = (int(number) for number in steps.split()[1:])
    assert with_speculation < without / 2
    # Steps come before speeds, which say nothing without a GPU, and what to do with another model comes last.
    places = [finished.stdout.index(name) for name in ("  steps", "  acceptance length", "  tokens per second")]
    assert places == sorted(places)
    last = finished.stdout.splitlines()[-1].strip()
    assert last.startswith("vllm-longspec bench --target TARGET --draft DRAFT --workload ")
