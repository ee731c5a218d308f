# SPDX-License-Identifier: Apache-2.0
"""An EAGLE-3 head by the `speculators` package, and what engines make of heads and drafts: scripts that are run on GPUs
where time is short."""

import json
import lzma
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks import PAIR, ROOT
from benchmarks.training import served

VOCAB_SIZE = 4096


@pytest.mark.skipif(not find_spec("speculators"), reason="speculators is not installed")
def test_a_head_is_trained_without_a_gpu(tmp_path):
    """The whole script, for a target with too few layers for the package's own choice."""
    (tmp_path / "target").symlink_to(PAIR / "target")
    with lzma.open(tmp_path / "train.npy.xz", "wb") as file:
        np.save(file, np.random.default_rng(0).integers(VOCAB_SIZE, size=5000).astype(np.uint16))
    # A process of its own: on a CPU the script changes what PyTorch says of accelerators.
    command = [sys.executable, "-m", "benchmarks.training.eagle3", "--pair", str(tmp_path), "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--device", "cpu", "--smoke", "--seconds", "0.1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "s a step, so 1 steps" in done.stdout
    (record,) = map(json.loads, (tmp_path / "recipes.jsonl").read_text().splitlines())
    assert (record["draft"], record["steps"], record["tokens"]) == ("eagle3", 1, 2048)
    config = json.loads((tmp_path / "eagle3" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["eagle_aux_hidden_state_layer_ids"] == [0, 3, 6]
    chain = {"model": str(tmp_path / "eagle3"), "method": "eagle3", "num_speculative_tokens": 5}
    assert served.methods_of(tmp_path / "eagle3", {}, 4, ["tree"]) == {
        "chain": chain,
        "drawn chain": chain | {"draft_sample_method": "probabilistic"},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eagle3", "recipes.jsonl", "target", "train.npy.xz"]


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "target").symlink_to(PAIR / "target")
    (tmp_path / "draft-default").symlink_to(PAIR / "draft")
    (tmp_path / "eagle3").mkdir()
    (tmp_path / "eagle3" / "config.json").write_text('{"speculators_model_type": "eagle3"}')
    (tmp_path / "prompts.jsonl").write_text("".join((PAIR / "prompts.jsonl").read_text().splitlines(True)[:2]))
    return tmp_path


def test_drafts_and_heads_are_served_side_by_side(pair, monkeypatch, capsys):
    """All but the engines: an engine that does not start costs the others nothing."""
    jobs = []

    def run_engine(settings, runs):
        method = settings["speculative_config"]
        jobs.append(method)
        if method.get("method") == "eagle3":
            raise ValueError("no head")
        assert [len(prompt) for run in runs for prompt in run["prompts"]] == [32] * 4 + [64] * 4
        # A step of 3 tokens, one of 2, and the first token is the prompt's
        return [[{"accepted": [2, 1], "token_ids": list(range(6))} for _ in run["prompts"]] for run in runs]

    monkeypatch.setattr(served, "run_engine", run_engine)
    options = ["--drafts", "draft-default", "eagle3", "--contexts", "32", "64", "--prompts", "2", "--parallel", "1"]
    files = ["--out", str(pair / "served.json"), "--answers", str(pair / "answers"), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["served", "--pair", str(pair), *options, *files])
    with pytest.raises(SystemExit, match="an engine failed"):
        served.main()
    assert [job.get("tree_shape") or job.get("copy_length", job.get("method")) for job in jobs] == [
        None,
        0,
        [1] * 5,
        "eagle3",
        "eagle3",
    ]
    records = json.loads((pair / "served.json").read_text())["records"]
    assert len(records) == 3 * 2 * 2 + 2
    assert records[-1] == {"draft": "eagle3", "method": "drawn chain", "error": "no head"}
    assert {record.get("tokens_per_step") for record in records[:-2]} == {2.5}
    assert records[0]["accepted_at_depth"] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert "| draft-default | tree | 0 | 2.50 (2.50) | 2.50 (2.50) |" in capsys.readouterr().out
    answers = [json.loads(line) for line in (pair / "answers" / "answers.jsonl").read_text().splitlines()]
    assert [len(each["input_ids"]) for each in answers] == [38, 38, 70, 70]
    assert all(sum(each["loss_mask"]) == 6 for each in answers)
