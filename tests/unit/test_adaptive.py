# SPDX-License-Identifier: Apache-2.0
"""The number of nodes that a step verifies, against drafts of every quality."""

import random

import pytest

from tests.unit.test_schedule import config
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.scheduling.adaptive import HALF_LIFE, AdaptiveVerification, typical_acceptance
from vllm_longspec.scheduling.cost import StepCost
from vllm_longspec.scheduling.schedule import default_schedule, nodes_by_batch_size

QUERIES_PER_KV_HEAD = 5
# QwQ-32B-Preview's shape in round numbers.
COST = StepCost(target=32e9, token=131072, drafting=GlideCost(level=1.3e9, num_layers=64, max_depth=5))


def choices(max_batch_size: int = 256) -> list[list[int]]:
    return nodes_by_batch_size(config(24, default_schedule(68, QUERIES_PER_KV_HEAD)), max_batch_size, adapt=True)


def budget_of(num_tokens: int = 16384, **settings) -> AdaptiveVerification:
    return AdaptiveVerification(choices(**settings), COST, num_cached_tokens=lambda: num_tokens)


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
    assert budget.choices[1] == budget.choices[2] == [0, 1, 3, 7, 15, 24]
    assert sum(COST(1, number, 16384) for number in play(budget, Draft(0.0), 1, 2000)) < 1.02 * 2000
