# SPDX-License-Identifier: Apache-2.0
"""What a step is expected to cost, against what was measured on a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.shapes import SHAPES
from vllm_longspec.config.cost import StepCost, level_cost
from vllm_longspec.config.schedule import default_schedule

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "speed.jsonl"
# A small target's step is short, and starting kernels is a part of it that does not shrink.
TOLERANCES = {"qwq-32b": 0.06, "llama-3-8b-262k": 0.15}


def nodes_of(record: dict) -> int:
    config = SHAPES[record["model"]]
    default = default_schedule(68, config["num_attention_heads"] // config["num_key_value_heads"])
    schedule = record["options"].get("num_speculative_tokens_per_batch_size", default)
    return next(nodes for first, last, nodes in schedule if first <= record["batch"] <= last)


def cost_of(record: dict) -> StepCost:
    config = SHAPES[record["model"]]
    vocab_size = config["vocab_size"]
    level = level_cost(
        SimpleNamespace(**config),
        vocab_size=vocab_size,
        draft_vocab_size=record["options"].get("frequent_tokens", vocab_size),
        is_quantised="quantization" in record["options"],
    )
    return StepCost(level, max_depth=5)


def test_costs_are_those_that_were_measured():
    records = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    # Those of trained pairs say how much of a short step is the host's.
    cells = [record for record in records if record["model"] in TOLERANCES and record["kind"] == "cell"]
    cells = [cell for cell in cells if "skipped" not in cell]
    place = ("run", "model", "context", "batch")
    plain = {tuple(cell[name] for name in place): cell["ms_per_step"] for cell in cells if cell["system"] == "plain"}
    compared = 0
    for cell in cells:
        if cell["system"] in ("default", "tuned"):
            measured = cell["ms_per_step"] / plain[tuple(cell[name] for name in place)]
            expected = cost_of(cell)(cell["batch"], nodes_of(cell))
            assert expected == pytest.approx(measured, rel=TOLERANCES[cell["model"]]), cell
            compared += 1
    assert compared >= 20


def test_a_step_without_nodes_is_plain_decoding():
    assert StepCost(level=0.5, max_depth=5)(64, 0) == 1


def test_fewer_nodes_than_levels_are_drafted_in_as_many_levels():
    cost = StepCost(level=0.1, max_depth=5)
    assert cost(1, 1) == pytest.approx(1.102)
    assert cost(1, 5) - cost(1, 4) == pytest.approx(0.101)
    assert cost(1, 9) - cost(1, 8) == pytest.approx(0.001)
    # Where arithmetic takes longer than reading.
    assert cost(16, 9) - cost(16, 8) == pytest.approx(0.048)
