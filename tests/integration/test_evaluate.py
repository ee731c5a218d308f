# SPDX-License-Identifier: Apache-2.0
"""The walk over stored answers against an engine, step by step."""

import argparse
import json
from copy import deepcopy
from dataclasses import replace

import torch

from benchmarks import PAIR
from benchmarks.training.acceptance import generate, load_prompts
from benchmarks.training.target import load_target
from vllm_longspec.training import evaluate
from vllm_longspec.training.continuations import Part
from vllm_longspec.training.draft import TargetVocabulary, load_draft
from vllm_longspec.training.engine import run_engine
from vllm_longspec.training.predict import Predictor
from vllm_longspec.training.sampling import Sampling
from vllm_longspec.training.teachers import Sample
from vllm_longspec.training.teachers.hf import HfTeacher
from vllm_longspec.tree.coupling import LevelNoise, TargetNoise, noised_logits

PROMPT_LENGTH, TOKENS, NODES, COPY_LENGTH, SEED = 150, 30, 40, 12, 5
LENGTH = PROMPT_LENGTH + TOKENS + COPY_LENGTH
SAMPLING = Sampling(0.8, top_k=40)


class WithNoiseOfVllm(Predictor):
    """Knows the seed of the one request that it walks."""

    def draw_noise(self, lesson, part, position):
        noise = TargetNoise(torch.ones(1), torch.tensor([SEED]), torch.tensor([-torch.inf]), use_fp64=False)
        level = LevelNoise(noise, torch.tensor([0]), torch.tensor([position]), 0)
        return noised_logits(torch.zeros(1, self.target.head(lesson.hidden[:1]).shape[-1]), level, None)[0]


def test_the_walk_takes_the_steps_of_an_engine_with_copies_a_part_of_the_cache_and_noise(tmp_path, monkeypatch):
    prompts = load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", 3, "cpu")
    prompt_ids = prompts[2048][:, 400 : 400 + PROMPT_LENGTH]
    with torch.inference_mode():
        texts = generate(load_target(PAIR / "target"), prompt_ids[:2], LENGTH - PROMPT_LENGTH, 0.0, torch.Generator())
    data = tmp_path / "data.jsonl"
    loss_mask = [index >= PROMPT_LENGTH for index in range(LENGTH)]
    data.write_text("".join(f"{json.dumps({'input_ids': ids, 'loss_mask': loss_mask})}\n" for ids in texts.tolist()))
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    argv = ["--target", str(PAIR / "target"), "--draft", str(PAIR / "draft"), "--data", str(data), "--contexts", "1k"]
    argv += ["--tokens", str(TOKENS), "--nodes", str(NODES), "--copy-length", str(COPY_LENGTH), "--device", "cpu"]
    argv += ["--cross-attention-budget", "48"]
    argv += ["--engine-args", json.dumps({"gpu_memory_utilization": 0.1, "block_size": 32})]
    evaluation = evaluate.prepare(parser.parse_args(argv))
    drawn: list[list[dict]] = []

    def run_more(settings, runs):
        """The command's own run, then another request, asked for once more to know how its text goes on."""
        another = {
            "prompts": [prompt_ids[2].tolist()],
            "sampling": {**SAMPLING._asdict(), "seed": SEED, "ignore_eos": True},
        }
        others = [{**another, "max_tokens": [number]} for number in (TOKENS, LENGTH - PROMPT_LENGTH)]
        *own, first, again = run_engine(settings, [*runs, *others])
        drawn.extend([first, again])
        return own

    monkeypatch.setattr(evaluate, "run_engine", run_more)
    monkeypatch.setattr(
        evaluate, "engine_settings", lambda each, _, original=evaluate.engine_settings: original(each, LENGTH)
    )
    (served,) = evaluate.serve(evaluation)
    (walked,), _ = evaluate.predict(evaluation)
    assert [each.accepted for each in walked] == [each["accepted"] for each in served]
    assert [text[PROMPT_LENGTH:][:TOKENS] for text in texts.tolist()] == [each["token_ids"] for each in served]
    # Beyond the tree: copies are accepted.
    assert len(evaluation.drafting.shape.levels) < max(max(each.accepted) for each in walked)

    # What copies are worth has been learned from these.
    vocabulary = TargetVocabulary.of(evaluation.shared, "cpu", torch.float32)
    glide = load_draft(evaluation.checkpoint, evaluation.config, "cpu")
    ids = torch.cat((prompt_ids[2], torch.tensor(drawn[1][0]["token_ids"])))
    assert ids[PROMPT_LENGTH:][:TOKENS].tolist() == drawn[0][0]["token_ids"]
    samples = [Sample(each, torch.tensor(loss_mask), torch.arange(LENGTH)) for each in (*texts, ids)]
    *before, lesson = HfTeacher(evaluation.shared, "cpu", torch.float32).teach(samples)
    learning = Predictor(vocabulary, glide, evaluation.drafting, Sampling(0.0))
    for each, part in zip(before, evaluation.parts, strict=True):
        learning.steps(each, part)
    part = Part(2, PROMPT_LENGTH, LENGTH, 0, 0)
    trust = learning.trust
    predictor = WithNoiseOfVllm(vocabulary, glide, evaluation.drafting, SAMPLING, trust=deepcopy(trust))
    accepted = predictor.steps(lesson, part).accepted
    assert accepted == drawn[0][0]["accepted"]
    # Without the part, or without the noise, they are others.
    for drafting in (replace(evaluation.drafting, part=None), replace(evaluation.drafting, couple_noise=False)):
        other = WithNoiseOfVllm(vocabulary, glide, drafting, SAMPLING, trust=deepcopy(trust))
        assert other.steps(lesson, part).accepted != accepted
