# SPDX-License-Identifier: Apache-2.0
"""What users ask of requests, each held against the same engine without a draft: what is emitted, why it ended, how
likely it was, and in what order requests were served.

One engine with a draft and one without play the same scenes. The one with a draft schedules asynchronously.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_lossless import PAIR, speculative
from tests.integration.test_magicdec import magicdec
from tests.models import write_agreeing_pair
from tests.stepping_engine import play

# One process has the engines of all tests.
pytestmark = pytest.mark.xdist_group("features")

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 12}
# Text that strays from the likeliest path of a tree, where a node's row would not be its place in the text.
STRAYING = {**SEEDED, "temperature": 1.3}
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
# LM Format Enforcer, the fourth, takes no speculation of any kind.
BACKENDS = ("xgrammar", "guidance", "outlines")


def token_ids(text: str) -> list[int]:
    """Token ids of characters."""
    vocabulary = json.loads((PAIR / "target" / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[character] for character in text]


# What the pair says: single characters, so that a draft may well fit a grammar.
SPOKEN = token_ids('abcdefghijklmnopqrstuvwxyz"{}:,.0123456789_()')
# Ends a request that does not say otherwise.
(EOS,) = token_ids("q")
(REASONING_END,) = token_ids("w")

BAD_WORDS = ["1qy", "4wb", "wbu", "qyw", "bu4", "n:1", "u4w", ":1q", "bu,"]


def prompt(length: int) -> list[int]:
    """Another one for every length."""
    source = random.Random(length)
    return [source.choice(SPOKEN) for _ in range(length)]


def scene_of_mode(mode: str) -> dict[str, Any]:
    samplings = {
        "logprobs=0": {**GREEDY, "logprobs": 0},
        "logprobs=5": {**SEEDED, "temperature": 0.9, "logprobs": 5, "top_k": 20},
        "prompt_logprobs": {**GREEDY, "prompt_logprobs": 2, "logprobs": 1},
        "logprobs with a penalty": {**GREEDY, "presence_penalty": 0.5, "logprobs": 2},
        "none": SEEDED,
    }
    running: dict[str, Any] = {
        name: {"prompt": prompt(5 + number), "sampling": {**sampling, "max_tokens": 8}}
        for number, (name, sampling) in enumerate(samplings.items())
    }
    return {"logprobs_mode": mode, "running": running}


def scene_of_backend(backend: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    structured = {
        "json": {"json": schema},
        # What may come next depends on how much has come, so a wrong place in the text is a wrong mask.
        "regex": {"regex": r"([a-z]{3}[0-9_]){2,6}"},
        "choice": {"choice": ["wbu4wbu", "wbu4:1qyw", "x4rapin"]},
        "grammar": {"grammar": 'root ::= name "(" name ")"\nname ::= [a-z] [a-z0-9]*'},
    }
    if backend == "guidance":
        structured["grammar"] = {"grammar": 'start: NAME "(" NAME ")"\nNAME: /[a-z][a-z0-9]*/'}
    if backend == "outlines":
        # It has none.
        del structured["grammar"]
    straying = {**STRAYING, "seed": 3, "max_tokens": 14}
    running: dict[str, Any] = {
        name: {
            "prompt": prompt(39 if name == "regex" else 10 + number),
            "sampling": {
                **(straying if name == "regex" else GREEDY),
                "ignore_eos": False,
                "structured_outputs": value,
            },
        }
        for number, (name, value) in enumerate(structured.items())
    }
    # No grammar, and one that any text fits.
    running["free"] = {"prompt": prompt(20), "sampling": SEEDED}
    running["any"] = {"prompt": prompt(20), "sampling": {**SEEDED, "structured_outputs": {"regex": r"[\s\S]*"}}}
    return {"structured_outputs_backend": backend, "running": running}


def scene_of_reasoning() -> dict[str, Any]:
    """Grammars that begin where reasoning ends, which is in the middle of a draft as often as not."""
    running: dict[str, Any] = {
        f"request {number}": {
            "prompt": [token for token in prompt(50 + number) if token != REASONING_END],
            "sampling": {**SEEDED, "seed": number, "max_tokens": 16, "structured_outputs": {"regex": "[0-9a-f]{16}"}},
        }
        for number in range(4)
    }
    return {"structured_outputs_backend": "xgrammar", "reasoning_end": "w", "running": running}


def scene_of_requests() -> dict[str, Any]:
    """Ends, streams, hang-ups and several outputs of one request."""
    ends = prompt(30)
    stops = prompt(31)
    streamed = {"output_kind": "DELTA", "detokenize": True}
    running = {
        "eos": (ends, {**GREEDY, "ignore_eos": False}),
        "ignore_eos": (ends, GREEDY),
        "min_tokens": (ends, {**GREEDY, "ignore_eos": False, "min_tokens": 6}),
        "n": (prompt(32), {**SEEDED, "n": 3}),
        "stop": (stops, {**GREEDY, "stop": ["xx", "b"], "detokenize": True}),
        "stop_token_ids": (stops, {**SEEDED, "stop_token_ids": token_ids("ghw1")}),
        "whole": (prompt(33), {**SEEDED, "logprobs": 1, "detokenize": True}),
        "stream": (prompt(33), {**SEEDED, **streamed, "logprobs": 1}),
        "stream with stop": (stops, {**GREEDY, **streamed, "stop": ["b"], "include_stop_str_in_output": True}),
        "allowed_token_ids": (prompt(34), {**GREEDY, "allowed_token_ids": SPOKEN[:20]}),
        "logit_bias": (prompt(35), {**SEEDED, "logit_bias": {str(SPOKEN[0]): 3.0, str(SPOKEN[1]): -4.0}}),
        "bad_words": (prompt(38), {**STRAYING, "seed": 2, "max_tokens": 14, "bad_words": BAD_WORDS}),
        "penalties": (prompt(37), {**STRAYING, "presence_penalty": 2.0, "frequency_penalty": 1.0}),
    }
    long = {**GREEDY, "max_tokens": 60}
    arriving = {
        "abort": {"prompt": prompt(38), "sampling": long, "abort_after": 5},
        "abort with a penalty": {"prompt": prompt(39), "sampling": {**long, "presence_penalty": 0.5}, "abort_after": 5},
    }
    search = {"beam_width": 3, "max_tokens": 5, "ignore_eos": True}
    return {
        "logprobs_mode": "raw_logprobs",
        "running": {name: {"prompt": each, "sampling": sampling} for name, (each, sampling) in running.items()},
        "arriving": arriving,
        "beams": {"beams": {"prompt": prompt(8), "search": search}},
    }


def scene_of_priorities() -> dict[str, Any]:
    """More requests than places, and than blocks: who matters less waits, and gives its place back."""
    running = {
        f"priority {number}": {
            "prompt": prompt(52 + number),
            "sampling": SEEDED if number % 2 else GREEDY,
            "priority": number,
        }
        for number in range(8)
    }
    arriving = {
        "late": {"prompt": prompt(40), "sampling": GREEDY, "priority": 9},
        "urgent": {"prompt": prompt(41), "sampling": GREEDY, "priority": -1},
    }
    return {"running": running, "arriving": arriving}


SCENES = {
    **{mode: scene_of_mode(mode) for mode in LOGPROBS_MODES},
    **{backend: scene_of_backend(backend) for backend in BACKENDS},
    "reasoning": scene_of_reasoning(),
    "requests": scene_of_requests(),
    "priorities": scene_of_priorities(),
}

SETTINGS = {
    "skip_tokenizer_init": False,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    # Eight requests of 52 tokens and more need all of them, and one more block each when they come to 64.
    "num_gpu_blocks_override": 18,
    "scheduling_policy": "priority",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    target, draft = write_agreeing_pair(tmp_path_factory.mktemp("pair"), PAIR / "target", SPOKEN)
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": EOS}))
    return target, draft


@pytest.fixture(scope="module")
def plain(pair) -> dict[str, Any]:
    return play(list(SCENES.values()), model=str(pair[0]), **SETTINGS)


@pytest.fixture(scope="module", params=["glide", "magicdec"])
def drafted(request, pair) -> dict[str, Any]:
    # A part so small that drafts are wrong now and then.
    method = speculative(pair[1], [2, 4]) if request.param == "glide" else magicdec(gamma=4, sinks=1, budget=5)
    options = method | {"async_scheduling": True, "per_request_spec_decode_metrics": "summary"}
    return play(list(SCENES.values()), model=str(pair[0]), **SETTINGS, **options)


def scene(result: dict[str, Any], name: str) -> dict[str, Any]:
    return result["scenes"][list(SCENES).index(name)]


def assert_same(plain: dict[str, Any], drafted: dict[str, Any], name: str, requests: list[str] | None = None) -> None:
    """That these requests of a scene, or all, got the same outputs."""
    one, other = scene(plain, name)["requests"], scene(drafted, name)["requests"]
    assert scene(plain, name)["errors"] == scene(drafted, name)["errors"] == {}
    for request in requests or one:
        assert one[request]["finished"] and other[request]["finished"], request
        assert_same_logprobs(one[request]["prompt_logprobs"], other[request]["prompt_logprobs"], request)
        for expected, found in zip(one[request]["outputs"], other[request]["outputs"], strict=True):
            for column in ("tokens", "text", "reason"):
                assert found[column] == expected[column], request
            assert_same_logprobs(expected["logprobs"], found["logprobs"], request)


def assert_same_logprobs(expected: list[dict[str, float]] | None, found: list[dict[str, float]] | None, request: str):
    assert (found is None) == (expected is None), request
    for one, other in zip(expected or [], found or [], strict=True):
        assert other == pytest.approx(one, abs=1e-3), request


def num_accepted(output: dict[str, Any]) -> int:
    return output["metrics"]["num_accepted_draft_tokens"] if output["metrics"] else 0


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_logprobs(plain, drafted, mode):
    assert_same(plain, drafted, mode)
    requests = scene(drafted, mode)["requests"]
    # Tokens of the depths of a tree, and not only of roots.
    assert all(num_accepted(each["outputs"][0]) > 0 for each in requests.values())
    lengths = {
        name: {len(position) for position in each["outputs"][0]["logprobs"] or []} for name, each in requests.items()
    }
    # The token that was drawn may be one more.
    assert lengths["logprobs=0"] == {1} and lengths["logprobs=5"] <= {5, 6} and lengths["none"] == set()
    assert (
        len(requests["prompt_logprobs"]["prompt_logprobs"])
        == len(SCENES[mode]["running"]["prompt_logprobs"]["prompt"]) - 1
    )


def test_the_modes_of_logprobs_differ(plain):
    found = [scene(plain, mode)["requests"]["logprobs=5"]["outputs"][0] for mode in LOGPROBS_MODES]
    assert all(each["tokens"] == found[0]["tokens"] for each in found)
    first = [each["logprobs"][0][str(each["tokens"][0])] for each in found]
    assert len(set(first)) == len(LOGPROBS_MODES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_structured_output(plain, drafted, backend):
    assert_same(plain, drafted, backend)
    for result in (plain, drafted):
        assert scene(result, backend)["backend"] == f"{backend.capitalize()}Backend"
    requests = scene(drafted, backend)["requests"]
    free, any_text = (requests.pop(name)["outputs"][0] for name in ("free", "any"))
    # With a grammar a tree gives as much as without.
    assert any_text["tokens"] == free["tokens"] and any_text["metrics"] == free["metrics"]
    assert num_accepted(free) > 0
    assert sum(num_accepted(each["outputs"][0]) for each in requests.values()) > 3


def test_structured_output_after_reasoning(plain, drafted):
    assert_same(plain, drafted, "reasoning")
    outputs = [each["outputs"][0] for each in scene(drafted, "reasoning")["requests"].values()]
    hexadecimal = set(token_ids("0123456789abcdef"))
    constrained, ends = [], set()
    for tokens in (output["tokens"] for output in outputs):
        end = tokens.index(REASONING_END) + 1 if REASONING_END in tokens else len(tokens)
        ends.add(end)
        assert set(tokens[end:]) <= hexadecimal
        constrained += tokens[end:]
        # Before, anything goes.
        assert not set(tokens[:end]) <= hexadecimal
    assert len(constrained) > 24 and len(ends) > 3
    assert sum(map(num_accepted, outputs)) > 8


def test_ends(plain, drafted):
    assert_same(plain, drafted, "requests", ["eos", "ignore_eos", "min_tokens", "stop", "stop_token_ids"])
    outputs = {name: each["outputs"][0] for name, each in scene(drafted, "requests")["requests"].items()}
    assert outputs["eos"]["tokens"][-1] == EOS and outputs["eos"]["reason"] == "stop"
    # The same prompt goes on past it, or says it only when it may.
    assert EOS in outputs["ignore_eos"]["tokens"][:-1] and outputs["ignore_eos"]["reason"] == "length"
    assert len(outputs["eos"]["tokens"]) < 6 <= len(outputs["min_tokens"]["tokens"]) < 12
    assert outputs["min_tokens"]["tokens"][-1] == EOS
    assert outputs["stop"]["reason"] == outputs["stop_token_ids"]["reason"] == "stop"
    assert len(outputs["stop"]["tokens"]) > 2 and "b" not in outputs["stop"]["text"]


def test_several_outputs_and_other_samplings(plain, drafted):
    names = ["n", "allowed_token_ids", "logit_bias", "bad_words", "penalties"]
    assert_same(plain, drafted, "requests", names)
    requests = scene(drafted, "requests")["requests"]
    assert len({tuple(output["tokens"]) for output in requests["n"]["outputs"]}) == 3
    outputs = [output for name in names for output in requests[name]["outputs"]]
    assert all(num_accepted(output) > 0 for output in outputs)
    # More nodes than the tree is deep.
    assert all(output["metrics"]["num_draft_tokens"] > 3 * output["metrics"]["num_spec_steps"] for output in outputs)


def test_streams(plain, drafted):
    assert_same(plain, drafted, "requests", ["whole", "stream", "stream with stop"])
    requests = scene(drafted, "requests")["requests"]
    whole, stream, stopped = (requests[name]["outputs"][0] for name in ("whole", "stream", "stream with stop"))
    for column in ("tokens", "text", "reason"):
        assert stream[column] == whole[column]
    assert_same_logprobs(whole["logprobs"], stream["logprobs"], "stream")
    assert stopped["reason"] == "stop" and stopped["text"].endswith("b")
    # In pieces, some of them of several tokens.
    for output in (stream, stopped):
        assert 1 < output["pieces"] < len(output["tokens"])


def test_abort_in_mid_stream(plain, drafted):
    for name in ("abort", "abort with a penalty"):
        (expected,), (found,) = (scene(result, "requests")["requests"][name]["outputs"] for result in (plain, drafted))
        assert found["reason"] is None
        assert 5 <= len(found["tokens"]) <= 5 + 2
        shorter = min(len(expected["tokens"]), len(found["tokens"]))
        assert found["tokens"][:shorter] == expected["tokens"][:shorter]
    # Nothing of them is left, and all others went on: see the other tests.
    assert drafted["counted"]["vllm:kv_cache_usage_perc"] == 0
    assert drafted["counted"]["vllm:num_requests_running"] == 0


def test_beam_search(plain, drafted):
    one, other = (scene(result, "requests")["beams"]["beams"] for result in (plain, drafted))
    assert [beam["tokens"] for beam in other] == [beam["tokens"] for beam in one]
    assert [beam["logprob"] for beam in other] == pytest.approx([beam["logprob"] for beam in one], abs=1e-3)
    assert len(one) == 3


def test_priorities(plain, drafted):
    """Of two requests that wait the one that matters more comes first; blocks are taken from those that matter less."""
    assert_same(plain, drafted, "priorities")
    requests = scene(drafted, "priorities")["requests"]
    assert requests["urgent"]["first_step"] < requests["late"]["first_step"]
    assert drafted["counted"]["vllm:num_preemptions"] > 0
    assert all(num_accepted(each["outputs"][0]) > 0 for each in requests.values())
