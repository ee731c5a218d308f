# SPDX-License-Identifier: Apache-2.0
"""The comparison of recipes: what a step of a recipe holds, and one whole run for a target of two layers."""

import json
import lzma
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from benchmarks.training import recipes
from benchmarks.training.draft import RandomWindows
from benchmarks.training.target import load_target
from benchmarks.training.text import Windows
from tests.models import write_target
from vllm_longspec.proposers.glide.checkpoint import read_draft
from vllm_longspec.training.batches import Cursor
from vllm_longspec.training.config import TrainConfig

ARGUMENTS = ["--pair", "pair", "--data", "data"]


def drawn(batch_tokens, count):
    windows = Windows(torch.arange(100_000), torch.Generator().manual_seed(0))
    source = RandomWindows(windows, (2048, 4096, 16384), batch_tokens, 32768)
    steps = list(islice(source.steps(Cursor()), count))
    assert source.num_tokens == [step.num_tokens for step in steps]
    return [[len(sample.input_ids) for sample in step.batches[0]] for step in steps]


def test_a_window_that_is_longer_than_a_step_is_one_of_its_own():
    steps = drawn(8192, 600)
    assert {tuple(step) for step in steps} == {(2048,) * 4, (4096,) * 2, (16384,)}
    tokens: Counter[int] = Counter()
    for step in steps:
        tokens[step[0]] += sum(step)
    # As many tokens of each length as in large steps, not as many steps.
    assert all(0.29 < share / tokens.total() < 0.38 for share in tokens.values())
    assert {sum(step) for step in drawn(32768, 20)} == {32768}


def test_recipes_by_the_tokens_of_a_step(capsys):
    parsed = recipes.parse_arguments([*ARGUMENTS, "--recipes", "longspec", "longspec@8192", "default@4096"])
    assert parsed.recipes == [("longspec", None), ("longspec", 8192), ("default", 4096)]
    for wrong in ("longspecs", "default@", "default@0", "default@many"):
        with pytest.raises(SystemExit):
            recipes.parse_arguments([*ARGUMENTS, "--recipes", wrong])
        assert f"'{wrong}' is no recipe: give NAME or NAME@TOKENS" in capsys.readouterr().err


def test_the_default_is_the_tools_own():
    config = TrainConfig("target", ("data",), "out")
    for name, value in recipes.RECIPES["default"].items():
        assert getattr(config, name) == value, name


@pytest.mark.usefixtures("one_thread")
def test_own_answers_go_on_with_the_text_of_the_others(tmp_path):
    """Windows begin as those of other recipes, and what follows are the target's draws at temperature 1."""
    write_target(tmp_path / "pair" / "target", "qwen2", tied=True)
    target = load_target(tmp_path / "pair" / "target")
    ids = torch.from_numpy(np.random.default_rng(0).integers(64, size=2000))

    def windows(kind, *others):
        generator = torch.Generator().manual_seed(0)
        return [kind(ids, generator, *others).draw(2, 64) for _ in range(3)]

    texts = windows(Windows)
    noise = torch.Generator().manual_seed(1)
    answers = windows(recipes.OwnAnswers, target, noise)
    # The same draws from the target's probabilities without a cache, from logits of float64.
    noise.manual_seed(1)
    exact = target.double()
    for text, answer in zip(texts, answers, strict=True):
        assert answer.shape == text.shape
        assert torch.equal(answer[:, :8], text[:, :8])
        with torch.no_grad():
            hidden, _ = exact(answer[:, :-1], torch.arange(64))
            logits = exact.head(hidden)
        for place in range(8, 65):
            drawn = torch.empty(2, 64).exponential_(generator=noise)
            assert torch.equal((logits[:, place - 1] - drawn.log()).argmax(-1), answer[:, place])


@pytest.mark.usefixtures("one_thread")
def test_recipes_of_as_many_tokens(tmp_path, monkeypatch):
    """Drafts stand beside each other, and not in the pair's folder."""
    write_target(tmp_path / "pair" / "target", "qwen2", tied=True)
    ids = np.random.default_rng(0).integers(64, size=2000).astype(np.uint16)
    for name in ("train", "held_out"):
        with lzma.open(tmp_path / f"{name}.npy.xz", "wb") as file:
            np.save(file, ids)
    monkeypatch.setattr(recipes, "FULL", recipes.replace(recipes.FULL, batch_tokens=256, evaluation_windows=2))
    paths = ["--pair", str(tmp_path / "pair"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    budget = ["--tokens", "512", "--windows", "64", "--device", "cpu"]
    names = ["longspec", "longspec@64", "default@64", "own-answers@64"]
    monkeypatch.setattr(sys, "argv", ["recipes", *paths, *budget, "--recipes", *names])
    recipes.main()
    records = [json.loads(line) for line in (tmp_path / "out" / "recipes.jsonl").read_text().splitlines()]
    drafts = ["draft-longspec", "draft-longspec-64", "draft-default-64", "draft-own-answers-64"]
    assert [record["draft"] for record in records] == drafts
    assert [record["steps"] for record in records] == [2, 8, 8, 8]
    rates = [(record["optimizer"], record["learning_rate"]) for record in records]
    assert rates == [("adamw", 1e-3)] * 2 + [("muon", 4e-3)] * 2
    assert records[2]["loss"] != records[3]["loss"]
    assert {record["tokens"] for record in records} == {512}
    for record in records:
        assert read_draft(str(tmp_path / "out" / record["draft"]), expected=True)
    assert [each.name for each in (tmp_path / "pair").iterdir()] == ["target"]
