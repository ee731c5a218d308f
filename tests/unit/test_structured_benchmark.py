# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.structured` makes an engine say a text; the engines themselves take minutes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.worker.gpu.sample.sampler import Sampler

from benchmarks import grammars, structured
from tests.unit.test_grammar import tokenizer


def test_a_text_is_drawn_at_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the row's true position; other requests and rows past the text's end keep the target's tokens."""
    monkeypatch.setattr(Sampler, "add_request", lambda self, req_idx, sampling_params: None)
    monkeypatch.setattr(Sampler, "sample", lambda self, logits, *args, **kwargs: (logits.argmax(dim=1), None))
    structured.replay()
    prompt_lens = SimpleNamespace(gpu=torch.tensor([5, 3, 9]))
    sampler: Any = SimpleNamespace(req_states=SimpleNamespace(prompt_len=prompt_lens))
    Sampler.add_request(sampler, 2, SamplingParams(extra_args={structured.REPLAYED: [7, 8]}))
    Sampler.add_request(sampler, 1, SamplingParams())
    indices, positions = torch.tensor([1, 2, 2, 2, 2]), torch.tensor([4, 8, 9, 9, 10])
    unused: Any = None
    sampled, _ = Sampler.sample(
        sampler, torch.eye(5), indices, unused, unused, positions, unused, unused, unused, return_logprobs=False
    )
    assert sampled.tolist() == [0, 7, 8, 8, 4]
    # The place was taken by another request.
    Sampler.add_request(sampler, 2, SamplingParams())
    sampled, _ = Sampler.sample(
        sampler, torch.eye(5), indices, unused, unused, positions, unused, unused, unused, return_logprobs=False
    )
    assert sampled.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("schema", structured.SCHEMAS)
def test_schemas_are_grammars(schema: dict[str, Any]) -> None:
    backend = grammars.make_backend("xgrammar", tokenizer(), len(tokenizer()), 6)
    grammar = backend.compile_grammar(StructuredOutputOptions.JSON, json.dumps(schema), stop_token_ids={0})
    assert grammar.accept_tokens("", tokenizer().encode("{" if schema["type"] == "object" else "["))
