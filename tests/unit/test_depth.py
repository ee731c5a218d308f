# SPDX-License-Identifier: Apache-2.0
"""The measurement by levels and nodes: one deep tree at each root says what smaller trees accept."""

import torch

from benchmarks import PAIR
from benchmarks.training import depth
from benchmarks.training.acceptance import generate, load_pair, load_prompts, make_passage
from vllm_longspec.training.walk import accepted_nodes

PROMPT_LENGTH = 64
ALL_NODES = 255


@torch.inference_mode()
def test_smaller_trees_accept_what_is_read_off_a_deep_one():
    target, glide = load_pair(PAIR, "cpu")
    prompts = load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", 3, "cpu")
    ids = min(prompts.items())[1][:, :PROMPT_LENGTH]
    ids = generate(target, ids, 9 + len(depth.SHAPE), 0.0, torch.Generator())
    passage = make_passage(target, glide, ids, PROMPT_LENGTH, end_of_text=-1)
    counts = set()
    for root in (PROMPT_LENGTH, PROMPT_LENGTH + 7):
        roots = torch.full_like(passage.ends, root)
        ranks = depth.path_ranks(target, glide, passage, roots)
        for levels in (2, 6):
            found = depth.accepted(ranks, levels, ALL_NODES)
            expected = accepted_nodes(target, glide, passage, roots, list(depth.SHAPE[:levels]))
            assert found.tolist() == expected.tolist()
            # With as many nodes as are on the path, or fewer, it cannot be the whole path unless it is listed first.
            fewer = [depth.accepted(ranks, levels, number) for number in range(levels + 1)]
            assert all((few <= number).all() and (few <= found).all() for number, few in enumerate(fewer))
            counts.update(found.tolist())
    assert len(counts) > 2


def test_a_walk_emits_what_its_roots_do():
    assert depth.walk([2, 1, 4, 1, 1, 1, 3]) == [(0, 2), (2, 4), (6, 3)]
