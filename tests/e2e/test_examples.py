# SPDX-License-Identifier: Apache-2.0
"""The examples as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPT = "def read_config(path):\n"


def test_offline():
    options = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    # One process less to start: the worker.
    options += ["--distributed-executor-backend", "uni", "--gpu-memory-utilization", "0.1"]
    command = [sys.executable, "-m", "examples.offline", "--prompt", PROMPT, "--max-tokens", "24", *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    _, text = finished.stdout.rsplit(PROMPT, 1)
    text, acceptance = text.split("\nAcceptance length: ")
    assert len(text.strip()) > 24
    found = re.match(r"(\d+\.\d+) tokens a step \((\d+) trees, (\d+) accepted tokens\)", acceptance)
    assert found is not None, acceptance
    length, trees, accepted = float(found[1]), int(found[2]), int(found[3])
    # The prompt's step emits the first of the 24 tokens, and the last step may accept more than were left.
    assert length == round(1 + accepted / trees, 2) > 1.2 and trees + accepted <= 23 + 5
