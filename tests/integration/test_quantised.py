# SPDX-License-Identifier: Apache-2.0
"""Quantised targets and a quantised KV cache: the draft emits what the same engine emits without one, up to ties.

Rounding to few bits makes much of little: two kernels for the same attention differ in the last bit of a float32, now
and then a value is rounded the other way for it, and the logits move by a part of what quantisation costs them anyway.
So where a run leaves the plain one, the two tokens must have been as good as equal.
"""

import pytest
import torch
from vllm import _custom_ops  # noqa: F401  # registers torch.ops._C

from tests.engine import Result, generate, request
from tests.integration.test_lossless import PAIR, source_code, speculative
from tests.integration.test_magicdec import magicdec
from tests.models import untied
from tests.quantised_models import write_awq, write_cache_scales, write_gptq, write_int8

needs_4_bit_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or hasattr(torch.ops._C, "cpu_gemm_wna16")),
    reason="vLLM has 4-bit weights on CPUs with AVX-512 only",
)
REQUESTS = [
    [request(prompt, temperature=0.0, logprobs=3, max_tokens=20, ignore_eos=True) for prompt in source_code((100, 200))]
]


def assert_lossless_up_to_ties(plain: Result, result: Result, tie: float) -> None:
    for expected, found, logprobs, tree_logprobs in zip(
        plain.tokens[0], result.tokens[0], plain.logprobs[0], result.logprobs[0], strict=True
    ):
        assert logprobs is not None and tree_logprobs is not None
        for at, (token, tree_token) in enumerate(zip(expected, found, strict=True)):
            if token != tree_token:
                assert logprobs[at][str(token)] - logprobs[at].get(str(tree_token), -torch.inf) < tie
                break
            assert tree_logprobs[at][str(token)] == pytest.approx(logprobs[at][str(token)], abs=tie)
    assert result.num_drafts > 1
    # Drafts are as good as without quantisation: a GLIDE draft is not quantised and reads what the target has cached,
    # and a target that drafts for itself is quantised as it is when it verifies.
    assert result.acceptance_length >= 2.5


@pytest.mark.parametrize(
    ("write", "settings", "tie"),
    [
        pytest.param(write_awq, {"dtype": "float16"}, 0.1, marks=needs_4_bit_kernels),
        # It rounds what goes into every layer too. For GPUs vLLM has it in half precision only.
        (write_int8, {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"}, 0.5),
    ],
)
def test_quantised_target(tmp_path, write, settings, tie):
    target = write(tmp_path / "target", PAIR / "target")
    plain = generate(target, REQUESTS, **settings)
    for drafting in (speculative(PAIR / "draft", [2, 4, 4]), magicdec(sinks=32, budget=64)):
        assert_lossless_up_to_ties(plain, generate(target, REQUESTS, **settings, **drafting), tie)


@needs_4_bit_kernels
def test_quantised_head(tmp_path):
    """The draft's logits come through the target's head, whatever that is made of; the layers are GPTQ's as well."""
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    target = write_gptq(tmp_path / "target", target)
    plain = generate(target, REQUESTS, dtype="float16")
    result = generate(target, REQUESTS, dtype="float16", **speculative(draft, [2, 4, 4]))
    assert_lossless_up_to_ties(plain, result, 0.1)


def test_fp8_cache(tmp_path):
    """A cache of fp8 with scales of its own in every layer, because the checkpoint says so."""
    target = write_cache_scales(tmp_path / "target", PAIR / "target", key=0.03, value=0.02)
    results = [
        generate(target, REQUESTS, **drafting)
        for drafting in (speculative(PAIR / "draft", [2, 4, 4]), magicdec(sinks=32, budget=64))
    ]
    if torch.cuda.is_available() or torch.cpu._is_avx512_supported():
        plain = generate(target, REQUESTS, kv_cache_dtype="fp8")
    else:
        # vLLM's own CPU backend has no fp8 on such a machine; this one verifies no node and so decodes plainly.
        none = {"num_speculative_tokens_per_batch_size": [(1, 8, 0)]}
        plain = generate(target, REQUESTS, kv_cache_dtype="fp8", **speculative(PAIR / "draft", [1], **none))
    for result in results:
        # On a GPU the two have more different kernels: log-probabilities were 0.1 apart there.
        assert_lossless_up_to_ties(plain, result, 0.2 if torch.cuda.is_available() else 0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has no fp8 layers for CPUs")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_channel"])
def test_fp8_target(quantization):
    """The target's layers are fp8, the draft's are not."""
    plain = generate(PAIR / "target", REQUESTS, dtype="bfloat16", quantization=quantization)
    draft = speculative(PAIR / "draft", [2, 4, 4])
    result = generate(PAIR / "target", REQUESTS, dtype="bfloat16", quantization=quantization, **draft)
    assert_lossless_up_to_ties(plain, result, 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has no fp8 layers for CPUs")
@pytest.mark.parametrize(("enforce_eager", "target_quantization"), [(True, None), (False, None), (False, "fp8")])
def test_fp8_draft(enforce_eager, target_quantization):
    """A draft of fp8 accepts about as much as the one that it was made of, whatever its target is made of."""
    settings = {"dtype": "bfloat16", "enforce_eager": enforce_eager, "quantization": target_quantization}
    plain = generate(PAIR / "target", REQUESTS, **settings)
    draft = speculative(PAIR / "draft", [4, 16, 16], quantization="fp8_per_channel")
    result = generate(PAIR / "target", REQUESTS, **settings, **draft)
    # Trees have other kernels than plain decoding.
    assert_lossless_up_to_ties(plain, result, 0.2 if target_quantization is None else 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has no fp8 layers for CPUs")
def test_fp8_draft_of_a_gptq_target(tmp_path):
    """Whose head is quantised too, so that the draft has no copy of it."""
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    target = write_gptq(tmp_path / "target", target)
    plain = generate(target, REQUESTS, dtype="float16")
    drafting = speculative(draft, [4, 16, 16], quantization="fp8_per_channel")
    assert_lossless_up_to_ties(plain, generate(target, REQUESTS, dtype="float16", **drafting), 0.1)
