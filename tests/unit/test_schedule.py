# SPDX-License-Identifier: Apache-2.0
"""How many nodes are verified by default, by batch size."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_longspec.config.schedule import BATCH_ROWS, PREFIX_TILE, default_schedule, nodes_by_batch_size


def config(num_nodes, schedule):
    return SimpleNamespace(num_speculative_tokens=num_nodes, num_speculative_tokens_per_batch_size=schedule)


@pytest.mark.parametrize("num_nodes", [1, 4, 10, 68, 255])
@pytest.mark.parametrize("queries_per_kv_head", [1, 4, 5, 7, 8, 128, 256])
def test_the_default_keeps_to_both_bounds_and_ends_in_plain_decoding(num_nodes, queries_per_kv_head):
    schedule = default_schedule(num_nodes, queries_per_kv_head)
    assert validate_and_normalize_dynamic_sd_schedule(schedule) == schedule
    # A range begins right after the one before it.
    assert [first for first, _, _ in schedule] == [1] + [1 + last for _, last, _ in schedule[:-1]]
    nodes = nodes_by_batch_size(config(num_nodes, schedule), 1024)
    assert all(later <= earlier for earlier, later in pairwise(nodes[1:]))
    assert nodes[-1] == 0
    for batch_size in range(1, 1025):
        kept = nodes[batch_size]
        assert kept <= num_nodes
        assert kept == 0 or batch_size * (1 + kept) <= BATCH_ROWS
        assert kept <= 1 or (1 + kept) * queries_per_kv_head <= PREFIX_TILE
        # Twice the batch could not have as many again.
        assert kept == min(nodes[1], num_nodes) or 2 * batch_size * (2 + kept) > BATCH_ROWS


def test_a_tree_of_a_single_request_fills_a_tile():
    assert default_schedule(68, 5)[0] == (1, 4, 24)
    assert default_schedule(68, 4)[0] == (1, 4, 31)
    assert default_schedule(68, 1)[0] == (1, 1, 68)
    assert default_schedule(4, 5)[0] == (1, 16, 4)


def test_without_a_schedule_every_batch_verifies_all_nodes():
    assert nodes_by_batch_size(config(68, None), 4)[1:] == [68] * 4
    assert nodes_by_batch_size(config(24, [(1, 1, 68), (2, 2, 8)]), 4)[1:] == [24, 8, 8, 8]
