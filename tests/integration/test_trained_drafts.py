# SPDX-License-Identifier: Apache-2.0
"""A draft that was trained here is served: the tokens stay the target's, and more of them come in a step."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine import generate, request
from tests.models import write_target
from vllm_longspec.commands import main
from vllm_longspec.training.checkpoints import write_draft
from vllm_longspec.training.config import build
from vllm_longspec.training.target import load_shared
from vllm_longspec.training.train import first_weights

NEW_TOKENS = 24


def answers(target, num_prompts, num_tokens):
    """Prompts with the target's own continuations: int64 [num_prompts, num_tokens], prompts of 8 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    prompts = torch.randint(3, 64, (num_prompts, 8))
    # Whatever ends a text is a token like others here.
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_length=num_tokens, eos_token_id=[99]
    )


@pytest.mark.parametrize("family", ["qwen3"])
def test_a_trained_draft_is_accepted_more_and_changes_nothing(tmp_path, family):
    target = write_target(tmp_path / "target", family, initializer_range=0.15)
    texts = answers(target, 84, 72)
    lines = [{"input_ids": text, "loss_mask": [0] * 8 + [1] * 64} for text in texts[4:].tolist()]
    data = tmp_path / "answers.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    out = tmp_path / "draft"
    settings = ["stages=[{steps: 50, learning_rate: 3e-3}]", "tokens_per_batch=1152", "held_out.samples=4"]
    main(["train", "--target", str(target), "--data", str(data), "--out", str(out), "--set", *settings])

    shared = load_shared(str(target))
    first = first_weights(build({"target": str(target), "data": ["x"], "out": "x"}), shared)
    (tmp_path / "untrained").mkdir()
    write_draft(tmp_path / "untrained", shared.draft_config(torch.float32), first.state_dict(), torch.float32)

    prompts = texts[:4, :8].tolist()
    batch = [request(prompt, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True) for prompt in prompts]
    batch += [request(prompt, temperature=1.0, seed=5, max_tokens=NEW_TOKENS, ignore_eos=True) for prompt in prompts]

    def served(draft):
        speculation = {"model": str(draft), "tree_shape": [4, 4], "copy_length": 0, "adapt_nodes": False}
        return generate(target, [batch], speculative_config=speculation)

    plain = generate(target, [batch])
    untrained, trained = served(tmp_path / "untrained"), served(out)
    assert trained.tokens == plain.tokens == untrained.tokens
    assert trained.acceptance_length > untrained.acceptance_length + 0.3
