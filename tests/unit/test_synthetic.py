# SPDX-License-Identifier: Apache-2.0
"""Synthetic acceptance: rates by depth, a path in every cut of the list, and a walk as long as the rates say."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracles import tree as oracle
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.state import NO_TOKEN, TreeState
from vllm_longspec.tree.synthetic import list_a_path_early, walk_synthetically
from vllm_longspec.tree.synthetic_rates import conditional_rates, lists_another_node, rates_by_depth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = TreeShape((2, 4, 4))


def rates(num_speculative_tokens=10, method="synthetic", **options):
    options |= {"rejection_sample_method": method, "num_speculative_tokens": num_speculative_tokens}
    return rates_by_depth(options, SHAPE)


def test_rates_are_by_depth():
    for acceptance in ({"synthetic_acceptance_length": 2.5}, {"synthetic_acceptance_rates": [1.0, 0.5, 0.0]}):
        expected = {"synthetic_acceptance_rates": [1.0, 0.5] + [0.0] * 8, "synthetic_acceptance_length": None}
        assert rates(**acceptance) == expected
    # Two nodes are at most two deep.
    assert rates(2, synthetic_acceptance_length=3)["synthetic_acceptance_rates"] == [1.0, 1.0]
    assert rates(method="standard") == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of"),
        ({"synthetic_acceptance_length": 4.5}, r"synthetic_acceptance_length must be in \[1, 4\]"),
        ({"synthetic_acceptance_length": 0.9}, r"synthetic_acceptance_length must be in \[1, 4\]"),
        ({"synthetic_acceptance_length": 3.5, "num_speculative_tokens": 2}, r"must be in \[1, 3\]"),
        ({"synthetic_acceptance_rates": [0.5] * 10}, "must have length 3"),
        ({"synthetic_acceptance_rates": [0.5, 0.6, 0.1]}, "must be non-increasing"),
    ],
)
def test_acceptance_that_the_tree_does_not_allow_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        rates(**options)


def test_conditional_rates():
    config: Any = SimpleNamespace(rejection_sample_method="synthetic", synthetic_acceptance_rates=[0.8, 0.4])
    assert conditional_rates(config, 3) == [0.8, 0.5, 0.0]
    config.synthetic_acceptance_rates = [0.8, 0.4, 0.0, 0.0, 0.0]
    assert conditional_rates(config, 3) == [0.8, 0.5, 0.0]
    config.rejection_sample_method = "standard"
    assert conditional_rates(config, 3) is None


def draft(levels, num_reqs, seed):
    """Trees of equally probable nodes, as random weights draft them: log-probabilities and parents."""
    source = torch.Generator().manual_seed(seed)
    parents, log_probs, first = [], [], 0
    for depth, width in enumerate(levels):
        above = levels[depth - 1] if depth else 0
        parents.append(first - above + torch.randint(max(above, 1), (num_reqs, width), generator=source))
        log_probs.append(torch.full((num_reqs, width), -11.9 * (depth + 1)))
        first += width
        if depth == 0:
            parents[0].fill_(-1)
    return torch.cat(log_probs, dim=1), torch.cat(parents, dim=1).to(torch.int32)


@pytest.mark.parametrize(
    ("levels", "num_nodes"),
    [
        ((4, 16, 16, 16, 16), 68),
        ((4, 16, 16, 16, 16), 6),
        ((2, 4, 4), 5),
        ((1, 1, 1), 3),
        ((1, 1, 1), 2),
        ((3,), 2),
        ((3, 2, 1), 3),
    ],
)
def test_every_list_starts_with_a_deep_path(levels, num_nodes):
    num_reqs, max_depth = 4, len(levels)
    log_probs, parents = draft(levels, num_reqs, seed=num_nodes)
    tree = TreeState.allocate(num_reqs, num_nodes, DEVICE)
    hole = lists_another_node(levels, num_nodes, num_nodes)
    listed = list_a_path_early(log_probs.to(DEVICE), parents.to(DEVICE), levels, hole)
    tokens = torch.arange(sum(levels), device=DEVICE).repeat(num_reqs, 1)
    order_tree(
        tokens,
        listed,
        parents.to(DEVICE),
        torch.arange(num_reqs, device=DEVICE),
        torch.empty(num_reqs, num_nodes, dtype=torch.int64, device=DEVICE),
        tree.parent_rows,
        tree.depths,
        tree.ancestor_masks,
        max_depth,
    )
    # A node before the path's, where level 1 has two and the list has room: what is accepted has to move.
    assert hole == (levels[0] > 1 and num_nodes > max_depth)
    depths = [0] * (1 + hole) + list(range(1, max_depth + 1))
    if hole:
        depths[1] = 1
    rows = min(num_nodes + 1, len(depths))
    assert tree.depths[:, :rows].tolist() == [depths[:rows]] * num_reqs
    path = [-1, *([0] if hole else []), 0, *range(1 + hole, max_depth + hole)]
    assert tree.parent_rows[:, :rows].tolist() == [path[:rows]] * num_reqs


def random_trees(num_reqs, num_rows, max_depth, seed):
    """(sampled, row tokens, parent rows, depths) of each request."""
    source = torch.Generator().manual_seed(seed)
    trees = []
    for _ in range(num_reqs):
        parents, depths = [-1], [0]
        for row in range(1, num_rows):
            above = [each for each in range(row) if depths[each] < max_depth]
            parents.append(above[int(torch.randint(len(above), (1,), generator=source))])
            depths.append(depths[parents[-1]] + 1)
        sampled, tokens = torch.randint(50, (2, num_rows), generator=source).tolist()
        trees.append((sampled, tokens, parents, depths))
    return trees


def run_walk(trees, lengths, conditional, slots=None):
    """Of each request's tree the first so many rows are in the batch."""
    num_reqs, num_rows, max_depth = len(trees), len(trees[0][2]), len(conditional)
    slots = list(range(num_reqs, 0, -1)) if slots is None else slots
    source = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**62), 2**62, (num_reqs + 1,), generator=source)
    parent_rows = torch.zeros(num_reqs + 1, num_rows, dtype=torch.int32)
    depths = torch.zeros(num_reqs + 1, num_rows, dtype=torch.int32)
    for slot, (_, _, parents, depth) in zip(slots, trees, strict=True):
        parent_rows[slot], depths[slot] = torch.tensor(parents), torch.tensor(depth)

    def packed(of_tree):
        return [value for tree, length in zip(trees, lengths, strict=True) for value in of_tree(tree)[:length]]

    emitted = torch.full((num_reqs, max_depth + 2), -77, device=DEVICE)
    num_emitted = torch.full((num_reqs,), -77, dtype=torch.int32, device=DEVICE)
    path_rows = torch.full((num_reqs, max_depth + 2), -77, dtype=torch.int32, device=DEVICE)
    walk_synthetically(
        torch.tensor(conditional, device=DEVICE),
        seeds.to(DEVICE),
        torch.tensor(packed(lambda tree: [700 + depth for depth in tree[3]]), device=DEVICE),
        depths.to(DEVICE),
        torch.tensor(packed(lambda tree: tree[0]), device=DEVICE),
        torch.tensor(packed(lambda tree: tree[1]), dtype=torch.int32, device=DEVICE),
        torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32),
        torch.tensor(slots, device=DEVICE),
        parent_rows.to(DEVICE),
        emitted,
        num_emitted,
        path_rows,
    )
    return emitted.tolist(), num_emitted.tolist(), path_rows.tolist()


@pytest.mark.parametrize("num_accepted", [0, 1, 3, 5])
def test_certain_rates_walk_like_the_oracle(num_accepted):
    """Ragged requests, of which some are cut to few rows: the walk ends where the rows do."""
    lengths = [12, 1, 7, 3, 2, 12, 5]
    trees = random_trees(len(lengths), 12, max_depth=5, seed=num_accepted)
    conditional = [1.0] * num_accepted + [0.0] * (5 - num_accepted)
    emitted, num_emitted, path_rows = run_walk(trees, lengths, conditional)
    for request, length in enumerate(lengths):
        expected, path = oracle.walk_synthetically(num_accepted, *(part[:length] for part in trees[request]))
        padding = [-1] * (7 - len(expected))
        assert num_emitted[request] == len(expected)
        assert emitted[request] == expected + padding
        assert path_rows[request] == path + padding


def test_mean_acceptance():
    num_reqs, unconditional = 300, [0.9, 0.6, 0.3]
    trees = [tree for tree in random_trees(2 * num_reqs, 10, max_depth=3, seed=0) if max(tree[3]) == 3][:num_reqs]
    _, num_emitted, path_rows = run_walk(trees, [10] * num_reqs, [0.9, 0.6 / 0.9, 0.3 / 0.6])
    for depth, rate in enumerate(unconditional, start=1):
        # Within four standard deviations.
        found = sum(count > depth for count in num_emitted) / num_reqs
        assert found == pytest.approx(rate, abs=4 * (rate * (1 - rate) / num_reqs) ** 0.5)
    for (_, _, parents, _), count, path in zip(trees, num_emitted, path_rows, strict=True):
        assert all(parents[child] == row for row, child in pairwise(path[:count]))


def test_what_holds_no_token_is_not_accepted():
    tree = ([5, 6, 7], [0, 9, NO_TOKEN], [-1, 0, 1], [0, 1, 2])
    emitted, num_emitted, _ = run_walk([tree], [3], [1.0, 1.0])
    assert (emitted, num_emitted) == ([[9, 6, -1, -1]], [2])
    # A request that only pads the batch has no tree.
    emitted, num_emitted, _ = run_walk([tree, tree], [2, 0], [1.0, 1.0], slots=[-1, 1])
    assert (num_emitted, emitted[0]) == ([1, 0], [5, -1, -1, -1])


def test_refuses_a_walk_that_does_not_fit():
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="a walk of depth 3 does not fit 3 emitted tokens"):
        walk_synthetically(torch.zeros(3), *(one,) * 6, one, one[None], torch.zeros(1, 3), one, torch.zeros(1, 3))
