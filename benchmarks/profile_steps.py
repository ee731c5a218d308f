# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step goes: the GPU's timeline of some steps, as a small table.

    python -m benchmarks.profile_steps --model qwq-32b --system default --context 16384 --batch 1 --out step.json

An engine with random weights runs in this process. After the prompts and `--after` steps, `--steps` steps are recorded
with PyTorch's profiler. A kernel belongs to the step and the part of it (target, sampling, compaction, draft) that
launched it, and within the part to a stage by its name; see `STAGES`. What the GPU does not fill is idle time of the
part that launches next. The table also counts what makes the host wait for the GPU.

Writes the table as JSON and, beside it, as markdown. Recording takes time of its own, mostly the host's: eager parts
look slower than they are, CUDA graphs do not, and a host that keeps up otherwise may be waited for. So `--timed` steps
before them are timed without it.
"""

import argparse
import bisect
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reporting import environment
from benchmarks.server import ENVIRONMENT, ON_CPU
from benchmarks.speed.engine import WARM_UP_TOKENS, RandomPrompts
from benchmarks.speed.runs import CPU_SETTINGS, SLACK
from benchmarks.speed.systems import Model, NotMeasurable, check_system, prepare, target_folder

# Ranges of the host's timeline that `_mark_parts` records. The first begins a step.
PARTS = ("target", "sampling", "compaction", "draft")
MARK = "step: "

GEMM = r"gemm|nvjet|cutlass|cublas|splitk|_mm_|wgmma"
SPLIT_K = r"splitk.*reduce"  # adds up what the GEMM before it computed in parts
SMALL = r"norm|quant|rotary|silu|act_and_mul|embedding|elementwise|copy|cat|fill|mem(set|cpy)|triton_|fused"
RANKS = r"cross_device|all_?gather|all_?reduce"  # what tensor parallelism sends
ATTENTION_PREFIX = r"prefix_attention|flash|fmha|FlashAttn"
# A stage's name, the part it belongs to, and what the name of a kernel contains. The first that fits counts.
STAGES: tuple[tuple[str, str, str], ...] = (
    ("target: between ranks", "target", RANKS),
    ("target: tree attention", "target", r"tree_attention|merge"),
    # vLLM calls it reshape_and_cache_flash, so it comes before FlashAttention.
    ("target: KV cache write", "target", r"reshape_and_cache"),
    ("target: prefix attention", "target", ATTENTION_PREFIX),
    ("target: GEMMs", "target", GEMM),
    ("target: lay out trees, slots, inputs", "target", r"lay_out|slot_mapping|prepare|combine_sampled|expand_idx"),
    ("target: norms, RoPE, activation, copies", "target", SMALL),
    ("head GEMM", "sampling", GEMM),
    ("sampling and walk", "sampling", r""),
    ("compaction", "compaction", r"compact"),
    ("update of request states", "compaction", r""),
    ("draft: between ranks", "draft", RANKS),
    ("draft: attention to the target's cache", "draft", ATTENTION_PREFIX),
    ("draft: attention to window and tree", "draft", r"window_attention|merge_splits"),
    ("draft: roots, K and V of window and tree", "draft", r"write_window|settled_tokens|read_roots|plant"),
    ("draft: tokens of the head", "draft", r"count_tokens"),
    ("draft: copied paths", "draft", r"find_matches|best_match|_copies|update_rates|merge_path|list_a_path"),
    ("draft: GEMMs", "draft", GEMM),
    ("draft: top-k", "draft", r"max_of_chunks|weigh_chunk|best_of_"),
    ("draft: order and masks", "draft", r"add_level|order_tree|gather|scatter|index"),
    ("draft: norms, RoPE, activation, copies", "draft", SMALL),
)
# The draft's head is a GEMM like its layer's. It is the last one before the best tokens are chosen.
HEAD_STAGE, AFTER_HEAD_STAGE, GEMM_STAGE = "draft: head GEMM", "draft: top-k", "draft: GEMMs"
OTHER = "other"

WAITS = r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$"


@dataclass(frozen=True)
class Kernel:
    """One piece of work of the GPU. Times are microseconds."""

    name: str
    start: float
    end: float
    launched: float


@dataclass
class Timeline:
    kernels: list[Kernel]  # by start
    parts: list[tuple[float, float, str]]  # start, end and name of the host's ranges, by start
    waits: list[tuple[float, str]]  # when the host's main thread waited for the GPU, and in which call and operator
    copies_to_host: list[Kernel]


def read_trace(trace: dict[str, Any]) -> Timeline:
    """Reads what PyTorch's profiler exports for Chrome."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)]
    main_threads = {event["tid"] for event in marks}
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels, copies = [], []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(event["args"].get("correlation"), event)
        kernel = Kernel(event["name"], event["ts"], event["ts"] + event["dur"], launch["ts"])
        kernels.append(kernel)
        if event["cat"] == "gpu_memcpy" and "DtoH" in event["name"]:
            copies.append(kernel)
    operators = [event for event in events if event.get("cat") == "cpu_op" and event["tid"] in main_threads]
    waits = []
    for event in events:
        if event.get("cat") == "cuda_runtime" and event["tid"] in main_threads and re.fullmatch(WAITS, event["name"]):
            around = [each for each in operators if each["ts"] <= event["ts"] < each["ts"] + each["dur"]]
            # The last to begin is the innermost.
            operator = max(around, key=lambda each: each["ts"], default={"name": "no operator"})["name"]
            waits.append((event["ts"], f"{event['name']} ({operator})"))
    parts = [(event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(MARK)) for event in marks]
    return Timeline(sorted(kernels, key=lambda kernel: kernel.start), sorted(parts), sorted(waits), copies)


def stage_of(kernel: Kernel, part: str) -> str:
    for stage, stage_part, pattern in STAGES:
        if stage_part == part and re.search(pattern, kernel.name, re.IGNORECASE):
            return stage
    return OTHER


def analyse(timeline: Timeline) -> dict[str, Any]:
    """Milliseconds and kernels of every stage in a mean step. The first and the last recorded step are left out."""
    starts = [start for start, _, part in timeline.parts if part == PARTS[0]]
    part_starts = [start for start, _, _ in timeline.parts]

    def step_of(when: float) -> int:
        return bisect.bisect_right(starts, when) - 1

    def part_of(when: float) -> str:
        # The innermost range; what comes between two ranges belongs to the one before.
        index = bisect.bisect_right(part_starts, when) - 1
        return timeline.parts[index][2] if index >= 0 else OTHER

    last = len(starts) - 1
    counted = [kernel for kernel in timeline.kernels if 1 <= step_of(kernel.launched) < last]
    after = [kernel for kernel in timeline.kernels if step_of(kernel.launched) >= last]
    num_steps = last - 1
    waits: Counter[str] = Counter(
        f"{name} in {part_of(when)}" for when, name in timeline.waits if 1 <= step_of(when) < last
    )
    copies: Counter[str] = Counter(
        part_of(copy.launched) for copy in timeline.copies_to_host if 1 <= step_of(copy.launched) < last
    )
    report: dict[str, Any] = {
        "steps": max(0, num_steps),
        "waits_per_step": {name: round(count / num_steps, 2) for name, count in waits.items()},
        "copies_to_host_per_step": {name: round(count / num_steps, 2) for name, count in copies.items()},
        "stages": {},
    }
    if not counted:
        return report

    times: defaultdict[str, float] = defaultdict(float)
    numbers: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    stages = _stages_of(counted, part_of)
    busy_until = counted[0].start
    for kernel, stage in zip(counted, stages, strict=True):
        if kernel.start > busy_until:
            times[f"idle before {part_of(kernel.launched)}"] += kernel.start - busy_until
        # Of kernels that run side by side, time counts once, for the one that began first.
        times[stage] += max(0.0, kernel.end - max(kernel.start, busy_until))
        busy_until = max(busy_until, kernel.end)
        numbers[stage] += 1
        if stage == OTHER:
            unknown[kernel.name] += 1
    if after and after[0].start > busy_until:
        times[f"idle before {PARTS[0]}"] += after[0].start - busy_until
    report["stages"] = {
        stage: {"ms": round(time / 1000 / num_steps, 4), "kernels": round(numbers[stage] / num_steps, 1)}
        for stage, time in sorted(times.items(), key=lambda item: -item[1])
    }
    report["ms_per_step"] = round(sum(times.values()) / 1000 / num_steps, 4)
    report["names_of_other"] = [name for name, _ in unknown.most_common(10)]
    return report


def _stages_of(kernels: list[Kernel], part_of: Callable[[float], str]) -> list[str]:
    stages = [stage_of(kernel, part_of(kernel.launched)) for kernel in kernels]
    last_gemm: list[int] = []
    for index, stage in enumerate(stages):
        if stage == GEMM_STAGE:
            completes = re.search(SPLIT_K, kernels[index].name, re.IGNORECASE)
            last_gemm = [*last_gemm, index] if completes else [index]
        elif stage == AFTER_HEAD_STAGE:
            for part in last_gemm:
                stages[part] = HEAD_STAGE
            last_gemm = []
    return stages


def table(report: dict[str, Any]) -> str:
    lines = ["| stage | ms a step | kernels a step |", "| --- | --- | --- |"]
    for stage, numbers in report["stages"].items():
        lines.append(f"| {stage} | {numbers['ms']:.3f} | {numbers['kernels']:g} |")
    if report["stages"]:
        lines.append(f"| **whole step** | **{report['ms_per_step']:.3f}** | |")
    if "ms_per_step_unrecorded" in report:
        lines.append(f"\nWithout the profiler, a step: {report['ms_per_step_unrecorded']:.3f} ms.")
    for title, counts in (
        ("The host waits for the GPU", report["waits_per_step"]),
        ("Copies to the host", report["copies_to_host_per_step"]),
    ):
        found = ", ".join(f"{count:g} {name}" for name, count in counts.items()) or "none"
        lines.append(f"\n{title}, a step: {found}.")
    return "\n".join(lines) + "\n"


@contextmanager
def _mark_parts(runner: Any) -> Iterator[None]:
    """Names the parts of a step in the profile."""
    from torch.profiler import record_function

    owners = {
        "target": (runner, "execute_model"),
        "sampling": (runner, "sample"),
        "compaction": (runner, "postprocess_sampled"),
    }
    if runner.speculator is not None:
        owners["draft"] = (runner.speculator, "propose")

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + part):
                return function(*args, **kwargs)

        return call

    for part, (owner, name) in owners.items():
        setattr(owner, name, marked(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in owners.values():
            delattr(owner, name)


def record(
    settings: dict[str, Any], vocab_size: int, context: int, batch: int, steps: int, after: int, timed: int
) -> tuple[dict[str, Any], float]:
    """Runs an engine in this process.

    Returns the profiler's trace of `steps` decoding steps and two more, when all requests have decoded `after` steps
    and `timed` ones, and the milliseconds that one of the latter took.
    """
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(**settings)
    (prompts,) = RandomPrompts(vocab_size).batches(context, batch, 1)
    engine: Any = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    # More than any number of tokens that the recorded steps may accept.
    speculative = settings.get("speculative_config")
    most = (after + timed + steps + 2) * (8 if speculative else 1)
    sampling = [
        SamplingParams(temperature=0.0, seed=number, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for tokens in (WARM_UP_TOKENS, WARM_UP_TOKENS + most)
        for number in range(batch)
    ]
    llm.generate(requests, sampling[:batch], use_tqdm=False)

    for number, (prompt, parameters) in enumerate(zip(requests, sampling[batch:], strict=True)):
        engine.add_request(f"profile-{number}", prompt, parameters)
    # Until all decode, and so many steps more.
    decoding: Counter[str] = Counter()
    while len(decoding) < batch or min(decoding.values()) < after:
        decoding.update(output.request_id for output in engine.step() if output.outputs[0].token_ids)
    start = time.perf_counter()
    for _ in range(timed):
        engine.step()
    ms_per_step = 1000 * (time.perf_counter() - start) / timed

    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with _mark_parts(runner), torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps + 2):
            engine.step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    return trace, ms_per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwq-32b", help="qwq-32b or llama-3-8b-262k")
    add("--system", type=check_system, default="default", help="as in benchmarks.speed")
    add("--context", type=int, default=16384)
    add("--batch", type=int, default=1)
    add("--acceptance", type=float, default=3.82, help="tokens a step")
    add("--given", type=json.loads, help="JSON of the options of system given; frequent_tokens may be how many")
    add("--engine", type=json.loads, default={}, help="JSON of more arguments of the engine")
    add("--steps", type=int, default=10)
    add(
        "--after",
        type=int,
        default=80,
        help="steps before; a head that learns its tokens has those of the prompts then",
    )
    add("--timed", type=int, default=64, help="steps that are timed without the profiler")
    add("--commit", help="the plugin's commit, where there is no git repository")
    add("--out", type=Path, required=True, help="JSON; the table goes beside it")
    add("--trace", type=Path, help="keep the whole trace here, too")
    arguments = parser.parse_args()

    machine = environment(arguments.commit)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    # The profiler sees kernels of its own process only.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = Model.find(arguments.model)
    longest = arguments.context + 8 * (arguments.after + arguments.timed + arguments.steps) + SLACK
    settings: dict[str, Any] = {
        "dtype": "float32" if ON_CPU else "bfloat16",
        "load_format": "auto" if model.trained else "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": min(model.num_positions, longest),
        "max_num_seqs": arguments.batch,
    }
    acceptance = None if arguments.system == "plain" else arguments.acceptance
    decoding = prepare(model, arguments.system, acceptance, arguments.given)
    settings["model"] = str(target_folder(model))
    if decoding.speculative_config is not None:
        settings["speculative_config"] = decoding.speculative_config
    settings |= (CPU_SETTINGS if ON_CPU else {}) | arguments.engine
    trace, ms_per_step = record(
        settings,
        model.config["vocab_size"],
        arguments.context,
        arguments.batch,
        arguments.steps,
        arguments.after,
        arguments.timed,
    )
    if arguments.trace:
        arguments.trace.write_text(json.dumps(trace))
    report = {
        "model": model.name,
        "system": arguments.system,
        "options": decoding.options,
        "context": arguments.context,
        "batch": arguments.batch,
        "after_steps": arguments.after,
        "environment": machine,
        **analyse(read_trace(trace)),
        "ms_per_step_unrecorded": round(ms_per_step, 4),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    try:
        main()
    except NotMeasurable as reason:
        sys.exit(str(reason))
