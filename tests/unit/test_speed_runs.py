# SPDX-License-Identifier: Apache-2.0
"""Which cells of `benchmarks.speed` share an engine, without starting one."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.speed import runs
from benchmarks.speed.runs import Plan, run
from benchmarks.speed.systems import Decoding

ACCEPTANCES = [2.5, 3.2, 3.82]


def engines_of(monkeypatch, tmp_path, system: str, trained: Any = None) -> list[dict[str, Any]]:
    """The jobs of all engines of a system."""
    jobs: list[dict[str, Any]] = []

    def prepare(model: Any, system: str, acceptance: float, tuned: Any) -> Decoding:
        if trained or system == "plain":
            return Decoding(system, None, None if system == "plain" else {}, {})
        return Decoding(system, acceptance, {"synthetic_acceptance_length": acceptance}, {})

    def start(command: list[str], *, input: str, **others: Any) -> Any:
        jobs.append(json.loads(input))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs, "prepare", prepare)
    monkeypatch.setattr(runs, "target_folder", lambda model: tmp_path)
    monkeypatch.setattr(runs.subprocess, "run", start)
    model: Any = SimpleNamespace(name="toy", trained=trained, config={"vocab_size": 64}, num_positions=4096)
    plan = Plan(
        contexts=[96],
        batches=[1, 2],
        acceptances=ACCEPTANCES,
        temperatures=[0.0],
        tokens=8,
        repeats=1,
        engine={},
        deadline=time.time() + 60,
        again=True,
        out=tmp_path / "out.jsonl",
        started="monday",
        machine={"device": "a GPU", "vllm": "0.32", "commit": "abc"},
    )
    run(plan, model, system, None)
    return jobs


def acceptances_of(job: dict[str, Any]) -> list[float | None]:
    return list(dict.fromkeys(cell["acceptance"] for cell in job["cells"]))


@pytest.mark.parametrize("system", ["default", "tuned", "gamma4"])
def test_the_number_of_nodes_is_chosen_by_the_acceptance_that_is_measured(monkeypatch, tmp_path, system):
    jobs = engines_of(monkeypatch, tmp_path, system)
    started = [job["llm"]["speculative_config"]["synthetic_acceptance_length"] for job in jobs]
    assert started == ACCEPTANCES and [acceptances_of(job) for job in jobs] == [[each] for each in ACCEPTANCES]


def test_systems_that_choose_nothing_by_it_start_once(monkeypatch, tmp_path):
    (job,) = engines_of(monkeypatch, tmp_path, "eagle3")
    assert acceptances_of(job) == ACCEPTANCES
    (job,) = engines_of(monkeypatch, tmp_path, "plain")
    assert acceptances_of(job) == [None] and len(job["cells"]) == 2
    # Trained weights have an acceptance of their own.
    (job,) = engines_of(monkeypatch, tmp_path, "default", trained=tmp_path)
    assert acceptances_of(job) == [None] and len(job["cells"]) == 2
