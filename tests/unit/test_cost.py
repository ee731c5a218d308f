# SPDX-License-Identifier: Apache-2.0
"""What a step is expected to cost, against what was measured on a GPU."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shapes import SHAPES
from vllm_longspec.proposers.glide.cost import LEVEL, GlideCost
from vllm_longspec.scheduling.cost import FURTHER_ROW, NODE, ROW, STEP, StepCost
from vllm_longspec.targets.families import NO_EXPERTS, expert_weights
from vllm_longspec.tree.shape import TreeShape

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "speed.jsonl"
OTHERS = ("plain", "eagle3", "ngram")


def drafting_of(model: str, depth: int = 5, num_ranks: int = 1, **settings) -> GlideCost:
    settings = {"draft_vocab_size": SHAPES[model]["vocab_size"], **settings}
    shape = SimpleNamespace(**SHAPES[model])
    tree = TreeShape((4, *[16] * (depth - 1)))
    return GlideCost.of_shape(shape, shape=tree, num_ranks=num_ranks, **settings)


def cost_of(model: str, depth: int = 5, num_ranks: int = 1, cache_is_quantised: bool = False, **settings) -> StepCost:
    return StepCost.of_shape(
        SimpleNamespace(**SHAPES[model]),
        vocab_size=SHAPES[model]["vocab_size"],
        drafting=drafting_of(model, depth, num_ranks, **settings),
        cache_is_quantised=cache_is_quantised,
        num_ranks=num_ranks,
    )


def level_of(cost: StepCost) -> float:
    assert isinstance(cost.drafting, GlideCost)
    return cost.drafting.level


def cost_of_cell(record: dict) -> StepCost:
    options = record["options"]
    return cost_of(
        record["model"],
        options.get("gamma", 5),
        draft_vocab_size=options.get("frequent_tokens", SHAPES[record["model"]]["vocab_size"]),
        is_quantised=record["draft_quantization"] is not None,
    )


def test_costs_are_those_that_were_measured():
    records = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    # Those of trained pairs say how much of a short step is the host's.
    cells = [record for record in records if record["model"] in SHAPES and record["kind"] == "cell"]
    cells = [cell for cell in cells if "skipped" not in cell]
    place = ("run", "model", "context", "batch")
    plain = {tuple(cell[name] for name in place): cell["ms_per_step"] for cell in cells if cell["system"] == "plain"}
    compared = set()
    for cell in cells:
        if cell["system"] in OTHERS:
            continue
        measured = cell["ms_per_step"] / plain[tuple(cell[name] for name in place)]
        # Half of what is decoded is in the cache when half of the time has passed.
        num_tokens = cell["batch"] * (cell["context"] + cell["tokens"] // 2)
        expected = cost_of_cell(cell)(cell["batch"], int(cell["drafted_per_step"]), num_tokens)
        assert expected == pytest.approx(measured, rel=0.08), cell
        compared.add((cell["model"], cell["system"], cell["context"], cell["batch"]))
    assert len(compared) >= 60


def test_a_step_without_nodes_is_plain_decoding():
    assert cost_of("qwq-32b")(64, 0, 64 * 1024) == 1


def test_fewer_nodes_than_levels_are_drafted_in_as_many_levels():
    cost = replace(cost_of("qwq-32b"), token=0.0)
    drafting = cost(1, 5, 0) - cost(1, 4, 0)
    row = cost(1, 9, 0) - cost(1, 8, 0)
    assert 5 * (drafting - row) + 6 * row == pytest.approx(cost(1, 5, 0) - 1)


def test_fewer_levels_cost_less_where_they_are_chosen():
    qwq = cost_of("qwq-32b")
    drafting = replace(drafting_of("qwq-32b"), shape=TreeShape((4, *[16] * 7)).with_plans({24: 8, 23: 3}))
    cost = replace(qwq, token=0.0, drafting=drafting)
    row = replace(qwq, token=0.0)(1, 24, 0) - replace(qwq, token=0.0)(1, 23, 0)
    level = (drafting.level + LEVEL) / (STEP + qwq.target)
    assert cost(1, 24, 0) - cost(1, 23, 0) == pytest.approx(row + 5 * level)


def test_rows_cost_more_where_arithmetic_takes_longer_than_reading():
    cost = replace(cost_of("qwq-32b"), token=0.0)
    few, many = cost(1, 9, 0) - cost(1, 8, 0), cost(16, 9, 0) - cost(16, 8, 0)
    assert many / few == pytest.approx(16 * FURTHER_ROW / ROW)


def test_the_longer_the_context_the_less_a_step_costs_in_plain_ones():
    """Plain decoding reads the whole cache, each level that of one layer, and nodes fill the tiles that read it."""
    cost = cost_of("llama-3-8b-262k")
    costs = [cost(4, 7, 4 * context) for context in (1024, 16384, 131072, 1 << 40)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(1 + 5 / 32 + 7 * NODE, abs=1e-4)


@pytest.mark.parametrize("num_ranks", [2, 8, 16])
def test_ranks_share_all_weights(num_ranks):
    one, shared = cost_of("qwq-32b"), cost_of("qwq-32b", num_ranks=num_ranks)
    assert shared.target == one.target / num_ranks
    assert level_of(shared) == level_of(one) / num_ranks
    # It has 8 KV heads.
    assert shared.token == one.token / min(num_ranks, 8)
    # A head of some tokens, too.
    restricted = drafting_of("qwq-32b", draft_vocab_size=32768, num_ranks=num_ranks)
    assert restricted.level == drafting_of("qwq-32b", draft_vocab_size=32768).level / num_ranks


def test_what_is_quantised_is_read_in_half_the_time():
    one = cost_of("qwq-32b")
    assert drafting_of("qwq-32b", is_quantised=True).level == level_of(one) / 2
    assert cost_of("qwq-32b", cache_is_quantised=True).token == one.token / 2


def test_which_drafts_are_large():
    """Reading their weights takes longer than starting their kernels, with a head of some tokens too."""
    large = {model: drafting_of(model).level > LEVEL for model in SHAPES}
    assert large == {model: model != "toy" for model in SHAPES}
    assert drafting_of("llama-3-8b-262k", draft_vocab_size=32768).level > LEVEL


# Qwen3-30B-A3B
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def cost_of_experts(num_ranks: int = 1, **changes) -> StepCost:
    nothing: Any = lambda *_: 0.0  # noqa: E731
    target: Any = SimpleNamespace(**MOE | changes)
    return StepCost.of_shape(target, vocab_size=151936, drafting=nothing, num_ranks=num_ranks)


def test_weights_of_a_mixture_of_experts():
    cost = cost_of_experts()
    # 30.5B parameters, of them 3.3B for each token; both without the embedding, which is not read.
    assert cost.target + cost.experts.total == pytest.approx(30.5e9 - 0.31e9, rel=0.01)
    assert cost.target + cost.experts.of_row == pytest.approx(3.3e9 - 0.31e9, rel=0.02)
    halves = cost_of_experts(num_ranks=2)
    assert (halves.target, halves.experts.total) == pytest.approx((cost.target / 2, cost.experts.total / 2))
    # Layers 1, 3, 5.. have experts, but not layer 1.
    some = cost_of_experts(decoder_sparse_step=2, mlp_only_layers=[1])
    assert some.experts.total == pytest.approx(cost.experts.total * 23 / 48)
    mlp = 3 * 2048 * 6144 - 128 * 2048
    assert some.target == pytest.approx(cost.target + 25 * mlp)


def test_verified_rows_wake_experts():
    cost = cost_of_experts()
    assert cost.experts.read(1) == cost.experts.of_row
    assert cost.experts.read(2) == pytest.approx(1.9375 * cost.experts.of_row)
    assert cost.experts.read(10**6) == pytest.approx(cost.experts.total)
    # Alone, a row's experts are read by nobody else; in a large batch all are awake anyway.
    dense = StepCost(cost.target + cost.experts.of_row, cost.token, cost.drafting)
    assert cost(1, 8, 1000) > 1.7 > 1.1 > dense(1, 8, 1000)
    assert cost(128, 1, 1000) < 1.2
    assert expert_weights(SimpleNamespace(**SHAPES["qwq-32b"]), 1) == NO_EXPERTS
