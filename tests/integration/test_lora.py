# SPDX-License-Identifier: Apache-2.0
"""Adapters of the target: requests with and without one in a batch, each as plain decoding with its adapter emits it.

The draft is the base model's. Two engines in a process each play the same batches.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine import running
from tests.integration.test_lossless import PAIR, source_code, speculative
from tests.models import as_llama, untied
from tests.process import run_alone

RANK = 8
# One more than there are: on a CPU vLLM gives a request without an adapter the last one of a batch that has any.
MAX_LORAS = 3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
# Of each request: its adapter (0 is none) and its sampling.
REQUESTS = [(0, 0.0), (1, 0.0), (2, 0.7), (1, 1.0), (0, 0.7)]
LENGTHS = (100, 60, 90, 80, 60)
GRAPHS = {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
ON_GPU = torch.cuda.is_available()
# vLLM's kernels for adapters on GPUs take no float32.
DTYPE = "bfloat16" if ON_GPU else "float32"
# What two log-probabilities may differ by in bfloat16.
CLOSE = 0.3


def write_adapter(path: Path, target: Path, seed: int) -> Path:
    """An adapter of every linear layer and of the embedding, with random weights."""
    config = json.loads((target / "config.json").read_text())
    hidden, intermediate, vocab_size = (config[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    modules = {"model.embed_tokens": (vocab_size, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, sizes in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv_size),
            "self_attn.v_proj": (hidden, kv_size),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, intermediate),
            "mlp.up_proj": (hidden, intermediate),
            "mlp.down_proj": (intermediate, hidden),
        }.items():
            modules[f"model.layers.{layer}.{name}"] = sizes
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (inputs, outputs) in modules.items():
        kinds = ("lora_embedding_A", "lora_embedding_B") if "embed" in name else ("lora_A.weight", "lora_B.weight")
        for kind, shape, scale in zip(kinds, ((RANK, inputs), (outputs, RANK)), (inputs**-0.5, 0.1), strict=True):
            weights[f"base_model.model.{name}.{kind}"] = torch.randn(shape, generator=source) * scale
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": MODULES, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def play(settings: dict[str, Any], adapters: list[str], prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [None, *(LoRARequest(path, 1 + i, path) for i, path in enumerate(adapters))]
    tokens, logprobs = [], []
    with running(
        {"dtype": DTYPE, "enable_lora": True, "max_loras": MAX_LORAS, "max_lora_rank": RANK, **settings}
    ) as llm:
        # The second time with other adapters: what is cached of a prompt belongs to an adapter.
        for turn in range(2):
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [
                    SamplingParams(
                        temperature=temperature, seed=3, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=5
                    )
                    for _, temperature in REQUESTS
                ],
                lora_request=[requests[(adapter + turn) % 3] for adapter, _ in REQUESTS],
                use_tqdm=False,
            )
            completions = [output.outputs[0] for output in outputs]
            tokens += [list(completion.token_ids) for completion in completions]
            logprobs += [
                [{token: value.logprob for token, value in position.items()} for position in completion.logprobs or []]
                for completion in completions
            ]
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {"tokens": tokens, "logprobs": logprobs, "metrics": metrics}


def assert_equal_up_to_ties(plain: dict[str, Any], drafted: dict[str, Any]) -> None:
    """Tokens are the same up to where a greedy request had two about equally probable ones.

    A sampled request is compared up to its first other token only: there noise that is not listed decides.
    """
    compared = total = 0
    for request, (expected, found) in enumerate(zip(plain["tokens"], drafted["tokens"], strict=True)):
        _, temperature = REQUESTS[request % len(REQUESTS)]
        is_greedy = temperature == 0
        total += is_greedy * len(expected)
        for at, (token, other) in enumerate(zip(expected, found, strict=True)):
            before, after = (each["logprobs"][request][at] for each in (plain, drafted))
            if token != other:
                if is_greedy:
                    for listed in (before, after):
                        assert {str(token), str(other)} <= listed.keys(), "a token that is not among the first five"
                        assert abs(listed[str(token)] - listed[str(other)]) < CLOSE, "tokens that are no tie"
                break
            assert after[str(token)] == pytest.approx(before[str(token)], abs=CLOSE), "other log-probabilities"
            compared += is_greedy
    assert compared >= total / 2, f"only {compared} of {total} greedy tokens could be compared"


def played(token: int, listed: dict[int, float], request: int, *, at: int = 1) -> dict[str, Any]:
    """Three tokens of every request, all the same but for one of them and its listed log-probabilities."""
    tokens = [[7, 7, 7] for _ in REQUESTS]
    logprobs = [[{"7": -0.5, "8": -0.6, "9": -2.0}] * 3 for _ in REQUESTS]
    tokens[request][at] = token
    logprobs[request][at] = {str(each): value for each, value in listed.items()}
    return {"tokens": tokens, "logprobs": logprobs}


PLAIN = played(7, {7: -0.5, 8: -0.6, 9: -2.0}, 0)


@pytest.mark.parametrize(
    "drafted",
    [
        PLAIN,
        # A tie, with what comes after it, which has another text before it.
        played(8, {7: -0.6, 8: -0.5}, 1),
        # Drawn with other noise, and no tie.
        played(9, {7: -0.1, 9: -5.0}, 2),
    ],
)
def test_equal_up_to_ties(drafted):
    assert_equal_up_to_ties(PLAIN, drafted)


@pytest.mark.parametrize(
    ("drafted", "said"),
    [
        (played(9, {7: -0.6, 9: -0.5}, 1), "no tie"),
        (played(8, {7: -1.5, 8: -0.5}, 1), "no tie"),
        (played(6, {7: -0.6, 6: -0.5}, 1), "first five"),
        (played(8, {8: -0.5}, 1), "first five"),
        (played(7, {7: -0.9, 8: -1.0}, 1), "other log-probabilities"),
        (played(7, {7: -0.9, 8: -1.0}, 2), "other log-probabilities"),
    ],
)
def test_other_than_ties(drafted, said):
    with pytest.raises(AssertionError, match=said):
        assert_equal_up_to_ties(PLAIN, drafted)


def test_ties_that_leave_too_little_to_compare():
    drafted = played(8, {7: -0.6, 8: -0.5}, 0, at=0)
    drafted["tokens"][1] = [8, 7, 7]
    with pytest.raises(AssertionError, match="only 0 of 6 greedy tokens"):
        assert_equal_up_to_ties(PLAIN, drafted)


def test_adapters_of_the_head_are_refused(tmp_path):
    target, draft = as_llama(tmp_path, PAIR / "target", PAIR / "draft")
    settings = {"model": str(target), **speculative(draft, [2, 4, 4])}
    with pytest.raises(AssertionError, match="give --lora-target-modules without lm_head, such as q_proj"):
        run_alone(play, settings, [], [])


@pytest.mark.parametrize(
    "graphs",
    [False, pytest.param(True, marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU"))],
)
def test_adapters(tmp_path, graphs):
    # Of these families only Llama's embedding can be adapted.
    target, draft = untied(tmp_path / "untied", *as_llama(tmp_path / "llama", PAIR / "target", PAIR / "draft"))
    adapters = [str(write_adapter(tmp_path / f"adapter{seed}", target, seed)) for seed in (1, 2)]
    prompts = source_code(LENGTHS)
    settings = {"model": str(target), "async_scheduling": True, "lora_target_modules": MODULES}
    # Fewer than the nodes of a tree for each of as many requests as there may be.
    settings |= {"max_num_seqs": 8, "max_num_batched_tokens": 40}
    if graphs:
        settings |= {"enforce_eager": False, **GRAPHS}
    (plain, _) = run_alone(play, settings, adapters, prompts)
    (drafted, _) = run_alone(play, settings | speculative(draft, [2, 4, 4]), adapters, prompts)
    if ON_GPU:
        assert_equal_up_to_ties(plain, drafted)
    else:
        assert drafted["tokens"] == plain["tokens"]
    # Each adapter has its say: the same prompts with another one go on otherwise.
    first, second = plain["tokens"][: len(REQUESTS)], plain["tokens"][len(REQUESTS) :]
    assert all(one != other for one, other in zip(first, second, strict=True))
    steps = drafted["metrics"]["vllm:spec_decode_num_drafts"]
    assert drafted["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0.5 * steps
