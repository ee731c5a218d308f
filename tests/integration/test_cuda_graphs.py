# SPDX-License-Identifier: Apache-2.0
"""Every CUDA-graph mode, with torch.compile and asynchronous scheduling: the draft emits what plain decoding emits.

Only a GPU has such graphs; `benchmarks/check_gpu.py` runs these tests there.
"""

import pytest
import torch

from tests.engine import generate, request
from tests.integration.test_lossless import DEFAULT_SHAPE, LENGTHS, PAIR, assert_lossless, source_code, speculative
from tests.models import write_draft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no CUDA graphs without a GPU")

WAYS = [{"temperature": 0.0}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "seed": 2, "top_k": 20}]
# Requests end one after the other, so that graphs of several sizes run; the second batch mixes prompts with trees.
REQUESTS = [
    [
        request(prompt, **WAYS[i % 3], max_tokens=limit - 6 * i, ignore_eos=True)
        for i, prompt in enumerate(source_code(LENGTHS))
    ]
    for limit in (64, 40)
]


def settings_of(mode: str) -> dict:
    return {"enforce_eager": False, "compilation_config": {"cudagraph_mode": mode}, "async_scheduling": True}


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_graph_mode(mode):
    plain = generate(PAIR / "target", REQUESTS, **settings_of(mode))
    result = generate(PAIR / "target", REQUESTS, **settings_of(mode), **speculative(PAIR / "draft", DEFAULT_SHAPE))
    assert_lossless(plain, result)
    assert result.acceptance_length > 2


def test_nodes_follow_what_is_accepted(tmp_path):
    """A draft that nobody follows: from one step to the next batches of the same size have other numbers of nodes."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    draft = write_draft(tmp_path / "draft", PAIR / "target")
    result = generate(PAIR / "target", REQUESTS, **mode, **speculative(draft, DEFAULT_SHAPE, adapt_nodes=True))
    assert_lossless(plain, result)
    # Fewer than half of the tokens came from steps with drafts.
    drafted = result.num_drafts + result.num_accepted_tokens
    assert drafted < sum(len(tokens) for batch in plain.tokens for tokens in batch) / 2


def test_nothing_waits_for_the_gpu(monkeypatch):
    """vLLM raises where a step makes the host wait for the GPU."""
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    # Another batch than in the test above: its result must not be answered from memory.
    requests = [
        [request(prompt, temperature=0.0, max_tokens=32, ignore_eos=True) for prompt in source_code((100, 300))]
    ]
    mode = settings_of("FULL_AND_PIECEWISE")
    result = generate(PAIR / "target", requests, **mode, **speculative(PAIR / "draft", DEFAULT_SHAPE))
    assert result.acceptance_length > 2
