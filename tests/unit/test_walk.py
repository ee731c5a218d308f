# SPDX-License-Identifier: Apache-2.0
"""Stage "walk": accepted paths against a walk over a dictionary of children."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import tree as oracle
from vllm_longspec.tree.walk import walk_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_walk(requests, num_rows, max_depth, token_dtype=torch.int64, slots=None, width=None):
    """`requests` holds (sampled, row tokens, parent rows); returns emitted, num_emitted and path_rows as tensors."""
    num_reqs = len(requests)
    slots = list(range(num_reqs, 0, -1)) if slots is None else slots
    width = num_rows if width is None else width
    parent_rows = torch.full((num_reqs + 1, num_rows), 0, dtype=torch.int32)
    for slot, (_, _, parents) in zip(slots, requests, strict=True):
        if slot >= 0:
            parent_rows[slot, : len(parents)] = torch.tensor(parents)
    lengths = torch.tensor([0] + [len(tokens) for _, tokens, _ in requests])
    emitted = torch.full((num_reqs, width), -77, dtype=torch.int64, device=DEVICE)
    num_emitted = torch.full((num_reqs,), -77, dtype=torch.int32, device=DEVICE)
    path_rows = torch.full((num_reqs, width), -77, dtype=torch.int32, device=DEVICE)
    walk_tree(
        torch.tensor([token for sampled, _, _ in requests for token in sampled], device=DEVICE),
        torch.tensor([token for _, tokens, _ in requests for token in tokens], dtype=token_dtype, device=DEVICE),
        lengths.cumsum(0).to(DEVICE, torch.int32),
        torch.tensor(slots, device=DEVICE),
        parent_rows.to(DEVICE),
        emitted,
        num_emitted,
        path_rows,
        max_depth=max_depth,
    )
    return emitted.tolist(), num_emitted.tolist(), path_rows.tolist()


def check(requests, num_rows, max_depth, **kwargs):
    emitted, num_emitted, path_rows = run_walk(requests, num_rows, max_depth, **kwargs)
    for request, (sampled, tokens, parents) in enumerate(requests):
        expected, path = oracle.walk(sampled, tokens, parents)
        padding = [-1] * (len(emitted[request]) - len(expected))
        assert num_emitted[request] == len(expected)
        assert emitted[request] == expected + padding
        assert path_rows[request] == path + padding


@st.composite
def batches(draw):
    """Ragged requests over a tiny vocabulary, so that walks are long and siblings may even share a token."""
    num_rows = draw(st.integers(1, 12))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, num_rows))
        tokens = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        sampled = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        # The tree in the state is whole even where the batch holds only its first rows.
        parents = [-1] + [draw(st.integers(0, row - 1)) for row in range(1, num_rows)]
        requests.append((sampled, tokens, parents))
    return requests, num_rows


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([torch.int32, torch.int64]))
def test_walks_like_a_dictionary_of_children(batch, token_dtype):
    requests, num_rows = batch
    check(requests, num_rows, max_depth=num_rows - 1, token_dtype=token_dtype)


@pytest.mark.parametrize("num_rows", [69, 256])
def test_wide_trees(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    requests = []
    max_depth = 0
    for length in (num_rows, 1, num_rows - 5, 2):
        tokens, sampled = torch.randint(0, 12, (2, length), generator=generator).tolist()
        parents = [-1] + [int(torch.randint(row, (1,), generator=generator)) for row in range(1, num_rows)]
        requests.append((sampled, tokens, parents))
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        max_depth = max(max_depth, *depths)
    # The outputs need no more room than the deepest path.
    check(requests, num_rows, max_depth, width=max_depth + 1)


def test_tokens_beyond_32_bits_of_float_precision():
    # Neighbouring ids of a large vocabulary must not be taken for each other.
    check([([16777217, 5], [0, 16777216], [-1, 0]), ([16777217, 5], [0, 16777217], [-1, 0])], 2, max_depth=1)


def test_of_two_children_with_one_token_the_lower_row_is_taken():
    emitted, num_emitted, path_rows = run_walk([([9, 1, 2], [0, 9, 9], [-1, 0, 0])], 3, max_depth=1)
    assert (emitted, num_emitted, path_rows) == ([[9, 1, -1]], [2], [[0, 1, -1]])


def test_rows_that_are_not_in_the_batch_are_not_walked():
    # Row 2 is cut off; its token would have been the next request's root token.
    requests = [([7, 8], [0, 7], [-1, 0, 1]), ([3], [8], [-1, 0, 1])]
    emitted, num_emitted, _ = run_walk(requests, 3, max_depth=2)
    assert emitted == [[7, 8, -1], [3, -1, -1]]
    assert num_emitted == [2, 1]


def test_requests_without_tree_or_rows():
    # Slot -1 has no tree; a request without rows emits nothing.
    requests = [([4, 6], [0, 4], [-1, 0]), ([], [], [-1, 0])]
    emitted, num_emitted, path_rows = run_walk(requests, 2, max_depth=1, slots=[-1, 1])
    assert emitted == [[4, -1], [-1, -1]]
    assert num_emitted == [1, 0]
    assert path_rows == [[0, -1], [-1, -1]]


def test_takes_max_depth_steps_at_most():
    chain = ([1, 2, 3, 4], [0, 1, 2, 3], [-1, 0, 1, 2])
    emitted, num_emitted, _ = run_walk([chain], 4, max_depth=2)
    assert (emitted, num_emitted) == ([[1, 2, 3, -1]], [3])


def test_refuses_a_walk_that_does_not_fit():
    with pytest.raises(ValueError, match="a walk of depth 3 does not fit 3 emitted tokens"):
        run_walk([([1], [0], [-1])], 3, max_depth=3)
