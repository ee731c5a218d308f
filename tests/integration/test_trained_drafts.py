# SPDX-License-Identifier: Apache-2.0
"""From prompts to serving, with the commands that a user runs, for a small target of every family.

The target answers, a draft is trained with its answers, and is served: the tokens stay the target's, and more of them
come in a step than with the draft's first weights, whose steps are predicted as `evaluate` does it. Of the trained
draft the engine takes the very steps that are predicted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import CPU_SETTINGS, SETTINGS, generate, request
from tests.models import GLIDE_ARCHITECTURES, write_target
from tests.process import run_alone
from vllm_longspec.commands import main
from vllm_longspec.training import evaluate
from vllm_longspec.training.checkpoints import write_draft
from vllm_longspec.training.config import build
from vllm_longspec.training.target import load_shared
from vllm_longspec.training.train import first_weights

PROMPT_LENGTH, ANSWER_LENGTH, NUM_TRAINED, NUM_HELD_OUT = 8, 42, 64, 4
# All nodes of the tree are verified, and none is copied.
TREE = [4, 4]
ENGINE = SETTINGS if torch.cuda.is_available() else SETTINGS | CPU_SETTINGS
# Without a setting a Mistral has a sliding window. A Granite with large embeddings says little more than what its head
# makes of a token's embedding, which no draft needs to learn.
SETTINGS_OF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "granite": {"embedding_multiplier": 0.5, "residual_multiplier": 0.8},
}
TRAINING = ["stages=[{steps: 30, learning_rate: 2e-2}]", "tokens_per_batch=600", "report.steps=10", "device=cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def write_prompts(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 64, (NUM_TRAINED + NUM_HELD_OUT, PROMPT_LENGTH), generator=generator)
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts.tolist()))
    return path


def write_untrained(path: Path, target: Path) -> Path:
    shared = load_shared(str(target))
    glide = first_weights(build({"target": str(target), "data": ["x"], "out": "x"}), shared)
    path.mkdir()
    write_draft(path, shared.draft_config(torch.float32), glide.state_dict(), torch.float32)
    return path


def prepared(target: Path, draft: Path, data: Path) -> evaluate.Evaluation:
    """All of the answers that leave room for a whole step at their ends."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    argv = ["--target", str(target), "--draft", str(draft), "--data", str(data), "--device", "cpu", "--contexts", "64"]
    argv += ["--tokens", str(ANSWER_LENGTH - len(TREE)), "--copy-length", "0", "--nodes", str(sum(TREE))]
    return evaluate.prepare(parser.parse_args([*argv, "--tree-shape", *map(str, TREE)]))


def predicted(evaluation: evaluate.Evaluation) -> list[int]:
    """Nodes that each step accepts."""
    (steps,), _ = evaluate.predict(evaluation)
    return [accepted for each in steps for accepted in each.accepted]


@pytest.mark.parametrize("family", sorted(GLIDE_ARCHITECTURES))
def test_a_family_from_prompts_to_serving(tmp_path, family):
    # Smaller weights than other tests have: texts that a draft learns from few of them. No token ends an answer.
    settings = {"initializer_range": 0.05, "eos_token_id": [], **SETTINGS_OF.get(family, {})}
    target = write_target(tmp_path / "target", family, **settings)
    prompts, data, draft = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "data", tmp_path / "draft"
    command = ["generate", "--target", str(target), "--prompts", str(prompts), "--out", str(data)]
    command += ["--temperature", "0", "--max-tokens", str(ANSWER_LENGTH), "--shard-size", str(NUM_TRAINED)]
    run_alone(main, [*command, "--engine", json.dumps(ENGINE)])
    trained_with, held_out = sorted(data.glob("*.jsonl"))

    command = ["train", "--target", str(target), "--data", str(trained_with), "--out", str(draft)]
    main([*command, "--set", *TRAINING, f"held_out.data={held_out}"])
    assert json.loads((draft / "config.json").read_text())["architectures"] == [GLIDE_ARCHITECTURES[family]]

    evaluation = prepared(target, draft, held_out)
    answers = [json.loads(line)["input_ids"] for line in held_out.read_text().splitlines()]
    assert len(evaluation.parts) == len(answers) == NUM_HELD_OUT
    num_tokens = ANSWER_LENGTH - len(TREE)
    batch = [request(ids[:PROMPT_LENGTH], temperature=0.0, max_tokens=num_tokens) for ids in answers]
    speculation = {"model": str(draft), "tree_shape": TREE, "copy_length": 0, "adapt_nodes": False}
    served = generate(target, [batch], speculative_config=speculation)
    assert served.tokens[0] == [ids[PROMPT_LENGTH:][:num_tokens] for ids in answers]

    trained = predicted(evaluation)
    assert (served.num_drafts, served.num_accepted_tokens) == (len(trained), sum(trained))
    untrained = predicted(prepared(target, write_untrained(tmp_path / "untrained", target), held_out))
    assert served.acceptance_length > 1 + sum(untrained) / len(untrained) + 0.3
