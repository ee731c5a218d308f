# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.speed` on a toy model: what it measures, leaves out, and does not measure twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# One process has the results of all tests.
pytestmark = pytest.mark.xdist_group("speed")

ROOT = Path(__file__).parents[2]
GIVEN = {"tree_shape": [2, 4, 4], "frequent_tokens": 512, "num_speculative_tokens": 8}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed") / "speed.jsonl"
    arguments = ["--smoke", "--systems", "plain,given", "--batches", "1,16", "--acceptances", "2.5"]
    arguments += ["--given", json.dumps(GIVEN)]
    # The second one is longer than the model's positions.
    arguments += ["--contexts", "96,2000"]
    # Too few blocks for 16 requests.
    arguments += ["--engine", '{"num_gpu_blocks_override": 40}', "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.speed", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return command, out


def test_cells(results):
    _, out = results
    cells = [json.loads(line) for line in out.read_text().splitlines()]
    long, cells = ([cell for cell in cells if cell["context"] == context] for context in (2000, 96))
    for found in (long, cells):
        assert [(cell["system"], cell["batch"]) for cell in found] == [
            ("plain", 1),
            ("plain", 16),
            ("given", 1),
            ("given", 16),
        ]
    assert {cell["skipped"] for cell in long} == {"2080 positions are needed, the model has 2048"}
    plain, plain_skipped, given, given_skipped = cells
    for cell in (plain_skipped, given_skipped):
        assert "the KV cache lacks" in cell["skipped"]
    assert plain["ms_per_token"] == plain["ms_per_step"] > 0
    assert plain["tokens_per_step"] == 1.0
    # At least the 8 tokens asked for, in steps of 2 or 3.
    (decoded,) = given["rounds"]
    assert decoded["emitted"] >= 8
    assert decoded["emitted"] / 3 <= decoded["drafts"] <= decoded["emitted"] / 2 + 1
    assert 2 <= given["tokens_per_step"] <= 3
    assert given["options"] == GIVEN
    # 512 positions of K and V, 2 heads of 32 float32 each.
    assert given["draft_memory"] == {"bytes_per_request": 512 * 2 * 2 * 32 * 4, "bytes_per_token": 0}


def test_measures_nothing_twice(results):
    command, out = results
    before = out.read_text()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert out.read_text() == before


def test_a_folder_that_is_no_model():
    command = [sys.executable, "-m", "benchmarks.speed", "--models", "no/such/folder"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "there is no model no/such/folder" in finished.stderr
