# SPDX-License-Identifier: Apache-2.0
"""Stage "order": the list of nodes, its prefixes, and the tree state written for them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import tree as oracle
from vllm_longspec.tree.order import order_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNWRITTEN = -77


class Ordered:
    """What `order_tree` wrote for a batch, as Python lists."""

    def __init__(self, parents, log_probs, num_nodes, slots, max_depth):
        num_reqs, num_drafted = len(parents), len(parents[0])
        num_rows = num_nodes + 1
        num_slots = 2 * num_reqs + 3
        num_words = -(-num_rows // 32)
        draft_tokens = torch.arange(num_reqs * num_drafted, device=DEVICE).view(num_reqs, num_drafted) + 1000
        tokens = torch.full((num_reqs, num_nodes), UNWRITTEN, dtype=torch.int64, device=DEVICE)
        parent_rows = torch.full((num_slots, num_rows), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        depths = parent_rows.clone()
        masks = torch.full((num_slots, num_rows, num_words), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        order_tree(
            draft_tokens,
            torch.tensor(log_probs, dtype=torch.float32, device=DEVICE),
            torch.tensor(parents, dtype=torch.int32, device=DEVICE),
            torch.tensor(slots, dtype=torch.int64, device=DEVICE),
            tokens,
            parent_rows,
            depths,
            masks,
            max_depth=max_depth,
        )
        self.draft_tokens = draft_tokens.tolist()
        self.tokens = tokens.tolist()
        self.parent_rows = parent_rows.tolist()
        self.depths = depths.tolist()
        self.masks = masks.tolist()

    def check(self, request, slot, parents, log_probs):
        """Compares a request with the reference, everything there is."""
        order = oracle.order_nodes(log_probs, parents)[: len(self.tokens[request])]
        parent_rows, depths, ancestors = oracle.describe_tree(order, parents)
        assert self.tokens[request] == [self.draft_tokens[request][node] for node in order]
        assert self.parent_rows[slot] == parent_rows
        assert self.depths[slot] == depths
        assert [oracle.mask_to_rows(words) for words in self.masks[slot]] == ancestors


def draft(shape, seed):
    """A tree of the given nodes per level, as beam search gives it: parents, log-probabilities that fall with depth."""
    generator = torch.Generator().manual_seed(seed)
    parents: list[int] = []
    log_probs: list[float] = []
    level = [-1]
    for width in shape:
        first = len(parents)
        for _ in range(width):
            parent = level[int(torch.randint(len(level), (1,), generator=generator))]
            step = float(torch.rand((), generator=generator).log())
            parents.append(parent)
            log_probs.append(step + (log_probs[parent] if parent >= 0 else 0.0))
        level = list(range(first, len(parents)))
    log_probs = torch.tensor(log_probs, dtype=torch.float32).tolist()
    return parents, log_probs


@st.composite
def small_trees(draw):
    """Any tree of up to 12 nodes, with few distinct log-probabilities so that ties are common."""
    num_drafted = draw(st.integers(1, 12))
    parents: list[int] = []
    log_probs: list[float] = []
    for node in range(num_drafted):
        parent = draw(st.integers(-1, node - 1))
        parents.append(parent)
        log_probs.append((log_probs[parent] if parent >= 0 else 0.0) - draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])))
    return parents, log_probs


SHAPES = [
    ([1], 1),
    ([2, 4, 4], 7),
    ([4, 16, 16, 16, 16], 3),
    ([4, 16, 16, 16, 16], 31),
    ([4, 16, 16, 16, 16], 32),
    ([4, 16, 16, 16, 16], 68),
    ([1] * 9, 9),
    ([15, 80, 80, 80], 255),
]


@pytest.mark.parametrize(("shape", "num_nodes"), SHAPES)
def test_lists_and_describes_the_tree(shape, num_nodes):
    drafts = [draft(shape, seed) for seed in range(3)]
    slots = [4, 0, 7]
    parents = [parents for parents, _ in drafts]
    log_probs = [log_probs for _, log_probs in drafts]
    ordered = Ordered(parents, log_probs, num_nodes, slots, len(shape))
    for request, slot in enumerate(slots):
        ordered.check(request, slot, parents[request], log_probs[request])


def test_writes_the_slots_of_the_batch_only():
    parents, log_probs = draft([2, 4, 4], 0)
    ordered = Ordered([parents, parents], [log_probs, log_probs], 6, [5, -1], 3)
    ordered.check(0, 5, parents, log_probs)
    assert ordered.tokens[1] == [UNWRITTEN] * 6
    for slot in (0, 1, 2, 3, 4, 6):
        assert set(ordered.parent_rows[slot]) == set(ordered.depths[slot]) == {UNWRITTEN}
        assert all(word == UNWRITTEN for words in ordered.masks[slot] for word in words)


@settings(max_examples=40, deadline=None)
@given(small_trees())
def test_every_prefix_is_the_best_tree_of_its_size(tree):
    parents, log_probs = tree
    num_drafted = len(parents)
    ordered = Ordered([parents], [log_probs], num_drafted, [1], num_drafted)
    ordered.check(0, 1, parents, log_probs)

    listed = [ordered.draft_tokens[0].index(token) for token in ordered.tokens[0]]
    assert sorted(listed) == list(range(num_drafted))
    probs = [math.exp(log_prob) for log_prob in log_probs]
    for size in range(1, num_drafted + 1):
        prefix = set(listed[:size])
        assert all(parents[node] < 0 or parents[node] in prefix for node in prefix)
        best = max(sum(probs[node] for node in nodes) for nodes in itertools.combinations(range(num_drafted), size))
        assert sum(probs[node] for node in prefix) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(small_trees(), st.data())
def test_parents_come_first_whatever_the_log_probs(tree, data):
    parents, _ = tree
    num_drafted = len(parents)
    values = st.sampled_from([math.nan, -math.inf, -2.0, -1.0, -0.0, 0.0, 0.5, math.inf])
    log_probs = data.draw(st.lists(values, min_size=num_drafted, max_size=num_drafted))
    num_nodes = data.draw(st.integers(1, num_drafted))
    ordered = Ordered([parents], [log_probs], num_nodes, [0], num_drafted)
    ordered.check(0, 0, parents, log_probs)
    for row, parent_row in enumerate(ordered.parent_rows[0]):
        assert parent_row < row


def test_a_certain_child_follows_its_parent():
    ordered = Ordered([[-1, -1, 1, 0]], [[-1.0, -0.5, -0.5, -1.0]], 4, [0], 2)
    assert ordered.tokens[0] == [1001, 1002, 1000, 1003]


def test_refuses_state_of_another_size():
    parents, log_probs = draft([2, 4], 0)
    with pytest.raises(ValueError, match="cannot list 7 nodes of 6 drafted"):
        Ordered([parents], [log_probs], 7, [0], 2)
    tokens = torch.zeros(1, 6, dtype=torch.int64, device=DEVICE)
    state = torch.zeros(1, 6, dtype=torch.int32, device=DEVICE)
    slots, masks = tokens[:, 0], state[:, :, None]
    with pytest.raises(ValueError, match="6 nodes do not fit ancestor masks of 6 rows and 1 words"):
        order_tree(tokens, state.float(), state, slots, tokens, state, state, masks, max_depth=2)
