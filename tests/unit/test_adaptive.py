# SPDX-License-Identifier: Apache-2.0
"""The number of nodes that a step verifies and of levels that it drafts, against drafts of every quality."""

import random
from dataclasses import replace

import pytest

from tests.unit.test_cost import cost_of
from tests.unit.test_schedule import auto_shape, config
from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.scheduling.adaptive import NODES_MEMORY, TRIAL_INTERVAL, AdaptiveVerification, typical_acceptance
from vllm_longspec.scheduling.cost import StepCost
from vllm_longspec.scheduling.schedule import default_schedule, nodes_by_batch_size
from vllm_longspec.tree.shape import TreeShape

HALF_LIFE = NODES_MEMORY.half_life
QUERIES_PER_KV_HEAD = 5
DEFAULT_SHAPE = TreeShape(DEFAULT_LEVELS)
# QwQ-32B-Preview's shape in round numbers.
COST = StepCost(target=32e9, token=131072, drafting=GlideCost(level=1.3e9, num_layers=64, shape=DEFAULT_SHAPE))


def choices(max_batch_size: int = 256) -> list[list[int]]:
    return nodes_by_batch_size(config(24, default_schedule(68, QUERIES_PER_KV_HEAD)), max_batch_size, choose=True)


def budget_of(num_tokens: int = 16384, **settings) -> AdaptiveVerification:
    return AdaptiveVerification(choices(**settings), COST, lambda: num_tokens, DEFAULT_SHAPE)


class Draft:
    """Accepts `quality` times what is typical, in whole tokens."""

    def __init__(self, quality: float):
        self.quality = quality
        self.source = random.Random(0)

    def tokens(self, num_nodes: int) -> float:
        return self.quality * typical_acceptance(num_nodes)

    def accept(self, num_nodes: int) -> int:
        whole, part = divmod(self.tokens(num_nodes), 1)
        return int(whole) + (self.source.random() < part)


def play(budget: AdaptiveVerification, draft: Draft, batch_size: int, num_steps: int) -> list[int]:
    numbers = []
    for _ in range(num_steps):
        numbers.append(budget[batch_size])
        # vLLM has no statistics of a step without drafts.
        for _ in range(batch_size if numbers[-1] else 0):
            budget.observe(numbers[-1], draft.accept(numbers[-1]))
    return numbers


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16, 40, 64])
@pytest.mark.parametrize("quality", [0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("context", [1024, 131072])
def test_it_is_nearly_as_good_as_the_best_number_would_be(batch_size, quality, context):
    draft, num_tokens = Draft(quality), batch_size * context
    numbers = play(budget_of(num_tokens), draft, batch_size, 4000)

    def cost_of(num_nodes: int) -> float:
        return COST(batch_size, num_nodes, num_tokens)

    def worth(num_nodes: int) -> float:
        return (1 + draft.tokens(num_nodes) if num_nodes else 1) / cost_of(num_nodes)

    cost = sum(map(cost_of, numbers))
    tokens = sum(1 + draft.tokens(number) if number else 1 for number in numbers)
    assert set(numbers) <= set(choices()[batch_size])
    assert tokens / cost >= 0.97 * max(map(worth, choices()[batch_size]))


def test_a_draft_that_nobody_follows_costs_next_to_nothing():
    numbers = play(budget_of(), Draft(0.0), 1, 2000)
    assert sum(COST(1, number, 16384) for number in numbers) < 1.02 * len(numbers)
    # It is given up soon and tried again.
    assert 0 < sum(number > 0 for number in numbers[50:250]) < 20
    assert any(numbers[-4 * HALF_LIFE :])


def test_a_draft_that_becomes_good_is_verified_again():
    budget = budget_of()
    play(budget, Draft(0.0), 1, 1000)
    numbers = play(budget, Draft(1.0), 1, 2 * HALF_LIFE)
    assert all(number >= 7 for number in numbers[-HALF_LIFE:])


def test_nodes_that_add_nothing_are_not_verified():
    """So many tokens a step, of however few nodes."""
    budget = budget_of()
    for _ in range(2000):
        number = budget[4]
        for _ in range(4 if number else 0):
            budget.observe(number, min(3, number))
    assert budget[4] <= 7


def test_a_poor_draft_is_worth_more_where_the_context_is_long():
    """There plain decoding is slow, and a draft no slower."""
    short, long = (play(budget_of(16 * context), Draft(0.3), 16, 2000)[-HALF_LIFE:] for context in (1024, 65536))
    assert sum(short) < sum(long)


def test_an_unknown_draft_gets_a_whole_tile_alone():
    assert [budget_of()[batch_size] for batch_size in (1, 64, 65)] == [24, 1, 0]


def test_the_same_steps_get_the_same_numbers():
    first, second = (play(budget_of(), Draft(0.4), 2, 500) for _ in range(2))
    assert first == second


def test_a_server_of_few_requests_has_the_same_numbers_to_choose_from():
    budget = budget_of(max_batch_size=2)
    assert budget.choices[1] == budget.choices[2] == [0, 1, 3, 5, 7, 15, 24]
    assert sum(COST(1, number, 16384) for number in play(budget, Draft(0.0), 1, 2000)) < 1.02 * 2000


# Levels that are chosen together with the nodes: a draft whose paths go on with the same probability at every depth.

MODELS = {"qwq-32b": 5, "llama-3-8b-262k": 4}  # -> queries for each KV head
CONTEXT = 8192


class Geometric:
    """A path goes on with probability `rate` where there is a node at each level, and more often where there are more.

    `copied` of the steps accept `COPIED` nodes that were not drafted.
    """

    COPIED = 14

    def __init__(self, rate: float, copied: float = 0.0):
        self.rate = rate
        self.copied = copied
        self.source = random.Random(0)

    def _continuation(self, num_nodes: int, num_levels: int) -> float:
        return self.rate ** (num_levels / num_nodes) ** 0.3

    def tokens(self, num_nodes: int, num_levels: int) -> float:
        continuation = self._continuation(num_nodes, num_levels)
        drafted = sum(continuation**depth for depth in range(1, num_levels + 1))
        return (1 - self.copied) * drafted + self.copied * self.COPIED

    def accept(self, num_nodes: int, num_levels: int) -> int:
        if self.source.random() < self.copied:
            return self.COPIED
        continuation, drawn = self._continuation(num_nodes, num_levels), self.source.random()
        return sum(drawn < continuation**depth for depth in range(1, num_levels + 1))


class Server:
    """Requests of one model, in a batch that stays the same, with or without levels that are chosen."""

    def __init__(self, model: str, batch_size: int, auto: bool = True):
        queries = MODELS[model]
        self.batch_size, self.num_tokens = batch_size, batch_size * CONTEXT
        self.shape = auto_shape(queries) if auto else DEFAULT_SHAPE
        schedule = default_schedule(self.shape.num_nodes, queries)
        self.choices = nodes_by_batch_size(config(schedule[0][2], schedule, self.shape), batch_size, choose=True)
        cost = cost_of(model, is_quantised=True)
        assert isinstance(cost.drafting, GlideCost)
        self.cost = replace(cost, drafting=replace(cost.drafting, shape=self.shape))
        self.adaptive = AdaptiveVerification(self.choices, self.cost, lambda: self.num_tokens, self.shape)

    def serve(self, draft: Geometric, num_steps: int) -> list[int]:
        """Numbers of nodes of every step."""
        numbers = []
        for _ in range(num_steps):
            numbers.append(number := self.adaptive[self.batch_size])
            for _ in range(self.batch_size if number else 0):
                self.adaptive.observe(number, draft.accept(number, self.shape.num_levels(number)))
        return numbers

    def throughput(self, draft: Geometric, numbers: list[int]) -> float:
        """Tokens per request in the time of a step of plain decoding, as expected of these numbers."""
        tokens = sum(1 + draft.tokens(number, self.shape.num_levels(number)) if number else 1 for number in numbers)
        return tokens / sum(self.cost(self.batch_size, number, self.num_tokens) for number in numbers)

    def best_of(self, draft: Geometric) -> float:
        return max(self.throughput(draft, [number]) for number in self.choices[self.batch_size])

    def levels(self, numbers: list[int]) -> float:
        """Mean number of levels."""
        return sum(self.shape.num_levels(number) if number else 0 for number in numbers) / len(numbers)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.7, 0.95])
def test_levels_and_nodes_are_nearly_as_good_as_the_best_would_be(model, batch_size, rate):
    auto, default = Server(model, batch_size), Server(model, batch_size, auto=False)
    draft, num_steps = Geometric(rate), 900 if batch_size < 16 else 300
    numbers = auto.serve(draft, num_steps)
    assert auto.throughput(draft, numbers[num_steps // 3 :]) >= 0.95 * auto.best_of(draft)
    # Of all steps, those in which it does not know better included.
    assert auto.throughput(draft, numbers) >= 0.96 * default.throughput(draft, default.serve(draft, num_steps))


@pytest.mark.parametrize("model", MODELS)
def test_trees_go_deep_where_paths_are_accepted_to_the_end_and_nowhere_else(model):
    deep, shallow = Server(model, 1), Server(model, 1)
    assert deep.levels(deep.serve(Geometric(0.95), 900)[300:]) > 11
    assert shallow.levels(shallow.serve(Geometric(0.4), 900)[300:]) < 5.5
    # A level of the smaller model is a larger part of its step.
    if model == "llama-3-8b-262k":
        assert shallow.levels(shallow.serve(Geometric(0.4), 300)) < 4


@pytest.mark.parametrize(("before", "after"), [(0.95, 0.3), (0.3, 0.95), (0.0, 0.9)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_levels_follow_a_draft_that_changes(batch_size, before, after):
    server, draft = Server("qwq-32b", batch_size), Geometric(after)
    server.serve(Geometric(before), 600)
    numbers = server.serve(draft, 600)[300:]
    assert server.throughput(draft, numbers) >= 0.95 * server.best_of(draft)


def test_paths_that_were_not_drafted_are_no_reason_to_draft_deeper():
    """They are accepted whatever the number of levels."""
    server, draft = Server("qwq-32b", 1), Geometric(0.3, copied=0.4)
    numbers = server.serve(draft, 900)[300:]
    assert server.levels(numbers) < 6
    assert server.throughput(draft, numbers) >= 0.9 * server.best_of(draft)


def test_steps_of_few_levels_say_what_more_would_accept():
    """Before there is a single step of more levels."""
    shape = TreeShape((4, *[16] * 11)).with_plans({24: 8, 23: 5, 22: 12, 21: 3})
    chosen = {}
    for rate in (0.1, 0.4, 0.99):
        budget = AdaptiveVerification(
            [[], [24, 23, 22, 21]], lambda _, nodes, __: 1 + 0.03 * shape.num_levels(nodes), lambda: 0, shape
        )
        draft = Geometric(rate)
        for _ in range(200):
            budget.observe(21, draft.accept(21, 3))
        chosen[rate] = shape.num_levels(budget[1])
    assert chosen == {0.1: 3, 0.4: 5, 0.99: 12}


def test_trials_change_the_nodes_or_the_levels():
    shape = auto_shape(QUERIES_PER_KV_HEAD)
    budget = AdaptiveVerification(
        # Of all that can be chosen 14 nodes are by far the cheapest.
        [[], [0, *dict(shape.plans)]],
        lambda _, nodes, __: 1 if nodes == 14 else 1.4,
        lambda: 0,
        shape,
    )
    numbers = [budget[1] for _ in range(4 * TRIAL_INTERVAL)]
    tried = {number for number in numbers if number != 14}
    # The next ones, which have other levels, and the next ones of 5 levels.
    assert {number: shape.num_levels(number) for number in tried} == {13: 12, 15: 8, 6: 5, 23: 5}
    assert len(numbers) - numbers.count(14) == 4


def test_numbers_that_cannot_pay_are_not_tried():
    """Of nodes that cost more than a step of plain decoding each there is nothing to learn."""

    def tried(cost_of_node: float) -> set[int]:
        budget = AdaptiveVerification(
            [[], [0, 1, 4]], lambda _, nodes, __: 1 + nodes * cost_of_node, lambda: 0, TreeShape((1,) * 4)
        )
        return set(play(budget, Draft(0.1), 1, 8 * TRIAL_INTERVAL))

    assert tried(1.01) == {0}
    assert tried(0.9) > {0}


def test_the_same_steps_get_the_same_levels():
    first, second = (Server("qwq-32b", 2).serve(Geometric(0.7), 400) for _ in range(2))
    assert first == second
