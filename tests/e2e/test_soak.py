# SPDX-License-Identifier: Apache-2.0
"""Concurrent clients, random requests, hang-ups, a small cache and a small budget: a short `benchmarks.soak`."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Of this seed's one round.
SEED = 358534
SETTINGS = {
    "max_num_seqs": 4,
    # Less than the rows of four trees.
    "max_num_batched_tokens": 60,
    "long_prefill_token_threshold": 37,
    "num_gpu_blocks_override": 34,
    "scheduler_reserve_full_isl": False,
    "async_scheduling": True,
    "tree_shape": [4, 8, 8],
    "copy_length": 16,
    "couple_noise": True,
    "num_speculative_tokens_per_batch_size": [[1, 1, 20], [2, 3, 12], [4, 256, 7]],
}


def test_soak(tmp_path):
    report = tmp_path / "soak.json"
    arguments = ["--rounds", "1", "--seed", str(SEED), "--requests", "20", "--clients", "6", "--max-tokens", "12"]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *arguments, "--out", str(report)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    counted = json.loads(report.read_text())
    (only_round,) = counted["rounds"]
    assert {name: only_round[name] for name in SETTINGS} == SETTINGS
    assert counted["requests"] == 20
    assert counted["finished"] + counted["hung_up"] == 20
    assert counted["acceptance_length"] > 1.2
