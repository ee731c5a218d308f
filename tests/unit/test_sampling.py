# SPDX-License-Identifier: Apache-2.0
"""Which requests take a chain."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_longspec.tree.chain import CHAIN_PARAMETERS, needs_chain

LINEAR: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "bad_words": ["no"],
    "thinking_token_budget": 0,
}


@pytest.mark.parametrize("name", CHAIN_PARAMETERS)
def test_draft_tokens_that_must_follow_each_other_are_a_chain(name):
    assert needs_chain(SamplingParams(**{name: LINEAR[name]}))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 1, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "n": 2},
        {"logit_bias": {3: 1.0}, "allowed_token_ids": [3, 4], "min_tokens": 5},
        {"logprobs": 3, "prompt_logprobs": 2, "stop_token_ids": [7], "ignore_eos": True},
        {"logprob_token_ids": [3], "stop": ["end"]},
        {"structured_outputs": StructuredOutputsParams(json_object=True)},
        {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
        {"bad_words": ["no"], "thinking_token_budget": 0},
        # what a client sends that sets every parameter
        {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "bad_words": []},
    ],
)
def test_everything_else_takes_a_tree(params):
    assert not needs_chain(SamplingParams(**params))
