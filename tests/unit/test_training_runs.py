# SPDX-License-Identifier: Apache-2.0
"""Whole runs of `vllm-longspec train` on a CPU: every family, resumed and killed runs, and what goes wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.models import FAMILY_SETTINGS, GLIDE_ARCHITECTURES, glide_shapes, write_target
from vllm_longspec.commands import main
from vllm_longspec.proposers.glide.checkpoint import read_draft
from vllm_longspec.proposers.glide.fit import check_fit
from vllm_longspec.training import checkpoints, loop, split
from vllm_longspec.training import train as train_module
from vllm_longspec.training.config import build
from vllm_longspec.training.split import held_out_by_prompt
from vllm_longspec.training.target import load_shared
from vllm_longspec.training.teachers import Lesson, TeacherError
from vllm_longspec.training.teachers.hf import HfTeacher
from vllm_longspec.training.train import (
    _teacher_device,
    check_agreement,
    first_weights,
    make_teacher,
    train,
)

CPU = torch.device("cpu")
FAMILIES = sorted(GLIDE_ARCHITECTURES)
# A stage at offset positions, then one at real ones.
STAGES = "stages=[{steps: 8, learning_rate: 2e-3, anchor_positions: 700}, {steps: 8, learning_rate: 1e-3}]"
QUICK = [STAGES, "tokens_per_batch=256", "held_out.samples=3", "report.steps=2", "accumulation=2", "device=cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts that repeat themselves, so that there is something to learn."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(40):
        words = torch.randint(64, (6 + number % 5,), generator=generator).tolist()
        ids = (words * 20)[: 60 + 3 * number]
        lines.append(json.dumps({"input_ids": ids, "loss_mask": [0] * 20 + [1] * (len(ids) - 20)}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target") / "llama", "llama")


def command(target, data, out, *settings, options=()):
    main(
        ["train", "--target", str(target), "--data", str(data), "--out", str(out), *options, "--set", *QUICK, *settings]
    )


def metrics(out, kind="train"):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def newest(out) -> Path:
    found = checkpoints.newest(out)
    assert found is not None
    return found


class Served:
    """What vLLM says of a target, as far as it is read of a draft."""

    def __init__(self, shared):
        self.model, self.hf_text_config = shared.name, shared.config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_recognised(tmp_path, data, family, capsys):
    # Without a setting a Mistral has a sliding window.
    overrides: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    target = write_target(tmp_path / "target", family, tied=family == "granite", **overrides)
    out = tmp_path / "draft"
    # GLM-4 has norms after its sublayers.
    init = "normal" if family in ("glm4", "llama") else "last_layer"
    command(target, data, out, f"init={init}")
    assert f"vllm serve {target} --speculative-model {out}" in capsys.readouterr().out
    shared = load_shared(str(target))
    for folder in (out, newest(out)):
        draft = read_draft(str(folder), expected=True)
        assert draft.architecture == GLIDE_ARCHITECTURES[family]
        check_fit(draft, Served(shared))
        shapes = {name: tuple(weight.shape) for name, weight in load_file(folder / "model.safetensors").items()}
        config = json.loads((target / "config.json").read_text())
        assert shapes == glide_shapes({"num_key_value_heads": 2, **config})
    losses = [each["loss"] for each in metrics(out)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    (held_out,) = metrics(out, "held_out")
    assert len(held_out["greedy"]) == 5 and held_out["rows"] > 0


@pytest.mark.parametrize(("optimizer", "steps"), [("muon", (5, 8, 13)), ("adamw", (5, 8))])
def test_a_run_that_is_resumed_is_the_same(tmp_path, target, data, optimizer, steps):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chosen = f"optimizer={optimizer}"
    command(target, data, whole, chosen)
    # Checkpoints after every step, of which that of step 5 stays.
    command(target, data, parts, chosen, "checkpoints.minutes=1e-9", "checkpoints.keep=100")
    for step in steps:
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(parts, resumed)
        for checkpoint in (resumed / checkpoints.FOLDER).iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        # What a process that was killed may leave.
        (resumed / checkpoints.FOLDER / ".step-00000099.1").mkdir()
        (resumed / "model.safetensors").unlink()
        command(target, data, resumed, chosen, options=["--resume"])
        for name, weight in load_file(whole / "model.safetensors").items():
            assert torch.equal(weight, load_file(resumed / "model.safetensors")[name]), (step, name)
        expected, found = ([{**each, "tokens_per_second": 0} for each in metrics(run)] for run in (whole, resumed))
        assert [each["step"] for each in found] == [each["step"] for each in expected]
        assert found[-1] == expected[-1]
        assert metrics(resumed, "held_out")[-1] == metrics(whole, "held_out")[-1]
        assert not list((resumed / checkpoints.FOLDER).glob(".*"))


def test_no_resume_changes_what_is_computed_together(tmp_path, target):
    """Samples of similar lengths, which a teacher would compute together, across batches and steps."""
    data, whole = tmp_path / "alike.jsonl", tmp_path / "whole"
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(64, (60 + 4 * (number % 2),), generator=generator).tolist() for number in range(31)]
    lines = [json.dumps({"input_ids": ids, "loss_mask": [0] * 20 + [1] * (len(ids) - 20)}) for ids in samples]
    data.write_text("\n".join(lines) + "\n")
    settings = ["stages=[{steps: 6, learning_rate: 2e-3}]", "checkpoints.minutes=1e-9", "checkpoints.keep=100"]
    command(target, data, whole, *settings, "tokens_per_batch=188")
    expected = checkpoints.read_state(newest(whole))
    for step in range(1, 6):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(whole, resumed)
        for checkpoint in (resumed / checkpoints.FOLDER).iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        command(target, data, resumed, *settings, "tokens_per_batch=188", options=["--resume"])
        found = checkpoints.read_state(newest(resumed))
        for state in (found, expected):
            state["moments"] = state["optimiser"]["state"]
        for name in ("weights", "moments", "acceptance"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=f"{name}, resumed from {step}")


def test_a_process_trains_twice_with_different_precisions(tmp_path, target, data):
    stages = "stages=[{steps: 1}]"
    command(target, data, tmp_path / "bfloat16", stages, "dtype=bfloat16")
    command(target, data, tmp_path / "float32", stages, "dtype=float32")
    losses = [metrics(tmp_path / run)[0]["loss"] for run in ("bfloat16", "float32")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_other_ranks_wait_for_the_tokens(tmp_path, monkeypatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("accelerate.Accelerator", lambda **given: asked.append(given))
    config = build({"target": "x", "data": ["x"], "out": "x", "device": "cpu"})
    loop.make_accelerator(config, tmp_path)
    (handler,) = asked[0]["kwargs_handlers"]
    assert handler.timeout.total_seconds() >= 12 * 3600


def test_reading_the_data_shows_progress(tmp_path, target, data, monkeypatch):
    bars = []

    class Bar(split.tqdm):
        def __init__(self, **settings):
            # Without a terminal nothing is shown, and nothing is counted.
            super().__init__(**{**settings, "disable": False})
            bars.append(self)

    monkeypatch.setattr(split, "tqdm", Bar)
    config = build({"target": str(target), "data": [str(data)], "out": str(tmp_path)})
    split.prepare_data(config, load_shared(str(target)))
    assert [(bar.n, bar.total) for bar in bars] == [(data.stat().st_size, data.stat().st_size)]


def test_an_engine_that_fails_leaves_the_last_checkpoint(tmp_path, target, data, monkeypatch):
    out = tmp_path / "run"
    teach_batches = HfTeacher.teach_batches

    def failing(teacher, batches):
        for number, lesson in enumerate(teach_batches(teacher, batches)):
            if number == 14:
                raise TeacherError("the teacher's engine stopped with 5: see what it printed above")
            yield lesson

    monkeypatch.setattr(HfTeacher, "teach_batches", failing)
    with pytest.raises(SystemExit, match="see what it printed above; no checkpoint is there yet"):
        command(target, data, out)
    with pytest.raises(SystemExit) as error:
        command(target, data, out, "checkpoints.minutes=1e-9")
    assert str(error.value).endswith(f"stopped with 5: see what it printed above; --resume goes on from {newest(out)}")
    monkeypatch.setattr(HfTeacher, "teach_batches", teach_batches)
    command(target, data, out, "checkpoints.minutes=1e-9", options=["--resume"])


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_a_host_compares_teachers(tmp_path, target, data, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    loaded, engines = [], []

    class Plain(HfTeacher):
        def __init__(self, shared, device, dtype, **settings):
            loaded.append((device, dtype))
            super().__init__(shared, device, dtype, **settings)

    class Engine(HfTeacher):
        def __init__(self, name, *_args, **_settings):
            super().__init__(load_shared(name), "cpu", torch.bfloat16)
            engines.append(self)

    monkeypatch.setattr("vllm_longspec.training.teachers.hf.HfTeacher", Plain)
    monkeypatch.setattr("vllm_longspec.training.teachers.vllm.VllmTeacher", Engine)
    values = {"target": str(target), "data": [str(data)], "out": str(tmp_path), "teacher": "vllm"}
    config, shared = build(values), load_shared(str(target))
    # An engine in another dtype than that of the files is compared by the coarser one.
    assert train_module.make_teacher(config, shared, torch.device("cpu")) is engines[0]
    assert loaded == ([("cpu", shared.embedding.dtype)] if rank == 0 else [])

    def refuse(*_args, **_settings):
        raise ValueError("Unknown quantization type")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    if rank == 0:
        message = r"\(Unknown quantization type\): give compared_samples: 0 to train with what vLLM serves"
        with pytest.raises(ValueError, match=message):
            train_module.make_teacher(config, shared, torch.device("cpu"))
        assert len(engines) == 1


def test_a_target_that_transformers_does_not_compute_on_a_cpu(tmp_path, target, data, monkeypatch):
    def refuse(*_args):
        raise RuntimeError("needs a GPU")

    monkeypatch.setattr(HfTeacher, "teach", refuse)
    config = build({"target": str(target), "data": [str(data)], "out": str(tmp_path), "teacher": "vllm"})
    with pytest.raises(ValueError, match=r"on a CPU.*\(needs a GPU\): give compared_samples: 0"):
        train_module.make_teacher(config, load_shared(str(target)), torch.device("cpu"))


def test_a_run_is_resumed_with_its_own_configuration(tmp_path, target, data, capsys):
    out = tmp_path / "run"
    command(target, data, out)
    with pytest.raises(SystemExit, match="has checkpoints of a run: give --resume"):
        command(target, data, out)
    with pytest.raises(SystemExit, match=r"seed is 0 in the run of .*, but now 7"):
        command(target, data, out, "seed=7", options=["--resume"])
    before = load_file(out / "model.safetensors")
    main(["train", "--out", str(out), "--resume"])
    assert all(torch.equal(before[name], weight) for name, weight in load_file(out / "model.safetensors").items())


def test_a_run_from_before_muon_was_the_default_goes_on_with_adamw(tmp_path, target, data):
    """Whether its file says so or is from before there was a choice."""
    whole = tmp_path / "whole"
    settings = ["stages=[{steps: 4, learning_rate: 2e-3}]", "checkpoints.minutes=1e-9", "checkpoints.keep=4"]
    command(target, data, whole, *settings, "optimizer=adamw")
    expected, saved = load_file(whole / "model.safetensors"), (whole / "run.yaml").read_text()
    says = "optimizer: adamw\n"
    for text in (saved, saved.replace(says, "")):
        out = tmp_path / f"run-{says in text}"
        shutil.copytree(whole, out)
        for step in (3, 4):
            shutil.rmtree(out / checkpoints.FOLDER / f"step-{step:08d}")
        (out / "model.safetensors").unlink()
        (out / "run.yaml").write_text(text.replace(str(whole), str(out)))
        with pytest.raises(SystemExit, match=r"optimizer is 'adamw' in the run of .*, but now 'muon': give it as it"):
            command(target, data, out, *settings, options=["--resume"])
        main(["train", "--out", str(out), "--resume"])
        assert says in (out / "run.yaml").read_text()
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_a_killed_run_leaves_whole_checkpoints(tmp_path, target, data):
    out = tmp_path / "run"
    arguments = ["train", "--target", str(target), "--data", str(data), "--out", str(out), "--set", *QUICK]
    settings = ["stages=[{steps: 10000}]", "checkpoints.minutes=1e-9", "checkpoints.keep=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "vllm_longspec", *arguments, *settings], env=environment)
    try:
        deadline = time.monotonic() + 240
        while int((checkpoints.newest(out) or Path("step-0")).name[5:]) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = newest(out)
    assert read_draft(str(last), expected=True).architecture == "LlamaGlideDecoderLayer"
    assert checkpoints.read_state(last)["step"] == int(last.name[5:])


def test_two_processes_train_what_one_does(tmp_path, target, data):
    """Each takes one of the two batches that one process takes behind each other, with whole and with split weights."""
    one, one_by_muon = tmp_path / "one", tmp_path / "one-by-muon"
    stages = "stages=[{steps: 4, learning_rate: 2e-3}]"
    command(target, data, one, stages, "optimizer=adamw")
    command(target, data, one_by_muon, stages)
    values = {
        "target": str(target),
        "data": [str(data)],
        "stages": [{"steps": 4, "learning_rate": 2e-3}],
        "tokens_per_batch": 256,
        # Due at every report.
        "held_out": {"samples": 3, "minutes": 1e-9},
        "report": {"steps": 2},
        "device": "cpu",
    }
    two, split, by_muon = tmp_path / "two", tmp_path / "split", tmp_path / "by-muon"
    script = tmp_path / "both.py"
    script.write_text(
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from vllm_longspec.training import loop\n"
        "from vllm_longspec.training.config import build\n"
        "from vllm_longspec.training.train import make_accelerator, train\n"
        f"two = build({ {**values, 'out': str(two), 'optimizer': 'adamw'} })\n"
        f"split = build({ {**values, 'out': str(split), 'sharding': 'fsdp2'} })\n"
        f"by_muon = build({ {**values, 'out': str(by_muon)} })\n"
        "accelerator = make_accelerator(two, Path(two.out))\n"
        # Nothing is ever due by the clock of the second rank.
        "if not accelerator.is_main_process:\n"
        "    loop.time = SimpleNamespace(monotonic=lambda: 0.0)\n"
        "train(two, accelerator=accelerator)\n"
        "train(by_muon, accelerator=accelerator)\n"
        "train(split, accelerator=accelerator)\n"
        # Split weights and moments are read again.
        "train(split, resume=True, accelerator=accelerator)\n"
        "accelerator.end_training()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([sys.executable, *torchrun], env=environment, check=True, timeout=300)
    expected = load_file(one / "model.safetensors")
    for run in (two, split):
        for name, weight in load_file(run / "model.safetensors").items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5, msg=f"{run} {name}")
        assert [each["step"] for each in metrics(run)] == [each["step"] for each in metrics(one)]
        assert [each["step"] for each in metrics(run, "held_out")][:3] == [2, 4, 4]
    expected = load_file(one_by_muon / "model.safetensors")
    for name, weight in load_file(by_muon / "model.safetensors").items():
        # Its steps are computed in bfloat16.
        torch.testing.assert_close(weight, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    with pytest.raises(SystemExit, match="had 2 processes, but now 1: start torchrun with as many"):
        main(["train", "--out", str(two), "--resume"])


@pytest.mark.parametrize(
    ("minutes", "not_finite"), [(1e-9, "weights are not finite at step 3"), (1e9, "the loss is nan and its gradient")]
)
def test_what_is_not_finite_stops_the_run(tmp_path, target, data, monkeypatch, minutes, not_finite):
    out, seen = tmp_path / "run", []
    learning_rate = loop.learning_rate

    def explode(stage, done):
        seen.append(done)
        # Two groups of parameters ask at each step.
        return float("inf") if len(seen) > 4 else learning_rate(stage, done)

    monkeypatch.setattr(loop, "learning_rate", explode)
    with pytest.raises(SystemExit) as error:
        command(target, data, out, f"checkpoints.minutes={minutes}", "report.steps=1000")
    message = str(error.value)
    assert not_finite in message and "\n" not in message and "learning_rate" in message
    if checkpoints.newest(out) is None:
        assert "no checkpoint is there yet" in message
        return
    # What is named is good.
    assert f"the last good checkpoint is {newest(out)}:" in message and newest(out).name == "step-00000002"
    assert all(weight.isfinite().all() for weight in load_file(newest(out) / "model.safetensors").values())
    # What the message says to do, as in a new process: accelerate keeps one precision for all of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loop, "learning_rate", learning_rate)
    slower = STAGES.replace("2e-3", "1e-3, warmup: 0.2").replace("learning_rate: 1e-3}]", "learning_rate: 5e-4}]")
    command(target, data, out, slower, "clip=0.5", "dtype=bfloat16", options=["--resume"])
    assert metrics(out)[-1]["step"] == 16
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="stages is "):
        command(target, data, out, STAGES.replace("steps: 8", "steps: 9"), options=["--resume"])


def test_a_run_is_not_resumed_with_other_data(tmp_path, target, data):
    changed, out = tmp_path / "texts.jsonl", tmp_path / "run"
    shutil.copy(data, changed)
    command(target, changed, out, "stages=[{steps: 1}]")
    lines = changed.read_text().splitlines(keepends=True)
    changed.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(SystemExit, match=r"the data have changed since .*: give the files of the run"):
        command(target, changed, out, "stages=[{steps: 1}]", options=["--resume"])


def test_long_prompts_leave_held_out_tokens_to_other_samples(tmp_path, target, data, capsys):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(
        "".join(
            json.dumps({"input_ids": [1] * 60, "loss_mask": [0] * first + [1] * (60 - first)}) + "\n"
            for first in (50, 10, 30)
        )
    )
    settings = ["stages=[{steps: 1}]", f"held_out.data={held_out}"]
    command(target, data, tmp_path / "run", *settings, "held_out.tokens=45")
    said = capsys.readouterr().out
    assert "held out: 1 of 3 samples are measured" in said and "stage 1 uses 40 of 40 samples" in said
    assert metrics(tmp_path / "run", "held_out")[-1]["rows"] == 35
    with pytest.raises(SystemExit, match="no held-out sample has a supervised token in its first 10 tokens"):
        command(target, data, tmp_path / "none", *settings, "held_out.tokens=10")


def test_all_answers_to_a_prompt_are_on_one_side():
    prompts = np.repeat(np.arange(30), 4)
    found = held_out_by_prompt(prompts, 16, 0)
    assert found.sum() == 16
    assert not set(prompts[found]) & set(prompts[~found])
    assert np.array_equal(found, held_out_by_prompt(prompts, 16, 0))
    assert not np.array_equal(found, held_out_by_prompt(prompts, 16, 1))
    # A prompt has more answers than are asked for.
    assert held_out_by_prompt(prompts, 3, 0).sum() == 4 and not held_out_by_prompt(prompts, 0, 0).any()
    with pytest.raises(ValueError, match="all samples have the same prompt"):
        held_out_by_prompt(np.zeros(9, dtype=np.int64), 2, 0)


def test_an_engine_gets_the_length_of_the_configuration(tmp_path, target, data, monkeypatch):
    from vllm_longspec.training.teachers import vllm

    given = []
    monkeypatch.setattr(vllm, "VllmTeacher", lambda *_, **engine: given.append(engine))
    shared = load_shared(str(target))
    values: dict[str, Any] = {"target": str(target), "data": [str(data)], "out": str(tmp_path), "teacher": "vllm"}
    values["compared_samples"] = 0
    for engine in ({}, {"max_length": 700, "seed": 1}):
        make_teacher(build({**values, "stages": [{"steps": 1, "max_length": 300}], "engine": engine}), shared, CPU)
    assert given == [{"revision": None, "max_length": 300}, {"revision": None, "max_length": 700, "seed": 1}]


def test_devices_of_teachers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")

    def place(device):
        return _teacher_device(build({"target": "x", "data": ["x"], "out": "x", "teacher_device": device}), CPU)

    assert place("auto") == CPU and place("cuda:0") == torch.device("cuda:0")
    assert place(["cuda:0", "cuda:1"]) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="teacher_device cuda:2 is not there, of 2 GPUs"):
        place("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="teacher_device has 2 entries, but this process has LOCAL_RANK 2"):
        place(["cuda:0", "cuda:1"])


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = build({"target": "x", "data": ["x"], "out": "x", "device": "cuda"})
    with pytest.raises(ValueError, match="device is cuda, but PyTorch finds no GPU here"):
        loop.make_accelerator(config, tmp_path)


def test_a_disk_that_is_full(tmp_path, target, data, monkeypatch):
    out = tmp_path / "run"
    command(target, data, out, "stages=[{steps: 1}]")
    first = newest(out)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    shutil.rmtree(out / "data")
    again = tmp_path / "again"
    shutil.copytree(out, again)
    config = build(
        {
            "target": str(target),
            "data": [str(data)],
            "out": str(again),
            "stages": [{"steps": 1}],
            "tokens_per_batch": 256,
            "held_out": {"samples": 3},
            "report": {"steps": 2},
            "accumulation": 2,
            "device": "cpu",
        }
    )
    with pytest.raises(ValueError, match=r"cannot be written to .* \(No space left on device\): make room") as error:
        train(config, resume=True)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"\(No space left on device\): make room; .*step-00000001 is whole"):
        checkpoints.save(again, 2, {}, {"a": torch.zeros(1)}, torch.float32, {}, 2)
    assert newest(again).name == first.name
    assert not list((again / checkpoints.FOLDER).glob(".*"))


def test_a_disk_that_is_full_where_pytorch_writes(tmp_path):
    """The system's reason is said: that of PyTorch is of the place in the file that it had got to."""
    state = tmp_path / checkpoints.FOLDER / f".step-00000002.{os.getpid()}" / "trainer" / "state.pt"
    state.parent.mkdir(parents=True)
    state.symlink_to("/dev/full")
    weights = {"a": torch.zeros(100_000)}
    with pytest.raises(ValueError, match=r"step-00000002 cannot be written \(No space left on device\): make room"):
        checkpoints.save(tmp_path, 2, {}, weights, torch.float32, {}, 2)
    assert not list((tmp_path / checkpoints.FOLDER).iterdir())


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl"])
def test_a_disk_that_is_full_before_the_first_step(tmp_path, target, data, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    (out / {"run.yaml": ".run.yaml", "metrics.jsonl": "metrics.tmp"}[name]).symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=rf"{name} cannot be written \(No space left on device\): make room"):
        command(target, data, out)


def test_a_stage_by_the_clock(tmp_path, target, data):
    out = tmp_path / "run"
    started = time.monotonic()
    command(target, data, out, "stages=[{minutes: 0.05}]")
    assert time.monotonic() - started > 3
    assert metrics(out)[-1]["done"] == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [["dtype=float32"], ["compile_target=true"], ["depths_per_batch=1"]], ids=str)
def test_a_gpu_trains_as_a_cpu_does(tmp_path, target, data, settings):
    """With flex_attention, compiled losses, and bfloat16 unless told otherwise."""
    stages = "stages=[{steps: 6, learning_rate: 2e-3}]"
    # A CPU needs no kernels compiled for the same result.
    command(target, data, tmp_path / "cpu", stages, *(each for each in settings if "compile" not in each))
    command(target, data, tmp_path / "gpu", "device=auto", stages, *settings)
    expected, found = (metrics(tmp_path / device) for device in ("cpu", "gpu"))
    for one, other in zip(expected, found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3 if settings == ["dtype=float32"] else 3e-2)
        assert "peak_memory_gib" in other
    assert read_draft(str(tmp_path / "gpu"), expected=True).architecture == "LlamaGlideDecoderLayer"


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["losss.kl=1"], [], "unknown key losss in the configuration: did you mean loss?"),
        (["loss.kll=1"], [], "unknown key loss.kll in the configuration: did you mean kl?"),
        (["stages=[{steps: 1, lr: 1}]"], [], "unknown key stages[0].lr"),
        (["stages=[{steps: 1, epochs: 1}]"], [], "one of epochs, steps, tokens and minutes, not epochs and steps"),
        (["stages=[{epochs: .inf}]"], [], "stages[0]: epochs is a finite number, not inf"),
        (["stages=[{minutes: .nan}]"], [], "stages[0]: minutes is more than 0, not nan"),
        (["clip=nan"], [], "clip is more than 0, not nan"),
        (["optimizer=sgd"], [], "optimizer is one of auto, adamw, muon, not 'sgd'"),
        (["optimizer=muon", "sharding=fsdp2"], [], "optimizer muon is not supported with sharding fsdp2"),
        (["seed=many"], [], "seed is 'many', but takes int"),
        (["device=gpu"], [], "device is one of auto, cpu, cuda, not 'gpu'"),
        (["teacher_device=cuda:x"], [], "teacher_device is one of auto, cpu, cuda, cuda:N, not 'cuda:x'"),
        (["engine.revision=main"], [], "engine.revision is not supported: give revision beside engine"),
        (["engine.target=x"], [], "engine.target is not supported: give target beside engine"),
        (["teacher=vllm"], [], "anchor_positions is not supported with teacher vllm"),
        (["held_out.samples=40"], [], "the data have 40 samples, and 40 are held out"),
        (["report.to=mlflow"], [], "report.to is one of wandb, tensorboard, trackio, not 'mlflow'"),
        (["report.to=trackio"], [], "report.to has trackio, which is not installed: pip install trackio"),
    ],
)
def test_settings_that_are_wrong(tmp_path, target, data, settings, options, message):
    with pytest.raises(SystemExit) as error:
        command(target, data, tmp_path / "run", *settings, options=options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / checkpoints.FOLDER).exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_of_others_are_not_replaced(tmp_path, data, name):
    """Not even those of the target, where it is given as --out as well."""
    target = write_target(tmp_path / "target", "llama")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(SystemExit, match=r"--out .*target has (model.safetensors|config.json), which is not of a run"):
        command(target, data, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    out = tmp_path / "out"
    out.mkdir()
    (out / name).touch()
    with pytest.raises(SystemExit, match=f"--out .*out has {name}, which is not of a run: give another folder"):
        command(target, data, out, options=["--resume"])


def test_ctrl_c_says_where_the_run_goes_on(tmp_path, target, data, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "fit", stopped)
    with pytest.raises(SystemExit, match="vllm-longspec train: stopped; no checkpoint is there yet"):
        command(target, data, tmp_path / "run")


def test_data_may_be_given_one_by_one(tmp_path, target, data, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [5] * 60, "loss_mask": [1] * 60}) + "\n")
    command(target, data, tmp_path / "run", options=["--data", str(other), "--plan"])
    assert "data: 41 samples" in capsys.readouterr().out


def test_the_plan_starts_nothing(tmp_path, target, data, capsys):
    out = tmp_path / "run"
    command(target, data, out, options=["--plan"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("GPU hours", "memory of a GPU", "disk", "40 samples", "estimate"))
    assert "a step: 2 x 256 tokens" in said and "for steps of muon" in said
    command(target, data, out, "optimizer=adamw", options=["--plan"])
    assert "for steps of" not in capsys.readouterr().out
    assert not (out / "model.safetensors").exists() and not (out / checkpoints.FOLDER).exists()


def test_teachers_that_disagree_are_named(target):
    from tests.unit.test_training_forward import CONFIG, lesson, sample

    one = lesson(sample(50, [(10, 50)]), CONFIG)
    one = Lesson(one.sample, *(part.float() for part in one[1:]))
    check_agreement([one], [one._replace(keys=one.keys * (1 + 1e-5))])
    for name in ("keys", "values", "hidden"):
        other = one._replace(**{name: getattr(one, name) + 0.1})
        with pytest.raises(ValueError, match=f"the {name} of vLLM's last layer differ"):
            check_agreement([one], [other])
    with pytest.raises(ValueError, match="differ"):
        check_agreement([one], [one._replace(keys=one.keys * float("nan"))])


def test_first_weights_of_the_last_layer(tmp_path):
    """A Qwen3's norm of queries is folded so that they have about the size that the norm gives them."""
    path = write_target(tmp_path / "qwen3", "qwen3")
    shared = load_shared(str(path))
    config = build({"target": str(path), "data": ["x"], "out": "x", "init": "last_layer"})
    glide = first_weights(config, shared)
    layer = shared.last_layer()
    assert torch.equal(glide.mlp.up_proj.weight, layer["mlp.up_proj.weight"])
    assert torch.equal(glide.cross_attn.o_proj.weight, layer["self_attn.o_proj.weight"])
    assert not glide.cross_attn.k_proj.weight.any() and not glide.cross_attn.k_proj.weight.requires_grad
    x = torch.randn(2000, 128)
    normed = torch.nn.functional.rms_norm(x, (128,), layer["input_layernorm.weight"], 1e-6)
    expected = (normed @ layer["self_attn.q_proj.weight"].T).unflatten(1, (4, 64))
    expected = torch.nn.functional.rms_norm(expected, (64,), layer["self_attn.q_norm.weight"], 1e-6)
    with torch.no_grad():
        found = glide.self_attn.q_proj(glide.input_layernorm(x)).unflatten(1, (4, 64))
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    assert 0.9 < (found.norm() / expected.norm()).item() < 1.1


def test_every_family_of_the_plugin_is_here():
    assert set(FAMILY_SETTINGS) <= set(FAMILIES)
