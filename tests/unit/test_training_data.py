# SPDX-License-Identifier: Apache-2.0
"""Samples of JSON lines: what is supervised, what is refused and how it is named, and which batches they make."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_longspec.training import data
from vllm_longspec.training.batches import Cursor, Plan, drawn_depths, without_short_stage
from vllm_longspec.training.config import Stage, TrainConfig, build
from vllm_longspec.training.data import Counts, TokenStore, prepare

WORDS = (
    "<|user|> <|assistant|> <|end|> <think> </think> how are you fine thanks bye good day indeed".split()  # noqa: SIM905
)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|> "
    "{% if loop.last %}<think> </think> {% endif %}{{ message.content }} <|end|> "
    "{% else %}<|user|> {{ message.content }} <|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
PLAIN = TEMPLATE.replace("{% if loop.last %}<think> </think> {% endif %}", "")
MARKED = PLAIN.replace(
    "{{ message.content }} <|end|> {% else %}",
    "{% generation %}{{ message.content }} <|end|>{% endgeneration %} {% else %}",
)
TALK = [
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "good day indeed"},
]


def tokenizer(template=PLAIN):
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="bye"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


def stored(tmp_path, *lines, template=PLAIN, vocab_size=14, max_length=100) -> TokenStore:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return prepare([str(path)], tmp_path / "cache", lambda: tokenizer(template), vocab_size, max_length)


def supervised(store, index=0):
    ids, mask = store[index]
    return " ".join(WORDS[token] for token in ids[mask])


def test_three_kinds_of_samples(tmp_path):
    store = stored(
        tmp_path,
        {"messages": TALK},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 1, 1]},
        "",
        {"text": "how are you"},
        {"input_ids": [1, 2], "loss_mask": [1, 0]},
        {"messages": TALK[:1]},
    )
    assert len(store) == 3
    assert supervised(store) == "fine thanks <|end|> good day indeed <|end|>"
    # The first token has none before it that would predict it.
    assert store[1][0].tolist() == [1, 2, 3, 4] and store[1][1].tolist() == [False, False, True, True]
    assert supervised(store, 2) == "are you"
    assert store.counts == Counts(samples=3, tokens=17 + 4 + 3, supervised=7 + 2 + 2, unsupervised=2)
    assert "2 samples without a supervised token left out" in str(store.counts)
    assert store.lengths.tolist() == [17, 4, 3]
    assert [int(mask.nonzero()[0]) for _, mask in (store[0], store[1], store[2])] == store.first_supervised.tolist()
    assert len(store.part(slice(1, None))) == 2 and store.part(slice(1, None))[0][0].tolist() == [1, 2, 3, 4]


def test_a_template_that_marks_turns(tmp_path):
    assert supervised(stored(tmp_path, {"messages": TALK}, template=MARKED)) == (
        "fine thanks <|end|> good day indeed <|end|>"
    )


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    """As Qwen3's, which takes the thoughts out of all turns but the last."""
    store = stored(tmp_path, {"messages": TALK}, template=TEMPLATE)
    assert supervised(store) == "<think> </think> good day indeed <|end|>"
    assert store.counts.rewritten_turns == 1 and "1 assistant turns not supervised" in str(store.counts)


def test_samples_are_cut(tmp_path):
    store = stored(
        tmp_path,
        {"input_ids": [1] * 9, "loss_mask": [0, 0, 1, 1, 1, 1, 1, 1, 1]},
        {"input_ids": [1] * 9, "loss_mask": [0] * 8 + [1]},
        max_length=5,
    )
    assert store.lengths.tolist() == [5]
    assert store.counts == Counts(samples=1, tokens=5, supervised=3, unsupervised=1, cut=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ({"prompt": "a"}, "has no sample: give one of messages, input_ids, text"),
        ({"text": "a", "input_ids": []}, "has input_ids and text"),
        ({"text": 3}, "its text is no string"),
        ({"input_ids": [1, 2]}, "its loss_mask is no list of 0 and 1, as long"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "its loss_mask"),
        ({"input_ids": [1, "2"], "loss_mask": [1, 1]}, "its input_ids are no list of integers"),
        ({"input_ids": [1, 14], "loss_mask": [1, 1]}, "has token 14, but the target's vocabulary has 14"),
        ({"input_ids": [1, -1], "loss_mask": [1, 1]}, "has token -1"),
        ({"messages": []}, "its messages are no list, or an empty one"),
        ({"messages": [{"content": "a"}]}, "its message 1 has no role"),
    ],
)
def test_a_line_that_is_no_sample_is_named_by_its_number(tmp_path, line, message):
    good = {"text": "how are you"}
    with pytest.raises(ValueError, match=r"line 3 of .*data\.jsonl") as error:
        stored(tmp_path, good, "", line, good)
    assert message in str(error.value) and "\n" not in str(error.value)
    # Nothing half-written is taken for data later.
    assert not list((tmp_path / "cache").iterdir())


def test_templates_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"line 1 of .*has no chat template"):
        stored(tmp_path, {"messages": TALK}, template=None)
    with pytest.raises(ValueError, match=r"line 1 of .*the chat template refuses its messages: only users"):
        stored(tmp_path, {"messages": TALK}, template="{{ raise_exception('only users') }}")
    other_prompt = PLAIN.replace("add_generation_prompt %}<|assistant|>", "add_generation_prompt %}<|user|>")
    with pytest.raises(ValueError, match="generation prompt"):
        stored(tmp_path, {"messages": TALK}, template=other_prompt)


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="no sample with a supervised token"):
        stored(tmp_path, {"input_ids": [1, 2], "loss_mask": [0, 0]})
    with pytest.raises(ValueError, match="has no JSON lines"):
        prepare([str(tmp_path / "none")], tmp_path / "cache", tokenizer, 10, 10)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(ValueError, match=r"cannot be written to .*cache \(No space left on device\): make room"):
        stored(tmp_path, {"text": "how are you"})
    assert not list((tmp_path / "cache").iterdir())


def test_tokens_are_written_once(tmp_path):
    calls = []

    def load():
        calls.append(1)
        return tokenizer()

    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "how are you"}\n')

    def read(max_length=10):
        prepare([str(tmp_path)], tmp_path / "cache", load, 20, max_length)
        return len(calls)

    assert [read(), read(), read(5), read(5)] == [1, 1, 2, 2]
    path.write_text('{"text": "how are you bye"}\n')
    assert read() == 3


class Lengths:
    """Samples of given lengths, all tokens supervised, each made of its own number."""

    def __init__(self, lengths, first_supervised=1):
        self.lengths = lengths
        self.first_supervised = [first_supervised] * len(lengths)

    def __getitem__(self, index):
        return torch.full((self.lengths[index],), index), torch.arange(self.lengths[index]) >= self.first_supervised[
            index
        ]


ONE_STEP = Stage(steps=1)


def plan(lengths, stage=ONE_STEP, ranks=(0, 1), accumulation=1, **settings):
    rank, num_ranks = ranks
    return Plan(Lengths(lengths, **settings), stage, 0, 100, accumulation, 5, 1000, rank, num_ranks)


def taken(steps, count):
    found = [next(steps) for _ in range(count)]
    return [[int(sample.input_ids[0]) for sample in batch] for step in found for batch in step.batches], found


LENGTHS = np.random.default_rng(0).integers(5, 60, 50).tolist()


def test_batches_are_full_and_every_epoch_has_each_sample_once():
    num_steps = plan(LENGTHS).num_steps(2.0)
    batches, steps = taken(plan(LENGTHS).steps(), num_steps)
    assert all(sum(LENGTHS[index] for index in batch) <= 100 for batch in batches)
    assert [step.num_tokens for step in steps] == [sum(LENGTHS[index] for index in batch) for batch in batches]
    order = [index for batch in batches for index in batch]
    assert sorted(order[:50]) == list(range(50)) and order[:50] != order[50:100]
    counts = Counter(order)
    assert set(counts) == set(range(50)) and set(counts.values()) <= {1, 2, 3}
    # A sample longer than a batch is one of its own.
    assert taken(plan([300, 20]).steps(), 2)[0] in ([[0], [1]], [[1], [0]])


def test_a_cursor_goes_on_where_it_was():
    _, steps = taken(plan(LENGTHS).steps(), 40)
    for done in (1, 7, 25, 33):
        _, rest = taken(plan(LENGTHS).steps(steps[done - 1].cursor), 40 - done)
        assert [step.cursor for step in rest] == [step.cursor for step in steps[done:]]
        for step, expected in zip(rest, steps[done:], strict=True):
            for sample, other in zip(step.batches[0], expected.batches[0], strict=True):
                assert all(map(torch.equal, sample, other))
    assert steps[-1].cursor.epoch >= 1 and Cursor() == (0, 0)


def test_ranks_share_a_step():
    alone, steps = taken(plan(LENGTHS, accumulation=6).steps(), 5)
    parts = [taken(plan(LENGTHS, accumulation=2, ranks=(rank, 3)).steps(), 5) for rank in range(3)]
    together = [batch for step in range(5) for found, _ in parts for batch in found[2 * step : 2 * step + 2]]
    assert together == alone
    for _, found in parts:
        assert [(step.num_tokens, step.cursor) for step in found] == [(step.num_tokens, step.cursor) for step in steps]


def test_positions_of_anchors():
    stage = Stage(steps=1, anchor_positions=500, max_length=40)
    _, steps = taken(plan(LENGTHS, stage).steps(), 60)
    offsets = set()
    for sample in (sample for step in steps for sample in step.batches[0]):
        length = len(sample.input_ids)
        assert length <= 40
        offset = int(sample.positions[-1]) - (length - 1)
        expected = list(range(4)) + list(range(4 + offset, length + offset))
        assert sample.positions.tolist() == expected[:length] and sample.positions[-1] < 500
        offsets.add(offset // 100)
    assert offsets == {0, 1, 2, 3, 4}


def test_a_stage_leaves_out_what_it_cuts_before_the_supervised_tokens():
    stage = Stage(steps=1, max_length=30)
    batches, _ = taken(plan([20, 40, 60], stage, first_supervised=25).steps(), 6)
    assert {index for batch in batches for index in batch} == {1, 2}
    with pytest.raises(ValueError, match="a larger max_length"):
        plan([20, 24], stage, first_supervised=25)


def test_the_recipe_has_a_short_stage_if_samples_fit():
    config = TrainConfig("target", ("data",), "out")
    short, long = Lengths([3000] * 10, first_supervised=2000), Lengths([3000] * 10, first_supervised=2500)
    assert without_short_stage(config, short) is config
    assert without_short_stage(config, long).stages == config.stages[1:]
    # What was asked for is kept.
    asked = TrainConfig("target", ("data",), "out", stages=(Stage(steps=1, max_length=2048), Stage(steps=1)))
    assert without_short_stage(asked, long) is asked


def test_the_optimizer_and_its_learning_rates():
    """Without one it is Muon, unless matrices are split. What is given is kept."""

    def chosen(**given):
        config = TrainConfig("target", ("data",), "out", **given)
        return config.optimizer, [stage.learning_rate for stage in config.stages]

    assert chosen() == chosen(optimizer="auto") == chosen(optimizer="muon") == ("muon", [2e-3, 4e-4])
    assert chosen(sharding="fsdp2") == chosen(optimizer="adamw") == ("adamw", [5e-4, 1e-4])
    stages = (Stage(steps=1), Stage(steps=1, learning_rate=3e-3))
    assert chosen(stages=stages) == ("muon", [4e-4, 3e-3])
    assert chosen(stages=stages, optimizer="adamw") == ("adamw", [1e-4, 3e-3])
    assert chosen(stages=stages, sharding="fsdp2") == ("adamw", [1e-4, 3e-3])
    # A run's file has what was chosen.
    config = TrainConfig("target", ("data",), "out", stages=stages)
    assert build(config.as_dict()) == config
    with pytest.raises(ValueError, match="optimizer muon is not supported with sharding fsdp2"):
        chosen(sharding="fsdp2", optimizer="muon")


def test_the_defaults_are_the_documented_ones():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", page, re.MULTILINE))
    config = TrainConfig("target", ("data",), "out")
    for name in (
        "tokens_per_batch",
        "accumulation",
        "levels",
        "depth_weights",
        "init",
        "teacher",
        "sharding",
        "optimizer",
    ):
        assert documented[name] == str(getattr(config, name)), name


def test_the_hash_of_prompts(tmp_path):
    store = stored(
        tmp_path,
        {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]},
        {"input_ids": [1, 2, 5], "loss_mask": [0, 0, 1]},
        {"input_ids": [1, 3, 5], "loss_mask": [0, 0, 1]},
        {"text": "how are you"},
        {"text": "how are bye"},
    )
    assert store.prompts[0] == store.prompts[1] and len(set(store.prompts.tolist())) == 4


def test_depths_that_are_drawn():
    assert drawn_depths(5, None, 0) == (1, 2, 3, 4, 5) == drawn_depths(5, 5, 0)
    drawn = [drawn_depths(5, 2, 0, step) for step in range(100)]
    assert drawn == [drawn_depths(5, 2, 0, step) for step in range(100)]
    assert all(len(each) == 2 and list(each) == sorted(set(each)) for each in drawn)
    assert len(set(drawn)) == 10
