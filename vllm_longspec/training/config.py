# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: dataclasses from YAML and the command line. Unknown keys are errors."""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.training.losses import LossWeights
from vllm_longspec.training.optimizer import ADAMW, MUON, OPTIMIZERS, RATES

# In a run's folder.
RUN_FILE = "run.yaml"
AUTO = "auto"
TEACHERS = ("hf", "vllm")
INITIALISATIONS = ("normal", "last_layer")
DEPTH_WEIGHTS = ("expected", "equal")
SHARDINGS = ("none", "fsdp2")
DTYPES = (AUTO, "float32", "bfloat16")
DEVICES = (AUTO, "cpu", "cuda")
TRACKERS = ("wandb", "tensorboard", "trackio")


@dataclass(frozen=True)
class Stage:
    """A part of the run with a schedule of its own. Its length is one of epochs, steps, tokens and minutes."""

    epochs: float | None = None
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    # The peak. Without one that of the recipe's last stage.
    learning_rate: float | None = None
    # Share of the stage in which the learning rate rises.
    warmup: float = 0.05
    # Longer samples are cut.
    max_length: int = 32768
    # Positions after the first four go on at a random offset, up to this position; 0 leaves positions as they are.
    anchor_positions: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("epochs", "steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a stage has one of epochs, steps, tokens and minutes, not {' and '.join(given) or 'none'}"
            )
        if self.learning_rate is not None:
            given.append("learning_rate")
        _positive(self, *given, "max_length")
        for name in given:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is a finite number, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the stage from 0 to below 1, not {self.warmup}")
        if self.anchor_positions < 0:
            raise ValueError(f"anchor_positions is 0 or a number of positions, not {self.anchor_positions}")


@dataclass(frozen=True)
class Checkpoints:
    minutes: float = 10.0
    # So many of the last ones stay.
    keep: int = 2

    def __post_init__(self) -> None:
        _positive(self, "minutes", "keep")


@dataclass(frozen=True)
class HeldOut:
    """Samples that are not trained with, to measure by: so many of the data, or all of `data`."""

    samples: int = 16
    data: tuple[str, ...] = ()
    # They stay in memory, cut to these many tokens in all.
    tokens: int = 65536
    minutes: float = 10.0

    def __post_init__(self) -> None:
        _positive(self, "tokens", "minutes")
        if self.samples < 0:
            raise ValueError(f"held_out.samples is 0 or more, not {self.samples}")


@dataclass(frozen=True)
class Reports:
    steps: int = 10
    to: tuple[str, ...] = ()
    project: str = "vllm-longspec"

    def __post_init__(self) -> None:
        _positive(self, "steps")
        for tracker in self.to:
            _one_of("report.to", tracker, TRACKERS)


# Of AdamW, in the recipe's first stage and in its last one, which is that of stages that give none.
_FIRST_RATE, _RATE = 5e-4, 1e-4


def recipe(teacher: str, optimizer: str) -> tuple[Stage, ...]:
    """LongSpec's: short samples at offset positions, then long ones as they are. An engine has no offset positions."""
    rate = RATES[optimizer]
    anchors = 30000 if teacher == "hf" else 0
    first = Stage(epochs=0.5, learning_rate=rate * _FIRST_RATE, max_length=2048, anchor_positions=anchors)
    return first, Stage(epochs=1.0, learning_rate=rate * _RATE)


@dataclass(frozen=True)
class TrainConfig:
    target: str
    # Files of JSON lines, or folders of them.
    data: tuple[str, ...]
    out: str
    revision: str | None = None
    teacher: str = "hf"
    # What the vLLM engine gets beside the model, such as tensor_parallel_size.
    engine: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    # Of the trainer; "auto" is the GPU of the process, or the CPU.
    device: str = AUTO
    # Of a teacher in Transformers, such as "cuda:1"; "auto" is the trainer's. Several are taken by LOCAL_RANK.
    teacher_device: tuple[str, ...] = (AUTO,)
    # What target and draft compute in; the draft's own weights are float32. "auto" is bfloat16 on GPUs.
    dtype: str = AUTO
    # Of the target in Transformers, norms and MLPs.
    compile_target: bool = False
    compile_losses: bool | str = AUTO
    init: str = "normal"
    # Levels of the tree that the draft will grow: so many numbers of withheld keys are trained.
    levels: int = len(DEFAULT_LEVELS)
    # How many of them each batch is trained with, drawn anew; all by default.
    depths_per_batch: int | None = None
    depth_weights: str = "expected"
    loss: LossWeights = field(default_factory=LossWeights)
    # Of a batch on one GPU, which so many fill. A longer sample is a batch of its own.
    tokens_per_batch: int = 8192
    # Batches of each GPU in a step of the optimiser.
    accumulation: int = 1
    # "auto" is Muon, and AdamW where `sharding` leaves no matrix whole.
    optimizer: str = AUTO
    weight_decay: float = 0.1
    clip: float = 1.0
    sharding: str = "none"
    # Without any, those of `recipe`.
    stages: tuple[Stage, ...] = ()
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    held_out: HeldOut = field(default_factory=HeldOut)
    report: Reports = field(default_factory=Reports)
    # Samples on which teachers must agree before a run with --teacher vllm; 0 trusts them.
    compared_samples: int = 2

    def __post_init__(self) -> None:
        _one_of("teacher", self.teacher, TEACHERS)
        _one_of("init", self.init, INITIALISATIONS)
        _one_of("depth_weights", self.depth_weights, DEPTH_WEIGHTS)
        _one_of("optimizer", self.optimizer, (AUTO, *OPTIMIZERS))
        _one_of("sharding", self.sharding, SHARDINGS)
        if self.optimizer == AUTO:
            object.__setattr__(self, "optimizer", ADAMW if self.sharding == "fsdp2" else MUON)
        if self.optimizer == MUON and self.sharding == "fsdp2":
            raise ValueError(
                "optimizer muon is not supported with sharding fsdp2, since it needs whole matrices: give sharding "
                "none, or optimizer adamw"
            )
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        if not self.teacher_device:
            raise ValueError("teacher_device has no entry: give auto, cpu, cuda or cuda:N")
        for place in self.teacher_device:
            if not re.fullmatch(r"cuda:\d+", place):
                _one_of("teacher_device", place, (*DEVICES, "cuda:N"))
        for name in ("target", "revision"):
            if name in self.engine:
                raise ValueError(f"engine.{name} is not supported: give {name} beside engine, the trainer reads it too")
        if isinstance(self.compile_losses, str):
            _one_of("compile_losses", self.compile_losses, (AUTO,))
        _positive(self, "levels", "tokens_per_batch", "accumulation", "clip")
        if self.depths_per_batch is not None and not 1 <= self.depths_per_batch <= self.levels:
            raise ValueError(f"depths_per_batch is 1 to levels ({self.levels}), not {self.depths_per_batch}")
        rate = RATES[self.optimizer] * _RATE
        stages = tuple(
            dataclasses.replace(stage, learning_rate=rate) if stage.learning_rate is None else stage
            for stage in self.stages
        )
        object.__setattr__(self, "stages", stages or recipe(self.teacher, self.optimizer))
        if self.teacher == "vllm" and any(stage.anchor_positions for stage in self.stages):
            raise ValueError(
                "anchor_positions is not supported with teacher vllm, whose positions have no gaps: give 0 there, or "
                "teacher hf"
            )
        if self.compared_samples < 0 or self.weight_decay < 0:
            raise ValueError("compared_samples and weight_decay are 0 or more")

    def as_dict(self) -> dict[str, Any]:
        """For YAML."""
        return _plain(dataclasses.asdict(self))


# What may differ in a run that is resumed.
RESUMABLE = (
    "out",
    "device",
    "teacher_device",
    "dtype",
    "clip",
    "compile_target",
    "compile_losses",
    "checkpoints",
    "report",
    "engine",
)


# Of a run whose file does not say it: it was started when there was no choice.
BEFORE = {"optimizer": ADAMW}


def build(values: dict[str, Any]) -> TrainConfig:
    """The configuration of nested dictionaries.

    Raises:
        ValueError: a key is unknown (the nearest known one is named), is missing, or has a value of another type.
    """
    return _build(TrainConfig, values, "")


def load(
    path: Path | None, given: dict[str, Any], settings: list[str], before: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The file's configuration, with what the command line gives.

    Args:
        before: what holds where neither says it, instead of the default
        given: values of options; None where one was not given
        settings: NAME=VALUE with dots in the name and YAML as the value
    """
    import yaml

    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ValueError(f"--config {path} cannot be read ({error.strerror}): give a file of YAML") from None
        except yaml.YAMLError as error:
            raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} holds no keys and values")
    values = {**(before or {}), **values, **{name: value for name, value in given.items() if value is not None}}
    for setting in settings:
        name, is_given, text = setting.partition("=")
        if not is_given:
            raise ValueError(f"--set {setting} is not NAME=VALUE")
        *parents, last = name.split(".")
        inside = values
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise ValueError(f"--set {setting}: {parent} holds no names, give it in --config")
        try:
            inside[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {setting}: the value is not YAML") from None
    return build(values)


def differing(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Names of settings that differ, but for those that a resumed run may change: of stages their learning rates."""
    one, other = (
        dataclasses.replace(
            config,
            stages=tuple(
                dataclasses.replace(stage, learning_rate=_RATE, warmup=Stage.warmup) for stage in config.stages
            ),
        )
        for config in (one, other)
    )
    return [
        each.name
        for each in dataclasses.fields(TrainConfig)
        if each.name not in RESUMABLE and getattr(one, each.name) != getattr(other, each.name)
    ]


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the configuration'} holds keys and values, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = [each.name for each in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {_inside(where, name)} in the configuration: did you mean {near[0]}?")
    missing = [
        each.name
        for each in dataclasses.fields(cls)
        if each.name not in values
        and each.default is dataclasses.MISSING
        and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"the configuration has no {_inside(where, missing[0])}: give it there or as an option")
    try:
        return cls(**{name: _convert(hints[name], value, _inside(where, name)) for name, value in values.items()})
    except ValueError as error:
        # A stage is told by its place.
        raise ValueError(f"{where}: {error}" if where and where not in str(error) else str(error)) from None


def _inside(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            # One item needs no list.
            value = [value]
        return tuple(_convert(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} holds keys and values, not {value!r}")
        return dict(value)
    kinds = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    if isinstance(value, str) and float in kinds:
        # YAML 1.1 reads 1e-4 as a word.
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if type(value) not in kinds:
        names = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{where} is {value!r}, but takes {names}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _positive(config: Any, *names: str) -> None:
    for name in names:
        # Not of NaN either.
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is more than 0, not {getattr(config, name)}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
