# SPDX-License-Identifier: Apache-2.0
"""Training of a draft: stages of optimizer steps with a cosine schedule, on one or many GPUs by accelerate.

Everything that a step draws follows from the seed and its number, so a run that is resumed goes on as if it had not
been stopped. A stage that lasts a number of minutes follows the clock instead.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vllm_longspec.training import checkpoints, held_out
from vllm_longspec.training.batches import Cursor, Step, drawn_depths
from vllm_longspec.training.config import AUTO, Stage, TrainConfig
from vllm_longspec.training.forward import Layout, lay_out, pack
from vllm_longspec.training.initialise import freeze_unused
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.learner import Learner
from vllm_longspec.training.losses import ACCEPTED, AGREED, LOSS
from vllm_longspec.training.optimizer import DraftOptimizer
from vllm_longspec.training.reporting import Reporter
from vllm_longspec.training.target import SharedTarget
from vllm_longspec.training.teachers import Lesson, Sample, Teacher

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=False)


class Source(Protocol):
    """Where the samples of a stage come from; `batches.Plan` is one."""

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        """From the cursor on. A source that ends before its stage ends the stage."""

    def num_steps(self, epochs: float) -> int: ...


class Result(NamedTuple):
    glide: GlideLayer
    steps: int
    # Of the last measurement of held-out samples; empty without any.
    held_out: dict[str, Any]


def make_accelerator(config: TrainConfig, run: Path) -> Any:
    """For this process, which may be one of several that torchrun has started."""
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise ValueError("training needs accelerate: pip install 'vllm-longspec[train]'") from None

    for tracker in config.report.to:
        # Accelerate would leave it out without a word.
        if find_spec(tracker) is None:
            raise ValueError(f"report.to has {tracker}, which is not installed: pip install {tracker}, or leave it out")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no GPU here: give cpu, or auto for what there is")
    on_cpu = config.device == "cpu" or (config.device == AUTO and not torch.cuda.is_available())
    precision = "bf16" if compute_dtype(config) == torch.bfloat16 else "no"
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=list(config.report.to) or None,
        project_dir=run,
        # While the first rank tokenizes, the others wait; PyTorch's own limit is 10 minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


def end(accelerator: Any) -> None:
    """Ends what `make_accelerator` made, so that the process may make another one with another device or precision."""
    from accelerate.state import AcceleratorState

    accelerator.end_training()
    # It is one state for the process. Accelerate has no public way to give it up; Transformers does it so as well.
    AcceleratorState._reset_state(reset_partial_state=True)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What target and draft compute in."""
    if config.dtype != AUTO:
        return getattr(torch, config.dtype)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu else torch.float32


class Clock:
    """How much of a stage is done."""

    def __init__(self, stage: Stage, source: Source, state: dict[str, Any]) -> None:
        self.stage = stage
        self.steps, self.tokens, self._before = (state.get(name, 0) for name in ("steps", "tokens", "seconds"))
        self.num_steps = source.num_steps(stage.epochs) if stage.epochs is not None else stage.steps
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def done(self) -> float:
        if self.num_steps is not None:
            share = self.steps / self.num_steps
        elif self.stage.tokens is not None:
            share = self.tokens / self.stage.tokens
        else:
            assert self.stage.minutes is not None
            share = self.seconds / (60 * self.stage.minutes)
        return min(1.0, share)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}


def learning_rate(stage: Stage, done: float) -> float:
    """A linear rise, then a cosine to zero."""
    assert stage.learning_rate is not None
    rise = min(1.0, (done + 1e-4) / stage.warmup) if stage.warmup else 1.0
    return stage.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    config: TrainConfig,
    shared: SharedTarget,
    glide: GlideLayer,
    teacher: Teacher,
    sources: Sequence[Source],
    run: Path,
    accelerator: Any,
    *,
    resume: Path | None = None,
    lessons: Sequence[Lesson] = (),
    data: str = "",
) -> Result:
    """Trains a draft and writes it into the run's folder.

    Args:
        shared: of the target, on any device
        glide: with its first weights, in float32
        sources: one for each stage of the configuration
        resume: a checkpoint of this run
        lessons: on held-out samples
        data: what tells these data from others, for the checkpoints

    Raises:
        ValueError: the loss is not finite, or a file cannot be written; the last checkpoint is named.
    """
    return _Fit(config, shared, glide, teacher, sources, run, accelerator, resume, lessons, data).run()


class _Fit:
    def __init__(
        self,
        config: TrainConfig,
        shared: SharedTarget,
        glide: GlideLayer,
        teacher: Teacher,
        sources: Sequence[Source],
        run: Path,
        accelerator: Any,
        resume: Path | None,
        lessons: Sequence[Lesson],
        data: str,
    ) -> None:
        self.config, self.teacher, self.sources, self.folder = config, teacher, sources, run
        self.accelerator, self.lessons, self.data = accelerator, lessons, data
        self.device = accelerator.device
        self.saved_dtype = shared.embedding.dtype
        self.draft_config = shared.draft_config(self.saved_dtype)
        freeze_unused(glide)
        compiled = self.device.type == "cuda" if config.compile_losses == AUTO else bool(config.compile_losses)
        self.learner = Learner(
            glide,
            shared.to(self.device, compute_dtype(config)),
            config.levels,
            config.loss,
            config.depth_weights == "expected",
            compiled,
        )
        self.learner.to(self.device)
        self.is_sharded = config.sharding == "fsdp2" and accelerator.num_processes > 1
        if self.is_sharded:
            # One layer is one group: it is whole from the forward pass to the backward pass.
            mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
            fully_shard(self.learner, mesh=mesh, reshard_after_forward=False)
        parameters = [each for each in self.learner.parameters() if each.requires_grad]
        self.optimizer = DraftOptimizer(config.optimizer, parameters, config.weight_decay)
        self.model: nn.Module = self.learner if self.is_sharded else accelerator.prepare(self.learner)
        self.step, self.stage, self.cursor = 0, 0, Cursor()
        self.clock_state: dict[str, Any] = {}
        self.measured: dict[str, Any] = {}
        if resume is not None:
            self._load(checkpoints.read_state(resume))

    def run(self) -> Result:
        config = self.config
        with Reporter(self.folder, self.step, self.accelerator) as self.reporter:
            self.last_checkpoint = self.last_measured = time.monotonic()
            first = self.stage
            for number in range(first, len(config.stages)):
                if number > first:
                    self.stage, self.cursor, self.clock_state = number, Cursor(), {}
                    # Moments of another learning rate and other samples.
                    self.optimizer.forget()
                self._run_stage(config.stages[number], self.sources[number])
            self._measure()
            weights = self._weights()
            if self.accelerator.is_main_process:
                checkpoints.export(self.folder, self.draft_config, weights, self.saved_dtype)
            self.accelerator.wait_for_everyone()
        return Result(self.learner.glide, self.step, self.measured)

    def _run_stage(self, stage: Stage, source: Source) -> None:
        self.clock = Clock(stage, source, self.clock_state)
        self.reporter.stage(f"stage {self.stage + 1} of {len(self.config.stages)}")
        recent = _Recent(self.config.levels, self.device)
        done, is_late, is_measure_due = self._agreed()
        steps = _taught(source.steps(self.cursor), self.teacher)
        upcoming: Taught | None = None

        def go_ahead() -> None:
            nonlocal upcoming
            upcoming = next(steps, None) if self.clock.done() < 1.0 else None

        while done < 1.0:
            taught = upcoming or next(steps, None)
            if taught is None:
                break
            step, batches = taught
            self.clock.steps += 1
            self.clock.tokens += step.num_tokens
            loss = self._update(stage, step, batches, done, recent, go_ahead)
            self.cursor = step.cursor
            self.step += 1
            recent.tokens += step.num_tokens
            done, is_late, is_measure_due = self._agreed()
            self.reporter.progress(done, self.step, loss, recent.tokens_per_second)
            if self.step % self.config.report.steps == 0 or done >= 1.0:
                self._report(stage, done, recent)
                if is_measure_due:
                    self._measure()
                recent = _Recent(self.config.levels, self.device)
            if is_late or done >= 1.0:
                self._save()
        steps.close()

    def _update(
        self,
        stage: Stage,
        step: Step,
        batches: Iterator[tuple[Layout, list[Lesson]]],
        done: float,
        recent: "_Recent",
        go_ahead: Callable[[], None],
    ) -> float:
        """One step of the optimiser. Returns the loss per row.

        Args:
            go_ahead: called while the device computes, to have the teacher begin with the next step
        """
        accelerator, config = self.accelerator, self.config
        num_rows: int | Tensor = sum(int(sample.loss_mask.sum()) for batch in step.batches for sample in batch)
        if accelerator.num_processes > 1:
            num_rows = accelerator.reduce(torch.tensor(num_rows, device=self.device), reduction="sum")
        statistics = torch.zeros(config.levels, 3, dtype=torch.float64, device=self.device)
        rows_by_depth = torch.zeros(config.levels, dtype=torch.float64, device=self.device)
        total = torch.zeros((), device=self.device)
        for place, (layout, lessons) in enumerate(batches):
            withheld = drawn_depths(config.levels, config.depths_per_batch, config.seed, self.step, place)
            packed = pack(lessons, layout, self.device)
            is_last = place + 1 == len(step.batches)
            if self.is_sharded:
                sharded: Any = self.learner  # of a class that FSDP2 has added methods to
                sharded.set_requires_gradient_sync(is_last)
            is_shared = is_last or self.is_sharded
            with nullcontext() if is_shared else accelerator.no_sync(self.model), accelerator.autocast():
                loss, by_depth, _ = self.model(packed, withheld)
                # Ranks' gradients are averaged, and the loss is per row of all ranks.
                accelerator.backward(loss * (accelerator.num_processes / num_rows))
            for of_depth, number in zip(by_depth.double(), withheld, strict=True):
                statistics[number - 1] += of_depth
                rows_by_depth[number - 1] += len(packed.layout.labels)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in self.optimizer.groups:
            group["lr"] = learning_rate(stage, done)
        if accelerator.num_processes > 1:
            total, statistics, rows_by_depth = (
                accelerator.reduce(each, reduction="sum") for each in (total, statistics, rows_by_depth)
            )
        # The device goes on with the next step's lessons while these come, and is not idle when they are there.
        figures = _copied(torch.stack([total / num_rows, norm]))
        go_ahead()
        value, size = figures()
        if not math.isfinite(value) or not math.isfinite(size):
            raise ValueError(self._not_finite(f"the loss is {value} and its gradient {size}", self.step + 1))
        self.optimizer.step()
        self.learner.learn_acceptance(statistics, rows_by_depth)
        recent.add(value, size, statistics, rows_by_depth)
        return value

    def _not_finite(self, what: str, step: int) -> str:
        last = checkpoints.newest(self.folder)
        kept = "no checkpoint is there yet" if last is None else f"the last good checkpoint is {last}"
        return (
            f"{what} at step {step} of the run, so it stops; {kept}: give the stages a smaller learning_rate, or "
            "another clip or dtype, and --resume"
        )

    def _agreed(self) -> tuple[float, bool, bool]:
        """How much of the stage is done, and whether a checkpoint and a measurement are due, the same on all ranks."""
        now = time.monotonic()
        is_late = now - self.last_checkpoint >= 60 * self.config.checkpoints.minutes
        is_measure_due = now - self.last_measured >= 60 * self.config.held_out.minutes
        done = self.clock.done()
        if self.accelerator.num_processes > 1:
            state = torch.tensor([done, is_late, is_measure_due], dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(state, src=0)
            done, is_late, is_measure_due = state.tolist()
        return done, bool(is_late), bool(is_measure_due)

    def _report(self, stage: Stage, done: float, recent: "_Recent") -> None:
        values = recent.values() | {"stage": self.stage, "done": round(done, 4), "lr": learning_rate(stage, done)}
        if self.device.type == "cuda":
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        self.reporter.metrics(self.step, "train", values)

    def _measure(self) -> None:
        self.last_measured = time.monotonic()
        if not self.lessons:
            return
        # Each rank measures for itself, without exchanging buffers, unless the weights are split.
        model = self.model if self.is_sharded else self.learner
        with self.accelerator.autocast():
            self.measured = held_out.measure(model, self.learner, self.lessons, self.device, self.config.seed)
        self.reporter.metrics(self.step, "held_out", self.measured)
        chain = self.measured["chain"]
        self.reporter.say(
            f"step {self.step}, held out: {chain['greedy']:.2f} tokens a step of a chain at temperature 0, "
            f"{chain['coupled']:.2f} at temperature 1"
        )

    def _weights(self) -> dict[str, Tensor]:
        """Of the draft, whole, on the CPU of the first rank."""
        found = get_model_state_dict(self.learner, options=_FULL)
        return {name.removeprefix("glide."): weight for name, weight in found.items() if name.startswith("glide.")}

    def _save(self) -> None:
        weights = self._weights()
        if not all(weight.isfinite().all() for weight in weights.values()):
            # The next loss would not be finite, and this checkpoint not good.
            raise ValueError(self._not_finite("weights are not finite", self.step))
        optimiser = get_optimizer_state_dict(self.learner, self.optimizer.members, options=_FULL)
        state = {
            "optimiser": optimiser,
            "step": self.step,
            "stage": self.stage,
            "cursor": list(self.cursor),
            "clock": self.clock.state(),
            "acceptance": self.learner.acceptance.cpu(),
            "rng": torch.get_rng_state(),
            "data": self.data,
            "num_processes": self.accelerator.num_processes,
        }
        if self.accelerator.is_main_process:
            checkpoints.save(
                self.folder,
                self.step,
                self.draft_config,
                weights,
                self.saved_dtype,
                state,
                self.config.checkpoints.keep,
            )
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = time.monotonic()

    def _load(self, state: dict[str, Any]) -> None:
        weights = {f"glide.{name}": weight for name, weight in state["weights"].items()}
        # The estimates of acceptance are no part of the weights.
        set_model_state_dict(self.learner, weights, options=_FULL)
        set_optimizer_state_dict(self.learner, self.optimizer.members, state["optimiser"], options=_FULL)
        self.step, self.stage, self.cursor = state["step"], state["stage"], Cursor(*state["cursor"])
        self.clock_state = state["clock"]
        self.learner.acceptance.copy_(state["acceptance"])
        torch.set_rng_state(state["rng"])


def _copied(values: Tensor) -> Callable[[], list[float]]:
    """Begins to copy from the device. What is returned waits for the copy, and for nothing that was begun later."""
    if values.device.type != "cuda":
        return values.tolist
    there = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[float]:
        event.synchronize()
        return there.tolist()

    return wait


# A step, and the lessons of its batches.
Taught = tuple[Step, Iterator[tuple[Layout, list[Lesson]]]]


class _Recent:
    """Sums since the last report."""

    def __init__(self, levels: int, device: torch.device) -> None:
        self.started, self.tokens, self.steps = time.monotonic(), 0, 0
        self.loss, self.norm = 0.0, 0.0
        self.statistics = torch.zeros(levels, 3, dtype=torch.float64, device=device)
        self.rows = torch.zeros(levels, dtype=torch.float64, device=device)

    def add(self, loss: float, norm: float, statistics: Tensor, rows: Tensor) -> None:
        self.steps += 1
        self.loss += loss
        self.norm += norm
        self.statistics += statistics
        self.rows += rows

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.monotonic() - self.started)

    def values(self) -> dict[str, Any]:
        steps = max(1, self.steps)
        shares = (self.statistics / self.rows.clamp(min=1)[:, None]).T.tolist()
        by_depth = {
            name: [round(share, 4) for share in shares[column]]
            for name, column in (("depth_loss", LOSS), ("accepted", ACCEPTED), ("greedy", AGREED))
        }
        return {
            "loss": self.loss / steps,
            "gradient_norm": self.norm / steps,
            "tokens_per_second": round(self.tokens_per_second, 1),
            **by_depth,
        }


def _taught(steps: Iterator[Step], teacher: Teacher) -> Generator[Taught, None, None]:
    """Each step with its lessons by batch. The teacher may be some steps ahead of what is asked for."""
    asked: deque[Step] = deque()

    def batches_asked() -> Iterator[list[Sample]]:
        for step in steps:
            asked.append(step)
            yield from step.batches

    stream = teacher.teach_batches(batches_asked())
    try:
        for first in stream:
            step = asked.popleft()
            batches = _batches(step, first, stream)
            yield step, batches
            # What was not asked for would come with the next step.
            deque(batches, maxlen=0)
    finally:
        close: Callable[[], None] | None = getattr(stream, "close", None)
        if close is not None:
            close()


def _batches(step: Step, first: Lesson, stream: Iterator[Lesson]) -> Iterator[tuple[Layout, list[Lesson]]]:
    for number, batch in enumerate(step.batches):
        lessons = [first] if number == 0 else []
        lessons += [next(stream) for _ in range(len(batch) - len(lessons))]
        yield lay_out(batch), lessons
