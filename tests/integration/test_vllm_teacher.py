# SPDX-License-Identifier: Apache-2.0
"""An engine teaches what Transformers computes: the last layer's K and V, and hidden states of supervised rows."""

import json
import pickle
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs

from benchmarks.training import teacher
from tests.engine import running
from tests.integration.test_tensor_parallel import TWO_RANKS
from tests.models import write_target
from tests.process import run_alone
from tests.quantised_models import write_cache_scales
from vllm_longspec import plugin
from vllm_longspec.proposers.capture.proposer import first_head
from vllm_longspec.proposers.capture.spool import (
    CaptureRequest,
    Part,
    read_failure,
    read_parts,
    write_failure,
    write_part,
)
from vllm_longspec.proposers.capture.writer import Captured, Slice, SpoolWriter
from vllm_longspec.training.teachers import Lesson, Sample, TeacherError
from vllm_longspec.training.teachers.engine import engine_arguments
from vllm_longspec.training.teachers.vllm import Assembly, TargetSizes, VllmTeacher, _room, visible_devices

plugin.register()

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 8 << 20,
    "gpu_memory_utilization": 0.1,
    "distributed_executor_backend": "uni",
}


def sample(num_tokens: int, supervised: float = 0.5, seed: int = 0) -> Sample:
    generator = random.Random(f"{num_tokens} {seed}")
    mask = torch.tensor([False] + [generator.random() < supervised for _ in range(num_tokens - 1)])
    return Sample(torch.tensor(generator.choices(range(3, 64), k=num_tokens)), mask, torch.arange(num_tokens))


# Several parts of one prompt, several prompts in a step, nothing or all supervised, the whole window.
SAMPLES = [
    sample(200),
    sample(33),
    sample(5, supervised=1.0),
    sample(70, supervised=0.0),
    sample(2048, supervised=0.02),
    sample(1),
    *(sample(20, seed=seed) for seed in range(8)),
]


@contextmanager
def teaching(target: Path, max_length: int, **settings: Any) -> Iterator[VllmTeacher]:
    taught_by = VllmTeacher(str(target), max_length, **ENGINE, **settings)
    try:
        yield taught_by
    finally:
        taught_by.close()
        assert not taught_by.spool.exists()


@torch.inference_mode()
def expected(target: Path, samples: list[Sample]) -> list[Lesson]:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    lessons = []
    for each in samples:
        output = model.model(each.input_ids[None], use_cache=True)
        last = output.past_key_values.layers[-1]
        keys, values = (states[0].transpose(0, 1) for states in (last.keys, last.values))
        lessons.append(Lesson(each, keys, values, output.last_hidden_state[0, each.rows]))
    return lessons


def assert_equal(lessons: list[Lesson], others: list[Lesson], tolerance: float = 3e-4) -> None:
    for lesson, other in zip(lessons, others, strict=True):
        assert lesson.sample is other.sample
        for found, wanted in zip(lesson[1:], other[1:], strict=True):
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_an_engine_agrees_with_transformers(tmp_path, monkeypatch):
    """One process, whose files have room for two of the smaller samples; and again after a round that was left."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    target = write_target(tmp_path / "target", "llama")
    lessons = expected(target, SAMPLES)
    spool = tmp_path / "spool"
    spool.mkdir()
    room = 2048 * 2 * 2 * 32 * 4 + 60 * 128 * 4
    with teaching(target, 2048, spool=spool, spool_bytes=room) as taught_by:
        assert_equal([next(taught_by.teach(SAMPLES))], lessons[:1])
        taught = []
        for lesson in taught_by.teach(SAMPLES):
            taught.append(lesson)
            assert sum(file.stat().st_size for file in spool.rglob("*") if file.is_file()) <= room + (64 << 10)
        assert_equal(taught, lessons)
        assert not [file for file in spool.rglob("*") if file.is_file()]

        too_long = sample(2049)
        offset = SAMPLES[1]._replace(positions=SAMPLES[1].positions + 7)
        too_large = sample(2048, supervised=1.0)
        for wrong, message in (
            (too_long, "a sample has 2049 tokens, but the teacher was started for 2048"),
            (offset, "cannot teach samples with anchor-offset positions: give --teacher hf for this stage"),
            (too_large, f"bytes of the teacher's spool, which may have {room}: give a larger spool_bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                list(taught_by.teach([SAMPLES[1], wrong]))
    assert not list(spool.iterdir())


def capture(settings: dict[str, Any], samples: list[Sample], sizes: TargetSizes, result: str) -> float:
    """Saves what an engine in this process captures of requests that go on; returns how many it has preempted."""
    from vllm import SamplingParams

    spool = Path(settings["speculative_config"]["spool"])
    assemblies = [Assembly(each, sizes, spool / str(index)) for index, each in enumerate(samples)]
    # One that asks for nothing is not captured.
    prompts = [{"prompt_token_ids": [7] * 50}]
    params = [SamplingParams(max_tokens=60, ignore_eos=True, detokenize=False)]
    for assembly in assemblies:
        assembly.folder.mkdir()
        prompts.append({"prompt_token_ids": assembly.sample.input_ids.tolist()})
        request = CaptureRequest(assembly.folder.name, len(assembly.sample.input_ids), assembly.rows.numpy())
        params.append(params[0].clone())
        params[-1].extra_args = request.to_extra_args()
    with running(settings) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        for assembly in assemblies:
            # The thread that writes may not be done.
            while not assembly.is_complete:
                for part in read_parts(assembly.folder):
                    assembly.add(part)
    torch.save([assembly.lesson()[1:] for assembly in assemblies], result)
    return metrics["vllm:num_preemptions"]


def captured(tmp_path: Path, target: Path, samples: list[Sample], **settings: Any) -> tuple[list[Lesson], float]:
    (tmp_path / "spool").mkdir()
    settings = {
        "model": str(target),
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 96,
        "speculative_config": {"method": "capture", "spool": str(tmp_path / "spool"), "copy_length": 0},
        **settings,
    }
    sizes = TargetSizes(2, AutoConfig.from_pretrained(target).head_dim, 128, torch.float32)
    preemptions, _ = run_alone(capture, settings, samples, sizes, str(tmp_path / "captured"))
    states = torch.load(tmp_path / "captured")
    return [Lesson(each, *its) for each, its in zip(samples, states, strict=True)], preemptions


def test_asynchronous_ranks_whose_requests_go_on_and_are_preempted(tmp_path):
    """Each rank has one of two heads. What requests emit is not captured, also where it is computed with the prompt."""
    target = write_target(tmp_path / "target", "qwen3")
    samples = [SAMPLES[0], SAMPLES[1], SAMPLES[3], SAMPLES[6]]
    lessons, preemptions = captured(
        tmp_path, target, samples, **TWO_RANKS, max_model_len=320, num_gpu_blocks_override=12
    )
    assert preemptions > 0
    assert_equal(lessons, expected(target, samples))


def test_a_cache_of_fp8(tmp_path):
    """Keys and values come as they are attended: rounded, and multiplied by the scales of their layer."""
    target = write_target(tmp_path / "plain", "llama", num_hidden_layers=1)
    scaled = write_cache_scales(tmp_path / "target", target, key=0.06, value=0.05)
    (lesson,), _ = captured(tmp_path, scaled, SAMPLES[:1])
    (other,) = expected(target, SAMPLES[:1])
    for found, wanted, scale in ((lesson.keys, other.keys, 0.06), (lesson.values, other.values, 0.05)):
        # Three bits after the first.
        torch.testing.assert_close(found, wanted, rtol=2**-3, atol=scale * 2**-6)
        stored = (found / scale).to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, stored * scale, rtol=1e-5, atol=1e-6)
    assert (lesson.hidden - other.hidden).abs().mean() < 0.2 * other.hidden.abs().mean()


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(None) is None
    assert visible_devices("4,5") == "4,5"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert visible_devices(None) == "1"
    assert visible_devices(["4", "5,6"]) == "5,6"
    with pytest.raises(ValueError, match="devices has 1 entries, but this is process 1 of the host"):
        visible_devices(["4"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert visible_devices(None) == "7"


def test_heads_of_ranks():
    """With more ranks than heads, one of those that have the same head."""
    assert [first_head(rank, 4, 8) for rank in range(4)] == [0, 2, 4, 6]
    assert [first_head(rank, 4, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [first_head(rank, 8, 2) for rank in range(8)] == [0, None, None, None, 1, None, None, None]


@pytest.mark.parametrize("rows", [[], [0], [3, 4, 5, 9], [0, 2, 4], list(range(100))])
def test_what_a_request_asks_for(rows):
    request = CaptureRequest("17", 120, np.array(rows, dtype=np.int64))
    found = CaptureRequest.from_extra_args(json.loads(json.dumps(request.to_extra_args())))
    assert found is not None and found[:2] == request[:2] and found.rows.tolist() == rows
    assert CaptureRequest.from_extra_args(None) is CaptureRequest.from_extra_args({"other": 1}) is None
    with pytest.raises(ValueError, match=r"has the name '\.\./a': give letters and digits only"):
        CaptureRequest.from_extra_args({"longspec_capture": {"name": "../a", "num_tokens": 1, "rows": []}})


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """The step after the one that could not be written raises, and the reader is told."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_longspec.proposers.capture.spool.save_file", fail)
    writer = SpoolWriter(tmp_path, 0, torch.device("cpu"))
    (tmp_path / "1").mkdir()
    step = Captured([Slice("1", 0, 2, 0, 0, 1)], torch.zeros(2, 2, 64), torch.zeros(1, 8))
    writer.put(step)
    deadline = time.monotonic() + 10
    while read_failure(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "No space left on device" in str(read_failure(tmp_path))
    with pytest.raises(OSError, match="No space left on device"):
        writer.put(step)
    assert not list((tmp_path / "1").iterdir())


def test_parts_that_nobody_wants_any_more(tmp_path):
    """Whoever stops asking removes the folder."""
    write_part(tmp_path / "gone", Part(0, 2, 0, torch.zeros(2, 2, 64), None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spool": Path("/nowhere")}, "spool /nowhere is no folder: give one that exists"),
        ({"spool_bytes": 0}, "spool_bytes must be positive, got 0"),
        ({"spool_bytes": 1 << 60}, "left for each of 1 processes: give a smaller spool_bytes or another folder"),
    ],
)
def test_a_spool_without_room(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        VllmTeacher("any", 100, **{"spool": tmp_path, **settings})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("sys.exit(3)", TeacherError, "the teacher's engine stopped with 3: see what it printed above"),
        ("pipe.send(('failed', 'no memory'))", TeacherError, r"engine failed \(no memory\): see what it printed above"),
        ("pipe.send(('refused', 'no such target'))", ValueError, "^no such target$"),
    ],
)
def test_an_engine_that_does_not_start(tmp_path, monkeypatch, script, error, message):
    run_instead(monkeypatch, script)
    with pytest.raises(error, match=message):
        VllmTeacher("any", 100, spool=tmp_path)
    assert not list(tmp_path.iterdir())


def test_spools_share_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    assert _room(tmp_path, None) == int(0.8 * (1 << 30)) and _room(tmp_path, 1 << 30) == 1 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _room(tmp_path, None) == int(0.8 * (1 << 27)) and _room(tmp_path, 1 << 27) == 1 << 27
    with pytest.raises(ValueError, match=r"has 134217728 left for each of 8 processes: give a smaller spool_bytes"):
        _room(tmp_path, (1 << 27) + 1)


def run_instead(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A script in the place of the engine's process, after it got the settings."""
    run = subprocess.Popen

    def start(command: list[str], **settings: Any) -> Any:
        program = f"import sys; from multiprocessing.connection import Connection; pipe = Connection({command[-1]})"
        return run([command[0], "-c", f"{program}; pipe.recv(); {script}"], **settings)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit(5)", "the teacher's engine stopped with 5"),
        (
            "pipe.send(('failed', 'a step failed')); pipe.recv()",
            r"the teacher's engine failed \(a step failed\): see what",
        ),
    ],
)
def test_an_engine_that_fails_while_it_teaches(tmp_path, monkeypatch, script, message):
    sizes = pickle.dumps(("ready", (100, TargetSizes(2, 32, 128, torch.float32))))
    run_instead(monkeypatch, f"pipe.send_bytes({sizes!r}); pipe.recv(); {script}")
    failing = VllmTeacher("any", 100, spool=tmp_path)
    with pytest.raises(TeacherError, match=message):
        list(failing.teach([SAMPLES[1], SAMPLES[2]]))
    failing.close()
    failing.close()
    assert not list(tmp_path.iterdir())


def test_a_spool_that_cannot_be_written(tmp_path, monkeypatch):
    sizes = pickle.dumps(("ready", (100, TargetSizes(2, 32, 128, torch.float32))))
    run_instead(monkeypatch, f"pipe.send_bytes({sizes!r}); pipe.recv(); pipe.recv()")
    full = VllmTeacher("any", 100, spool=tmp_path)
    write_failure(full.spool, "No space left on device")
    message = r"cannot write what it captured to .* \(No space left on device\): make room, or give another spool"
    with pytest.raises(TeacherError, match=message):
        list(full.teach([SAMPLES[1]]))
    full.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "a"}, "model is not an option of a teacher's engine, which sets it itself: leave it out"),
        ({"spec_tokens": 2}, "spec_tokens is not an option of a teacher's engine"),
        ({"tensor_size": 2}, "'tensor_size' is no engine argument of vLLM's: leave it out"),
        ({"max_model_len": 64}, "max_model_len is 64, but samples may have 64 tokens, and a request one more"),
    ],
)
def test_engine_arguments_that_are_refused(given, message):
    settings = {"target": "any", "revision": None, "max_length": 64, "engine": given, "spool": "/tmp"}
    with pytest.raises(ValueError, match=message):
        engine_arguments(settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy_length": 0}, "spool must be a folder with the method capture, got None"),
        ({"spool": "/tmp"}, "the method capture drafts nothing: give copy_length 0"),
        ({"spool": "/tmp", "copy_length": 0, "gamma": 4}, "gamma is not supported with the method capture"),
        ({"spool": "/tmp", "copy_length": 0}, "prefix caching is not supported with the method capture"),
    ],
)
def test_options_of_the_method(tmp_path, options, message):
    target = write_target(tmp_path / "target", "llama", num_hidden_layers=1)
    engine_args = EngineArgs(model=str(target), speculative_config={"method": "capture", **options})
    with pytest.raises(ValueError, match=message):
        engine_args.create_engine_config()


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # As the benchmark sets it for its own process; the engines of later tests are to say what they log.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    # Forked of a process that has imported vLLM, not spawned.
    monkeypatch.setattr(teacher, "plain_seconds", lambda *arguments: run_alone(teacher.prefill, *arguments)[0])
    result = tmp_path / "teacher.json"
    command = ["--shape", "toy", "--contexts", "40", "--tokens", "100", "--supervised", "8", "--out", str(result)]
    teacher.main([*command, "--engine", json.dumps(ENGINE)])
    found = json.loads(result.read_text())
    (record,) = found["records"]
    assert (record["context"], record["samples"], record["supervised"]) == (40, 2, 8)
    assert record["captured_tokens_per_second"] > 0 and record["plain_tokens_per_second"] > 0
    share = record["captured_tokens_per_second"] / record["plain_tokens_per_second"]
    assert record["share"] == pytest.approx(share)
    assert found["engine"]["load_format"] == "dummy" and found["environment"]["vllm"].startswith("0.3")
    assert f"| 40 | 2 | {record['captured_tokens_per_second']:.0f} |" in capsys.readouterr().out
