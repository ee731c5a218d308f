# SPDX-License-Identifier: Apache-2.0
"""Laying trees out: the true position of every row, and the ancestor masks that the batch sees."""

import random

import pytest
import torch

from tests.oracles.attention import ancestors, pack_masks, random_tree
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.layout import lay_out_trees
from vllm_longspec.tree.state import TreeState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_NUM_REQS = 9
UNWRITTEN = -77


class LaidOut:
    """A tree in every slot, and a batch of requests of which the first ones carry theirs."""

    def __init__(self, num_nodes: int, query_lens: list[int], num_tree_reqs: int, num_padding: int = 0, seed: int = 0):
        source = random.Random(seed)
        num_rows = 1 + num_nodes
        # [max_num_reqs][num_rows] for each row, itself and its ancestors
        self.paths = [ancestors(random_tree(num_rows, source)) for _ in range(MAX_NUM_REQS)]
        self.state = TreeState.allocate(MAX_NUM_REQS, num_nodes, torch.device(DEVICE))
        self.batch = TreeBatch.allocate(self.state, num_nodes)
        self.state.depths.copy_(torch.tensor([[len(path) - 1 for path in paths] for paths in self.paths]))
        self.state.ancestor_masks.copy_(pack_masks(self.paths, num_rows, DEVICE))
        self.batch.ancestor_masks.fill_(UNWRITTEN)
        self.batch.idx_mapping.fill_(UNWRITTEN)
        self.before = [tensor.clone() for tensor in vars(self.state).values()]

        self.slots = source.sample(range(MAX_NUM_REQS), len(query_lens))
        self.num_computed = [source.choice([0, 1, 31, 32, 1000, 250_000]) for _ in query_lens]
        self.query_starts = [sum(query_lens[:request]) for request in range(len(query_lens) + 1)]
        # As vLLM lays the tokens out, and what a longer batch left in the rest of the buffer.
        self.linear = [
            first + index
            for first, length in zip(self.num_computed, query_lens, strict=True)
            for index in range(length)
        ] + [UNWRITTEN] * 5
        positions = torch.tensor(self.linear, dtype=torch.int64, device=DEVICE)
        # Every third row holds no token.
        self.tokens = [token if index % 3 else -1 for index, token in enumerate(self.linear)]
        input_ids = torch.tensor(self.tokens, dtype=torch.int32, device=DEVICE)
        seq_lens = [first + length for first, length in zip(self.num_computed, query_lens, strict=True)]
        # As vLLM pads a CUDA graph's batch.
        query_starts = self.query_starts + self.query_starts[-1:] * num_padding
        lay_out_trees(
            self.state,
            self.batch,
            num_tree_reqs,
            torch.tensor(self.slots, device=DEVICE),
            torch.tensor(query_starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(seq_lens + [0] * num_padding, dtype=torch.int32, device=DEVICE),
            input_ids,
            positions,
        )
        self.positions = positions.tolist()
        self.input_ids = input_ids.tolist()


@pytest.mark.parametrize(
    ("num_nodes", "query_lens", "num_tree_reqs"),
    [
        # A whole tree; one cut to its root and a node; a prompt; a decode without a tree.
        (4, [5, 2, 7, 1], 2),
        # Exactly one mask word, and one row more.
        (31, [32, 1, 17, 40], 3),
        (32, [33, 32, 2], 3),
        # Three mask words, cut in each of them.
        (68, [69, 30, 50, 65, 32, 64, 3], 6),
        (255, [256, 100, 1], 2),
        (1, [2], 1),
    ],
)
def test_positions_and_masks(num_nodes, query_lens, num_tree_reqs):
    laid_out = LaidOut(num_nodes, query_lens, num_tree_reqs)
    expected = list(laid_out.linear)
    for request in range(num_tree_reqs):
        slot, start = laid_out.slots[request], laid_out.query_starts[request]
        for row in range(query_lens[request]):
            depth = len(laid_out.paths[slot][row]) - 1
            expected[start + row] = laid_out.num_computed[request] + depth
    # Some row is deeper in the list than in the tree, so the linear positions would not do.
    assert expected != laid_out.linear or num_nodes == 1
    assert laid_out.positions == expected

    masks = laid_out.batch.ancestor_masks
    for request in range(num_tree_reqs):
        assert torch.equal(masks[request], laid_out.state.ancestor_masks[laid_out.slots[request]])
    assert bool((masks[num_tree_reqs:] == UNWRITTEN).all())


@pytest.mark.parametrize(("num_tree_reqs", "num_padding"), [(3, 0), (3, 2), (2, 0)])
def test_every_request_of_the_batch_has_a_prefix_and_padding_has_none(num_tree_reqs, num_padding):
    laid_out = LaidOut(4, [5, 2, 5], num_tree_reqs, num_padding)
    prefix_lens = laid_out.batch.prefix_lens.tolist()
    assert prefix_lens[: 3 + num_padding] == laid_out.num_computed + [0] * num_padding
    indices = laid_out.batch.idx_mapping.tolist()
    assert indices[: 3 + num_padding] == laid_out.slots[:num_tree_reqs] + [-1] * (3 + num_padding - num_tree_reqs)
    assert indices[3 + num_padding :] == [UNWRITTEN] * (MAX_NUM_REQS - 3 - num_padding)


def test_rows_of_trees_without_a_token_get_one():
    laid_out = LaidOut(4, [5, 5, 7], 2)
    assert -1 in laid_out.tokens[:10]
    assert laid_out.input_ids == [max(token, 0) for token in laid_out.tokens[:10]] + laid_out.tokens[10:]


def test_changes_nothing_but_the_batch():
    laid_out = LaidOut(68, [69, 40, 5], 2)
    for name, before in zip(vars(laid_out.state), laid_out.before, strict=True):
        assert torch.equal(getattr(laid_out.state, name), before), name


def test_a_request_that_nothing_was_drafted_for_knows_its_root_alone():
    state = TreeState.allocate(3, 40, torch.device(DEVICE))
    batch = TreeBatch.allocate(state, 4)
    assert state.num_rows == 41
    assert state.ancestor_masks.shape == batch.ancestor_masks.shape == (3, 41, 2)
    assert batch.path_rows.shape == (3, 5)
    assert bool((state.parent_rows == -1).all())
    assert bool((state.depths == 0).all())
    assert bool((state.ancestor_masks[:, :, 0] == 1).all())
    assert bool((state.ancestor_masks[:, :, 1:] == 0).all())


def test_a_new_request_has_no_tree_yet():
    state = TreeState.allocate(5, 6, torch.device(DEVICE))
    state.parent_rows.fill_(2)
    slots = torch.tensor([4, 1], device=DEVICE)
    state.log_cutoffs.fill_(-1.0)
    state.add_requests(slots, torch.tensor([-2.0, float("-inf")], device=DEVICE))
    assert state.log_cutoffs.tolist() == [-1.0, float("-inf"), -1.0, -1.0, -2.0]
    assert [set(rows) for rows in state.parent_rows.tolist()] == [{2}, {-1}, {2}, {2}, {-1}]
