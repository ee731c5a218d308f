# SPDX-License-Identifier: Apache-2.0
"""A path joins a drafted tree: equal nodes are one, and the ordered list's prefixes are still the best trees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import copying as oracle
from tests.oracles.copying import Node
from vllm_longspec.tree.merge import merge_path
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.state import NO_TOKEN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Draft = tuple[list[int], list[float], list[int], list[int], list[float]]


def on_device(values: list, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def merge(drafts: list[Draft]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    types = (torch.int64, torch.float32, torch.int32, torch.int64, torch.float32)
    columns = zip(*drafts, strict=True)
    return merge_path(*(on_device(list(column), dtype) for column, dtype in zip(columns, types, strict=True)))


def order(merged: tuple[torch.Tensor, torch.Tensor, torch.Tensor], num_nodes: int) -> list:
    """For each request the (token, parent row) of its listed nodes."""
    tokens, log_probs, parents = merged
    num_reqs = tokens.shape[0]
    state = torch.zeros(num_reqs, num_nodes + 1, dtype=torch.int32, device=DEVICE)
    listed, parent_rows = torch.zeros(num_reqs, num_nodes, dtype=torch.int64, device=DEVICE), state.clone()
    masks = state[:, :, None].repeat(1, 1, -(-(num_nodes + 1) // 32))
    slots = torch.arange(num_reqs, device=DEVICE)
    order_tree(tokens, log_probs, parents, slots, listed, parent_rows, state, masks, tokens.shape[1])
    return [
        list(zip(row_tokens, rows[1:], strict=True))
        for row_tokens, rows in zip(listed.tolist(), parent_rows.tolist(), strict=True)
    ]


def names_of(listed: list[tuple[int, int]]) -> list[Node]:
    """The listed nodes by the tokens on their paths; a row whose parent is not before it is no tree."""
    names: list[Node] = [()]
    for token, parent_row in listed:
        names.append((*names[parent_row], token))
    return names[1:]


@st.composite
def drafts(draw: st.DrawFn, num_drafted: int, path_length: int) -> Draft:
    """A tree with different tokens for the children of a node, and a path that often goes along one of its own."""
    names: list[Node] = []
    log_probs: list[float] = []
    parents: list[int] = []
    for node in range(num_drafted):
        parent = draw(st.integers(-1, node - 1))
        above = names[parent] if parent >= 0 else ()
        taken = {name[-1] for name in names if name[:-1] == above}
        names.append((*above, min(set(range(num_drafted + 1)) - taken)))
        parents.append(parent)
        step = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, math.inf]))
        log_probs.append((log_probs[parent] if parent >= 0 else 0.0) - step)
    followed = names[draw(st.integers(0, num_drafted - 1))][: draw(st.integers(0, num_drafted))]
    own = draw(st.lists(st.integers(0, 3), min_size=path_length, max_size=path_length))
    path = [*followed, *own][:path_length]
    # The path may end before its last place, or be none.
    end = draw(st.sampled_from([path_length, path_length, 0, path_length // 2]))
    path[end:] = [NO_TOKEN] * (path_length - end)
    scores, total = [], 0.0
    for _ in range(path_length):
        total -= draw(st.sampled_from([0.125, 0.375, 0.75, 2.0]))
        scores.append(total)
    return [name[-1] for name in names], log_probs, parents, path, scores


@st.composite
def batches(draw: st.DrawFn) -> list[Draft]:
    num_drafted, path_length = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return draw(st.lists(drafts(num_drafted, path_length), min_size=1, max_size=3))


@settings(max_examples=40, deadline=None)
@given(batches(), st.data())
def test_the_best_nodes_of_both_form_a_tree(batch, data):
    num_nodes = data.draw(st.integers(1, len(batch[0][0])))
    for draft, listed in zip(batch, order(merge(batch), num_nodes), strict=True):
        tokens, log_probs, parents, path, scores = draft
        length = path.index(NO_TOKEN) if NO_TOKEN in path else len(path)
        expected = oracle.merge(tokens, log_probs, parents, path[:length], scores)
        names = names_of(listed)
        # Every prefix is a tree, and no node is there twice.
        assert all(parent_row <= index for index, (_, parent_row) in enumerate(listed))
        assert len(set(names)) == num_nodes
        best = sorted(expected.values(), reverse=True)[:num_nodes]
        assert [expected[name] for name in names] == pytest.approx(best)


@pytest.mark.parametrize(("num_drafted", "path_length"), [(1, 1), (5, 16), (68, 16)])
def test_paths_that_leave_the_tree_at_every_depth(num_drafted, path_length):
    """A drafted path of token 1 with siblings of token 2; the copied one follows it for so many tokens."""
    depth = (num_drafted + 1) // 2
    tokens = [1 + node % 2 for node in range(num_drafted)]
    parents = [2 * (node // 2) - 2 if node > 1 else -1 for node in range(num_drafted)]
    log_probs = [-1.0 - node // 2 for node in range(num_drafted)]
    scores = [-0.5 - 0.01 * step for step in range(path_length)]
    lengths = sorted({0, 1, min(depth, path_length) - 1, min(depth, path_length)})
    batch: list[Draft] = [
        (tokens, log_probs, parents, [1] * shared + [3] * (path_length - shared), scores) for shared in lengths
    ]
    merged = merge(batch)
    for draft, shared, listed in zip(batch, lengths, order(merged, num_drafted), strict=True):
        names = names_of(listed)
        # The path is better than all else, also where it goes deeper than the tree.
        path = tuple(draft[3])
        for length in range(1, min(path_length, num_drafted) + 1):
            assert names[length - 1] == path[:length]
        assert shared == sum(token == 1 for token in path)


def test_a_score_that_is_no_number_loses():
    tokens, log_probs, _ = merge([([4, 5], [math.nan, -1.0], [-1, -1], [4, 6], [-0.5, -0.75])])
    assert log_probs[0].tolist() == [-0.5, -1.0, -math.inf, -0.75]
    assert tokens[0].tolist() == [4, 5, 0, 6]


def test_without_a_path_the_tree_is_as_drafted():
    draft: Draft = ([4, 5, 6], [-1.0, -math.inf, -math.inf], [-1, 0, 0], [NO_TOKEN] * 3, [-math.inf] * 3)
    assert order(merge([draft]), 3) == [[(4, 0), (5, 1), (6, 1)]]
