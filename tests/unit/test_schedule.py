# SPDX-License-Identifier: Apache-2.0
"""How many nodes are verified by default, by batch size."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_longspec.options import AUTO_LEVELS, LongSpecOptions, attach_options
from vllm_longspec.scheduling.schedule import (
    BATCH_ROWS,
    LEVEL_CHOICES,
    MOST_ROWS,
    PREFIX_TILE,
    default_schedule,
    nodes_by_batch_size,
    numbers_of,
    plan_levels,
)
from vllm_longspec.tree.shape import TreeShape

AUTO_SHAPE = TreeShape(AUTO_LEVELS)


def config(num_nodes, schedule, shape=None):
    speculative_config: Any = SimpleNamespace(
        num_speculative_tokens=num_nodes, num_speculative_tokens_per_batch_size=schedule
    )
    if shape is not None:
        attach_options(speculative_config, LongSpecOptions("glide", shape, adaptive_verification=True))
    return speculative_config


def auto_shape(queries_per_kv_head):
    schedule = default_schedule(AUTO_SHAPE.num_nodes, queries_per_kv_head)
    return AUTO_SHAPE.with_plans(plan_levels(numbers_of(schedule, AUTO_SHAPE.num_nodes), AUTO_SHAPE))


def limits(speculative_config, max_batch_size):
    """The one number of every batch size from 1 on."""
    choices = nodes_by_batch_size(speculative_config, max_batch_size, choose=False)[1:]
    assert all(len(numbers) == 1 for numbers in choices)
    return [number for (number,) in choices]


@pytest.mark.parametrize("num_nodes", [1, 4, 10, 68, 255])
@pytest.mark.parametrize("queries_per_kv_head", [1, 4, 5, 7, 8, 128, 256])
def test_the_default_keeps_to_both_bounds_and_ends_in_plain_decoding(num_nodes, queries_per_kv_head):
    schedule = default_schedule(num_nodes, queries_per_kv_head)
    assert validate_and_normalize_dynamic_sd_schedule(schedule) == schedule
    # A range begins right after the one before it.
    assert [first for first, _, _ in schedule] == [1] + [1 + last for _, last, _ in schedule[:-1]]
    nodes = limits(config(num_nodes, schedule), 1024)
    assert all(later <= earlier for earlier, later in pairwise(nodes))
    assert nodes[-1] == 0
    for batch_size in range(1, 1025):
        kept = nodes[batch_size - 1]
        assert kept <= num_nodes
        assert kept == 0 or batch_size * (1 + kept) <= BATCH_ROWS
        assert kept <= 1 or (1 + kept) * queries_per_kv_head <= PREFIX_TILE
        # Twice the batch could not have as many again.
        assert kept == min(nodes[0], num_nodes) or 2 * batch_size * (2 + kept) > BATCH_ROWS


def test_a_tree_of_a_single_request_fills_a_tile():
    assert default_schedule(68, 5)[0] == (1, 4, 24)
    assert default_schedule(68, 4)[0] == (1, 4, 31)
    assert default_schedule(68, 1)[0] == (1, 1, 68)
    assert default_schedule(4, 5)[0] == (1, 21, 4)


def test_between_eight_and_four_rows_of_a_request_there_are_six():
    assert default_schedule(68, 5, MOST_ROWS) == [
        (1, 16, 24),
        (17, 32, 15),
        (33, 64, 7),
        (65, 85, 5),
        (86, 128, 3),
        (129, 256, 1),
        (257, 512, 0),
    ]


def test_without_a_schedule_every_batch_verifies_all_nodes():
    assert limits(config(68, None), 4) == [68] * 4
    assert limits(config(24, [(1, 1, 68), (2, 2, 8)]), 4) == [24, 8, 8, 8]


def test_a_number_that_adapts_is_one_of_the_schedules_and_not_above_the_batchs_own():
    schedule = [(1, 2, 24), (3, 4, 8), (5, 5, 0)]
    choices = nodes_by_batch_size(config(24, schedule), 6, choose=True)[1:]
    assert choices == [[24, 8, 0], [24, 8, 0], [8, 0], [8, 0], [0], [0]]
    # Numbers of larger batches than there may be are numbers, too, and so is 0.
    assert nodes_by_batch_size(config(24, schedule), 1, choose=True)[1] == [24, 8, 0]
    assert nodes_by_batch_size(config(8, [(1, 1, 24), (2, 2, 4)]), 1, choose=True)[1] == [8, 4, 0]


@pytest.mark.parametrize("queries_per_kv_head", [1, 2, 4, 5, 8, 256])
def test_levels_are_chosen_with_the_nodes(queries_per_kv_head):
    schedule = default_schedule(AUTO_SHAPE.num_nodes, queries_per_kv_head)
    shape = auto_shape(queries_per_kv_head)
    # Nothing is lost of the schedule's numbers, and few nodes of the largest.
    numbers = numbers_of(schedule, AUTO_SHAPE.num_nodes)
    assert set(numbers) <= {0, *dict(shape.plans)}
    for num_nodes, levels in shape.plans:
        assert min(abs(number - num_nodes) for number in numbers) < len(LEVEL_CHOICES)
        drafted = shape.for_best(num_nodes)
        assert drafted.max_depth == shape.num_levels(num_nodes) == levels <= num_nodes <= drafted.num_nodes
    choices = nodes_by_batch_size(config(schedule[0][2], schedule, shape), 256, choose=True)
    limits = nodes_by_batch_size(config(schedule[0][2], schedule), 256, choose=False)
    for chosen, (limit,) in list(zip(choices, limits, strict=True))[1:]:
        assert chosen == sorted({0, *(number for number, _ in shape.plans if number <= limit)}, reverse=True)


def test_the_plans_of_a_tile():
    """The number of CUDA graphs grows with them."""
    plans = {24: 8, 23: 5, 22: 12, 21: 3, 15: 8, 14: 5, 13: 12, 12: 3, 7: 7, 6: 5, 5: 3, 4: 3, 3: 3, 1: 1}
    assert dict(auto_shape(5).plans) == plans


def test_plans_of_numbers_that_are_next_to_each_other():
    assert plan_levels([24, 23, 4, 0], AUTO_SHAPE) == {
        24: 8,
        23: 5,
        22: 12,
        21: 3,
        20: 8,
        19: 5,
        18: 12,
        17: 3,
        4: 4,
        3: 3,
    }
    assert plan_levels([0], AUTO_SHAPE) == {}
    # No more levels than the bound has.
    assert plan_levels([16], TreeShape((4, 16))) == {16: 2}
