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
from vllm_longspec.tree.draw import FilteredDraw

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
        self.draw = FilteredDraw(self.sampler, *arguments)
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


def mixed(temperatures: tuple[float, ...] = (0.7, 1.0, 1.6)) -> list[SamplingParams]:
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
