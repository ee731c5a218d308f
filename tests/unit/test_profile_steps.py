# SPDX-License-Identifier: Apache-2.0
"""The table of a step's stages, from a timeline written by hand."""

import re
from pathlib import Path

import pytest

import vllm_longspec
from benchmarks.profile_steps import OTHER, Kernel, analyse, read_trace, stage_of, table

STEP = 1000.0  # microseconds
# Part, name of the kernel, when it is launched, when it begins and how long it runs.
KERNELS = (
    ("target", "nvjet_tst_128x8", 0, 20, 200),
    ("target", "flash_fwd_kernel", 0, 220, 50),
    ("target", "_tree_attention_kernel", 0, 270, 30),
    ("sampling", "nvjet_tst_128x8", 310, 320, 80),
    ("sampling", "_walk_tree_kernel", 310, 400, 10),
    ("compaction", "_compact_kv_caches_kernel", 420, 430, 10),
    ("draft", "nvjet_tst_64x8", 500, 510, 20),
    ("draft", "_window_attention_kernel", 500, 530, 10),
    ("draft", "nvjet_tst_64x8_splitK", 500, 540, 50),
    ("draft", "splitKreduce_kernel", 500, 590, 10),
    ("draft", "_weigh_chunk_kernel", 500, 600, 40),
    ("draft", "a_new_kernel", 500, 640, 5),
)
PARTS = {"target": (0, 300), "sampling": (305, 100), "compaction": (415, 60), "draft": (490, 200)}


def event(category: str, name: str, start: float, duration: float, **args: object) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 7, "args": args}


def trace(steps: int) -> dict:
    events = []
    for step in range(steps):
        origin = step * STEP
        for part, (start, duration) in PARTS.items():
            events.append(event("user_annotation", f"step: {part}", origin + start, duration))
        for number, (_, name, launched, start, duration) in enumerate(KERNELS):
            correlation = step * len(KERNELS) + number
            events.append(event("cuda_runtime", "cudaGraphLaunch", origin + launched, 5, correlation=correlation))
            events.append(event("kernel", name, origin + start, duration, correlation=correlation))
        events.append(event("cpu_op", "aten::item", origin + 495, 20))
        events.append(event("cpu_op", "aten::_local_scalar_dense", origin + 496, 15))
        events.append(event("cuda_runtime", "cudaStreamSynchronize", origin + 497, 10))
    return {"traceEvents": events}


def test_every_microsecond_of_a_step_is_in_a_stage():
    report = analyse(read_trace(trace(steps=5)))
    assert report["steps"] == 3  # without the first and the last
    milliseconds = {stage: numbers["ms"] for stage, numbers in report["stages"].items()}
    assert milliseconds == pytest.approx(
        {
            "target: GEMMs": 0.2,
            "target: prefix attention": 0.05,
            "target: tree attention": 0.03,
            "head GEMM": 0.08,
            "sampling and walk": 0.01,
            "compaction": 0.01,
            "draft: GEMMs": 0.02,
            "draft: attention to window and tree": 0.01,
            # The last GEMM before the top-k.
            "draft: head GEMM": 0.06,
            "draft: top-k": 0.04,
            "other": 0.005,
            # From the last kernel of a step to the first of the next.
            "idle before target": 0.375,
            "idle before sampling": 0.02,
            "idle before compaction": 0.02,
            "idle before draft": 0.07,
        },
        abs=1e-4,
    )
    assert report["ms_per_step"] == pytest.approx(STEP / 1000)
    assert "Without the profiler, a step: 0.900 ms." in table(report | {"ms_per_step_unrecorded": 0.9})
    assert report["names_of_other"] == ["a_new_kernel"]
    assert report["waits_per_step"] == {"cudaStreamSynchronize (aten::_local_scalar_dense) in draft": 1.0}


@pytest.mark.parametrize(
    "files",
    ["copying/*.py", "proposers/glide/*.py", *(f"tree/{name}.py" for name in ("best_children", "merge", "order"))],
)
def test_every_kernel_of_a_draft_has_a_stage(files):
    names = {
        name
        for path in Path(vllm_longspec.__file__).parent.glob(files)
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert names
    for name in names:
        assert stage_of(Kernel(name, 0.0, 1.0, 0.0), "draft") != OTHER, name


def test_kernels_side_by_side_count_once():
    events = trace(steps=5)
    for step in range(5):
        events["traceEvents"].append(event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", step * STEP + 60, 40))
    report = analyse(read_trace(events))
    assert report["ms_per_step"] == pytest.approx(STEP / 1000)
    assert sum(report["copies_to_host_per_step"].values()) == 1.0


def test_table_without_a_gpu():
    marks = [each for each in trace(steps=4)["traceEvents"] if each["cat"] == "user_annotation"]
    report = analyse(read_trace({"traceEvents": marks}))
    assert report["steps"] == 2
    assert "The host waits for the GPU, a step: none." in table(report)


@pytest.mark.parametrize("part", ["target", "draft"])
@pytest.mark.parametrize(
    "name", ["void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", "ncclDevKernel_AllGather_RING_LL"]
)
def test_what_ranks_send_is_a_stage(name, part):
    assert stage_of(Kernel(name, 0.0, 1.0, 0.0), part) == f"{part}: between ranks"
