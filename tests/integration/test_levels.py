# SPDX-License-Identifier: Apache-2.0
"""Levels that are chosen while an engine runs: many where the draft is followed to the end, few afterwards."""

from typing import Any

from tests.engine import generate, request, run_batches
from tests.integration.test_lossless import PAIR, source_code
from tests.process import run_alone

# The trained draft is followed far at temperature 0, and not at all where every token is as likely as any other.
REQUESTS = [
    [request(prompt, temperature=temperature, seed=1, max_tokens=num_tokens, ignore_eos=True)]
    for temperature, num_tokens, prompt in zip((0.0, 50.0), (48, 30), source_code((100, 60)), strict=True)
]
# Levels that cost as much of a step as with QwQ-32B-Preview, in whose place the small pair stands.
LEVEL = 40e6


def test_levels_follow_what_is_accepted():
    draft = {"model": str(PAIR / "draft"), "tree_shape": "auto", "num_speculative_tokens": 8}
    (tokens, levels), _ = run_alone(_generate_with_levels, {"model": str(PAIR / "target"), "speculative_config": draft})
    assert tokens == generate(PAIR / "target", REQUESTS).tokens
    # Most of the first text was drafted with all levels that 8 nodes can have, the end of the second one was not.
    assert levels[:10].count(8) > 5, levels
    assert max(levels[-4:]) <= 5, levels


def _generate_with_levels(settings: dict[str, Any]) -> tuple[list[list[list[int]]], list[int]]:
    """The tokens of all requests, and how many levels were drafted in each step."""
    from vllm_longspec.proposers.glide import cost, proposer

    cost.LEVEL = LEVEL
    levels: list[int] = []
    grow_trees = proposer.grow_trees

    def recording(model: Any, shape: Any, *args: Any) -> Any:
        levels.append(shape.max_depth)
        return grow_trees(model, shape, *args)

    proposer.grow_trees = recording
    tokens = run_batches(settings, REQUESTS)["tokens"]
    return tokens, levels
