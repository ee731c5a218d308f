# SPDX-License-Identifier: Apache-2.0
"""Draws without filtering every row: what vLLM's sampler draws, which sorts and filters them all."""

import functools
import itertools

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.cpu import buffer_utils as cpu_buffer_utils
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.interpreter import interpreting
from vllm_longspec.interpreter.sampling import gumbel_sample
from vllm_longspec.tree import draw
from vllm_longspec.tree.draw import FilteredDraw, rows_to_draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """What vLLM's CPU worker and this plugin replace before an engine starts."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(buffer_utils, "UvaBuffer", cpu_buffer_utils.UvaBuffer)
    if interpreting():
        monkeypatch.setattr(topk_topp_sampler, "HAS_TRITON", False)
        many_rows = functools.partial(gumbel_sample, vllm_sampler.gumbel_sample)
        monkeypatch.setattr(vllm_sampler, "gumbel_sample", many_rows)


def make_sampler(params: list[SamplingParams], vocab_size: int, use_fp64: bool = False) -> Sampler:
    state = RequestState(len(params), 64, 4096, 1, vocab_size, DEVICE)
    sampler = Sampler(VllmConfig(), len(params), vocab_size, DEVICE, state, use_fp64_gumbel=use_fp64)
    for slot, each in enumerate(params):
        sampler.add_request(slot, each)
    sampler.apply_staged_writes()
    sampler.use_flashinfer = False
    return sampler


class Drawn:
    """Draws of both kinds from the same rows, which belong to requests in turn."""

    def __init__(self, logits: torch.Tensor, params: list[SamplingParams], use_fp64: bool = False):
        num_rows, vocab_size = logits.shape
        self.sampler = make_sampler(params, vocab_size, use_fp64)
        slots = np.arange(len(params))
        per_request = -(-num_rows // len(params))
        self.mapping = torch.from_numpy(slots.repeat(per_request)[:num_rows]).to(DEVICE)
        self.starts = torch.arange(len(params) + 1, device=DEVICE, dtype=torch.int32) * per_request
        self.starts.clamp_(max=num_rows)
        anything = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        arguments = (
            logits.to(DEVICE),
            self.mapping,
            torch.from_numpy(slots).to(DEVICE),
            slots,
            torch.arange(num_rows, device=DEVICE),
            anything,
            anything,
            np.full(len(params), 64),
        )
        self.draw = FilteredDraw(self.sampler, rows_to_draw(self.sampler, *arguments), slots)
        self.expected, _ = self.sampler.sample(*arguments)

    @property
    def undecided(self) -> torch.Tensor:
        assert self.draw.undecided is not None
        return self.draw.undecided.bool()

    def settle_all(self) -> None:
        """As for walks that came to every row."""
        width = int(self.starts.diff().max())
        path = torch.arange(width, device=DEVICE, dtype=torch.int32).repeat(len(self.starts) - 1, 1)
        self.draw.settle(self.starts, path, self.starts.diff())

    def check(self) -> float:
        """Compares before and after, and returns the share of undecided rows."""
        is_decided = ~self.undecided
        share = 1 - is_decided.float().mean().item()
        assert torch.equal(self.draw.sampled[is_decided], self.expected[is_decided])
        self.settle_all()
        assert torch.equal(self.draw.sampled, self.expected)
        assert not self.undecided.any()
        return share


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 20},
    {"top_k": 400},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 5, "top_p": 0.95, "min_p": 0.02},
    {"top_k": 100, "top_p": 0.3},
]


def mixed(temperatures: tuple[float, ...] = (0.7, 1.6)) -> list[SamplingParams]:
    """Every filter at every temperature, and a greedy request."""
    return [
        *(
            SamplingParams(temperature=temperature, seed=index, **filters)  # type: ignore[arg-type]
            for index, (filters, temperature) in enumerate(itertools.product(FILTERS, temperatures))
        ),
        SamplingParams(temperature=0.0),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("slice_", "vocab_size"), [(64, 600), (256, 900)])
def test_draws_what_vllm_draws(monkeypatch, dtype, slice_, vocab_size):
    monkeypatch.setattr(draw, "SLICE", slice_)
    monkeypatch.setattr(draw, "SLICES", 4)
    params = mixed()
    logits = 3 * torch.randn(2 * len(params), vocab_size, generator=torch.Generator().manual_seed(slice_))
    share = Drawn(logits.to(dtype), params).check()
    assert share < 0.1


def few_slices(monkeypatch, slice_: int = 64) -> None:
    monkeypatch.setattr(draw, "SLICE", slice_)
    monkeypatch.setattr(draw, "SLICES", 4)


@pytest.mark.parametrize("spread", [0, 1, 4])
def test_ties_are_settled_by_vllm(monkeypatch, spread):
    """Equal logits, where cuts go through many equal tokens and nothing but vLLM's order of them decides."""
    few_slices(monkeypatch)
    params = mixed((1.0,))
    logits = (spread * torch.randn(2 * len(params), 300, generator=torch.Generator().manual_seed(spread))).round()
    share = Drawn(logits, params).check()
    # Of all kinds of filters.
    assert 0 < share < 1


@pytest.mark.parametrize("temperature", [0.05, 2.0])
def test_extreme_temperatures(monkeypatch, temperature):
    few_slices(monkeypatch)
    params = mixed((temperature,))
    logits = 4 * torch.randn(2 * len(params), 500, generator=torch.Generator().manual_seed(1))
    Drawn(logits, params).check()
    Drawn(logits + 3000, params).check()


def test_forbidden_tokens(monkeypatch):
    """A grammar leaves few tokens, fewer than top-k, or one, in one slice or in many."""
    few_slices(monkeypatch)
    params = mixed((0.8,))
    source = torch.Generator().manual_seed(2)
    num_rows, vocab_size = 3 * len(params), 400
    logits = 3 * torch.randn(num_rows, vocab_size, generator=source)
    num_allowed = torch.tensor([1, 4, 40]).repeat(len(params))
    rank = torch.rand(num_rows, vocab_size, generator=source).argsort(dim=1).argsort(dim=1)
    Drawn(logits.masked_fill(rank >= num_allowed[:, None], -torch.inf), params).check()


def test_noise_in_double_precision(monkeypatch):
    few_slices(monkeypatch)
    params = mixed((0.9,))
    logits = 3 * torch.randn(len(params), 300, generator=torch.Generator().manual_seed(3))
    Drawn(logits, params, use_fp64=True).check()


def test_logits_that_other_parameters_change(monkeypatch):
    """Everything before top-k and top-p is vLLM's own then, min-p included."""
    few_slices(monkeypatch)
    params = [
        SamplingParams(temperature=0.8, seed=seed, logit_bias={7: 4.0, 9: -20.0}, **filters)  # type: ignore[arg-type]
        for seed, filters in enumerate(FILTERS)
    ]
    logits = torch.randn(2 * len(params), 300, generator=torch.Generator().manual_seed(4))
    drawn = Drawn(logits, params)
    assert drawn.draw.rows.is_scaled
    drawn.check()
    assert (drawn.draw.sampled == 7).any()


@pytest.mark.parametrize("is_processed", [False, True])
def test_nothing_is_undecided_without_filters(is_processed):
    bias = {"logit_bias": {1: 2.0}} if is_processed else {}
    params = [SamplingParams(temperature=temperature, seed=5, **bias) for temperature in (0.0, 0.6, 1.0)]  # type: ignore[arg-type]
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(5)).bfloat16()
    drawn = Drawn(logits, params)
    assert drawn.draw.undecided is None
    assert torch.equal(drawn.draw.sampled, drawn.expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_with_nans_and_infinite_logits_are_left_to_vllm(value):
    params = [SamplingParams(temperature=0.8, seed=6, **filters) for filters in FILTERS[1:]]  # type: ignore[arg-type]
    logits = torch.randn(len(params), 500, generator=torch.Generator().manual_seed(6))
    logits[:, 123] = value
    assert Drawn(logits, params).undecided.all()


def test_only_what_a_walk_came_to_is_settled(monkeypatch):
    """All rows are undecided. Requests of three rows, of which the walks came to some."""
    params = [SamplingParams(temperature=1.0, seed=seed, top_k=3) for seed in range(4)]
    drawn = Drawn(torch.zeros(12, 50), params)
    assert drawn.undecided.all()
    # The second one's rows are decided, as far as the walk is concerned; the last emits nothing.
    drawn.draw.undecided[3:5] = 0  # type: ignore[index]
    before = drawn.draw.sampled.clone()
    path = torch.tensor([[0, 2], [0, 1], [0, -1], [-1, -1]], device=DEVICE, dtype=torch.int32)
    drawn.draw.settle(drawn.starts, path, torch.tensor([2, 2, 1, 0], device=DEVICE, dtype=torch.int32))
    settled = [0, 1, 2, 6, 7, 8]
    assert drawn.undecided.nonzero()[:, 0].tolist() == [5, 9, 10, 11]
    assert torch.equal(drawn.draw.sampled[settled], drawn.expected[settled])
    others = [3, 4, 5, 9, 10, 11]
    assert torch.equal(drawn.draw.sampled[others], before[others])


def test_when_vllm_draws_itself(monkeypatch):
    sampler = make_sampler([SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)], 50)
    assert draw.draws_without_filtering(sampler, np.array([0, 1]), return_processed=False) is not interpreting()
    monkeypatch.setattr(draw, "interpreting", lambda: False)
    assert draw.draws_without_filtering(sampler, np.array([0, 1]), return_processed=False)
    assert not draw.draws_without_filtering(sampler, np.array([0]), return_processed=False)
    assert not draw.draws_without_filtering(sampler, np.array([1]), return_processed=True)
    sampler.use_flashinfer = True
    assert not draw.draws_without_filtering(sampler, np.array([1]), return_processed=False)
