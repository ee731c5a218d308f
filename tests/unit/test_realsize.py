# SPDX-License-Identifier: Apache-2.0
"""The prompts of the pair of a real size: from the middle of held-out files, with what comes before them."""

import json

import pytest
from tokenizers import Tokenizer

from benchmarks import PAIR
from benchmarks.training import realsize
from benchmarks.training.realsize import choose_prompts, write_bench_prompts

TOKENIZER = PAIR / "target" / "tokenizer.json"


@pytest.fixture(scope="module")
def held_out():
    """Files of different lengths, one behind the other, each with an end-of-text token."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()[:24]
    ids = []
    for number, line in enumerate(lines):
        ids += [*tokenizer.encode(json.loads(line)["text"]).ids[: 40 + 50 * number], 0]
    return ids


def test_prompts(held_out):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    prompts = list(choose_prompts(held_out, tokenizer, 256, 6, after=64))
    places = set()
    for prompt in prompts:
        place = int(prompt["path"].removeprefix("held-out token "))
        places.add(place)
        ids = tokenizer.encode(prompt["text"]).ids
        assert ids == held_out[place - 256 : place]
        # An eighth of the prompt is of the file that goes on.
        assert 0 not in ids[-32:] and 0 not in held_out[place : place + 64]
    assert len(places) == 6
    # From all over the text.
    assert min(places) < len(held_out) / 3 and max(places) > len(held_out) * 2 / 3


def test_prompts_of_bench_are_the_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(realsize, "BENCH_PROMPTS", {"short": 16, "long": 100_000})
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()[:10]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "target").symlink_to(PAIR / "target")
    write_bench_prompts(tmp_path)
    written = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    texts = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines[:8]]
    assert written == [{"input_ids": ids[-16:]} for ids in texts]
    # No prompt has so many tokens.
    assert not (tmp_path / "long.jsonl").exists()
