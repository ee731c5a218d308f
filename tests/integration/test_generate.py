# SPDX-License-Identifier: Apache-2.0
"""What `vllm-longspec generate` makes of its input before an engine starts, and the answers of one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.process import run_alone
from vllm_longspec import commands
from vllm_longspec.training.data import prepare
from vllm_longspec.training.generate import (
    MANIFEST,
    Generator,
    Settings,
    check_prompts,
    open_folder,
    parse_prompt,
    read_prompts,
    seed_of,
    to_answer,
    write_atomically,
)

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
USER = {"role": "user", "content": "def f("}
ANSWER = {"role": "assistant", "content": "x)"}
TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('a tool first') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object, but list"),
        ('{"content": "a"}', "has none of messages, prompt, input_ids, text"),
        ('{"text": ["a"]}', "text must be a text that is not empty"),
        ('{"prompt": "a", "input_ids": [1]}', "has prompt and input_ids of"),
        ('{"prompt": ""}', "prompt must be a text"),
        ('{"prompt": ["a"]}', "prompt must be a text"),
        ('{"input_ids": []}', "input_ids must be a list"),
        ('{"input_ids": [1, true]}', "input_ids must be a list"),
        ('{"input_ids": [1, -1]}', "input_ids must be a list"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": ["a"]}', "a message must be an object with a role"),
        ('{"messages": [{"content": "a"}]}', "a message must be an object with a role"),
        ('{"messages": [{"role": "user"}]}', "the content of a message of user must be a text"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "the content of a message of user must be a text"),
        (json.dumps({"messages": [ANSWER]}), "messages must have one to answer"),
        ('{"prompt": "a", "tools": []}', "tools must be a list, beside messages"),
        ('{"input_ids": [9]}', "token id 9 is not in the target's vocabulary of 9"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n{{"prompt": "b"}}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl line 3: ") as error:
        check_prompts(path, vocab_size=9)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prompts_of_several_files_are_numbered_through(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"prompt": "a"}\n\n{"input_ids": [1, 2]}\n')
    second.write_text(json.dumps({"messages": [USER, ANSWER], "tools": [{}], "source": "any"}))
    assert check_prompts(first, 9)[::2] == (2, {"prompt", "input_ids"})
    assert check_prompts(second, 9)[::2] == (1, {"messages"})
    prompts = list(read_prompts([first, second]))
    assert [(each.number, each.place.split("/")[-1], each.kind) for each in prompts] == [
        (0, "first.jsonl line 1", "prompt"),
        (1, "first.jsonl line 3", "input_ids"),
        (2, "second.jsonl line 1", "messages"),
    ]
    assert (prompts[1].content, prompts[2].tools) == ([1, 2], [{}])
    assert to_answer(prompts[2].content) == [USER]
    called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{}]}
    assert parse_prompt(json.dumps({"messages": [USER, called, USER]}).encode())[1][1] == called


def test_each_answer_has_a_seed_of_its_own():
    seeds = {seed_of(seed, f"{prompt}.{sample}") for seed in (0, 1) for prompt in range(20) for sample in range(20)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_file_that_cannot_be_written_is_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a.jsonl", object())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_the_way_out(tmp_path):
    (tmp_path / "a.jsonl.unfinished").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"a.jsonl cannot be written \(No space left on device\): make room") as error:
        write_atomically(tmp_path / "a.jsonl", "text")
    assert "--resume" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def settings_of(*prompts: str) -> Settings:
    return Settings("t", None, {path: f"digest of {path}" for path in prompts}, 1, 8, None, None, None, 0, {}, None)


def test_a_run_goes_on_with_the_same_prompts_in_the_same_order(tmp_path):
    """Answers are told by the number of their prompt."""
    (tmp_path / MANIFEST).write_text(json.dumps({"settings": vars(settings_of("a", "b"))}))
    (tmp_path / "answers-000000.jsonl").write_text('{"id": "0.0"}\n{"id": "3.0"}\n')
    assert open_folder(tmp_path, settings_of("a", "b"), resume=True) == {"0.0", "3.0"}
    for others in (("b", "a"), ("a",)):
        with pytest.raises(ValueError, match=r"--resume with prompts .*: give the same, or another folder"):
            open_folder(tmp_path, settings_of(*others), resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "an app"}', '{"settings": 3}'])
def test_a_manifest_of_something_else_is_no_run(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"manifest.json is not of a run: give another folder"):
            open_folder(tmp_path, settings_of("a"), resume)


@pytest.mark.parametrize("line", ["{", "[]", '{"input_ids": [1]}'])
def test_a_damaged_shard_is_named_with_the_line(tmp_path, line):
    (tmp_path / MANIFEST).write_text(json.dumps({"settings": vars(settings_of("a"))}))
    (tmp_path / "answers-000000.jsonl").write_text(f'{{"id": "0.0"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"answers-000000.jsonl line 2 is no answer of a run: move the file away"):
        open_folder(tmp_path, settings_of("a"), resume=True)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    ended: list[bool] = []
    generator: Any = Generator.__new__(Generator)
    generator.arguments, generator.settings, generator.finished = SimpleNamespace(out=tmp_path), settings_of("a"), []
    generator.engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: ended.append(True)))
    monkeypatch.setattr(Generator, "_write_manifest", lambda *_, **__: None)
    monkeypatch.setattr(Generator, "_generate", stopped)
    with pytest.raises(ValueError, match=r"^stopped; finished answers are in .*: go on with --resume$"):
        generator.run([], 1, set())
    assert ended


def command_error(*arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        generate(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_target_that_has_no_drafts_answers_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    said = command_error(
        "--target", str(tmp_path), "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")
    )
    assert "model_type 'opt'" in said and "llama, qwen2, qwen3" in said
    assert not (tmp_path / "out").exists()


def test_an_engine_that_does_not_start_is_one_line(tmp_path, target, monkeypatch):
    def failing(**_settings: Any) -> None:
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    monkeypatch.setattr("vllm.LLM", failing)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [5]}\n')
    arguments = ["--target", str(target), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    said = command_error(*arguments)
    assert "the engine does not start (Engine core initialization failed. See root cause above.): give --engine" in said
    # The folder holds nothing that a second try would stumble over.
    assert "the engine does not start" in command_error(*arguments)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The trained target with a chat template."""
    shutil.copytree(PAIR / "target", tmp_path / "target")
    path = tmp_path / "target" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return tmp_path / "target"


ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 32 << 20,
    "gpu_memory_utilization": 0.1,
    "distributed_executor_backend": "uni",
}


def generate(arguments: Sequence[str]) -> None:
    commands.main(["generate", *arguments])


def records(folder: Path) -> dict[str, dict[str, Any]]:
    shards = sorted(folder.glob("*.jsonl"))
    return {record["id"]: record for shard in shards for record in map(json.loads, shard.read_text().splitlines())}


def test_answers_and_the_same_again_after_a_stop(tmp_path, target):
    """What is missing is generated again, with a draft this time, and no answer changes."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "data"
    lines: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER]},
        {"prompt": "def g(self):\n"},
        {"input_ids": [476, 260, 325, 258]},
        {"input_ids": [5] * 128},
        {"messages": [USER]},
        {"messages": [{"role": "tool", "content": "1"}]},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--target", str(target), "--prompts", str(prompts), "--out", str(out), "--engine", json.dumps(ENGINE)]
    command += ["--samples", "2", "--temperature", "0.7", "--max-tokens", "24", "--shard-size", "3", "--text"]
    _, printed = run_alone(generate, command)
    assert "2 prompts left out" not in printed
    assert "1 prompts left out, too long for the window of 128 tokens: " + f"{prompts} line 4" in printed
    assert f"1 prompts left out, refused by the chat template: {prompts} line 6 (a tool first)" in printed
    assert "1 conversations ended with an answer" in printed
    assert [len(shard.read_text().splitlines()) for shard in sorted(out.glob("*.jsonl"))] == [3, 3, 2]
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["finished"] and manifest["sampling"]["temperature"] == 0.7
    assert manifest["counts"]["answers"] == 8 and manifest["versions"]["vllm"].startswith("0.3")
    answers = records(out)
    assert answers.keys() == {f"{prompt}.{sample}" for prompt in (0, 1, 2, 4) for sample in (0, 1)}
    for record in answers.values():
        num_answered = sum(record["loss_mask"])
        assert record["loss_mask"] == [0] * (len(record["input_ids"]) - num_answered) + [1] * num_answered
        assert record["finish_reason"] == ("length" if num_answered == 24 else "stop") and record["answer"]
    # As `train` reads it.
    store = prepare([str(out)], tmp_path / "tokens", lambda: pytest.fail("ids need no tokenizer"), 1 << 16, 256)
    assert store.counts.samples == 8
    assert store.counts.supervised == sum(sum(record["loss_mask"]) for record in answers.values())
    assert answers["2.0"]["input_ids"][:4] == [476, 260, 325, 258]
    # The given answer is not part of the prompt, so both are the same prompt; seeds differ.
    given, alone = (answers[name]["input_ids"][: answers[name]["loss_mask"].index(1)] for name in ("0.0", "4.0"))
    assert given == alone
    assert len({tuple(answers[name]["input_ids"]) for name in ("0.0", "0.1", "4.0", "4.1")}) > 1

    with pytest.raises(SystemExit, match="has a run: go on with it by --resume"):
        generate(command)
    with pytest.raises(SystemExit, match=r"--resume with temperature 0.5, but the run in .* has 0.7: give the same"):
        generate([*command, "--resume", "--temperature", "0.5"])
    missing = {json.loads(line)["id"] for line in (out / "answers-000001.jsonl").read_text().splitlines()}
    (out / "answers-000001.jsonl").rename(out / "answers-000001.jsonl.unfinished")
    _, printed = run_alone(generate, [*command, "--resume", "--draft", str(PAIR / "draft")])
    assert not (out / "answers-000001.jsonl.unfinished").exists()
    assert json.loads((out / MANIFEST).read_text())["counts"]["answers"] == len(missing) == 3
    again = records(out)
    assert again == answers


def test_refused_before_the_engine_starts(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [USER]}))
    command = ["--target", str(PAIR / "target"), "--prompts", str(prompts), "--out", str(tmp_path / "data")]
    for more, message in (
        ([], "has no chat template: give prompt or input_ids instead"),
        (["--prompts", str(prompts)], "prompts.jsonl twice: leave one out, --samples 2 gives two answers"),
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--samples", "0"], "--samples must be 1 or more, got 0"),
        (["--temperature", "-1"], "--temperature -1.0: temperature must be non-negative"),
        (["--top-p", "2"], "--top-p 2.0: top_p must be in (0, 1]"),
        (["--engine", '{"model": "a"}'], "--engine has 'model': give --target instead"),
        (["--engine", '{"tensor_size": 2}'], "'tensor_size', which is no engine argument of vLLM's"),
        (
            ["--draft", "d", "--engine", '{"speculative_config": {"model": "e"}}'],
            "--draft and the speculative_config of --engine are mutually exclusive",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            generate([*command, *more])
        assert message in str(stopped.value) and "\n" not in str(stopped.value)
    prompts.write_text("\n")
    with pytest.raises(SystemExit, match="--prompts has no prompts"):
        generate(command)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other.jsonl").touch()
    prompts.write_text('{"prompt": "a"}')
    with pytest.raises(SystemExit, match=r"other.jsonl, which is not of a run: give another folder"):
        generate(command)
