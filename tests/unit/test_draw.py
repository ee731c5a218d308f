# SPDX-License-Identifier: Apache-2.0
"""Draws at a temperature: what vLLM's sampler draws, which copies and divides the logits first."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.interpreter import interpreting
from vllm_longspec.tree import draw
from vllm_longspec.tree.draw import draw_at_temperature, draws_at_temperature

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.usefixtures("sampling_without_a_gpu")


def make_sampler(params: list[SamplingParams], vocab_size: int, use_fp64: bool = False) -> Sampler:
    state = RequestState(len(params), 64, 4096, 1, vocab_size, DEVICE)
    sampler = Sampler(VllmConfig(), len(params), vocab_size, DEVICE, state, use_fp64_gumbel=use_fp64)
    for slot, each in enumerate(params):
        sampler.add_request(slot, each)
    sampler.apply_staged_writes()
    sampler.use_flashinfer = False
    return sampler


def at_temperatures(*temperatures: float, **settings: object) -> list[SamplingParams]:
    """One request each, with and without an own seed in turn."""
    return [
        SamplingParams(temperature=temperature, seed=slot if slot % 2 else None, **settings)  # type: ignore[arg-type]
        for slot, temperature in enumerate(temperatures)
    ]


def drawn(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    params: list[SamplingParams],
    use_fp64: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What this package draws and what vLLM's sampler draws, from rows that belong to the requests in turn."""
    num_rows, vocab_size = logits.shape
    sampler = make_sampler(params, vocab_size, use_fp64)
    slots = np.arange(len(params))
    mapping = torch.arange(num_rows, device=DEVICE) % len(params)
    positions = 7 * torch.arange(num_rows, device=DEVICE)
    anything = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    logits = logits.to(DEVICE)
    before = logits.clone()
    own = draw_at_temperature(sampler, logits, mapping, positions)
    assert torch.equal(logits.nan_to_num(9.0), before.nan_to_num(9.0))
    indices = torch.from_numpy(slots).to(DEVICE)
    lengths = np.full(len(params), 64)
    expected, _ = sampler.sample(logits, mapping, indices, slots, positions, anything, anything, lengths)
    return own, expected


@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [50, 1024, 2500])
def test_draws_what_vllm_draws(dtype, vocab_size, use_fp64):
    """With greedy requests, and in bfloat16 with equal logits, in one batch."""
    logits = 3 * torch.randn(15, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    own, expected = drawn(logits.to(dtype), at_temperatures(0.7, 0.0, 1.6, 0.05, 1.0), use_fp64)
    assert torch.equal(own, expected)
    greedy = logits[1::5].to(dtype).argmax(dim=-1)
    assert torch.equal(own[1::5].cpu(), greedy)
    assert not torch.equal(own[2::5].cpu(), logits[2::5].to(dtype).argmax(dim=-1))


@pytest.mark.parametrize("spread", [0, 1])
def test_equal_logits(spread):
    logits = (spread * torch.randn(12, 1500, generator=torch.Generator().manual_seed(1))).round()
    assert torch.equal(*drawn(logits, at_temperatures(0.8, 0.0, 1.2)))


def test_forbidden_tokens():
    """A grammar leaves few tokens, or one."""
    source = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(12, 1500, generator=source)
    rank = torch.rand(12, 1500, generator=source).argsort(dim=1).argsort(dim=1)
    num_allowed = torch.tensor([1, 4, 40]).repeat(4)
    logits = logits.masked_fill(rank >= num_allowed[:, None], -torch.inf)
    own, expected = drawn(logits, at_temperatures(0.8, 1.5, 0.0, 0.3))
    assert torch.equal(own, expected)
    assert (logits.gather(1, own.cpu()[:, None]) > -torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nans_and_infinite_logits(value):
    logits = torch.randn(6, 1100, generator=torch.Generator().manual_seed(3))
    logits[::2, 123] = value
    assert torch.equal(*drawn(logits, at_temperatures(0.8, 1.5)))


def draws(params: list[SamplingParams], return_processed: bool = False) -> bool:
    return draws_at_temperature(make_sampler(params, 50), np.arange(len(params)), return_processed)


def test_in_the_interpreter_vllm_draws():
    assert draws(at_temperatures(0.7)) is not interpreting()


@pytest.mark.parametrize(
    ("temperatures", "expected"),
    [((0.7,), True), ((0.7, 0.0, 1.0), True), ((0.0,), False), ((1.0,), False), ((0.0, 1.0), False)],
)
def test_draws_where_vllm_would_divide(monkeypatch, temperatures, expected):
    """For other temperatures vLLM's sampler reads the logits as they come, too."""
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    assert draws(at_temperatures(*temperatures)) is expected


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3, 4]},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
)
def test_what_else_changes_logits_is_left_to_vllm(monkeypatch, settings):
    """If one request of the batch has it."""
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    others = at_temperatures(0.7, 0.9)
    assert draws(others)
    assert not draws([*others, *at_temperatures(0.7, **settings)])


def test_bad_words_are_left_to_vllm(monkeypatch):
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    params = at_temperatures(0.7)
    params[0]._bad_words_token_ids = [[3, 4]]
    assert not draws(params)


def test_processors_are_left_to_vllm(monkeypatch):
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    sampler = make_sampler(at_temperatures(0.7), 50)
    sampler.logits_processors.append(object())  # type: ignore[arg-type]
    assert not draws_at_temperature(sampler, np.array([0]), return_processed=False)


def test_thinking_budgets_are_left_to_vllm(monkeypatch):
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    sampler = make_sampler(at_temperatures(0.7, 0.7), 50)
    sampler.thinking_budget_state.enabled = True
    sampler.thinking_budget_state.use_thinking_budget = np.array([False, True])
    assert draws_at_temperature(sampler, np.array([0]), return_processed=False)
    assert not draws_at_temperature(sampler, np.array([0, 1]), return_processed=False)


def test_processed_logits_are_vllms(monkeypatch):
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    assert not draws(at_temperatures(0.7), return_processed=True)
