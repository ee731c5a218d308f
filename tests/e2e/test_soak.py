# SPDX-License-Identifier: Apache-2.0
"""Concurrent clients, random requests, hang-ups, a small cache and a small budget: a short `benchmarks.soak`."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Of this seed's one round.
SEED = 210
SETTINGS = {
    "max_num_seqs": 5,
    # Less than one tree's rows.
    "max_num_batched_tokens": 47,
    "long_prefill_token_threshold": 50,
    # As few as one long request may need.
    "num_gpu_blocks_override": 33,
    "async_scheduling": True,
    "tree_shape": [4, 16, 16, 16, 16],
    "num_speculative_tokens_per_batch_size": [[1, 1, 68], [2, 4, 56], [5, 256, 1]],
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
    # Trees and chains of several kinds ran together.
    assert 4 < counted["chains"] < counted["finished"] - 4
    assert "structured_outputs" in counted["chains_by_reason"] and len(counted["chains_by_reason"]) > 2
    assert counted["drafts_by_kind"]["tree"] > 0 and counted["drafts_by_kind"]["chain"] > 0
