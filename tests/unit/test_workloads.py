# SPDX-License-Identifier: Apache-2.0
"""Workloads of the paper, on small files of the format that they have."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import PAIR
from vllm_longspec.bench.prompts import SHORTEST, VICUNA_TEMPLATE, Renderer, choose, choose_own
from vllm_longspec.bench.workloads import WORKLOADS, read_records

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
# About as many tokens.
WORDS = [f"word{number} " for number in range(2 * SHORTEST)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(folder, name, records):
    path = folder / WORKLOADS[name].local_file
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def longbench(context, query=""):
    """A record as LongBench has it."""
    return {
        "input": query,
        "context": context,
        "answers": ["an answer"],
        "length": len(context.split()),
        "dataset": "a task",
        "language": "en",
        "all_classes": None,
        "_id": "0123",
    }


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_instruction_takes_the_fields_of_its_records(name, tmp_path):
    record = {"id": 60, "problem": "PROBLEM {x}", "answer": "204"} if name == "aime24" else longbench("TEXT {x}", "Q?")
    write(tmp_path, name, [record])
    [(place, read)] = read_records(WORKLOADS[name], tmp_path)
    asked = WORKLOADS[name].ask(read)
    assert place.endswith(f"{WORKLOADS[name].local_file}:1")
    assert ("PROBLEM {x}" if name == "aime24" else "TEXT {x}") in asked
    assert ("Q?" in asked) == (name in ("qmsum", "repobench-p"))
    # What is left in braces came from the text.
    assert re.findall(r"\{\w+\}", asked) == ["{x}"]


def test_revisions_are_fixed():
    assert all(re.fullmatch(r"[0-9a-f]{40}", workload.revision) for workload in WORKLOADS.values())


def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path):
    path = write(tmp_path, "lcc", [longbench("x")])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"lcc\.jsonl:2 is not JSON"):
        list(read_records(WORKLOADS["lcc"], tmp_path))
    path.write_text('{"input": ""}\n')
    with pytest.raises(ValueError, match=r"lcc\.jsonl:1: there is no text 'context'"):
        list(read_records(WORKLOADS["lcc"], tmp_path))
    with pytest.raises(
        ValueError, match=r"no .*gov_report\.jsonl; take data/gov_report\.jsonl out of data\.zip of https:"
    ):
        list(read_records(WORKLOADS["govreport"], tmp_path))


def test_without_a_network_the_file_is_named(monkeypatch):
    """And without `datasets`, what to install."""

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        raise ConnectionError("no route to huggingface.co\nsecond line")

    asked: list = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ValueError, match=r"no route to huggingface\.co\); without a network, take data/qmsum\.jsonl"
    ) as error:
        list(read_records(WORKLOADS["qmsum"], None))
    assert "\n" not in str(error.value)
    [(arguments, keywords)] = asked
    assert arguments == ("json",)
    revision = WORKLOADS["qmsum"].revision
    assert keywords["data_files"] == f"zip://data/qmsum.jsonl::hf://datasets/zai-org/LongBench@{revision}/data.zip"
    with pytest.raises(
        ValueError, match=r"save the records of https://huggingface\.co/datasets/HuggingFaceH4/aime_2024"
    ):
        list(read_records(WORKLOADS["aime24"], None))
    assert asked[1][1]["revision"] == WORKLOADS["aime24"].revision
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-longspec\[bench\]'"):
        list(read_records(WORKLOADS["qmsum"], None))


def test_long_texts_lose_their_middle(tokenizer):
    text = "BEGIN " + "".join(WORDS) + "END"
    whole, nothing = Renderer(tokenizer, "a/target", 100_000).fit(text)
    assert nothing == 0 and tokenizer.decode(whole) == f"<user>{text}<assistant>"
    for most in (64, 500, len(whole) - 1):
        ids, num_cut = Renderer(tokenizer, "a/target", most).fit(text)
        assert most - 8 <= len(ids) <= most
        assert abs(len(whole) - len(ids) - num_cut) <= 8
        rendered = tokenizer.decode(ids)
        assert rendered.startswith("<user>BEGIN ") and rendered.endswith("END<assistant>")
    with pytest.raises(ValueError, match="4 tokens hold no prompt"):
        Renderer(tokenizer, "a/target", 4).fit(text)


def test_prompts_are_chosen_by_length_and_seed(tmp_path, tokenizer):
    short = [longbench(f"short {number}") for number in range(3)]
    long = [longbench(f"long {number} " + "".join(WORDS)) for number in range(5)]
    write(tmp_path, "lcc", [*short, *long])
    renderer = Renderer(tokenizer, "a/target", 4000)
    everything = choose(WORKLOADS["lcc"], tmp_path, renderer, None, seed=0)
    assert (len(everything.prompts), everything.num_short) == (5, 3)
    assert min(len(prompt.token_ids) for prompt in everything.prompts) > SHORTEST
    assert "5 prompts" in everything.describe() and "3 of 1,200 tokens or fewer were left out" in everything.describe()
    assert "\n" not in everything.describe()
    some = choose(WORKLOADS["lcc"], tmp_path, renderer, 2, seed=0)
    assert some.prompts == everything.prompts[:2]
    assert any(choose(WORKLOADS["lcc"], tmp_path, renderer, 2, seed).prompts != some.prompts for seed in range(1, 6))
    write(tmp_path, "lcc", short)
    with pytest.raises(ValueError, match="none of its 3 texts makes more than 1,200 tokens"):
        choose(WORKLOADS["lcc"], tmp_path, renderer, None, seed=0)


def test_problems_may_be_short(tmp_path, tokenizer):
    write(tmp_path, "aime24", [{"problem": "Find x."}])
    chosen = choose(WORKLOADS["aime24"], tmp_path, Renderer(tokenizer, "a/target", 4000), None, seed=0)
    assert [prompt.num_cut for prompt in chosen.prompts] == [0]


def test_vicunas_template_is_shipped(tokenizer):
    class WithoutTemplate:
        chat_template = None

        def apply_chat_template(self, messages, chat_template, tools, **keywords):
            assert chat_template == VICUNA_TEMPLATE and tools is None
            return tokenizer.apply_chat_template(messages, chat_template=chat_template, **keywords)

    ids = Renderer(WithoutTemplate(), "lmsys/vicuna-7b-v1.5-16k", 4000).render("Hello")
    assert tokenizer.decode(ids).endswith("polite answers to the user's questions. USER: Hello ASSISTANT:")
    with pytest.raises(ValueError, match="no chat template: give one by --chat-template"):
        Renderer(WithoutTemplate(), "a/base-model", 4000)


def test_vicunas_template_makes_fastchats_tokens():
    """Its separators are a space after the system's and the user's text and </s> after the assistant's, without one."""
    texts = ["<s>", "</s>", "SYSTEM", "USER:", "ASSISTANT:", "one", "two", "three", " "]
    own = Tokenizer(WordLevel({text: number for number, text in enumerate(texts)}))
    own.pre_tokenizer = Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    turns = [("system", "SYSTEM"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = Renderer(tokenizer, "lmsys/vicuna-7b-v1.5", 4000).render_messages(messages, None)
    assert [texts[number] for number in ids] == [
        *("<s>", "SYSTEM", " ", "USER:", " ", "one", " ", "ASSISTANT:", " ", "two", "</s>"),
        *("USER:", " ", "three", " ", "ASSISTANT:"),
    ]


def test_a_template_may_refuse_a_workload(tmp_path, tokenizer):
    write(tmp_path, "aime24", [{"problem": "Find x."}])
    refusing = Renderer(tokenizer, "a/target", 64, template="{{ raise_exception('no\\nuser') }}")
    with pytest.raises(
        ValueError, match=r"--workload aime24, .*:1: the chat template refuses it \(no user\); give one by --chat"
    ):
        choose(WORKLOADS["aime24"], tmp_path, refusing, None, seed=0)


def test_windows_that_hold_short_prompts_only_are_refused(tmp_path, tokenizer):
    write(tmp_path, "lcc", [longbench("".join(WORDS))])
    with pytest.raises(ValueError, match="the window less --output-len holds 1,200: give a larger --max-model-len"):
        choose(WORKLOADS["lcc"], tmp_path, Renderer(tokenizer, "a/target", SHORTEST), None, seed=0)


def test_texts_may_be_left_as_they_are(tokenizer):
    renderer = Renderer(tokenizer, "a/base-model", 4000, as_they_are=True)
    assert tokenizer.decode(renderer.fit("Hello")[0]) == "Hello"
    renderer = Renderer(tokenizer, "a/target", 4000, template="[{{ messages[0]['content'] }}]")
    assert tokenizer.decode(renderer.fit("Hello")[0]) == "[Hello]"


def own(tmp_path, *lines):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_users_prompts_are_rendered_by_kind(tmp_path, tokenizer):
    conversation = [{"role": role, "content": f"{role}!"} for role in ("system", "user", "assistant")]
    path = own(
        tmp_path, {"messages": conversation}, {"prompt": "as it is"}, {"input_ids": [3, 4]}, {"prompt": "a " * 99}
    )
    chosen = choose_own(path, Renderer(tokenizer, "a/target", 64), 4096, None, seed=0)
    texts = {int(prompt.place.rsplit(maxsplit=1)[1]): prompt.token_ids for prompt in chosen.prompts}
    # The answer at the end is what is asked for.
    assert tokenizer.decode(texts[1]) == "<system>system!<user>user!<assistant>"
    assert tokenizer.decode(texts[2]) == "as it is"
    assert texts[3] == [3, 4] and len(texts) == 3
    assert chosen.describe().endswith("; 1 too long for the window were left out")


def test_the_prompts_that_ship_are_texts_as_they_are(tmp_path, tokenizer):
    path = PAIR / "prompts.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    chosen = choose_own(path, Renderer(tokenizer, "a/target", 4096), 4096, None, seed=0)
    places = [int(prompt.place.rsplit(maxsplit=1)[1]) for prompt in chosen.prompts]
    assert sorted(places) == list(range(1, len(texts) + 1))
    assert [tokenizer.decode(prompt.token_ids) for prompt in chosen.prompts] == [texts[place - 1] for place in places]
    # Data sets have texts beside their prompts, which are not asked.
    beside = own(tmp_path, {"prompt": "asked", "text": "not asked"})
    [prompt] = choose_own(beside, Renderer(tokenizer, "a/target", 64), 4096, None, seed=0).prompts
    assert tokenizer.decode(prompt.token_ids) == "asked"


def test_what_is_wrong_with_the_users_prompts_is_said(tmp_path, tokenizer):
    renderer = Renderer(tokenizer, "a/target", 8)
    with pytest.raises(ValueError, match=r"own\.jsonl line 2: token id 5000 is not in the target's vocabulary"):
        choose_own(own(tmp_path, {"prompt": "x"}, {"input_ids": [5000]}), renderer, 4096, None, seed=0)
    with pytest.raises(ValueError, match="none of its 1 prompts fits 8 tokens: give a larger --max-model-len"):
        choose_own(own(tmp_path, {"prompt": "x " * 99}), renderer, 4096, None, seed=0)
    refusing = Renderer(tokenizer, "a/target", 64, template="{{ raise_exception('roles must alternate') }}")
    message = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses it \(roles must alternate\)"):
        choose_own(own(tmp_path, message), refusing, 4096, None, seed=0)

    class WithoutTemplate:
        chat_template = None

    untemplated = Renderer(WithoutTemplate(), "a/base-model", 64, as_they_are=True)
    with pytest.raises(ValueError, match="no chat template: give one by --chat-template"):
        choose_own(own(tmp_path, message), untemplated, 4096, None, seed=0)
