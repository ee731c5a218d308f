# SPDX-License-Identifier: Apache-2.0
"""Two ranks emit what two ranks emit without a draft. Each grows, walks and compacts its trees from what all share."""

import json
import random

import pytest
import torch

from tests.engine import generate, request
from tests.integration.test_lossless import (
    GREEDY,
    PAIR,
    SAMPLINGS,
    assert_lossless,
    random_prompts,
    source_code,
    speculative,
)
from tests.integration.test_magicdec import magicdec
from tests.models import write_draft, write_target

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a second GPU, or none")

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "async_scheduling": True}


def requests(prompts: list[list[int]], max_tokens: int) -> list[list]:
    samplings = [GREEDY, SAMPLINGS[0], SAMPLINGS[1]]
    return [
        [
            request(prompt, **sampling, max_tokens=max_tokens, ignore_eos=True)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
    ]


@pytest.mark.parametrize(
    "enforce_eager",
    [True, pytest.param(False, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs"))],
)
def test_trained_draft(enforce_eager):
    """Half of the heads, of the vocabulary and of the window on each rank; a rank that drafts or walks another tree
    than its neighbour accepts next to nothing, and soon reads a cache that nobody has written."""
    batch = requests(source_code((300, 33, 100)), 20)
    settings = {**TWO_RANKS, "enforce_eager": enforce_eager}
    plain = generate(PAIR / "target", batch, **settings)
    result = generate(PAIR / "target", batch, **settings, **speculative(PAIR / "draft", [2, 4, 4]))
    assert_lossless(plain, result)
    assert result.acceptance_length >= 2.0


def test_a_target_that_drafts_for_itself():
    """Ranks that drafted other tokens than their neighbours would verify other trees than these."""
    batch = requests(source_code((300, 33, 100)), 20)
    plain = generate(PAIR / "target", batch, **TWO_RANKS, enforce_eager=True)
    result = generate(PAIR / "target", batch, **TWO_RANKS, enforce_eager=True, **magicdec(sinks=32, budget=64))
    assert_lossless(plain, result)
    assert result.acceptance_length >= 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has no fp8 layers for CPUs")
@pytest.mark.parametrize("frequent_tokens", [False, "auto:1024"])
def test_fp8_draft(frequent_tokens):
    """Each rank quantises its shard of the head, and rows that take the place of others."""
    batch = requests(source_code((300, 33, 100)), 20)
    options = {"quantization": "fp8_per_channel", "frequent_tokens": frequent_tokens}
    draft = speculative(PAIR / "draft", [2, 4, 4], **options)
    result = generate(PAIR / "target", batch, **TWO_RANKS, **draft, dtype="bfloat16")
    assert result.acceptance_length >= 2.0


@pytest.fixture(scope="module")
def odd_pair(tmp_path_factory):
    """One KV head, which both ranks hold, and a vocabulary of which neither has a half."""
    folder = tmp_path_factory.mktemp("odd")
    target = write_target(folder / "target", "llama", vocab_size=71, num_key_value_heads=1)
    (folder / "tokens.json").write_text(json.dumps(random.Random(0).sample(range(71), 37)))
    return target, write_draft(folder / "draft", target), str(folder / "tokens.json")


@pytest.mark.xdist_group("odd_pair")
@pytest.mark.parametrize("learns", [False, True])
def test_a_head_of_some_tokens(odd_pair, learns):
    """Its rows come from both ranks and go to both, at first and when other tokens take the places of these."""
    target, draft, tokens = odd_pair
    drafting = speculative(draft, [8, 8], frequent_tokens="auto:40" if learns else tokens)
    batch = requests(random_prompts(71, (3, 33, 100)), 16)
    alone = generate(target, batch, **drafting, async_scheduling=True)
    result = generate(target, batch, **TWO_RANKS, **drafting)
    assert_lossless(generate(target, batch, **TWO_RANKS), result)
    assert result.tokens == alone.tokens
    # The very trees that one rank drafts and walks.
    assert result.num_drafts == alone.num_drafts > 1
    assert result.num_accepted_tokens == alone.num_accepted_tokens > 1
