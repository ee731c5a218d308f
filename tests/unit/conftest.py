# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CPU worker and this plugin replace before an engine starts, for tests of parts of an engine."""

import functools

import pytest
import torch
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.cpu import buffer_utils as cpu_buffer_utils
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler

from vllm_longspec.interpreter import interpreting
from vllm_longspec.interpreter.sampling import gumbel_sample


@pytest.fixture
def buffers_without_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(buffer_utils, "UvaBuffer", cpu_buffer_utils.UvaBuffer)


@pytest.fixture
def sampling_without_a_gpu(monkeypatch, buffers_without_a_gpu):
    if interpreting():
        monkeypatch.setattr(topk_topp_sampler, "HAS_TRITON", False)
        many_rows = functools.partial(gumbel_sample, vllm_sampler.gumbel_sample)
        monkeypatch.setattr(vllm_sampler, "gumbel_sample", many_rows)
