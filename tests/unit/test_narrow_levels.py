# SPDX-License-Identifier: Apache-2.0
"""Levels that hold only what a batch can verify (`TreeShape.for_best`): the list of nodes is that of whole levels."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.unit.test_properties import examples, on_device, shapes
from vllm_longspec.tree.best_children import best_children
from vllm_longspec.tree.merge import merge_path
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.state import TreeState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = 3
NUM_REQS = 2
COPY_LENGTH = 6


def logits_of(seed: int, request: int, path: tuple[int, ...]) -> list[float]:
    """What a draft says after a path: few values, so that many nodes are equally probable; sometimes nothing sound."""
    source = random.Random(hash((seed, request, path)))
    if source.random() < 0.05:
        return [source.choice([math.nan, -math.inf])] * VOCAB_SIZE
    return [source.choice([0.0, 0.0, 1.0, 4.0, -math.inf]) for _ in range(VOCAB_SIZE - 1)] + [0.0]


def draft(shape: TreeShape, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, log-probabilities and parents of beam search, level by level."""
    paths: list[list[tuple[int, ...]]] = [[()] for _ in range(NUM_REQS)]
    log_probs = torch.zeros(NUM_REQS, 1, device=DEVICE)
    columns = []
    first_of_level_above = -1
    for width in shape.levels:
        logits = [logits_of(seed, request, path) for request in range(NUM_REQS) for path in paths[request]]
        parents, tokens, log_probs = best_children(torch.tensor(logits, device=DEVICE), log_probs, width)
        columns.append((tokens, log_probs, (parents + first_of_level_above).int()))
        first_of_level_above += len(paths[0])
        paths = [
            [paths[request][parent] + (token,) for parent, token in zip(*children, strict=True)]
            for request, children in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))
        ]
    tokens, scores, parents = (torch.cat(column, dim=1) for column in zip(*columns, strict=True))
    return tokens, scores, parents


def listed(shape: TreeShape, num_nodes: int, example: SimpleNamespace) -> list[list]:
    """The list of `num_nodes` nodes and the tree that they form, with what is copied joined as the speculator does."""
    tokens, log_probs, parents = draft(shape, example.seed)
    max_depth = shape.max_depth
    if example.copied is not None:
        length = min(COPY_LENGTH, num_nodes)
        copied = on_device(example.copied, torch.int64)[:, :length]
        scores = on_device(example.scores, torch.float32)[:, :length]
        tokens, log_probs, parents = merge_path(tokens, log_probs, parents, copied, scores)
        max_depth = max(max_depth, length)
    state = TreeState.allocate(NUM_REQS, num_nodes, DEVICE)
    ordered = torch.empty(NUM_REQS, num_nodes, dtype=torch.int64, device=DEVICE)
    order_tree(
        tokens,
        log_probs,
        parents,
        torch.arange(NUM_REQS, device=DEVICE),
        ordered,
        state.parent_rows,
        state.depths,
        state.ancestor_masks,
        max_depth,
    )
    return [each.tolist() for each in (ordered, state.parent_rows, state.depths, state.ancestor_masks)]


@st.composite
def drawn(draw) -> SimpleNamespace:
    levels = draw(shapes())
    copied = scores = None
    if draw(st.booleans()):
        token = st.integers(0, VOCAB_SIZE)  # one that no draft has, too
        # No sum is a drafted node's log-probability: of such two, the one that is drafted would be listed first.
        step = st.sampled_from([-0.0127, -0.1, -1.0, -4.0])
        row = st.lists(token, min_size=COPY_LENGTH, max_size=COPY_LENGTH)
        steps = st.lists(step, min_size=COPY_LENGTH, max_size=COPY_LENGTH)
        copied = [draw(row) for _ in range(NUM_REQS)]
        scores = [torch.tensor(draw(steps)).cumsum(0).tolist() for _ in range(NUM_REQS)]
    return SimpleNamespace(
        levels=tuple(levels),
        num_nodes=draw(st.integers(1, sum(levels))),
        seed=draw(st.integers(0, 2**20)),
        copied=copied,
        scores=scores,
    )


@examples(40)
@given(drawn())
def test_the_list_is_that_of_whole_levels(example):
    """Equally probable nodes included, as both lists have them in the order of their levels."""
    whole = TreeShape(example.levels)
    narrow = whole.for_best(example.num_nodes)
    assert narrow.num_nodes >= example.num_nodes
    # No node is deeper than the list is long.
    reached = TreeShape(example.levels[: narrow.max_depth])
    assert listed(narrow, example.num_nodes, example) == listed(reached, example.num_nodes, example)


def test_the_property_can_fail(monkeypatch):
    """Levels that are narrower by one node are found."""

    def too_narrow(shape: TreeShape, num_nodes: int) -> TreeShape:
        levels = enumerate(shape.levels[: shape.num_levels(num_nodes)])
        return TreeShape(tuple(min(width, max(1, num_nodes - depth - 1)) for depth, width in levels))

    monkeypatch.setattr(TreeShape, "for_best", too_narrow)
    check = given(drawn())(test_the_list_is_that_of_whole_levels.hypothesis.inner_test)
    with pytest.raises(AssertionError):
        settings(examples(60), phases=[Phase.generate])(check)()
