# SPDX-License-Identifier: Apache-2.0
"""The noise of the target's draws in the draft's ranking: the sampler's own, and no other than it."""

import math
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from tests.oracles.children import best_children as sorted_pairs
from vllm_longspec.tree import best_children as module
from vllm_longspec.tree.best_children import best_children, best_children_in_pytorch
from vllm_longspec.tree.coupling import CUTOFF_WIDTH, LevelNoise, TargetNoise, log_cutoff, noised_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOOSE = [best_children, best_children_in_pytorch]
MAX_NUM_REQS = 6


def noise_of(
    temperatures: list[float], idx_mapping: list[int], depth: int = 0, use_fp64: bool = False, cutoff: float = -math.inf
) -> LevelNoise:
    source = torch.Generator().manual_seed(len(temperatures) + depth)
    seeds = torch.randint(-(2**63), 2**63 - 1, (MAX_NUM_REQS,), generator=source)
    positions = torch.randint(0, 2**20, (len(idx_mapping),), generator=source)
    by_slot = torch.zeros(MAX_NUM_REQS)
    for slot, temperature in zip(idx_mapping, temperatures, strict=True):
        if slot >= 0:
            by_slot[slot] = temperature
    cutoffs = torch.full((MAX_NUM_REQS,), cutoff, device=DEVICE)
    noise = TargetNoise(by_slot.to(DEVICE), seeds.to(DEVICE), cutoffs, use_fp64)
    return LevelNoise(noise, torch.tensor(idx_mapping, device=DEVICE), positions.to(DEVICE), depth)


def drawn_by_the_target(
    logits: torch.Tensor,  # [num_reqs, draft_vocab_size]
    level: LevelNoise,
    token_ids: torch.Tensor | None,
) -> list[int]:
    """What vLLM's sampler draws from these logits at the parents' positions, as indices of the draft's vocabulary."""
    if token_ids is not None:
        whole = torch.full((logits.shape[0], int(token_ids.max()) + 1), -math.inf, device=logits.device)
        whole[:, token_ids] = logits
        logits = whole
    sampled = gumbel_sample(
        logits,
        level.idx_mapping,
        level.noise.temperature,
        level.noise.seeds,
        level.root_positions + level.depth,
        apply_temperature=True,
        is_drafting=False,
        use_fp64=level.noise.use_fp64,
    )
    if token_ids is None:
        return sampled.tolist()
    return [token_ids.tolist().index(token) for token in sampled.tolist()]


@pytest.mark.parametrize("choose", CHOOSE)
@pytest.mark.parametrize(("use_fp64", "restricted", "depth"), [(False, False, 0), (False, True, 3), (True, False, 3)])
def test_the_best_child_is_what_the_target_would_draw(
    choose, use_fp64: bool, restricted: bool, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From equal logits: requests of all temperatures in one batch, and padding, which has no noise."""
    monkeypatch.setattr(module, "CHUNK", 64)
    level = noise_of([1.0, 0.0, 0.3, 2.0, 1.0, 0.3] * 4, [4, 0, -1, 2, 5, 1] * 4, depth, use_fp64)
    vocab_size = 150
    source = torch.Generator().manual_seed(depth)
    # Noise decides, with a spread of about 1.3.
    logits = torch.randn(24, vocab_size, generator=source).to(DEVICE)
    token_ids = torch.randperm(400, generator=source)[:vocab_size].to(DEVICE) if restricted else None
    expected = drawn_by_the_target(logits, level, token_ids)
    assert sum(drawn != best for drawn, best in zip(expected, logits.argmax(dim=1).tolist(), strict=True)) > 4
    _, tokens, _ = choose(logits, torch.zeros(24, 1, device=DEVICE), 1, level, token_ids)
    assert tokens[:, 0].tolist() == expected


@pytest.mark.parametrize("choose", CHOOSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cutoff", [-math.inf, math.log(0.05), 0.0])
def test_the_order_and_scores_of_children(choose, dtype, cutoff: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best pairs of logits / T + g, lower past the cutoff, by their own normalised log-probabilities."""
    monkeypatch.setattr(module, "CHUNK", 16)
    # A request's three rows are two programs' and share noise.
    monkeypatch.setattr(module, "PROGRAMS", 50)
    temperatures, width, vocab_size = [0.7, 0.0, 1.5], 3, 200
    level = noise_of(temperatures, [1, 3, 0], cutoff=cutoff)
    source = torch.Generator().manual_seed(7)
    logits = (2 * torch.randn(3 * width, vocab_size, generator=source)).to(dtype)
    # A row that the head broke stays last.
    logits[2, 5] = math.nan
    parent_log_probs = -torch.rand(3, width, generator=source)
    zeros = torch.zeros(3 * width, vocab_size, device=DEVICE)
    gumbel = noised_logits(zeros, noise_of([1.0 if each else 0.0 for each in temperatures], [1, 3, 0]), None).cpu()
    noised = logits.to(torch.float32, copy=True)
    for request, temperature in enumerate(temperatures):
        if temperature == 0.0:
            continue
        rows = slice(request * width, (request + 1) * width)
        drawn = noised[rows] / temperature
        above = drawn - drawn.amax(dim=1, keepdim=True) - cutoff
        noised[rows] = drawn + gumbel[rows] - torch.log1p(torch.exp(-above / CUTOFF_WIDTH))
    parents, tokens, log_probs = choose(logits.to(DEVICE), parent_log_probs.to(DEVICE), 12, level)
    for request, pairs in enumerate(sorted_pairs(noised, parent_log_probs, 12)):
        expected = torch.tensor([pair[2] for pair in pairs])
        torch.testing.assert_close(log_probs[request].cpu(), expected, rtol=0, atol=1e-5)
        found = list(zip(parents[request].tolist(), tokens[request].tolist(), strict=True))
        assert found == [pair[:2] for pair in pairs]


@pytest.mark.parametrize("choose", CHOOSE)
def test_greedy_requests_are_ranked_as_without_noise(choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(6, 150, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
        parent_log_probs = -torch.rand(2, 3, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        level = noise_of([0.0, 0.0], [2, -1], cutoff=-1.0)
        with_noise = choose(logits, parent_log_probs, 10, level)
        for got, expected in zip(with_noise, choose(logits, parent_log_probs, 10), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("params", "cutoff"),
    [
        ({}, 0.0),
        ({"top_p": 0.8}, 0.04),
        ({"top_p": 0.8, "min_p": 0.1}, 0.1),
        ({"top_k": 20}, 0.0025),
        ({"top_k": 1}, 1.0),
        ({"top_k": -1, "min_p": 0.02}, 0.02),
    ],
)
def test_cutoff(params: dict[str, Any], cutoff: float) -> None:
    assert math.exp(log_cutoff(SamplingParams(temperature=1.0, **params))) == pytest.approx(cutoff)
