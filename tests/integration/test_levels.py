# SPDX-License-Identifier: Apache-2.0
"""Levels that are chosen while an engine runs: few while the draft is hardly followed, many afterwards."""

from typing import Any

from tests.engine import generate, request, run_batches
from tests.integration.test_lossless import PAIR, source_code
from tests.process import run_alone

# The trained draft is hardly followed at temperature 1.3, and far at temperature 0.
REQUESTS = [
    [request(prompt, temperature=temperature, seed=1, max_tokens=num_tokens, ignore_eos=True)]
    for temperature, num_tokens, prompt in zip((1.3, 0.0), (32, 96), source_code((60, 100)), strict=True)
]
# Levels that cost as much of a step as with QwQ-32B-Preview, in whose place the small pair stands.
LEVEL = 40e6


def test_levels_follow_what_is_accepted():
    draft = {"model": str(PAIR / "draft"), "tree_shape": "auto", "num_speculative_tokens": 8}
    # Which would be accepted at any temperature.
    draft |= {"couple_noise": False, "copy_length": 0}
    (tokens, levels), _ = run_alone(_generate_with_levels, {"model": str(PAIR / "target"), "speculative_config": draft})
    assert tokens == generate(PAIR / "target", REQUESTS).tokens
    # All levels that 8 nodes can have at first, as nothing is known, and again where paths are accepted to the end.
    assert levels[0] == 8 and min(levels) <= 3, levels
    assert levels[-8:].count(8) >= 4, levels


def _generate_with_levels(settings: dict[str, Any]) -> tuple[list[list[list[int]]], list[int]]:
    """The tokens of all requests, and how many levels were drafted in each step."""
    from vllm_longspec.proposers.glide import cost, proposer

    cost.LEVEL = LEVEL
    levels: list[int] = []
    grow_trees = proposer.grow_trees

    def recording(model: Any, shape: Any, *args: Any) -> Any:
        levels.append(shape.max_depth)
        return grow_trees(model, shape, *args)

    proposer.grow_trees = recording  # type: ignore[assignment]
    tokens = run_batches(settings, REQUESTS)["tokens"]
    return tokens, levels
