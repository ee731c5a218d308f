# SPDX-License-Identifier: Apache-2.0
"""Acceptance that is predicted from stored answers: which parts are walked, with what noise, and what is reported."""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import PAIR
from benchmarks.training import acceptance as pair_acceptance
from tests.models import write_draft, write_target
from tests.oracles import copying
from vllm_longspec import commands
from vllm_longspec.training import acceptance, evaluate
from vllm_longspec.training.acceptance import Sum
from vllm_longspec.training.continuations import (
    Bucket,
    Part,
    answers_of,
    choose,
    parse_contexts,
    parts_of,
)
from vllm_longspec.training.copies import Trust, find_copy
from vllm_longspec.training.draft import TargetVocabulary
from vllm_longspec.training.predict import Drafting, Likelihood, Predictor
from vllm_longspec.training.sampling import FORBIDDEN, Sampling, noise_given, truncate
from vllm_longspec.training.target import load_shared
from vllm_longspec.training.teachers import Sample
from vllm_longspec.training.teachers.hf import HfTeacher
from vllm_longspec.training.walk import Level, accepted_of_listed
from vllm_longspec.tree.shape import TreeShape

TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")


def test_contexts():
    assert parse_contexts("2k,8K, 100000") == [
        Bucket("2k", 0, 2048),
        Bucket("8K", 4096, 8192),
        Bucket("100000", 50000, 100000),
    ]
    assert parse_contexts("3k,4k")[1] == Bucket("4k", 3072, 4096)


@pytest.mark.parametrize("value", ["", "2k,", "8k,2k", "2k,2k", "0", "two", "-2k", "2.5k"])
def test_contexts_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="--contexts must be increasing"):
        parse_contexts(value)


def test_answers():
    assert list(answers_of(torch.tensor([1, 1, 0, 1, 1, 1]))) == [(1, 2), (3, 6)]
    assert list(answers_of(torch.tensor([0, 0]))) == []


@pytest.mark.parametrize(("num_tokens", "overhang"), [(10, 5), (7, 16), (100, 2)])
def test_every_root_of_an_answer_is_in_one_part_and_in_its_bucket(num_tokens, overhang):
    buckets = parse_contexts("20,60,200")
    answer = range(13, 150)
    mask = torch.tensor([index in answer for index in range(160)])
    parts = list(parts_of(3, mask, buckets, num_tokens, overhang))
    roots: list[int] = []
    for part in parts:
        assert part.text == 3 and part.output_position == part.start - answer.start
        bucket = buckets[part.bucket]
        # The engine is asked for all but the overhang, and the last of these is no root.
        asked_for = part.end - part.start - overhang
        own = range(part.start, part.start + asked_for - 1)
        assert 2 <= asked_for <= num_tokens + 1 and part.end <= answer.stop
        assert all(bucket.above < root <= bucket.limit for root in own)
        roots += own
    assert len(set(roots)) == len(roots)
    # None but those between two parts, and before ends of answers.
    walked = {root for bucket in buckets for root in range(bucket.above + 1, bucket.limit + 1)}
    missing = walked & set(range(answer.start, answer.stop - overhang - 1)) - set(roots)
    assert len(missing) <= len(parts)


def test_choice_of_parts_is_even_and_repeatable():
    parts = [Part(text, 1, 9, 0, text % 2) for text in range(40)]
    counts = dict.fromkeys(range(40), 0)
    for seed in range(400):
        chosen = choose(parts, 2, 5, seed)
        assert chosen == choose(parts, 2, 5, seed) == sorted(chosen)
        assert [sum(part.bucket == bucket for part in chosen) for bucket in (0, 1)] == [5, 5]
        for part in chosen:
            counts[part.text] += 1
    # 100 expected of each, standard deviation 9
    assert min(counts.values()) > 60 and max(counts.values()) < 140


def test_noise_given_its_token_is_that_which_drew_it():
    """Of each token that wins, noise of every token has the moments that it has where it was drawn first."""
    rows = 200_000
    scaled = torch.tensor([0.3, 1.5, -2.0, 0.9, FORBIDDEN]).expand(rows, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = -torch.empty(rows, 5, dtype=torch.float64).exponential_(generator=generator).log()
    tokens = (scaled + drawn).argmax(-1)
    given = noise_given(scaled, tokens, generator)
    assert torch.equal((scaled + given).argmax(-1), tokens)
    assert tokens.unique().tolist() == [0, 1, 2, 3]
    for token in range(4):
        won, again = drawn[tokens == token], given[tokens == token]
        for power in (1, 2, 3):
            one, other = won**power, again**power
            error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
            assert ((one.mean(0) - other.mean(0)).abs() < 4.5 * error).all()
        # And of the correlations.
        assert torch.allclose(torch.corrcoef(won.T), torch.corrcoef(again.T), atol=6 * len(won) ** -0.5)


def test_truncation_is_that_of_vllm():
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    torch.manual_seed(0)
    scaled = 3 * torch.randn(50, 40)
    for top_k, top_p in itertools.product((0, 1, 7, 60), (0.3, 0.9, 1.0)):
        found = truncate(scaled, Sampling(1.0, top_k, top_p))
        k = torch.full((50,), min(top_k, 40)) if top_k else None
        expected = apply_top_k_top_p_pytorch(scaled.clone(), k, torch.full((50,), top_p))
        assert torch.equal(found > FORBIDDEN, expected > -math.inf)
    found = truncate(scaled, Sampling(1.0, min_p=0.1))
    assert torch.equal(found > FORBIDDEN, scaled.softmax(-1) >= 0.1 * scaled.softmax(-1).amax(-1, keepdim=True))


def test_copies_are_found_and_trusted_as_the_oracle_does():
    generator = random.Random(0)
    trust, oracle = Trust(), copying.Trust()
    found = 0
    for request in range(60):
        text = [generator.randrange(3) for _ in range(generator.randrange(1, 40))]
        text += text[generator.randrange(len(text)) :][:20]
        root = generator.randrange(len(text))
        while root < len(text):
            known = text[: root + 1]
            copied, length = find_copy(torch.tensor(text), root, 6)
            assert (copied, length) == copying.find_copy(known, 6)
            oracle.observe({request: known})
            scores = trust.score(torch.tensor(text), root, copied, length)
            oracle.keep(request, known, copied, length)
            assert scores == pytest.approx(oracle.scores(length, len(copied)) if copied else [])
            found += length > 0
            root += generator.randrange(1, 4)
        trust.forget()
    assert found > 100


def random_levels(generator: random.Random, widths: list[int]) -> list[Level]:
    levels: list[Level] = []
    above = [0.0]
    for width in widths:
        pairs = generator.sample([(parent, token) for parent in range(len(above)) for token in range(4)], width)
        scores = [above[parent] - generator.random() for parent, _ in pairs]
        best = sorted(range(width), key=lambda node: -scores[node])
        columns = zip(*(pairs[node] for node in best), strict=True)
        parents, tokens = (torch.tensor([column]) for column in columns)
        above = [scores[node] for node in best]
        levels.append(Level(torch.tensor([above], dtype=torch.float64), tokens, parents))
    return levels


def test_nodes_are_listed_and_accepted_as_the_oracle_does():
    generator = random.Random(1)
    seen = set()
    for _ in range(400):
        levels = random_levels(generator, [3, 5, 5])
        copied = [generator.randrange(4) for _ in range(generator.randrange(7))]
        rates = [generator.random() for _ in copied]
        copied_scores = [-sum(rates[: depth + 1]) for depth in range(len(copied))]
        expected = (copied if generator.random() < 0.5 else []) + [generator.randrange(4) for _ in range(6)]
        tokens: list[int] = []
        scores: list[float] = []
        parents: list[int] = []
        first = -1
        for level in levels:
            parents += [first + parent for parent in level.parents[0].tolist()]
            first = len(tokens)
            tokens += level.tokens[0].tolist()
            scores += level.scores[0].tolist()
        merged = copying.merge(tokens, scores, parents, copied, copied_scores)
        for num_nodes in (1, 4, 9, 30):
            listed = sorted(merged, key=lambda node: -merged[node])[:num_nodes]
            path = [tuple(expected[:depth]) in listed for depth in range(1, len(expected) + 1)]
            found = accepted_of_listed(levels, 0, expected, num_nodes, copied, copied_scores)
            assert found == [*path, False].index(False)
            seen.add(found)
    assert seen >= {0, 1, 2, 3, 4, 5, 6}


@torch.inference_mode()
def test_a_coupled_draft_accepts_with_noise_given_the_text_what_it_does_with_the_noise_that_drew_it():
    target, glide = pair_acceptance.load_pair(PAIR, "cpu")
    prompts = pair_acceptance.load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", 12, "cpu")
    length, num_tokens, shape = 48, 50, TreeShape((2, 3))
    sampling = Sampling(0.9, top_k=50)
    noises: list[torch.Tensor] = []
    ids = pair_acceptance.generate(
        target,
        prompts[2048][:, 500 : 500 + length],
        num_tokens,
        sampling.temperature,
        torch.Generator().manual_seed(1),
        lambda scaled: truncate(scaled, sampling),
        noises,
    )
    shared = load_shared(TARGET)
    teacher, vocabulary = HfTeacher(shared, "cpu", torch.float32), TargetVocabulary.of(shared, "cpu", torch.float32)
    mask = torch.arange(length + num_tokens) >= length
    lessons = list(teacher.teach(Sample(row, mask, torch.arange(len(row))) for row in ids))
    parts = [Part(text, length, length + num_tokens, 0, 0) for text in range(len(ids))]
    drafting = Drafting(shape, shape.num_nodes, 0)

    class Drawn(Predictor):
        def draw_noise(self, lesson, part, position):
            return noises[position + 1 - length][part.text]

    def sums(cls: type[Predictor], drafting: Drafting, seeds: range) -> list[Sum]:
        """Of each text, over all seeds."""
        found = [[0, 0] for _ in parts]
        for seed in seeds:
            predictor = cls(vocabulary, glide, drafting, sampling, seed)
            for total, lesson, part in zip(found, lessons, parts, strict=True):
                each = Sum.of(predictor.steps(lesson, part).accepted)
                total[:] = total[0] + each.steps, total[1] + each.tokens
        return [Sum(*total) for total in found]

    known = sums(Drawn, drafting, range(1))
    given = sums(Predictor, drafting, range(2))
    compared = acceptance.compare(given, known, 0.05)
    assert compared.standard_error is not None and compared.standard_error < 0.03
    assert abs(compared.difference) < 2.5 * compared.standard_error
    # What it would be without the noise is another matter.
    drafting.couple_noise = False
    alone = acceptance.compare(sums(Predictor, drafting, range(1)), known, 0.05)
    assert alone.standard_error is not None and alone.difference < -4 * alone.standard_error
    # The text passes for what it is, and not for another.
    for other, is_named in ((sampling, False), (Sampling(0.3), True), (Sampling(0.0), True)):
        predictor = Predictor(vocabulary, glide, drafting, other)
        found = [predictor.likelihood(lesson, part) for lesson, part in zip(lessons, parts, strict=True)]
        total = Likelihood(*map(sum, zip(*found, strict=True)))
        assert (evaluate.mismatch(other, total) is not None) == is_named


def test_depths_and_positions():
    assert acceptance.by_depth([0, 2, 3, 2], 4) == [0.75, 1.0, 1 / 3, 0.0]
    assert acceptance.by_depth([0, 0], 2) == [0.0, None]
    steps = acceptance.Steps(Part(0, 5, 500, 0, 0), [0, 3, 63, 64, 300], [2, 0, 1, 3, 5])
    assert acceptance.by_output_position([steps]) == [
        {"from": 0, "steps": 3, "tokens_per_step": 2.0},
        {"from": 64, "steps": 1, "tokens_per_step": 4.0},
        {"from": 256, "steps": 1, "tokens_per_step": 6.0},
    ]


def test_walk_and_engine_agree_differ_or_have_too_few_steps():
    walked = [Sum(10, 30), Sum(20, 50), Sum(10, 28)]
    assert acceptance.compare(walked, walked, 0.03).verdict == "agree"
    lower = [Sum(each.steps, each.tokens - each.steps // 5) for each in walked]
    different = acceptance.compare(walked, lower, 0.03)
    assert different.verdict == "differ" and different.difference > 0.03
    noisy = acceptance.compare(walked, [Sum(10, 20), Sum(20, 60), Sum(10, 22)], 0.03)
    assert noisy.verdict == "too few steps" and (noisy.steps_needed or 0) > noisy.engine_steps
    assert acceptance.compare(walked[:1], lower[:1], 0.03).verdict == "too few steps"
    # The standard error of a mean of independent numbers is the usual one.
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(0))
    found = acceptance.jackknife(50, lambda kept: float(numbers[kept].mean()))
    assert found == pytest.approx(float(numbers.std() / 50**0.5), rel=1e-4)


def write_data(path: Path, texts: list[list[int]], prompt_length: int) -> Path:
    lines = [{"input_ids": ids, "loss_mask": [index >= prompt_length for index in range(len(ids))]} for ids in texts]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_command_writes_table_json_and_plot(tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path / "data.jsonl", [list(range(10, 60)) * 2, list(range(200, 300))], 20)
    (tmp_path / "manifest.json").write_text(json.dumps({"sampling": {"temperature": 0.5, "top_k": -1, "top_p": 0.9}}))
    out, figure = tmp_path / "out.json", tmp_path / "plot.svg"
    argv = ["evaluate", "--target", TARGET, "--draft", DRAFT, "--data", str(data), "--contexts", "40,100"]
    commands.main([*argv, "--tokens", "8", "--parts", "2", "--out", str(out), "--plot", str(figure)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    # 128 rows of a tile, two heads to each KV head
    assert found["nodes"] == 63 and found["tree_shape"] == [4, 16, 16, 16, 16]
    (result,) = found["results"]
    assert (result["temperature"], result["top_k"], result["top_p"]) == (0.5, 0, 0.9)
    assert [context["context"] for context in result["contexts"]] == ["40", "100"]
    for context in result["contexts"]:
        assert context["parts"] == 2 and context["steps"] >= 2 and 1 <= context["tokens_per_step"] <= 17
        assert f"{context['tokens_per_step']:.2f}" in printed
    assert result["contexts"][0]["mean_context"] <= 40 < result["contexts"][1]["mean_context"]
    # Numbers in order are no text of this target's.
    assert "were not drawn like this" in printed and "by their manifest" not in printed
    assert "<svg" in figure.read_text()
    # Another temperature than the manifest's, and no matplotlib
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    commands.main([*argv, "--tokens", "8", "--parts", "1", "--temperatures", "0", "--plot", str(figure)])
    captured = capsys.readouterr()
    assert "by their manifest the answers were drawn with temperature 0.5, top_p 0.9." in captured.out
    assert captured.err.splitlines()[-1] == "--plot needs matplotlib: pip install 'vllm-longspec[report]'"


def test_without_data_the_held_out_samples_of_the_run_are_evaluated(tmp_path, capsys):
    """Of a run's draft and of its checkpoints; a draft that is of no run needs answers."""
    texts = [[(seed * index) % 97 + 3 for index in range(60)] for seed in (3, 5, 7, 11)]
    data = write_data(tmp_path / "data.jsonl", texts, 20)
    (tmp_path / "manifest.json").write_text(json.dumps({"sampling": {"temperature": 0.5}}))
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    for folder in (run, checkpoint):
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(PAIR / "draft" / file)
    settings = {"target": TARGET, "data": [str(data)], "out": "elsewhere", "held_out": {"samples": 1}}
    (run / "run.yaml").write_text(json.dumps(settings))
    for folder in (run, checkpoint):
        out = tmp_path / "out.json"
        argv = ["evaluate", "--target", TARGET, "--contexts", "60", "--tokens", "20", "--out", str(out)]
        commands.main([*argv, "--draft", str(folder)])
        (result,) = json.loads(out.read_text())["results"]
        # One sample of four, its 40 tokens in two parts, drawn as the manifest beside the data says
        assert result["contexts"][0]["parts"] == 2 and result["temperature"] == 0.5
    for draft, held_out, message in (
        (DRAFT, {}, f"--draft {DRAFT} has no run.yaml of a run of vllm-longspec train"),
        (str(run), {"samples": 0}, "has held out no samples: give answers as --data"),
    ):
        (run / "run.yaml").write_text(json.dumps(settings | {"held_out": held_out}))
        with pytest.raises(SystemExit, match=message):
            commands.main([*argv, "--draft", draft])


@pytest.mark.parametrize(
    ("options", "budget"),
    [([], False), (["--cross-attention-budget", "64"], 64), (["--cross-attention-budget", "false"], False)],
)
def test_an_engine_sees_the_same_part(tmp_path, options, budget):
    data = write_data(tmp_path / "data.jsonl", [[1] * 80], 20)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    argv = ["--target", TARGET, "--draft", DRAFT, "--data", str(data), "--contexts", "80", *options]
    evaluation = evaluate.prepare(parser.parse_args(argv))
    part = evaluation.drafting.part
    # All that the shipped target has positions for is shorter than the default's part.
    assert (False if part is None else part.budget) == budget
    assert evaluate.engine_settings(evaluation, 80)["speculative_config"]["cross_attention_budget"] is budget


def test_an_engine_that_accepts_otherwise_is_an_error(tmp_path, capsys, monkeypatch):
    """All that the command does with an engine but the engine itself, which `tests/integration` runs."""
    texts = [[(seed * index) % 97 + 3 for index in range(80)] for seed in (3, 5, 7)]
    data = write_data(tmp_path / "data.jsonl", texts, 20)
    argv = ["evaluate", "--target", TARGET, "--draft", DRAFT, "--data", str(data), "--contexts", "80", "--engine"]
    argv += [
        "--revision",
        "v1",
        "--tokens",
        "30",
        "--copy-length",
        "4",
        "--tree-shape",
        "2",
        "2",
        "--out",
        str(tmp_path / "out.json"),
    ]
    jobs: list[tuple[dict, list]] = []

    def run_engine(settings, runs):
        jobs.append((settings, runs))
        (run,) = runs
        # As many tokens in fewer steps
        return [[{"accepted": [5] * (tokens // 6)} for tokens in run["max_tokens"]]]

    monkeypatch.setattr(evaluate, "run_engine", run_engine)
    with pytest.raises(SystemExit) as stopped:
        commands.main(argv)
    assert str(stopped.value.code).startswith(
        "vllm-longspec evaluate: walk and engine differ by more than 3.0%: context 80, temperature 0: "
    )
    assert "differ" in capsys.readouterr().out
    ((settings, (run,)),) = jobs
    assert settings["speculative_config"]["num_speculative_tokens_per_batch_size"] == [[1, 1, 4]]
    assert settings["revision"] == "v1"
    assert settings["speculative_config"]["copy_length"] == 4 and settings["max_num_seqs"] == 1
    assert [prompt[:20] for prompt in run["prompts"]] == [text[:20] for text in texts for _ in range(2)]
    assert run["max_tokens"] == [30, 26] * 3 and run["sampling"]["temperature"] == 0
    # Everything is written before that.
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["contexts"][0]["engine"]["engine"] == 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "40,900"], "--contexts 900: no answers of 18 tokens or more with such contexts"),
        (["--contexts", "8k"], "--contexts 8k is longer than the 4096 positions of"),
        (["--draft", TARGET], "--draft is no GLIDE draft"),
        (["--draft", "{other}"], "does not fit target"),
        (["--data", "{foreign}"], "foreign.jsonl has token 9999, but the target's vocabulary has 4096"),
        (["--data", "{tmp}/nothing.jsonl"], "nothing.jsonl"),
        (["--nodes", "69"], "--nodes must be from 1 to 68"),
        (["--tree-shape", "300"], "at most 255 are supported"),
        (["--cross-attention-budget", "0"], "cross_attention_budget must be a positive integer or false, got 0"),
        (["--cross-attention-budget", "all"], "cross_attention_budget must be a positive integer or false, got 'all'"),
        (["--copy-length", "-1"], "copy_length must be an integer from 0"),
        (["--temperatures", "-1"], "temperature must be"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--tolerance", "3"], "--tolerance must be between 0 and 1"),
        (["--plot", "plot.doc"], "must end with .svg or .png"),
        (["--tokens", "1"], "--tokens is 1: give more"),
        (["--out", "{tmp}/nowhere/out.json"], "nowhere/out.json cannot be a file: give one in a folder that exists"),
        (["--out", "{tmp}"], "cannot be a file"),
        (["--plot", "{tmp}/nowhere/plot.svg"], "--plot {tmp}/nowhere/plot.svg cannot be a file"),
        (["--engine-args", '{{"gpus": 2}}'], "--engine-args has 'gpus', which is no engine argument of vLLM's"),
        (["--engine-args", '{{"model": "a"}}'], "--engine-args has 'model': give --target instead"),
        (["--engine-args", '{{"speculative_config": null}}'], "a speculative_config that is no JSON object"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path, options, message):
    target = write_target(tmp_path / "target", "llama")
    places = {"tmp": tmp_path, "other": write_draft(tmp_path / "draft", target)}
    places["foreign"] = write_data(tmp_path / "foreign.jsonl", [[1] * 80, [9999] * 80], 20)
    data = write_data(tmp_path / "data.jsonl", [[1] * 80], 20)
    given = {"--target": TARGET, "--draft": DRAFT, "--data": str(data)}
    given[options[0]] = options[1].format(**places)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["evaluate", *itertools.chain(*given.items())])
    assert message.replace("{tmp}", str(tmp_path)) in str(stopped.value.code) and "\n" not in str(stopped.value.code)
