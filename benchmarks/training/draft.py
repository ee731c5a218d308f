# SPDX-License-Identifier: Apache-2.0
"""The draft of a pair, trained by the package on windows at random places of one long text."""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.training.loop import Plan
from benchmarks.training.text import Windows
from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.training.batches import Cursor, Step, anchored
from vllm_longspec.training.config import Checkpoints, HeldOut, Stage, TrainConfig
from vllm_longspec.training.loop import Result, compute_dtype, fit, make_accelerator
from vllm_longspec.training.optimizer import ADAMW
from vllm_longspec.training.target import load_shared
from vllm_longspec.training.teachers import Lesson, Sample
from vllm_longspec.training.teachers.hf import HfTeacher
from vllm_longspec.training.train import first_weights


class RandomWindows:
    """A source of steps: windows of one length at a time, drawn anew, at one offset.

    Args:
        lengths: of windows, of which one is drawn for each step; of each come as many tokens
        batch_tokens: of a step; a longer window is a step of its own
        max_position: positions stay below

    Attributes:
        num_tokens: of each step that was drawn
    """

    def __init__(self, windows: Windows, lengths: tuple[int, ...], batch_tokens: int, max_position: int) -> None:
        self.windows, self.max_position = windows, max_position
        self.counts = {length: max(1, batch_tokens // length) for length in lengths}
        longest = max(count * length for length, count in self.counts.items())
        # Steps of few tokens are drawn more often.
        self.lengths = [
            length for length, count in self.counts.items() for _ in range(max(1, longest // (count * length)))
        ]
        self.num_tokens: list[int] = []

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        generator = self.windows.generator
        while True:
            length = self.lengths[int(torch.randint(len(self.lengths), (), generator=generator))]
            offset = int(torch.randint(self.max_position - length + 1, (), generator=generator))
            drawn = self.windows.draw(self.counts[length], length)[:, :-1]
            self.num_tokens.append(drawn.numel())
            yield Step([samples_of(drawn, offset)], drawn.numel(), cursor)

    def num_steps(self, epochs: float) -> int:
        raise ValueError("random windows have no epochs: give a number of steps or minutes")


class Trained(NamedTuple):
    result: Result
    seconds: float  # without those for compiling
    tokens: int


def samples_of(windows: Tensor, offset: int = 0) -> list[Sample]:
    """Windows, int64 [count, length], with all tokens supervised."""
    length = windows.shape[1]
    return [Sample(window, torch.arange(length) > 0, anchored(length, offset)) for window in windows.cpu()]


def train_draft(
    plan: Plan,
    folder: Path,
    train: Windows,
    evaluation: Tensor,
    device: str,
    seed: int,
    length: Mapping[str, Any] | None = None,
    name: str = "draft",
    changes: Mapping[str, Any] | None = None,
    out: Path | None = None,
) -> Trained:
    """Trains the draft of the target in `folder`/target and saves it in `out`/`name`.

    Args:
        evaluation: int64 [count, length + 1], windows that are not trained with
        length: one of `steps`, `tokens` and `minutes` of a `Stage`, by default the minutes of the plan
        changes: of settings of `TrainConfig`
        out: `folder` by default
    """
    out = folder if out is None else out
    run = out / f"{name}-run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    length = {"minutes": plan.draft_seconds / 60} if length is None else length
    never = 1e9
    settings: dict[str, Any] = {
        "target": str(folder / "target"),
        "data": (),
        "out": str(run),
        "seed": seed,
        "device": "cpu" if device == "cpu" else "auto",
        "compile_target": device != "cpu",
        "levels": len(DEFAULT_LEVELS),
        "depths_per_batch": 1,
        "depth_weights": "equal",
        "optimizer": ADAMW,
        "tokens_per_batch": plan.batch_tokens,
        "stages": (Stage(learning_rate=plan.draft_lr, warmup=0.02, max_length=max(plan.draft_windows), **length),),
        "checkpoints": Checkpoints(minutes=never, keep=1),
        "held_out": HeldOut(minutes=never),
    }
    config = TrainConfig(**settings | dict(changes or {}))
    shared = load_shared(config.target)
    accelerator = make_accelerator(config, run)
    teacher = HfTeacher(
        shared, accelerator.device, compute_dtype(config), config.tokens_per_batch, config.compile_target
    )
    windows = replace(train, ids=train.ids.cpu())
    source = RandomWindows(windows, plan.draft_windows, config.tokens_per_batch, shared.config.max_position_embeddings)
    lessons: list[Lesson] = [
        Lesson(lesson.sample, lesson.keys.cpu(), lesson.values.cpu(), lesson.hidden.cpu())
        for lesson in teacher.teach(samples_of(evaluation[:, :-1]))
    ]
    if accelerator.device.type == "cuda":
        # Kernels are compiled for each shape that comes; the clock is for training.
        few = replace(config, stages=(Stage(steps=4 * len(source.lengths), learning_rate=1e-6),))
        fit(few, shared, first_weights(config, shared), teacher, [source], run, accelerator)
    source.num_tokens.clear()
    started = time.perf_counter()
    glide = first_weights(config, shared)
    result = fit(config, shared, glide, teacher, [source], run, accelerator, lessons=lessons)
    seconds = time.perf_counter() - started
    teacher.close()
    (out / name).mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (run / file).replace(out / name / file)
    shutil.rmtree(run)
    return Trained(result, seconds, sum(source.num_tokens[: result.steps]))
