# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec bench` as a user runs it, on the shipped pair: its own servers, the report, and a run that goes on."""

import json
import os

from benchmarks import PAIR
from benchmarks.server import ENVIRONMENT, ON_CPU, OPTIONS
from vllm_longspec import commands
from vllm_longspec.bench import command

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
OUTPUT_LEN = 12
if ON_CPU:
    # A process less to start, which takes seconds. vLLM has a worker of its own on a CPU unless both say so.
    ENGINE["distributed_executor_backend"] = "uni"
    ENVIRONMENT = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def arguments(folder, *options):
    given = ["--target", str(PAIR / "target"), "--draft", str(PAIR / "draft"), "--max-model-len", "768"]
    given += ["--workload", str(folder / "own.jsonl"), "--out", str(folder / "out"), "--engine", json.dumps(ENGINE)]
    given += ["--output-len", str(OUTPUT_LEN), "--warmups", "0", "--batch", "2", *options]
    return given


def bench(folder, *options):
    """In this process, which has loaded vLLM already: another one would take seconds for that."""
    commands.main(["bench", *arguments(folder, *options)])


def read(folder):
    """The report's figures by temperature and method, in which JSON has no number that is none."""

    def refuse(name):
        raise AssertionError(f"the report has {name}")

    report = json.loads((folder / "out" / "report.json").read_text(), parse_constant=refuse)
    return report, {(each["temperature"], each["method"]): each for each in report["figures"]}


def test_methods_side_by_side(tmp_path, monkeypatch, capsys):
    texts = [json.loads(line)["text"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()[:2]]
    lines = (json.dumps({"prompt": text[:600]}) + "\n" for text in texts)
    (tmp_path / "own.jsonl").write_text("".join(lines))
    options = ["--methods", "vanilla,seq,tree,magicdec", "--peers", "ngram", "--temperatures", "0,1"]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(command, "exit_on_signals", lambda: None)
    bench(tmp_path, *options)
    assert capsys.readouterr().out.count("starting a server") == 5
    report, figures = read(tmp_path)
    assert report["environments"][0]["vllm"].startswith("0.3")
    methods = ("vanilla", "seq", "tree", "magicdec", "ngram")
    assert list(figures) == [(temperature, method) for temperature in (0.0, 1.0) for method in methods]
    for (temperature, method), each in figures.items():
        assert each["num_prompts"] == 2 and each["output_tokens"] == 2 * OUTPUT_LEN
        assert min(each["user_tokens_per_second"], each["tokens_per_second"], *each["ttft_ms"], *each["tpot_ms"]) > 0
        if method == "vanilla":
            assert each["tokens_per_step"] == 1.0 and each["speedup"] is None and each["drafted"] == {}
            continue
        assert each["speedup"] > 0 and sum(each["drafted"].values()) > 0.99
        assert 1 <= each["tokens_per_step"] <= OUTPUT_LEN - 1
        # vLLM's own methods draw other tokens.
        compared = None if (temperature, method) == (1.0, "ngram") else 2
        assert (each["identical"], each["compared"]) == (compared, compared)
    for temperature in (0.0, 1.0):
        seq, tree, magicdec = (figures[temperature, method] for method in ("seq", "tree", "magicdec"))
        assert len(seq["by_depth"]) <= 4 and seq["by_depth"][0] > 0.3
        assert tree["tokens_per_step"] > seq["tokens_per_step"] and magicdec["by_depth"][0] > 0.5
    assert figures[0.0, "tree"]["tokens_per_step"] > 2

    # All is there: no server is started.
    bench(tmp_path, *options, "--resume", "--baseline", str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "10 measurements are there, 0 are missing" in said and "starting a server" not in said
    assert "### Compared with" in (tmp_path / "out" / "report.md").read_text()
