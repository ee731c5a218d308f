# SPDX-License-Identifier: Apache-2.0
"""Properties of a whole verification step, over tree shapes, ragged batches and sampling settings.

The stages have tests of their own; here each gets what the one before it wrote, as in the engine. Hypothesis draws the
same examples in every run.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from tests.oracles import tree as oracle
from tests.oracles.attention import TOLERANCE, attend_slots, make_batch, pack_masks, relative_error
from tests.unit.test_sample import Step, emitted_by, random_request, without_a_gpu  # noqa: F401
from tests.unit.test_verify import attended_slots, run_both
from vllm_longspec.options import parse_tree_shape
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.compact import KVCacheTable, compact_kv_caches
from vllm_longspec.tree.layout import lay_out_trees
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.state import TreeState
from vllm_longspec.tree.walk import walk_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16
# Few tokens, so that the target often samples what was drafted.
VOCAB_SIZE = 3
MAX_NUM_REQS = 5


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@st.composite
def shapes(draw):
    """Any shape that the options take for this vocabulary: bushy, slim, a single path, wider than a mask word."""
    levels, width = [], 1
    for _ in range(draw(st.sampled_from([5, 4, 3, 2, 1]))):
        width = draw(st.integers(1, min(12, width * VOCAB_SIZE)))
        levels.append(width)
    return list(parse_tree_shape({"tree_shape": levels}, VOCAB_SIZE).levels)


@st.composite
def drafts(draw, levels):
    """A tree as beam search gives it: every (parent, token) pair once, log-probabilities that fall along a path."""
    tokens: list[int] = []
    parents: list[int] = []
    log_probs: list[float] = []
    above = [-1]
    for width in levels:
        pairs = [(parent, token) for parent in above for token in range(VOCAB_SIZE)]
        chosen = draw(st.lists(st.sampled_from(pairs), min_size=width, max_size=width, unique=True))
        above = list(range(len(tokens), len(tokens) + width))
        for parent, token in chosen:
            step = draw(st.sampled_from([0.0, -0.25, -1.0, -3.0, -math.inf, math.nan]))
            tokens.append(token)
            parents.append(parent)
            log_probs.append(step + (log_probs[parent] if parent >= 0 else 0.0))
    return tokens, parents, log_probs


@st.composite
def steps(draw):
    """A batch of trees, each cut to any length, and what the target samples at their rows."""
    levels = draw(shapes())
    num_nodes = draw(st.just(sum(levels)) | st.integers(1, sum(levels)))
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        tokens, parents, log_probs = draw(drafts(levels))
        num_rows = draw(st.just(1 + num_nodes) | st.integers(1, 1 + num_nodes))
        sampled = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=num_rows, max_size=num_rows))
        root_position = draw(st.sampled_from([0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, 37]))
        requests.append(
            SimpleNamespace(
                tokens=tokens,
                parents=parents,
                log_probs=log_probs,
                num_rows=num_rows,
                sampled=sampled,
                root_position=root_position,
            )
        )
    slots = draw(st.permutations(range(MAX_NUM_REQS)))[: len(requests)]
    return SimpleNamespace(levels=levels, num_nodes=num_nodes, requests=requests, slots=slots)


def on_device(values, dtype):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@examples(150)
@given(steps())
def test_a_step_leaves_what_decoding_one_by_one_leaves(step):
    """Order, lay out, walk and compact: tokens, positions, masks and cache are those of the accepted path."""
    requests, slots = step.requests, on_device(step.slots, torch.int64)
    max_depth = len(step.levels)
    state = TreeState.allocate(MAX_NUM_REQS, step.num_nodes, torch.device(DEVICE))
    batch = TreeBatch.allocate(state, max_depth)
    state.add_requests(slots, torch.zeros(len(requests), device=DEVICE))
    listed = torch.empty(len(requests), step.num_nodes, dtype=torch.int64, device=DEVICE)
    order_tree(
        on_device([each.tokens for each in requests], torch.int64),
        on_device([each.log_probs for each in requests], torch.float32),
        on_device([each.parents for each in requests], torch.int32),
        slots,
        listed,
        state.parent_rows,
        state.depths,
        state.ancestor_masks,
        max_depth,
    )

    query_lens = [each.num_rows for each in requests]
    starts = [sum(query_lens[:index]) for index in range(len(requests) + 1)]
    query_start_loc = on_device(starts, torch.int32)
    first_positions = [each.root_position for each in requests]
    seq_lens = [first + length for first, length in zip(first_positions, query_lens, strict=True)]
    positions = torch.full((starts[-1],), -1, dtype=torch.int64, device=DEVICE)
    input_ids = torch.zeros(starts[-1], dtype=torch.int32, device=DEVICE)
    lay_out_trees(
        state, batch, len(requests), slots, query_start_loc, on_device(seq_lens, torch.int32), input_ids, positions
    )

    # A list may be cut; the root's token is not looked at.
    row_tokens = [
        token for each, nodes in zip(requests, listed.tolist(), strict=True) for token in [0, *nodes][: each.num_rows]
    ]
    emitted = torch.empty(len(requests), max_depth + 1, dtype=torch.int64, device=DEVICE)
    num_emitted = torch.empty(len(requests), dtype=torch.int32, device=DEVICE)
    path_rows = batch.path_rows[: len(requests)]
    walk_tree(
        on_device([token for each in requests for token in each.sampled], torch.int64),
        on_device(row_tokens, torch.int64),
        query_start_loc,
        slots,
        state.parent_rows,
        emitted,
        num_emitted,
        path_rows,
        max_depth,
    )

    # One head whose key says which request and row it is of.
    num_blocks = -(-(40 + 1 + step.num_nodes) // BLOCK_SIZE)
    block_tables = torch.randperm(len(requests) * num_blocks, generator=torch.Generator().manual_seed(0))
    block_tables = block_tables.view(len(requests), num_blocks).to(DEVICE, torch.int32)
    cache = torch.full((len(requests) * num_blocks, 1, BLOCK_SIZE, 2), -1.0, device=DEVICE)

    def at(request, position):
        return cache[int(block_tables[request, position // BLOCK_SIZE]), 0, position % BLOCK_SIZE]

    for index, each in enumerate(requests):
        for row in range(each.num_rows):
            at(index, each.root_position + row)[:] = on_device([index, row], torch.float32)
    compact_kv_caches(
        KVCacheTable([cache]), block_tables, on_device(first_positions, torch.int32), path_rows, num_emitted, max_depth
    )

    for index, each in enumerate(requests):
        order = oracle.order_nodes(each.log_probs, each.parents)[: step.num_nodes]
        parent_rows, depths, ancestors = oracle.describe_tree(order, each.parents)
        row_tokens = [0, *(each.tokens[node] for node in order)][: each.num_rows]
        assert listed[index].tolist() == [each.tokens[node] for node in order]
        rows = slice(starts[index], starts[index + 1])
        assert positions[rows].tolist() == [each.root_position + depth for depth in depths[: each.num_rows]]
        masks = batch.ancestor_masks[index].tolist()
        assert [oracle.mask_to_rows(words) for words in masks] == ancestors
        # A list cut anywhere is a tree: what a row attends is in the batch.
        assert all(max(seen) <= row for row, seen in enumerate(ancestors))

        tokens, path = oracle.walk(each.sampled, row_tokens, parent_rows)
        assert int(num_emitted[index]) == len(tokens) <= max_depth + 1
        assert emitted[index, : len(tokens)].tolist() == tokens
        for offset, row in enumerate(path):
            assert at(index, each.root_position + offset).tolist() == [index, row]
            # The token there is the one emitted before it, at its own position and with its own ancestors.
            assert offset == 0 or row_tokens[row] == tokens[offset - 1]
            assert positions[starts[index] + row] == each.root_position + offset
            assert ancestors[row] == set(path[: offset + 1])


@st.composite
def sampling(draw):
    params = {"temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])), "seed": draw(st.integers(0, 2**31))}
    for name, values in (
        ("top_k", st.integers(1, 7)),
        ("top_p", st.floats(0.05, 1.0)),
        ("min_p", st.floats(0.0, 0.9)),
        ("logit_bias", st.dictionaries(st.integers(0, 5), st.floats(-5, 5), min_size=1, max_size=3)),
        ("allowed_token_ids", st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)),
    ):
        if draw(st.booleans()):
            params[name] = draw(values)
    return SamplingParams(**params)


@examples(25)
@given(st.lists(st.tuples(sampling(), st.integers(1, 8)), min_size=1, max_size=4), st.integers(0, 2**20))
def test_any_sampling_emits_what_decoding_one_by_one_emits(requests, seed):
    """Settings of every kind in one ragged batch: each request's tokens are the ones it would have alone."""
    source = torch.Generator().manual_seed(seed)
    step = Step([random_request(source, 6, num_rows, params) for params, num_rows in requests], max_depth=8)
    for index, (request, tokens) in enumerate(zip(step.requests, emitted_by(step.run()), strict=True)):
        drawn = [step.sample_one(index, row) for row in range(len(request.parents))]
        assert tokens == oracle.walk(drawn, request.tokens, request.parents)[0]


@st.composite
def batches(draw):
    """Prefixes and trees of any length, of two families of heads."""
    num_rows = draw(st.integers(1, 40))
    lengths = st.tuples(st.integers(0, 70), st.integers(1, num_rows))
    prefix_lens, query_lens = zip(*draw(st.lists(lengths, min_size=1, max_size=3)), strict=True)
    # For each row, itself and its ancestors.
    trees = [[[0]] for _ in prefix_lens]
    for tree in trees:
        for row in range(1, num_rows):
            tree.append([*tree[draw(st.integers(max(0, row - 6), row - 1))], row])
    return list(prefix_lens), list(query_lens), trees, num_rows, draw(st.sampled_from([(2, 2), (4, 1)]))


@examples(40)
@given(batches(), st.integers(0, 2**20))
def test_rows_attend_their_prefix_and_ancestors_and_nothing_else(drawn, seed):
    prefix_lens, query_lens, trees, num_rows, (num_heads, num_kv_heads) = drawn
    # Whatever must not be read is NaN.
    batch = make_batch(
        prefix_lens, query_lens, num_heads, num_kv_heads, 32, BLOCK_SIZE, torch.float32, "tokens_first", DEVICE, seed
    )
    output = run_both(batch, pack_masks(trees, num_rows, DEVICE))
    expected, _ = attend_slots(batch, attended_slots(batch, trees, with_prefix=True))
    assert relative_error(output, expected) < TOLERANCE[torch.float32]


@examples(200)
@given(st.lists(st.integers(-2, 300), max_size=6), st.integers(1, 50))
def test_a_shape_is_refused_or_can_be_drafted(levels, vocab_size):
    try:
        shape = parse_tree_shape({"tree_shape": levels}, vocab_size)
    except ValueError as error:
        assert "\n" not in str(error)
        possible = bool(levels) and min(levels) > 0 and sum(levels) <= 255
        assert not possible or any(
            width > vocab_size * above for above, width in zip([1, *levels], levels, strict=False)
        )
        return
    assert list(shape.levels) == levels
    assert shape.num_nodes == sum(levels) <= 255
    # Beam search finds so many continuations.
    width = 1
    for depth in range(1, shape.max_depth + 1):
        assert shape.width(depth) <= width * vocab_size
        width = shape.width(depth)


def test_the_step_property_can_fail(monkeypatch):
    """A walk that stops too early is found."""
    monkeypatch.setattr(oracle, "walk", lambda sampled, row_tokens, parent_rows: (sampled[:1], [0]))
    check = given(steps())(test_a_step_leaves_what_decoding_one_by_one_leaves.hypothesis.inner_test)
    with pytest.raises(AssertionError):
        settings(examples(60), phases=[Phase.generate])(check)()
