# SPDX-License-Identifier: Apache-2.0
"""Concurrent clients, random requests, hang-ups and a small cache: the short version of `benchmarks.soak`."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_soak(tmp_path):
    report = tmp_path / "soak.json"
    arguments = ["--requests", "24", "--clients", "6", "--max-tokens", "16", "--out", str(report)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    counted = json.loads(report.read_text())
    assert counted["requests"] == 24
    assert counted["finished"] + counted["hung_up"] == 24
    assert counted["acceptance_length"] > 1.2
    # Trees and chains of several kinds ran together.
    assert 4 < counted["chains"] < counted["finished"] - 4
    assert "structured_outputs" in counted["chains_by_reason"] and len(counted["chains_by_reason"]) > 2
