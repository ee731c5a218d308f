# SPDX-License-Identifier: Apache-2.0
"""Trains a GLIDE draft for a target.

    vllm-longspec train --target Qwen/Qwen3-8B --data data/ --out draft/ [--config run.yaml] [--plan] [--resume]
    torchrun --nproc-per-node 8 -m vllm_longspec train ...

The folder gets the draft, checkpoints/, metrics.jsonl and run.yaml, the configuration with all defaults.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_longspec.training import checkpoints
from vllm_longspec.training.batches import Plan, anchored, generator_of, without_short_stage
from vllm_longspec.training.config import AUTO, BEFORE, RUN_FILE, TrainConfig, build, differing, load
from vllm_longspec.training.data import TokenStore
from vllm_longspec.training.initialise import initialise, initialise_from_last_layer
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.loop import Result, compute_dtype, end, fit, make_accelerator
from vllm_longspec.training.plan import plan
from vllm_longspec.training.split import prepare_data
from vllm_longspec.training.target import SharedTarget, check_served, load_shared
from vllm_longspec.training.teachers import Lesson, Sample, Teacher, TeacherError

# Of tokens that teachers are compared at.
_COMPARED_TOKENS = 512
# Differences of two right computations, relative to the size of what is compared, by dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.08}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="the model to train a draft for: folder or name")
    parser.add_argument("--revision", help="branch, tag or commit of the target's repository")
    parser.add_argument(
        "--data", nargs="+", action="extend", metavar="PATH", help="files of JSON lines, or folders of them"
    )
    parser.add_argument("--out", required=True, help="folder of the run, which gets the draft")
    parser.add_argument("--teacher", help="hf: the target in Transformers; vllm: in vLLM, as it is served")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML; options here come before it")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="a setting, such as loss.kl=1"
    )
    parser.add_argument("--plan", action="store_true", help="say memory, disk and GPU hours, and start nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out, if one is there"
    )


def run(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("target", "revision", "data", "out", "teacher")}
    saved = Path(arguments.out) / RUN_FILE
    is_bare = arguments.config is None and arguments.target is None and arguments.data is None
    # A run that is resumed has its configuration.
    is_saved = arguments.resume and is_bare and saved.exists()
    config = load(saved if is_saved else arguments.config, given, arguments.set, BEFORE if is_saved else None)
    if arguments.plan:
        print(plan(config))
        return
    train(config, arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"vllm serve {config.target} --speculative-model {config.out}")


def train(config: TrainConfig, resume: bool = False, accelerator: Any = None) -> Result:
    """A whole run.

    Args:
        accelerator: that of `make_accelerator`, which stays the caller's to end; by default the run has one of its own

    Raises:
        ValueError: what is wrong with the configuration, the target, the data or a file, in one line.
    """
    folder = Path(config.out)
    checkpoint = checkpoints.newest(folder)
    _check_folder(config, folder, checkpoint, resume)
    check_served(config.target, config.revision)
    shared = load_shared(config.target, config.revision)
    is_own = accelerator is None
    if accelerator is None:
        accelerator = make_accelerator(config, folder)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(folder)
            _write_config(config, folder)
        store, held_out = prepare_data(config, shared)
    if checkpoint is not None:
        _check_same(checkpoint, folder, store.digest, accelerator.num_processes)
    whole, config = config, without_short_stage(config, store)
    if accelerator.is_main_process:
        print(f"data: {store.counts}", flush=True)
        if config.stages != whole.stages:
            print(f"the recipe's stage of {whole.stages[0].max_length} tokens is left out: almost no sample fits")
    sources = [
        Plan(
            store,
            stage,
            number,
            config.tokens_per_batch,
            config.accumulation,
            config.seed,
            shared.config.max_position_embeddings,
            accelerator.process_index,
            accelerator.num_processes,
        )
        for number, stage in enumerate(config.stages)
    ]
    if accelerator.is_main_process:
        for number, source in enumerate(sources, start=1):
            print(f"stage {number} uses {len(source.usable)} of {len(store)} samples", flush=True)
    if config.report.to:
        accelerator.init_trackers(config.report.project, config=_settings(config))
    glide = first_weights(config, shared)
    teacher = make_teacher(config, shared, accelerator.device)
    try:
        lessons = held_out_lessons(config, held_out, teacher)
        if accelerator.is_main_process and len(held_out):
            print(f"held out: {len(lessons)} of {len(held_out)} samples are measured", flush=True)
        return fit(
            config,
            shared,
            glide,
            teacher,
            sources,
            folder,
            accelerator,
            resume=checkpoint,
            lessons=lessons,
            data=store.digest,
        )
    except TeacherError as error:
        raise TeacherError(f"{error}; {_how_to_go_on(folder)}") from error
    except KeyboardInterrupt:
        raise ValueError(f"stopped; {_how_to_go_on(folder)}") from None
    finally:
        teacher.close()
        if is_own:
            end(accelerator)


def first_weights(config: TrainConfig, shared: SharedTarget) -> GlideLayer:
    glide = GlideLayer(shared.config)
    generator = generator_of(config.seed)
    if config.init == "last_layer":
        initialise_from_last_layer(glide, shared, generator)
    else:
        initialise(glide, generator)
    return glide


def make_teacher(config: TrainConfig, shared: SharedTarget, device: torch.device) -> Teacher:
    """The teacher that is asked for. One in vLLM is first compared with one in Transformers."""
    from vllm_longspec.training.teachers.hf import HfTeacher

    dtype = compute_dtype(config)
    if config.teacher == "hf":
        return HfTeacher(shared, _teacher_device(config, device), dtype, config.tokens_per_batch, config.compile_target)
    from vllm_longspec.training.teachers.vllm import VllmTeacher

    # The engines of a host are alike, and its memory may have no room for several copies of the target.
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    samples = _compared(config, shared) if is_first else []
    reference = _reference(shared, samples) if samples else []
    longest = min(max(stage.max_length for stage in config.stages), shared.config.max_position_embeddings)
    teacher: Teacher = VllmTeacher(config.target, revision=config.revision, **{"max_length": longest, **config.engine})
    if samples:
        try:
            check_agreement(reference, list(teacher.teach(samples)))
        except BaseException:
            teacher.close()
            raise
    return teacher


def _teacher_device(config: TrainConfig, device: torch.device) -> torch.device:
    """Of this process's teacher in Transformers."""
    places = config.teacher_device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 1 < len(places) <= local_rank:
        raise ValueError(
            f"teacher_device has {len(places)} entries, but this process has LOCAL_RANK {local_rank}: give one for each"
        )
    place = places[local_rank if len(places) > 1 else 0]
    if place == AUTO:
        return device
    found = torch.device(place)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"teacher_device {place} is not there, of {torch.cuda.device_count()} GPUs: give another, cpu or auto"
        )
    return found


def _reference(shared: SharedTarget, samples: Sequence[Sample]) -> list[Lesson]:
    """By Transformers, on the CPU, so that the engine finds an empty GPU, in the dtype of the target's files."""
    from vllm_longspec.training.teachers.hf import HfTeacher

    way_out = "give compared_samples: 0 to train with what vLLM serves"
    teacher = HfTeacher(shared, "cpu", shared.embedding.dtype, way_out=way_out)
    try:
        return list(teacher.teach(samples))
    except Exception as error:
        # Of quantised weights, whose kernels may need a GPU.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Transformers does not compute --target {shared.name} on a CPU, to compare the engine with ({reason}): "
            f"{way_out}"
        ) from error
    finally:
        teacher.close()


def check_agreement(expected: Sequence[Lesson], found: Sequence[Lesson]) -> None:
    """Raises ValueError where keys, values or hidden states differ by more than rounding does, in the coarser dtype."""
    for one, other in zip(expected, found, strict=True):
        most = max(_TOLERANCE[lesson.keys.dtype] for lesson in (one, other))
        for name in ("keys", "values", "hidden"):
            right, given = (getattr(lesson, name).detach().cpu().double() for lesson in (one, other))
            if right.shape != given.shape:
                raise ValueError(
                    f"the teachers' {name} have shapes {tuple(right.shape)} and {tuple(given.shape)}: the target is "
                    "none that both compute"
                )
            difference = float((right - given).norm() / right.norm().clamp(min=1e-9))
            if not difference <= most:
                raise ValueError(
                    f"the {name} of vLLM's last layer differ from those of Transformers by {difference:.3g} of their "
                    f"size, more than {most}: check dtype and engine settings, or give compared_samples: 0 to train "
                    "with what vLLM serves"
                )


def held_out_lessons(config: TrainConfig, store: TokenStore, teacher: Teacher) -> list[Lesson]:
    """On the CPU, since they stay for the whole run."""

    def samples() -> Iterator[Sample]:
        left = config.held_out.tokens
        for index in range(len(store)):
            # A long prompt leaves its place to the samples after it.
            if store.first_supervised[index] >= left:
                continue
            ids, mask = store[index]
            yield Sample(ids[:left], mask[:left], anchored(min(left, len(ids)), 0))
            left -= len(ids)
            if left <= 0:
                return

    if len(store) and min(store.first_supervised) >= config.held_out.tokens:
        raise ValueError(
            f"no held-out sample has a supervised token in its first {config.held_out.tokens} tokens: give more as "
            "held_out.tokens, or held_out.samples 0"
        )
    return [
        Lesson(lesson.sample, *(part.cpu() for part in (lesson.keys, lesson.values, lesson.hidden)))
        for lesson in teacher.teach(samples())
    ]


def _compared(config: TrainConfig, shared: SharedTarget) -> list[Sample]:
    store, _ = prepare_data(config, shared)
    samples = []
    for index in range(min(config.compared_samples, len(store))):
        ids, _ = store[index]
        ids = ids[:_COMPARED_TOKENS]
        samples.append(Sample(ids, torch.arange(len(ids)) > 0, anchored(len(ids), 0)))
    return samples


def _how_to_go_on(folder: Path) -> str:
    last = checkpoints.newest(folder)
    return "no checkpoint is there yet" if last is None else f"--resume goes on from {last}"


def _check_folder(config: TrainConfig, folder: Path, checkpoint: Path | None, resume: bool) -> None:
    if checkpoint is None:
        # What a run writes at its end would replace another draft's weights, or those of a target.
        others = [] if (folder / RUN_FILE).exists() else [n for n in checkpoints.EXPORTED if (folder / n).exists()]
        if others:
            raise ValueError(f"--out {folder} has {others[0]}, which is not of a run: give another folder")
        return
    if not resume:
        raise ValueError(f"--out {folder} has checkpoints of a run: give --resume to go on, or another folder")
    saved = build(_read_config(folder))
    if names := differing(saved, config):
        raise ValueError(
            f"--resume: {names[0]} is {getattr(saved, names[0])!r} in the run of {folder}, but now "
            f"{getattr(config, names[0])!r}: give it as it was, or another folder"
        )


def _check_same(checkpoint: Path, folder: Path, data: str, num_processes: int) -> None:
    """Places in the data are those of the same data and the same number of processes."""
    state = checkpoints.read_state(checkpoint, mapped=True)
    if state.get("data") != data:
        raise ValueError(
            f"--resume: the data have changed since {checkpoint} was written: give the files of the run of {folder}, "
            "or another --out"
        )
    if state["num_processes"] != num_processes:
        raise ValueError(
            f"--resume: the run of {folder} had {state['num_processes']} processes, but now {num_processes}: start "
            "torchrun with as many, or give another --out"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load((folder / RUN_FILE).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder / RUN_FILE} cannot be read ({' '.join(str(error).split())}): give another --out"
        ) from None
    return BEFORE | values if isinstance(values, dict) else values


def _write_config(config: TrainConfig, folder: Path) -> None:
    import yaml

    temporary = folder / f".{RUN_FILE}"
    try:
        temporary.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
        temporary.replace(folder / RUN_FILE)
    except OSError as error:
        raise ValueError(
            f"{folder / RUN_FILE} cannot be written ({error.strerror}): make room, or give another --out"
        ) from None


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Of trackers, which take no nested values."""
    return {
        name: value if isinstance(value, int | float | str) else str(value) for name, value in config.as_dict().items()
    }
