# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot be served and requests at the edges, among others that run: with a draft as without."""

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import generate
from tests.integration.test_lossless import PAIR, assert_lossless, batches, random_prompts, source_code, speculative
from tests.models import write_draft, write_target
from tests.stepping_engine import play

# One process has the engines of all tests.
pytestmark = pytest.mark.xdist_group("requests")

MAX_MODEL_LEN = 160
VOCAB_SIZE = 4096
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
SHAPE = [2, 4, 4, 4]
# A copied path may be as deep as there are nodes.
MAX_DEPTH = sum(SHAPE)


def run(**settings: object) -> dict:
    """Serves the requests below, each while others run."""
    prompts = source_code((100, 140, 60, 159, 80))
    sampled = {"max_tokens": 32, "ignore_eos": True}
    running = {
        "greedy": {"prompt": prompts[0], "sampling": {**GREEDY, "max_tokens": 40}},
        "sampled": {"prompt": prompts[1], "sampling": {"temperature": 0.7, "seed": 3, **sampled}},
        "straying": {"prompt": prompts[2], "sampling": {"temperature": 1.0, "seed": 4, "top_p": 0.9, **sampled}},
        "penalty": {"prompt": prompts[4], "sampling": {**GREEDY, "max_tokens": 32, "presence_penalty": 0.5}},
        "grammar": {
            "prompt": prompts[4],
            "sampling": {**GREEDY, "max_tokens": 32, "structured_outputs": {"regex": r"(.|\n){200}"}},
        },
    }
    long = (prompts[3] * 2)[: MAX_MODEL_LEN + 1]
    refused = {
        "empty": [],
        "exactly max_model_len": long[:MAX_MODEL_LEN],
        "longer than max_model_len": long,
        "first id out of range": [5, VOCAB_SIZE, 7],
        "id of 33 bits": [5, 2**32, 7],
        "negative id": [-1, 5],
    }
    edges = {
        "one token": ([9], GREEDY),
        "one token to come": (prompts[2], {**GREEDY, "max_tokens": 1}),
        "room for one token": (long[: MAX_MODEL_LEN - 1], GREEDY),
        "room for two tokens": (long[: MAX_MODEL_LEN - 2], GREEDY),
        "last id": ([5, VOCAB_SIZE - 1, 7], GREEDY),
        "one token twice": ([9], {"temperature": 1.0, "seed": 1, "max_tokens": 1}),
    }
    # In turns, so that what is refused comes between what is not.
    arriving = {}
    for (bad, prompt), (good, (edge, sampling)) in zip(refused.items(), edges.items(), strict=True):
        arriving[bad] = {"prompt": prompt, "sampling": GREEDY}
        arriving[good] = {"prompt": edge, "sampling": sampling}
    arriving["no token to come"] = {"prompt": prompts[2], "sampling": {"max_tokens": 0}}

    settings = {
        "model": str(PAIR / "target"),
        "skip_tokenizer_init": False,
        "max_model_len": MAX_MODEL_LEN,
        **settings,
    }
    played = play([{"running": running, "arriving": arriving}], **settings)
    (scene,) = played.pop("scenes")
    return scene | played


@pytest.fixture(scope="module")
def plain() -> dict:
    return run()


@pytest.fixture(scope="module")
def drafted() -> dict:
    options = speculative(PAIR / "draft", SHAPE)
    return run(per_request_spec_decode_metrics="detailed", **options)


def test_refusals_are_vllms_own(plain, drafted):
    assert drafted["errors"] == plain["errors"]
    assert plain["errors"].keys() == {
        "empty",
        "exactly max_model_len",
        "longer than max_model_len",
        "first id out of range",
        "id of 33 bits",
        "negative id",
        "no token to come",
    }


def test_all_others_are_served_as_without_a_draft(plain, drafted):
    def outputs(result: dict) -> dict:
        assert all(each["finished"] for each in result["requests"].values())
        return {
            name: [(output["tokens"], output["reason"]) for output in each["outputs"]]
            for name, each in result["requests"].items()
        }

    assert outputs(drafted) == outputs(plain)
    assert len(outputs(plain)) == 11
    lengths = {name: len(tokens) for name, ((tokens, _),) in outputs(plain).items()}
    assert lengths["one token to come"] == lengths["room for one token"] == 1
    assert lengths["room for two tokens"] == 2
    assert drafted["counted"]["vllm:kv_cache_usage_perc"] == 0


def test_metrics_count_by_depth(drafted):
    counted = drafted["counted"]
    drafts, accepted = counted["vllm:spec_decode_num_drafts"], counted["vllm:spec_decode_num_accepted_tokens"]
    by_depth = counted["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert len(by_depth) == MAX_DEPTH
    # A node is accepted only with its parent.
    assert drafts >= by_depth[0] and by_depth == sorted(by_depth, reverse=True) and by_depth[-1] > 0
    assert sum(by_depth) == accepted
    assert drafts < counted["vllm:spec_decode_num_draft_tokens"] <= sum(SHAPE) * drafts

    requests = {name: each["outputs"][0]["metrics"] for name, each in drafted["requests"].items()}
    assert sum(each["num_spec_steps"] for each in requests.values()) == drafts
    assert sum(each["num_accepted_draft_tokens"] for each in requests.values()) == accepted
    assert sum(each["num_draft_tokens"] for each in requests.values()) == counted["vllm:spec_decode_num_draft_tokens"]
    assert {len(each["acceptance_histogram"]) for each in requests.values()} == {1 + MAX_DEPTH}
    for name in ("greedy", "penalty", "grammar"):
        assert requests[name]["num_draft_tokens"] > 10 * requests[name]["num_spec_steps"], name

    # vLLM logs every few seconds what has come since the line before.
    lines = [line for line in drafted["log"] if "SpecDecoding metrics" in line]
    assert sum(int(re.findall(r"Accepted: (\d+) tokens", line)[0]) for line in lines) == accepted
    for line in lines:
        rates = [float(rate) for rate in re.findall(r"Per-position acceptance rate: (.*), Avg", line)[0].split(", ")]
        assert len(rates) == MAX_DEPTH
        mean = float(re.findall(r"Mean acceptance length: ([\d.]+),", line)[0])
        assert mean == pytest.approx(1 + sum(rates), abs=0.01)


def test_start_up_says_what_is_served(drafted):
    (line,) = [line for line in drafted["log"] if "Proposer glide: " in line]
    assert "tree shape [2, 4, 4, 4], 14 of 14 nodes verified, up to 16 tokens copied, " in line
    assert f"text {4 * MAX_MODEL_LEN} bytes per request" in line
    assert "4096 of 4096 tokens drafted, " in line
    # 512 positions of K and V in float32.
    config = json.loads((PAIR / "target" / "config.json").read_text())
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    assert f"draft state {512 * 2 * config['num_key_value_heads'] * head_size * 4} bytes per request" in line
    assert line.endswith(" GiB in all)")


def test_a_draft_of_nan_costs_nothing_but_acceptance(tmp_path):
    """NaN in every weight of one matrix, infinity in another: nothing of it reaches the target."""
    target = write_target(tmp_path / "target", "llama")
    draft = write_draft(tmp_path / "draft", target)
    weights = load_file(draft / "model.safetensors")
    weights["self_attn.k_proj.weight"].fill_(torch.nan)
    weights["mlp.down_proj.weight"][3] = torch.inf
    save_file(weights, draft / "model.safetensors")
    requests = batches(random_prompts(64, (1, 33, 60)), max_tokens=8)
    result = generate(target, requests, **speculative(draft, [2, 4, 4]))
    assert_lossless(generate(target, requests), result)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_nan_is_blamed_on_the_request_that_has_it(tmp_path, monkeypatch, drafts):
    """Of three requests the second says the token whose embedding is NaN; the engine says whose logits that spoils."""
    target = write_target(tmp_path / "target", "llama")
    weights = load_file(target / "model.safetensors")
    poison = 63
    weights["model.embed_tokens.weight"][poison] = torch.nan
    # So unlikely that nobody says or drafts it unless nothing else is allowed.
    weights["lm_head.weight"][poison] = 0.0
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    options = speculative(write_draft(tmp_path / "draft", target), [2, 2]) if drafts else {}
    running: dict[str, Any] = {
        name: {"prompt": prompt, "sampling": GREEDY}
        for name, prompt in zip(("first", "second", "third"), random_prompts(poison, (5, 20, 33)), strict=True)
    }
    running["second"]["sampling"] = {**GREEDY, "allowed_token_ids": [poison]}
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    with pytest.raises(AssertionError, match=r"NaNs detected in logits: \{'second[^,]*': \d+\}"):
        play([{"running": running}], model=str(target), **options)
