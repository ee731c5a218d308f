# SPDX-License-Identifier: Apache-2.0
"""The tables and plots of measured speed, from results written by hand."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import RESULTS as RECORDS
from benchmarks.speed import engine as speed_engine
from benchmarks.speed.engine import summary
from benchmarks.speed.records import append, identity, read
from benchmarks.speed.report import compare, plot, report

MACHINE = {
    "device": "a GPU",
    "driver": "1",
    "commit": "abc",
    "python": "3",
    "torch": "2",
    "triton": "3",
    "vllm": "0.32",
}


def cell(system: str, context: int, batch: int, ms_per_token: float, **others: Any) -> dict[str, Any]:
    return {
        "kind": "cell",
        "model": "a-model",
        "system": system,
        "acceptance": None if system == "plain" else 4.0,
        "options": {},
        "engine": {},
        "run": "monday",
        "environment": MACHINE,
        "temperature": 0.0,
        "context": context,
        "batch": batch,
        "ms_per_token": ms_per_token,
        "ms_per_step": ms_per_token if system == "plain" else 4 * ms_per_token,
        "tokens_per_step": 1.0 if system == "plain" else 4.0,
        "draft_memory": {"bytes_per_request": 0, "bytes_per_token": 0},
        **others,
    }


RESULTS = [
    cell("plain", 1024, 1, 20.0),
    cell("plain", 16384, 1, 22.0),
    cell("plain", 16384, 64, 40.0),
    cell("eagle3", 1024, 1, 8.0, draft_memory={"bytes_per_request": 0, "bytes_per_token": 4096}),
    cell("eagle3", 16384, 1, 8.0, draft_memory={"bytes_per_request": 0, "bytes_per_token": 4096}),
    {
        **cell("eagle3", 16384, 64, 0.0),
        "skipped": "the KV cache lacks 5 tokens",
    },
    *({**cell(system, 16384, 256, 0.0), "skipped": "too large"} for system in ("plain", "eagle3")),
    # Measured again, and in a run of its own.
    cell("default", 1024, 1, 99.0, run="sunday"),
    cell("default", 1024, 1, 5.0, run="tuesday"),
    cell(
        "default",
        16384,
        1,
        5.5,
        drafted_per_step=24.0,
        draft_memory={"bytes_per_request": 2 << 20, "bytes_per_token": 0},
    ),
    cell("default", 1024, 1, 10.0)
    | {"kind": "cross_check", "benchmark": "serve", "benchmark_ms": 5.5, "measured_ms": 5},
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "speed.jsonl"
    for record in RESULTS:
        append(path, record)
    return path


def rows(text: str) -> list[str]:
    return [line.replace(" ", "") for line in text.splitlines() if line.startswith("|")]


def test_tables(results):
    text = report(read([results]))
    found = rows(text)
    # Speedups; the last measurement counts, and one without plain decoding in its run is marked.
    assert "|1,024|1|20.00|2.50x|4.00x*|" in found
    assert "|16,384|1|22.00|2.75x|4.00x|" in found
    assert "|16,384|64|40.00|skipped||" in found
    assert "eagle3 at context 16,384, batch 64: the KV cache lacks 5 tokens." in text
    assert "Skipped by every system: context 16,384, batch 256 (too large)." in text
    assert not any(row.startswith("|16,384|256|") for row in found)
    assert "Plain decoding was measured in another run." in text
    # A step in plain steps.
    assert "|16,384|1|default|5.50|24|4.00|22.00|1.00|" in found
    # Of an older measurement without the number that was verified.
    assert "|16,384|1|eagle3|8.00||4.00|32.00|1.45|" in found
    # What a draft keeps grows with the context or does not.
    assert "|a-model|EAGLE-3|0|4,096|64.0MiB|512.0MiB|1024.0MiB|" in found
    assert "|a-model|GLIDE|2,097,152|0|2.0MiB|2.0MiB|2.0MiB|" in found
    assert "|vllmbenchserve|a-modeldefault,context1,024,batch1|5.5|5|+10.0%|" in found


def test_how_long_engines_take_to_start(results):
    append(results, cell("eagle3", 1024, 4, 20.0, start_seconds=None))
    assert "## Start-up" not in report(read([results]))
    # Cells of one engine are one start.
    for context in (1024, 16384):
        append(results, cell("plain", context, 4, 20.0, start_seconds=31.4))
        append(results, cell("default", context, 4, 20.0, start_seconds=52.0))
    append(results, cell("default", 1024, 4, 20.0, start_seconds=38.6, run="wednesday"))
    found = rows(report(read([results])).split("## Start-up")[1])
    assert "|aGPU|a-model|plain|1|31|31|" in found
    assert "|aGPU|a-model|default|2|39|52|" in found


@pytest.mark.parametrize("path", sorted(RECORDS.glob("speed*.jsonl")), ids=lambda path: path.name)
def test_what_was_recorded(path):
    assert report(read([path]))


def test_other_devices_are_compared_with_themselves(results):
    other = MACHINE | {"device": "another GPU"}
    append(results, cell("default", 1024, 1, 2.0, environment=other))
    comparisons = compare(read([results]))
    assert [comparison.device for comparison in comparisons] == ["a GPU", "another GPU"]
    (lonely,) = comparisons[1].cells["default"].values()
    assert comparisons[1].speedup(lonely) is None


def test_other_engines_are_compared_with_themselves(results):
    append(results, cell("plain", 1024, 1, 40.0, engine={"enforce_eager": True}))
    append(results, cell("default", 1024, 1, 10.0, engine={"enforce_eager": True}))
    graphs, eager = compare(read([results]))
    assert "eager" in eager.title and "engine" not in graphs.title
    assert eager.speedup(eager.cells["default"][1024, 1]) == 4.0
    assert graphs.cells["plain"][1024, 1]["ms_per_token"] == 20.0


def test_plain_decoding_is_shown_of_a_run_with_something_to_compare(results):
    # A later run, at another acceptance.
    append(results, cell("plain", 16384, 1, 30.0, run="wednesday"))
    append(results, cell("default", 16384, 1, 10.0, run="wednesday", acceptance=3.0))
    later, earlier = compare(read([results]))
    for comparison, plain, speedup in ((earlier, 22.0, 4.0), (later, 30.0, 3.0)):
        assert comparison.cells["plain"][16384, 1]["ms_per_token"] == plain
        assert comparison.speedup(comparison.cells["default"][16384, 1]) == speedup


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    (comparison,) = compare(read([results]))
    plot(comparison, tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.startswith("<?xml") and len(svg) < 200_000


def test_what_is_the_same_measurement():
    elsewhere = MACHINE | {"commit": "another"}
    # The plugin's commit changes the plugin and nothing else.
    for system, same in (
        ("plain", True),
        ("eagle3", True),
        ("default", False),
        ("default@8", False),
        ("gamma4", False),
        # Was a system once, and is one of the recorded ones.
        ("tuned", False),
    ):
        one, other = cell(system, 1024, 1, 1.0), cell(system, 1024, 1, 2.0, environment=elsewhere)
        assert (identity(one) == identity(other)) == same
    assert identity(cell("default", 1024, 1, 1.0)) != identity(cell("default", 1024, 4, 1.0))
    assert identity(cell("default", 1024, 1, 1.0)) == identity(json.loads(json.dumps(cell("default", 1024, 1, 1.0))))


def test_summary_of_rounds():
    plain = [
        {"seconds": seconds, "emitted": 400, "drafts": 0, "drafted": 0, "accepted": 0} for seconds in (1.0, 1.2, 9.0)
    ]
    numbers = summary(plain, batch=4, tokens=100, same_work=True)
    assert (numbers["ms_per_token"], numbers["ms_per_step"], numbers["tokens_per_step"]) == (12.0, 12.0, 1.0)
    # 4 requests, 25 steps each, 3 tokens accepted in each step.
    drafted = [{"seconds": 0.5, "emitted": 400, "drafts": 100, "drafted": 700, "accepted": 300}]
    numbers = summary(drafted, batch=4, tokens=100, same_work=True)
    assert (numbers["ms_per_token"], numbers["ms_per_step"], numbers["tokens_per_step"]) == (5.0, 20.0, 4.0)
    # A number of nodes that adapts: half as many steps with drafts as without.
    mixed = [{"seconds": 1.0, "emitted": 200, "drafts": 50, "drafted": 1200, "accepted": 50}]
    numbers = summary(mixed, batch=1, tokens=200, same_work=False)
    assert (numbers["tokens_per_step"], numbers["drafted_per_step"]) == (1.333, 8.0)
    assert numbers["tokens_per_step"] * numbers["ms_per_token"] == pytest.approx(numbers["ms_per_step"], rel=1e-3)
    # Of different work, the mean.
    assert summary(plain, batch=4, tokens=100, same_work=False)["ms_per_token"] == pytest.approx(11.2e3 / 300, abs=1e-3)


def test_all_cells_are_measured_before_any_is_again(tmp_path):
    measured = []
    decoded = {"seconds": 1.0, "emitted": 8, "drafts": 0, "drafted": 0, "accepted": 0}

    def measure(batches: list[list[list[int]]], temperature: float) -> tuple[list[dict[str, Any]], list[list[int]]]:
        measured.append(len(batches[0][0]))
        return [dict(decoded) for _ in batches], [[0] * 8]

    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(
            speculative_config=None,
            model_config=SimpleNamespace(max_model_len=64),
            scheduler_config=SimpleNamespace(max_num_seqs=1),
        ),
        num_blocks=4,
        block_size=16,
        llm=SimpleNamespace(collective_rpc=lambda function: [0]),
        lacking_blocks=lambda context, batch: context // 32,
        measure=measure,
    )
    cells = [{"acceptance": None, "temperature": 0.0, "context": context, "batch": 1} for context in (4, 8, 32)]
    out = tmp_path / "speed.jsonl"
    job = {"record": {}, "cells": cells, "passes": 2, "repeats": 3, "tokens": 8, "vocab_size": 9, "trained": None}
    speed_engine.measure_cells(engine, job | {"deadline": math.inf, "out": str(out)}, 1.0)
    assert measured == [4, 8, 4, 8]
    records = read([out])
    assert [(record["context"], record["pass"]) for record in records] == [
        (context, number) for number in (1, 2) for context in (4, 8, 32)
    ]
    assert [len(record.get("rounds", [])) for record in records] == [3, 3, 0] * 2


def test_an_engine_is_closed_whatever_happens(monkeypatch):
    """`multiprocessing` waits for engines at exit, so one that was left open would keep the benchmark from ending."""
    closed = []
    fake = SimpleNamespace(close=lambda: closed.append(True))

    def fail(engine: object, *_: object) -> None:
        assert engine is fake and not closed
        raise RuntimeError("a cell failed")

    monkeypatch.setattr("sys.stdin", io.StringIO('{"llm": {}, "tokens": 8}'))
    monkeypatch.setattr(speed_engine, "Engine", lambda *_: fake)
    monkeypatch.setattr(speed_engine, "measure_cells", fail)
    with pytest.raises(RuntimeError, match="a cell failed"):
        speed_engine.main()
    assert closed == [True]
