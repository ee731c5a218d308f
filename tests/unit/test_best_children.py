# SPDX-License-Identifier: Apache-2.0
"""The choice of a level's nodes against all pairs, sorted."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.oracles.children import best_children as sorted_pairs
from tests.oracles.children import token_log_probs
from vllm_longspec.tree import best_children as module
from vllm_longspec.tree.best_children import best_children, best_children_in_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Chosen = list[list[tuple[int, int, float]]]
Choose = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def run(choose: Choose, logits: torch.Tensor, parent_log_probs: torch.Tensor, num_children: int) -> Chosen:
    parents, tokens, log_probs = choose(logits.to(DEVICE), parent_log_probs.to(DEVICE), num_children)
    assert parents.dtype == tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert parents.shape == tokens.shape == log_probs.shape == (len(parent_log_probs), num_children)
    columns = zip(parents.tolist(), tokens.tolist(), log_probs.tolist(), strict=True)
    return [list(zip(*column, strict=True)) for column in columns]


def check_close(chosen: Chosen, logits: torch.Tensor, parent_log_probs: torch.Tensor) -> None:
    """Every pair is what it is said to be, and as good as the one that sorting puts there."""
    width = parent_log_probs.shape[1]
    expected = sorted_pairs(logits, parent_log_probs, len(chosen[0]))
    for request, pairs in enumerate(chosen):
        assert len({pair[:2] for pair in pairs}) == len(pairs)
        for (parent, token, log_prob), (_, _, expected_log_prob) in zip(pairs, expected[request], strict=True):
            own = token_log_probs(logits[request * width + parent])[token] + float(parent_log_probs[request, parent])
            assert log_prob == pytest.approx(own, abs=1e-5)
            assert log_prob == pytest.approx(expected_log_prob, abs=1e-5)


def same_pairs(chosen: Chosen, expected: Chosen) -> bool:
    return [[pair[:2] for pair in pairs] for pairs in chosen] == [[pair[:2] for pair in pairs] for pairs in expected]


@pytest.mark.parametrize("choose", [best_children, best_children_in_pytorch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_reqs", "width", "vocab_size", "num_children"),
    [(1, 1, 300, 4), (3, 4, 100, 16), (2, 3, 257, 1), (1, 2, 64, 20), (2, 5, 7, 12), (1, 1, 1, 1)],
)
def test_random_logits(
    num_reqs: int,
    width: int,
    vocab_size: int,
    num_children: int,
    dtype: torch.dtype,
    choose: Choose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that are full, cut, and smaller than the number of children."""
    monkeypatch.setattr(module, "CHUNK", 64)
    generator = torch.Generator().manual_seed(num_reqs * vocab_size)
    logits = (3 * torch.randn(num_reqs * width, vocab_size, generator=generator)).to(dtype)
    parent_log_probs = -3 * torch.rand(num_reqs, width, generator=generator)
    check_close(run(choose, logits, parent_log_probs, num_children), logits, parent_log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_order_of_equals(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few values in rows that are all alike: the lower parent first, then the lower token, whatever the chunk."""
    monkeypatch.setattr(module, "CHUNK", 32)
    row = torch.tensor([0.0, -0.0, 2.0, -1.5, 1.0])[torch.arange(100) % 5].to(dtype)
    logits = row.expand(6, -1).contiguous()
    parent_log_probs = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -0.5, -0.5]])
    chosen = run(best_children, logits, parent_log_probs, 50)
    check_close(chosen, logits, parent_log_probs)
    assert same_pairs(chosen, sorted_pairs(logits, parent_log_probs, 50))
    assert [pair[1] for pair in chosen[0][:20]] == list(range(2, 100, 5))


@pytest.mark.parametrize("num_children", [3, 9, 40])
@pytest.mark.parametrize("programs", [1, 10**6])
def test_wherever_the_best_tokens_are(num_children: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one chunk, the last or the first; one in each; or with the second best in the chunk of the best."""
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    rising = torch.arange(150.0) / 10
    scattered = rising[torch.arange(150) * 16 % 150]
    paired = torch.where(torch.arange(150) // 2 % 8 == 3, rising + 5, rising.flip(0))
    logits = torch.stack([rising, rising.flip(0), scattered, paired])
    for parent_log_probs in (torch.zeros(4, 1), torch.tensor([[-0.5, -0.5], [-1.0, -0.2]])):
        chosen = run(best_children, logits, parent_log_probs, num_children)
        check_close(chosen, logits, parent_log_probs)
        assert same_pairs(chosen, sorted_pairs(logits, parent_log_probs, num_children))


def test_tokens_that_rounding_makes_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's log-probability is so low that a float32 cannot tell its children apart: the logits still can."""
    monkeypatch.setattr(module, "CHUNK", 16)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    chosen = run(best_children, logits, torch.tensor([[-1e9]]), 40)
    assert [pair[1] for pair in chosen[0]] == logits[0].argsort(descending=True).tolist()
    assert {pair[2] for pair in chosen[0]} == {-1e9}


@pytest.mark.parametrize("choose", [best_children, best_children_in_pytorch])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_row_comes_last(broken: float, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    if broken == -math.inf:
        logits[1] = broken
    else:
        logits[1, 20] = broken
    parent_log_probs = torch.tensor([[-1.0, -0.1, -2.0]])
    chosen = run(choose, logits, parent_log_probs, 30)
    check_close(chosen, logits, parent_log_probs)
    assert {pair[0] for pair in chosen[0]} == {0, 2}
    # When it must give some, they are tokens and none comes twice.
    chosen = run(choose, logits, parent_log_probs, 100)
    last = [pair for pair in chosen[0] if pair[0] == 1]
    assert len({pair[1] for pair in last}) == len(last) == 20
    assert all(0 <= token < 40 and log_prob == -math.inf for _, token, log_prob in last)


def test_every_row_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    logits = torch.full((4, 40), math.nan)
    logits[2:] = torch.inf
    chosen = run(best_children, logits, torch.zeros(2, 2), 5)
    assert same_pairs(chosen, [[(0, token, 0.0) for token in range(5)]] * 2)
    assert all(pair[2] == -math.inf for pairs in chosen for pair in pairs)


def test_impossible_tokens_and_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minus infinity is a log-probability like others: it comes after all others."""
    monkeypatch.setattr(module, "CHUNK", 16)
    logits = torch.full((2, 40), -torch.inf)
    logits[:, [3, 17, 39]] = torch.tensor([1.0, 2.0, 3.0])
    parent_log_probs = torch.tensor([[-math.inf, -1.0]])
    chosen = run(best_children, logits, parent_log_probs, 6)
    assert same_pairs(chosen, sorted_pairs(logits, parent_log_probs, 6))
    check_close(chosen, logits, parent_log_probs)


def test_a_slice_of_wider_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM pads the vocabulary; what is in the padding is not looked at."""
    monkeypatch.setattr(module, "CHUNK", 32)
    wide = torch.randn(4, 80, generator=torch.Generator().manual_seed(2))
    wide[:, 70:] = 100.0
    logits = wide.to(DEVICE)[:, :70]
    parent_log_probs = -torch.rand(2, 2, generator=torch.Generator().manual_seed(3))
    check_close(run(best_children, logits, parent_log_probs, 10), wide[:, :70], parent_log_probs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
def test_a_large_vocabulary() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(4 * 16, 152064, generator=torch.Generator().manual_seed(4)).to(dtype).to(DEVICE)
        parent_log_probs = -torch.rand(4, 16, device=DEVICE)
        *_, log_probs = best_children(logits, parent_log_probs, 16)
        *_, expected = best_children_in_pytorch(logits, parent_log_probs, 16)
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
