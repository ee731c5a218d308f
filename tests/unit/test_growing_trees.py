# SPDX-License-Identifier: Apache-2.0
"""What a level of drawn nodes leaves behind, against trees that are described node by node."""

import pytest
import torch

from tests.oracles.tree import describe_tree, mask_to_rows
from vllm_longspec.proposers.glide.growing_trees import GrowingTrees
from vllm_longspec.tree.best_children import request_arguments
from vllm_longspec.tree.block import block_of
from vllm_longspec.tree.shape import TreeShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_POSITION = 105
VOCAB_SIZE = 50


@pytest.mark.parametrize("has_token_ids", [False, True])
@pytest.mark.parametrize("num_reqs", [1, 3])
@pytest.mark.parametrize("levels", [(1,), (1, 1, 1, 1), (2, 4, 4), (4, 16, 16, 16, 16), (3, 31, 40, 5)])
def test_levels(levels: tuple[int, ...], num_reqs: int, has_token_ids: bool) -> None:
    generator = torch.Generator().manual_seed(len(levels) + num_reqs)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator).to(DEVICE)

    root_positions = torch.tensor([0, 102, 106])[:num_reqs].to(DEVICE)
    token_ids = integers(1000, VOCAB_SIZE) if has_token_ids else None
    trees = GrowingTrees(
        TreeShape(levels), root_positions, torch.empty(num_reqs, 8, 2, 1, 16, device=DEVICE), MAX_POSITION
    )
    # As memory may come.
    trees.masks.fill_(-1)
    assert trees.plant().tolist() == [[0.0]] * num_reqs
    tokens: list[list[int]] = [[] for _ in range(num_reqs)]
    log_probs: list[list[float]] = [[] for _ in range(num_reqs)]
    parents: list[list[int]] = [[] for _ in range(num_reqs)]
    first_row = 0
    for depth, width in enumerate(levels, start=1):
        width_above = trees.shape.width(depth - 1)
        # The best tokens of each parent, and sums of which the best are kept; all different.
        num_kept = min(width, VOCAB_SIZE)
        offered = integers(VOCAB_SIZE, num_reqs * width_above, num_kept)
        scores = -torch.rand(num_reqs * width_above, num_kept, generator=generator).to(DEVICE)
        scores = scores.sort(descending=True).values
        level_tokens, positions, level_log_probs = trees.add_level(depth, offered, scores, token_ids)
        drawn_log_probs, order = scores.view(num_reqs, -1).sort(descending=True)
        drawn_log_probs, order = drawn_log_probs[:, :width], order[:, :width]
        drawn_parents, choices = order // num_kept, offered.view(num_reqs, -1).gather(1, order)
        assert torch.equal(level_log_probs, drawn_log_probs)
        expected_tokens = choices if token_ids is None else token_ids[choices]
        assert level_tokens.tolist() == expected_tokens.flatten().tolist()
        expected = (root_positions + depth).clamp(max=MAX_POSITION)
        assert positions.tolist() == expected.repeat_interleave(width).tolist()
        for request in range(num_reqs):
            tokens[request] += expected_tokens[request].tolist()
            log_probs[request] += drawn_log_probs[request].tolist()
            parents[request] += (first_row + drawn_parents[request] - 1).tolist()
        first_row += width_above
        assert trees.first_row(depth) == first_row

    assert trees.tokens.tolist() == tokens
    assert trees.log_probs.tolist() == log_probs
    assert trees.parents.tolist() == parents
    num_rows = trees.masks.shape[1]
    assert num_rows == trees.node_kv.shape[1] == 1 + sum(levels[:-1])
    for request in range(num_reqs):
        _, _, ancestors = describe_tree(list(range(len(parents[request]))), parents[request])
        assert [mask_to_rows(words) for words in trees.masks[request].tolist()] == ancestors[:num_rows]


def test_trees_for_fewer_nodes_need_few_kernels_of_their_own() -> None:
    shape = TreeShape((4, 16, 16, 16, 16))
    numbers_of_nodes = (31, 24, 15, 7, 5, 3, 1)
    shapes = [shape.for_best(num_nodes) for num_nodes in numbers_of_nodes]
    levels = [
        tuple(
            request_arguments(narrower.width(depth - 1), width, width)[name]
            for name in ("CANDIDATES", "CHILDREN_BLOCK", "num_warps")
        )
        for narrower in shapes
        for depth, width in enumerate(narrower.levels, start=1)
    ]
    assert set(levels) == {(32, 32, 1), (64, 32, 1), (256, 32, 1)}
    assert {block_of(narrower.num_nodes) for narrower in shapes} == {32, 64, 128}
