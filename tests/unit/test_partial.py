# SPDX-License-Identifier: Apache-2.0
"""The measurement of GLIDE drafts together with a part of the target's cache."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks import PAIR
from benchmarks.training import partial
from benchmarks.training.acceptance import load_pair, load_prompts
from benchmarks.training.sparse import Passages, make_passages
from benchmarks.training.target import Target
from vllm_longspec.attention.partial import PartialTables
from vllm_longspec.options import PartialAttention
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.walk import kept_part

CONTEXT, TOKENS = 200, 40


@pytest.fixture(scope="module")
def pair() -> tuple[Target, GlideLayer]:
    return load_pair(PAIR, "cpu")


@torch.inference_mode()
def passages_of(target: Target, temperature: float) -> Passages:
    prompts = load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", 2, "cpu")
    passages = make_passages(target, prompts[max(prompts)][:, -CONTEXT:], TOKENS, temperature)
    # Whether the text goes on or is in a loop does not matter here.
    return replace(passages, ends=[CONTEXT + TOKENS - 1] * 2)


def test_a_part_is_whole_blocks() -> None:
    kept = partial.kept_of(40, 250)
    assert kept is not None
    deeper = partial.kept_of(40, 250, first_depth=1)
    assert deeper is not None
    for root in (0, 1, 31, 71, 72, 73, 88, 89, 200, 249):
        part = kept(torch.tensor([root]), 0)
        assert torch.equal(part, kept(torch.tensor([root]), 3)) and torch.equal(part, deeper(torch.tensor([root]), 1))
        assert deeper(torch.tensor([root]), 0).all()
        seen = part[0, :root].nonzero().flatten().tolist()
        blocks = {place // 16 for place in range(root) if place < 32 or place >= root - 40}
        assert seen == [place for place in range(root) if place // 16 in blocks]
    assert partial.kept_of(None, 250) is None


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_a_served_part_is_the_blocks_of_the_table(block_size: int) -> None:
    part = PartialAttention(sinks=32, budget=100)
    kept = kept_part(part, 1024, block_size)
    roots = [1, 32, 33, 100, 132, 133, 200, 320, 321, 600, 1024]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = PartialTables.allocate(part.sinks, part.budget, block_size, len(roots), 1024, device)
    blocks = torch.arange(1024 // block_size, dtype=torch.int32, device=device).repeat(len(roots), 1)
    written = tables.write(blocks, torch.tensor(roots, dtype=torch.int32, device=device))
    table, lens = (each.cpu() for each in written)
    seen = kept(torch.tensor(roots), 1)
    assert kept(torch.tensor(roots), 0).all()
    for request, root in enumerate(roots):
        places = torch.arange(int(lens[request]))
        expected = table[request, places // block_size] * block_size + places % block_size
        assert seen[request, :root].nonzero().flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_checks_over_the_whole_cache_find_nothing_wrong(pair: tuple[Target, GlideLayer], temperature: float) -> None:
    """So a round is a verification that emits what the draft's chain alone emits; over a few tokens some are wrong."""
    target, glide = pair
    passages = passages_of(target, temperature)
    chain = partial.cross(target, glide, passages, [1] * partial.GAMMA, None)
    assert partial.rounds(target, glide, passages, 0, None) == chain
    # A budget as long as the text is all of it.
    assert partial.cross(target, glide, passages, [1] * partial.GAMMA, CONTEXT + TOKENS) == chain
    whole, few = (partial.rounds(target, glide, passages, 2, budget) for budget in (None, 16))
    # Two rounds and the last chain are three steps of the chain alone, less those that go beyond the end.
    assert min(whole) >= 3 and sum(few) / len(few) < sum(whole) / len(whole)


def test_expected_tokens_are_those_of_a_simulation() -> None:
    source, chain, check, tries = random.Random(0), 0.7, 0.9, 20000

    def right(probability: float, most: int) -> int:
        return next((count for count in range(most) if source.random() >= probability), most)

    total = 0
    for _ in range(tries):
        emitted, goes_on = 1, True
        for _ in range(2):
            drafted = right(chain, partial.GAMMA)
            checked = right(check, drafted + 1) if goes_on else 0
            emitted += checked
            goes_on &= checked == drafted + 1
        total += emitted + (right(chain, partial.GAMMA) if goes_on else 0)
    assert partial.expected_tokens(2, chain, check) == pytest.approx(total / tries, rel=0.02)


def test_what_costs_less_and_is_accepted_as_often_is_faster() -> None:
    for load in partial.LOADS:
        tree = [4, 16, 16, 16, 16]
        whole, deeper, part = (
            partial.speed_up(tree, budget, 4.0, *load, reads_all)
            for budget, reads_all in ((None, True), (1024, True), (1024, False))
        )
        assert whole < deeper < part and partial.speed_up(tree, None, 4.0, *load) == whole
        # A check costs something.
        assert partial.speed_up(1, 1024, 4.0, *load) < partial.speed_up(0, 1024, 4.0, *load)
