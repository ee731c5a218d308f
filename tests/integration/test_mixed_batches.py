# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind in one batch, all of them with trees."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.engine import Request, Result, generate, request
from tests.integration.test_magicdec import magicdec

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "seed": 5, "top_p": 0.95}
STRAYING = {"temperature": 1.0, "seed": 1, "top_p": 0.9}
PENALTIES = {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.05}

SAMPLINGS: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {**GREEDY, "prompt_logprobs": 2, "max_tokens": 8},
    "logprobs": {**GREEDY, "logprobs": 2, "max_tokens": 8},
    "logprob_token_ids": {**GREEDY, "logprob_token_ids": [199, 370, 15], "max_tokens": 8},
    "n": {**SEEDED, "n": 2},
    "min_p": {"temperature": 1.0, "seed": 6, "min_p": 0.1},
    "stop": {**GREEDY, "stop": ["("], "detokenize": True},
    "allowed_token_ids": {**GREEDY, "allowed_token_ids": list(range(3, 1000))},
    "min_tokens and logit_bias": {**SEEDED, "min_tokens": 8, "logit_bias": {"0": 4.0}},
}
# Of requests whose sampling reads the tokens before. Sampled text strays from the likeliest path of a tree, and then a
# node's row is not its place in the text.
HISTORY: dict[str, dict[str, Any]] = {
    "presence_penalty": {**GREEDY, "presence_penalty": 0.8},
    "frequency_penalty": {**STRAYING, "frequency_penalty": 2.0},
    "repetition_penalty": {**GREEDY, "repetition_penalty": 1.1},
    "all penalties": {**STRAYING, **PENALTIES, "n": 2, "logprobs": 1},
    "bad_words": {**GREEDY, "bad_words": ["self", "import numpy", "("]},
    **{f"thinking_token_budget of {budget}": {**STRAYING, "thinking_token_budget": budget} for budget in (6, 7)},
    "everything": {**STRAYING, **PENALTIES, "bad_words": ["self", "import numpy", "("], "thinking_token_budget": 5},
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "json": {
        **GREEDY,
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
                "required": ["name", "size"],
                "additionalProperties": False,
            }
        },
    },
    "seeded json": {**SEEDED, "structured_outputs": {"json_object": True}},
    "regex": {**SEEDED, "structured_outputs": {"regex": r"def [a-z_]+\(self(, [a-z]+){1,4}\):"}},
    "choice": {**GREEDY, "structured_outputs": {"choice": ["return self.name", "return self.value", "raise"]}},
    "grammar": {
        **GREEDY,
        "structured_outputs": {
            "grammar": 'root ::= "self." name " = " name ("." name)* "\\n"\nname ::= [a-z]+ ("_" [a-z]+)*'
        },
    },
    "regex with penalty": {**GREEDY, "frequency_penalty": 1.0, "structured_outputs": {"regex": "[a-z]+(, [a-z]+)*"}},
}

SETTINGS: dict[str, Any] = {
    # Grammars, bad words and stop strings are text.
    "skip_tokenizer_init": False,
    # Once the first token of the end is forced, the draft says the rest by itself: it is forced inside of trees.
    "reasoning_config": {"reasoning_start_str": "# think", "reasoning_end_str": "import numpy as np\n"},
    # Fewer than there are requests: those of one kind take the slots of another.
    "max_num_seqs": 12,
    "max_num_batched_tokens": 1024,
    "max_model_len": 128,
}


def prompts(count: int) -> list[list[int]]:
    """Held-out source code, of 16 tokens and more."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()[:count]
    return [tokenizer.encode(json.loads(line)["text"])[: 16 + 3 * i] for i, line in enumerate(lines)]


def mixed_batch() -> dict[str, Request]:
    """A request of each kind by turns."""
    from transformers import AutoTokenizer

    think = AutoTokenizer.from_pretrained(PAIR / "target").encode(SETTINGS["reasoning_config"]["reasoning_start_str"])
    samplings = {**SAMPLINGS, **HISTORY, **GRAMMARS}
    names = [name for some in zip_longest(SAMPLINGS, HISTORY, GRAMMARS) for name in some if name]
    return {
        name: request(
            prompt + (think if "thinking_token_budget" in samplings[name] else []),
            **{"max_tokens": 13, **samplings[name]},
        )
        for name, prompt in zip(names, prompts(len(names)), strict=True)
    }


def test_every_kind_of_request_in_one_batch():
    """All at once, also where the target drafts for itself; then those with a history or a grammar, scheduled
    asynchronously and preempted."""
    batch = mixed_batch()
    plain = generate(PAIR / "target", [list(batch.values())], **SETTINGS)
    expected = outputs_of(plain, batch)
    for name, sampling in HISTORY.items():
        if "thinking_token_budget" in sampling:
            assert_end_is_forced(expected[name]["tokens"][0], sampling["thinking_token_budget"])
    counted = SETTINGS | {"per_request_spec_decode_metrics": "summary"}
    itself = counted | magicdec(sinks=16, budget=16)
    check(batch, expected, generate(PAIR / "target", [list(batch.values())], **itself, async_scheduling=True))
    settings = counted | {"speculative_config": {"model": str(PAIR / "draft"), "tree_shape": [2, 4]}}
    check(batch, expected, generate(PAIR / "target", [list(batch.values())], **settings, async_scheduling=False))

    few = {name: batch[name] for name in ("n", "all penalties", "everything", *GRAMMARS)}
    # How many masks the host can fill decides what a step emits, and so whether a cache of a given size is too small.
    for num_blocks in (18, 12, 14, 10, 16):
        small = {"async_scheduling": True, "num_gpu_blocks_override": num_blocks}
        result = generate(PAIR / "target", [list(few.values())], **settings, **small)
        check(few, expected, result)
        if result.metrics["vllm:num_preemptions"] > 0:
            break
    else:
        pytest.fail("no request was preempted")


def assert_end_is_forced(tokens: list[int], budget: int) -> None:
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(PAIR / "target").encode(SETTINGS["reasoning_config"]["reasoning_end_str"])
    assert len(end) > 3
    # What may come before the end is cut short.
    assert tokens[budget : budget + len(end)] == end[: len(tokens) - budget]


def outputs_of(result: Result, batch: dict[str, Request]) -> dict[str, dict[str, list]]:
    """All that a batch gave, by the request's name: a list with an entry for each of its outputs."""
    outputs: dict[str, dict[str, list]] = {}
    first = 0
    for index, (name, each) in enumerate(batch.items()):
        last = first + dict(each.sampling).get("n", 1)
        columns = ("tokens", "finish_reasons", "logprobs", "acceptance_lengths")
        outputs[name] = {column: getattr(result, column)[0][first:last] for column in columns}
        outputs[name]["prompt_logprobs"] = [result.prompt_logprobs[0][index]]
        first = last
    return outputs


def check(batch: dict[str, Request], expected: dict[str, dict[str, list]], result: Result) -> None:
    found = outputs_of(result, batch)
    for name in batch:
        for column in ("tokens", "finish_reasons"):
            assert found[name][column] == expected[name][column], name
        for column in ("logprobs", "prompt_logprobs"):
            for at_plain, at_tree in zip(expected[name][column], found[name][column], strict=True):
                assert (at_tree is None) == (at_plain is None), name
                for one, other in zip(at_plain or [], at_tree or [], strict=True):
                    assert other == pytest.approx(one, abs=1e-3), name
    lengths = {name: found[name]["acceptance_lengths"][0] for name in batch}
    assert all(lengths[name] > 1 for name in HISTORY if name in batch), lengths
    # A grammar drops what the draft, which does not know it, says of other texts: None is that of a request whose every
    # draft was dropped before its first token.
    assert sum((lengths[name] or 1) > 1 for name in GRAMMARS) >= 3, lengths
