# SPDX-License-Identifier: Apache-2.0
"""Costs from the times of an engine's own graphs: against GPUs whose every step takes a known time."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import SpeculativeConfig

from benchmarks.shapes import SHAPES
from tests.unit.test_cost import cost_of
from tests.unit.test_schedule import config
from vllm_longspec.options import DEFAULT_LEVELS, LongSpecOptions, attach_options
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.scheduling import scheduler as scheduling
from vllm_longspec.scheduling.adaptive import AdaptiveVerification, NodesByCost, typical_acceptance
from vllm_longspec.scheduling.cost import StepCost, cost_of_steps
from vllm_longspec.scheduling.schedule import MOST_ROWS, default_schedule, nodes_by_batch_size
from vllm_longspec.scheduling.step_times import (
    HOST,
    HOST_OF_TREE,
    WALK,
    MeasuredCost,
    StepTimes,
    attach_times,
    describe_numbers,
    describe_times,
    times_of,
)
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.synthetic_rates import accepted_by_nodes

SHAPE = TreeShape(DEFAULT_LEVELS)
MAX_BATCH_SIZE = 512


@dataclass(frozen=True)
class Gpu:
    """A GPU with a bandwidth and a number of rows from which on arithmetic takes longer than reading weights."""

    rate: float = 1.9e9  # weights per millisecond
    knee: int = 200  # rows
    row: float = 0.0004  # of a reading of the weights, before the knee
    node: float = 0.006  # of a reading of the request's cache
    launch: float = 0.09  # milliseconds of a level

    def verify(self, cost: StepCost, batch_size: int, num_nodes: int) -> float:
        rows = batch_size * (1 + num_nodes)
        return cost.target / self.rate * (max(1.0, rows / self.knee) + self.row * rows)

    def read(self, cost: StepCost, num_nodes: int) -> float:
        return cost.token / self.rate * (1 + self.node * num_nodes)

    def draft(self, cost: StepCost, num_nodes: int) -> float:
        assert isinstance(cost.drafting, GlideCost)
        return SHAPE.num_levels(num_nodes) * (self.launch + cost.drafting.level / self.rate)

    def step(self, cost: StepCost, batch_size: int, num_nodes: int, num_tokens: int) -> float:
        time = self.verify(cost, batch_size, num_nodes) + self.read(cost, num_nodes) * num_tokens
        if num_nodes:
            assert isinstance(cost.drafting, GlideCost)
            levels = SHAPE.num_levels(num_nodes)
            time += WALK + self.draft(cost, num_nodes)
            time += levels * num_tokens * cost.token / cost.drafting.num_layers / self.rate
        return time

    def times(self, cost: StepCost, choices: list[list[int]]) -> StepTimes:
        """As `StepTimer` would time them."""
        verify, draft, read = {}, {}, {}
        for number in sorted(set().union(*choices[1:])):
            largest = max(size for size, numbers in enumerate(choices) if size and number in numbers)
            sizes = sorted({*(1 << power for power in range(largest.bit_length())), largest})
            verify[number] = [(size, self.verify(cost, size, number)) for size in sizes]
            read[number] = [(1, self.read(cost, number))]
            if number:
                draft[number] = [(size, self.draft(cost, number)) for size in sizes]
        return StepTimes("GPU", verify, draft, read)


def choices_of(queries_per_kv_head: int = 5) -> list[list[int]]:
    schedule = default_schedule(68, queries_per_kv_head, MOST_ROWS)
    return nodes_by_batch_size(config(schedule[0][2], schedule), MAX_BATCH_SIZE, choose=True)


def measured(model: str, gpu: Gpu, choices: list[list[int]]) -> tuple[MeasuredCost, StepCost]:
    constants = cost_of(model)
    return MeasuredCost(gpu.times(constants, choices), constants.drafting, constants.token, constants), constants


GPUS = {"H200": Gpu(), "slow to read": Gpu(rate=0.4e9, knee=420), "slow to compute": Gpu(knee=40)}


@pytest.mark.parametrize("model", ["qwq-32b", "llama-3-8b-262k"])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("context", [0, 1024, 131072])
def test_a_step_costs_what_it_takes(model, gpu, context):
    cost, constants = measured(model, gpu, choices := choices_of())
    for batch_size, numbers in list(enumerate(choices))[1:]:
        tokens = batch_size * context
        plain = gpu.step(constants, batch_size, 0, tokens)
        for number in numbers:
            is_timed = batch_size & (batch_size - 1) == 0
            expected = gpu.step(constants, batch_size, number, tokens) / plain
            # In between it is linear, which a knee is not.
            assert cost(batch_size, number, tokens) == pytest.approx(expected, rel=1e-9 if is_timed else 0.15)
    assert cost(7, 0, 12345) == 1.0


@pytest.mark.parametrize("model", ["qwq-32b", "llama-3-8b-262k"])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("quality", [0.0, 0.1, 0.5, 1.0, 1.3])
def test_the_number_is_the_best_or_nearly(model, gpu, quality):
    """Of a draft of known quality, for each batch and context; never one that is slower than plain decoding."""
    cost, constants = measured(model, gpu, choices := choices_of(4))
    for batch_size in (1, 2, 3, 8, 16, 40, 64, 128, 256):
        for context in (1024, 65536):
            tokens = batch_size * context
            accepted = {number: min(number, quality * typical_acceptance(number)) for number in choices[1]}
            chooser = NodesByCost(choices, cost, lambda: tokens, SHAPE, accepted)  # noqa: B023

            def speed(number: int) -> float:
                accepted = min(number, quality * typical_acceptance(number))
                plain = gpu.step(constants, batch_size, 0, tokens)  # noqa: B023
                return (1 + accepted) * plain / gpu.step(constants, batch_size, number, tokens)  # noqa: B023

            number = chooser[batch_size]
            assert number == chooser.best(batch_size, tokens)
            best = max(map(speed, choices[batch_size]))
            assert speed(number) >= (0.98 if batch_size & (batch_size - 1) == 0 else 0.93) * best
            assert quality > 0 or number == 0


def test_a_gpu_with_rows_to_spare_verifies_more_nodes():
    def nodes(gpu: Gpu, batch_size: int) -> int:
        cost, _ = measured("qwq-32b", gpu, choices := choices_of())
        return NodesByCost(choices, cost, lambda: batch_size * 1024, SHAPE)[batch_size]

    for batch_size in (8, 16, 32):
        slow_to_read, slow_to_compute = (nodes(GPUS[name], batch_size) for name in ("slow to read", "slow to compute"))
        assert slow_to_read > slow_to_compute
    assert nodes(GPUS["H200"], 1) == 24


def test_numbers_that_were_not_timed_cost_what_the_constants_say():
    choices = choices_of()
    whole, constants = measured("qwq-32b", Gpu(), choices)
    less = json.loads(whole.times.to_json())
    for name in ("verify", "draft", "read"):
        del less[name]["7"]
    times = StepTimes.from_json(json.dumps(less))
    cost = MeasuredCost(times, constants.drafting, constants.token, constants)
    assert cost(4, 7, 4096) == constants(4, 7, 4096) != whole(4, 7, 4096)
    assert cost(4, 15, 4096) == whole(4, 15, 4096)


def test_a_draft_without_its_graph_is_not_worth_it():
    constants = cost_of("qwq-32b")
    times = Gpu().times(constants, choices_of())
    cost = MeasuredCost(times, lambda batch_size, nodes, cache: math.inf if batch_size > 4 else 0.0, 1.0, constants)
    assert cost(8, 7, 100) == math.inf > cost(4, 7, 100)


def engine_of(verify: list[tuple[int, float]]) -> MeasuredCost:
    """Of three nodes, whose verification takes so long; a step of plain decoding takes 10 ms, a draft 1 ms."""
    times = StepTimes(
        "GPU",
        {0: [(1, 10.0)], 3: verify},
        {3: [(size, 1.0) for size, _ in verify]},
        {0: [(1, 0.0)], 3: [(1, 0.0)]},
    )
    return MeasuredCost(times, lambda *_: 0.0, 1.0, lambda *_: 0.0)


def test_noise_does_not_make_a_larger_batch_cheaper():
    cost = engine_of([(1, 12.0), (2, 11.8), (3, 11.7), (4, 13.0)])
    assert cost(1, 3, 0) == cost(2, 3, 0) == cost(3, 3, 0) == (WALK + 13) / 10
    # Beyond the largest it goes on as from half of it.
    assert cost(8, 3, 0) == pytest.approx((WALK + 16) / 10)


def test_a_bend_at_the_end_does_not_go_on():
    """A graph of 72 rows after one of 64, which fill a tile: the next ones do not take as much longer."""
    cost = engine_of([(1, 10.0), (2, 10.0), (4, 12.0), (7, 10.8), (8, 13.3)])
    assert cost(8, 3, 0) == (WALK + 14.3) / 10
    assert cost(64, 3, 0) == pytest.approx((WALK + 1 + 13.3 + 14 * 1.3) / 10)
    # Nor does noise between neighbours, which is many times as much in a batch of so many more.
    steady, noisy = engine_of([(32, 10.0), (64, 20.0)]), engine_of([(32, 10.0), (63, 19.4), (64, 20.0)])
    assert noisy(128, 3, 0) == steady(128, 3, 0)


def test_a_larger_batch_may_fill_a_tile():
    cost = engine_of([(1, 10.0), (4, 10.0), (5, 13.0), (16, 11.0)])
    assert cost(4, 3, 0) == (WALK + 11) / 10
    assert cost(5, 3, 0) == (WALK + 14) / 10
    assert cost(16, 3, 0) == cost(32, 3, 0) == (WALK + 12) / 10


def test_a_step_of_a_small_target_takes_as_long_as_the_host():
    times = StepTimes(
        "GPU",
        {0: [(1, 0.9)], 2: [(1, 0.9)], 4: [(1, 0.9)]},
        {2: [(1, 0.5)], 4: [(1, 4.0)]},
        {0: [(1, 1e-4)], 2: [(1, 1e-4)], 4: [(1, 1e-4)]},
    )
    cost = MeasuredCost(times, lambda *_: 0.0, 1.0, lambda *_: 0.0)
    assert cost(1, 2, 0) == HOST_OF_TREE / HOST
    assert cost(1, 4, 0) == pytest.approx((WALK + 4.9) / HOST)
    # With a context the GPU is the slower one.
    assert cost(1, 2, 20000) == pytest.approx((WALK + 3.4) / 2.9)
    assert describe_times(times, lambda _: 4).startswith(f"plain decoding {HOST:.2f} ms, a node 0 us of verification")


# Milliseconds of a step with QwQ-32B-Preview's shape by nodes on an H200 (docs/performance.md#what-nodes-cost).
RECORDED = {
    (16384, 1): {0: 20.647, 7: 22.613, 15: 24.817, 24: 23.981},
    (16384, 4): {0: 23.955, 7: 27.133, 15: 28.437, 24: 29.076},
    (8192, 16): {0: 28.081, 3: 31.295, 7: 34.58, 15: 45.492},
    (2048, 64): {0: 29.662, 1: 32.885, 3: 44.859},
}


@pytest.mark.parametrize("cell", RECORDED)
@pytest.mark.parametrize("quality", [0.3, 0.7, 1.0, 1.22, 1.35])
def test_the_constants_choose_the_best_number_of_what_was_recorded(cell, quality):
    context, batch_size = cell
    recorded = RECORDED[cell]
    choices = [[], *[sorted(recorded, reverse=True)] * batch_size]
    constants = cost_of("qwq-32b", draft_vocab_size=32768, is_quantised=True)
    accepted = {number: min(number, quality * typical_acceptance(number)) for number in recorded}
    number = NodesByCost(choices, constants, lambda: batch_size * context, SHAPE, accepted)[batch_size]

    def speed(number: int) -> float:
        return (1 + min(number, quality * typical_acceptance(number))) / recorded[number]

    assert speed(number) >= 0.98 * max(map(speed, recorded))


def test_set_acceptance_takes_the_cheapest_nodes_that_it_needs_and_is_not_learnt_from():
    constants = cost_of("qwq-32b")
    choices = choices_of()
    most = choices[1][0]

    def chooser(length: float) -> NodesByCost:
        rates = SpeculativeConfig._resolve_synthetic_acceptance_rates(5, None, length)
        config: Any = SimpleNamespace(
            rejection_sample_method="synthetic", synthetic_acceptance_rates=rates, num_speculative_tokens=most
        )
        accepted = accepted_by_nodes(config, SHAPE, choices[1])
        return NodesByCost(choices, constants, lambda: 64 * 2048, SHAPE, accepted)

    poor, rich = chooser(1.05), chooser(5.0)
    assert poor[64] == 0 < rich[64]
    # A path of four nodes and another one are listed; with 24 no more are accepted.
    assert rich[1] == 5 and rich.acceptance[5] == rich.acceptance[24] == pytest.approx(4.0)
    # A path of five nodes and another one.
    assert chooser(5.9)[1] == 7 and chooser(5.9).acceptance[7] == pytest.approx(4.9)
    # The path's first two nodes, and its first.
    assert rich.acceptance[3] == pytest.approx(2.0) and rich.acceptance[1] == pytest.approx(1.0)
    # The largest number accepts what was asked for.
    most = 3
    assert chooser(5.0).acceptance[3] == pytest.approx(3.0)
    for _ in range(500):
        rich.observe(rich[64], 0)
    assert rich[64] > 0


def test_without_feedback_it_is_what_an_adaptive_one_begins_with():
    constants = cost_of("llama-3-8b-262k")
    for batch_size in (1, 8, 64):
        tables = (kind(choices_of(4), constants, lambda: 4096, SHAPE) for kind in (NodesByCost, AdaptiveVerification))
        assert len({table[batch_size] for table in tables}) == 1


def test_which_costs_an_engine_has():
    def engine(quantization=None):
        shape = SimpleNamespace(**SHAPES["qwq-32b"])
        speculative_config = config(24, None, SHAPE)
        speculative_config.quantization = None
        return SimpleNamespace(
            speculative_config=speculative_config,
            model_config=SimpleNamespace(
                hf_text_config=shape, get_vocab_size=lambda: shape.vocab_size, quantization=quantization
            ),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )

    assert cost_of_steps(engine()) == StepCost.of(engine())
    assert cost_of_steps(engine("awq")) is None
    for quantization in (None, "awq"):
        timed = engine(quantization)
        attach_times(timed.speculative_config, times := Gpu().times(cost_of("qwq-32b"), choices_of()))
        cost = cost_of_steps(timed)
        assert isinstance(cost, MeasuredCost) and cost.times is times is times_of(timed.speculative_config)
    assert times_of(engine().speculative_config) is None


def test_times_are_read_as_they_were_written():
    times = Gpu().times(cost_of("qwq-32b"), choices_of())
    assert StepTimes.from_json(times.to_json()) == times
    assert times.numbers() == [1, 3, 5, 7, 15, 24]


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("device"),
        lambda found: found.pop("draft"),
        lambda found: found["verify"].pop("0"),
        lambda found: found["verify"].pop("7"),
        lambda found: found["read"].pop("7"),
        lambda found: found["verify"].update({"7": []}),
        lambda found: found["verify"].update({"7": [[1, -1.0]]}),
        lambda found: found["verify"].update({"7": [[1, math.nan]]}),
        lambda found: found["verify"].update({"7": [[2, 1.0], [1, 1.0]]}),
        lambda found: found["verify"].update({"seven": [[1, 1.0]]}),
        lambda found: found.update(verify=None),
        lambda found: found["draft"].update({"7": [1, 2]}),
        lambda found: found["draft"].update({"7": [[math.inf, 1.0]]}),
        lambda found: found["draft"].update({"7": [[1, 10**400]]}),
        lambda found: found.pop("larger"),
        lambda found: found["larger"].update({"7": [[2, 2]]}),
        lambda found: found["larger"].update({"6": [[1, 2]]}),
        lambda found: found.update(draft={}, verify={"0": [[1, 1.0]]}, read={"0": [[1, 0.0]]}),
    ],
)
def test_other_times_are_refused(change):
    found = json.loads(Gpu().times(cost_of("qwq-32b"), choices_of()).to_json())
    change(found)
    with pytest.raises(ValueError):
        StepTimes.from_json(json.dumps(found))


def test_what_start_up_says():
    times = Gpu(row=0.0).times(cost_of("qwq-32b"), choices_of())
    said = describe_times(times, SHAPE.num_levels)
    plain = cost_of("qwq-32b").target / Gpu.rate
    assert said.startswith(f"plain decoding {plain:.2f} ms, a node 0 us of verification, a level ")
    assert describe_numbers([0, 24, 24, 7, 7, 7, 0, 0]) == "24 up to 2, 7 up to 5, 0 above"
    assert describe_numbers([0, 4]) == "4"


@pytest.mark.parametrize("is_timed", [True, False])
@pytest.mark.parametrize(
    ("method", "adaptive", "said_of"),
    [("synthetic", False, "the set"), ("synthetic", True, "a typical"), ("standard", False, "a typical")],
)
def test_start_up_says_what_was_chosen_and_by_what(monkeypatch, is_timed, method, adaptive, said_of):
    said: list[str] = []
    monkeypatch.setattr(scheduling, "logger", SimpleNamespace(info_once=lambda text, *given: said.append(text % given)))
    speculative_config = config(24, None)
    attach_options(speculative_config, LongSpecOptions("glide", SHAPE, adaptive_verification=adaptive))
    speculative_config.rejection_sample_method = method
    if is_timed:
        attach_times(speculative_config, Gpu().times(cost_of("qwq-32b"), choices_of()))
    scheduler: Any = object.__new__(scheduling.TreeScheduler)
    scheduler.vllm_config = SimpleNamespace(speculative_config=speculative_config)
    scheduler.max_model_len = 32768
    scheduler._log_choice(NodesByCost(choices_of(), cost_of("qwq-32b"), lambda: 0, SHAPE))
    (line,) = said
    assert line.startswith("Steps on GPU: plain decoding " if is_timed else "Costs of steps are those of an H200. ")
    assert f"at {said_of} acceptance and 4096 tokens of context: 24 up to " in line and line.endswith(", 0 above")
