# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec bench` as a user runs it, on the shipped pair: its own servers, the report, and a run that goes on."""

import json
import os
import subprocess
import sys

from benchmarks import PAIR, ROOT
from benchmarks.server import ENVIRONMENT, OPTIONS

# The same as arguments of the engine.
ENGINE = {
    "dtype": "float32",
    **{
        name.removeprefix("--").replace("-", "_"): int(value) if value.isdecimal() else float(value)
        for name, value in zip(OPTIONS[1::2], OPTIONS[2::2], strict=True)
    },
    "enforce_eager": True,
    "max_num_seqs": 2,
}


def bench(folder, *options):
    arguments = ["--target", str(PAIR / "target"), "--draft", str(PAIR / "draft"), "--max-model-len", "768"]
    arguments += ["--workload", str(folder / "own.jsonl"), "--out", str(folder / "out"), "--engine", json.dumps(ENGINE)]
    arguments += ["--output-len", "16", "--warmups", "0", "--batch", "2", *options]
    return subprocess.run(
        [sys.executable, "-m", "vllm_longspec", "bench", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_methods_side_by_side(tmp_path):
    texts = [json.loads(line)["text"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()[:2]]
    lines = (json.dumps({"prompt": text[:1200]}) + "\n" for text in texts)
    (tmp_path / "own.jsonl").write_text("".join(lines))
    finished = bench(tmp_path, "--methods", "vanilla,tree")
    assert finished.returncode == 0, finished.stdout[-4000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    vanilla, tree = report["figures"]
    assert (vanilla["method"], vanilla["tokens_per_step"]) == ("vanilla", 1.0)
    assert (tree["method"], tree["identical"], tree["compared"]) == ("tree", 2, 2)
    # 15 tokens of each after the prompt's own.
    assert tree["output_tokens"] == 32 and 2 < tree["tokens_per_step"] <= 15
    assert tree["by_depth"][0] > 0.5 and sum(tree["drafted"].values()) > 0.99
    assert tree["speedup"] > 0
    assert report["environments"][0]["vllm"].startswith("0.3")

    # All is there: no server is started.
    again = bench(tmp_path, "--methods", "vanilla,tree", "--resume", "--baseline", str(tmp_path / "out"))
    assert again.returncode == 0, again.stdout[-4000:]
    assert "2 measurements are there, 0 are missing" in again.stdout and "starting a server" not in again.stdout
    assert "### Compared with" in (tmp_path / "out" / "report.md").read_text()
