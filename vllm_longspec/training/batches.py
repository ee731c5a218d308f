# SPDX-License-Identifier: Apache-2.0
"""Which samples a step is trained with: shuffled by a seed, packed by their lengths, the same at every start.

All ranks make the same plan of lengths, and each loads its own batches. Whatever is drawn follows from the seed and the
place in the plan, so that a cursor is all that a resumed run needs.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_longspec.training.config import Stage, TrainConfig, recipe
from vllm_longspec.training.data import Dataset
from vllm_longspec.training.teachers import Sample

NUM_ANCHORS = 4
# Where fewer of the samples have a supervised token in the short stage, the default recipe goes without it.
_FEWEST_SHORT = 0.05


class Cursor(NamedTuple):
    """The next sample: its epoch, and its place in that epoch's order."""

    epoch: int = 0
    place: int = 0


class Step(NamedTuple):
    """What a rank is trained with between two updates of the weights."""

    batches: list[list[Sample]]
    num_tokens: int  # of all ranks
    cursor: Cursor  # after it


class Plan:
    """Batches of a stage.

    Args:
        number: of the stage
        max_position: the target's `max_position_embeddings`, which no position reaches
    """

    def __init__(
        self,
        dataset: Dataset,
        stage: Stage,
        number: int,
        tokens_per_batch: int,
        accumulation: int,
        seed: int,
        max_position: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset, self.stage, self.seed, self.number = dataset, stage, seed, number
        self.tokens_per_batch, self.accumulation = tokens_per_batch, accumulation
        self.rank, self.num_ranks = rank, num_ranks
        self.max_length = min(stage.max_length, max_position)
        self.last_position = min(stage.anchor_positions, max_position)
        lengths = torch.as_tensor(dataset.lengths).clamp(max=self.max_length)
        self.usable = usable_samples(dataset, self.max_length)
        self.lengths = lengths.tolist()
        if len(self.usable) == 0:
            raise ValueError(
                f"stages[{number}] has no sample with a supervised token in its first {self.max_length} tokens: give a "
                "larger max_length"
            )

    def steps(self, cursor: Cursor = Cursor()) -> Iterator[Step]:  # noqa: B008
        """Without end: epoch after epoch."""
        per_step = self.num_ranks * self.accumulation
        batches: list[list[tuple[int, int]]] = []
        for batch, after in self._batches(cursor):
            batches.append(batch)
            if len(batches) == per_step:
                mine = batches[self.rank * self.accumulation : (self.rank + 1) * self.accumulation]
                num_tokens = sum(self.lengths[index] for batch in batches for _, index in batch)
                yield Step([[self._load(*each) for each in batch] for batch in mine], num_tokens, after)
                batches = []

    def num_steps(self, epochs: float) -> int:
        """Steps that so many epochs take, at least one."""
        end = epochs * len(self.usable)
        for batches, (_, after) in enumerate(self._batches(Cursor()), start=1):
            if after.epoch * len(self.usable) + after.place >= end:
                return max(1, batches // (self.num_ranks * self.accumulation))
        raise AssertionError

    def _batches(self, cursor: Cursor) -> Iterator[tuple[list[tuple[int, int]], Cursor]]:
        """Batches of (epoch, number of the sample), and the cursor after each."""
        batch: list[tuple[int, int]] = []
        num_tokens, (epoch, place) = 0, cursor
        while True:
            order = self._order(epoch)
            for at in range(place, len(order)):
                index = order[at]
                if batch and num_tokens + self.lengths[index] > self.tokens_per_batch:
                    yield batch, Cursor(epoch, at)
                    batch, num_tokens = [], 0
                batch.append((epoch, index))
                num_tokens += self.lengths[index]
            epoch, place = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        generator = generator_of(self.seed, self.number, epoch)
        return self.usable[torch.randperm(len(self.usable), generator=generator)].tolist()

    def _load(self, epoch: int, index: int) -> Sample:
        ids, mask = (part[: self.max_length] for part in self.dataset[index])
        offset = 0
        if self.last_position > len(ids):
            generator = generator_of(self.seed, self.number, epoch, index)
            offset = int(torch.randint(self.last_position - len(ids) + 1, (), generator=generator))
        return Sample(ids, mask, anchored(len(ids), offset))


def usable_samples(dataset: Dataset, max_length: int) -> Tensor:
    """int64 [num_usable], numbers of the samples that are not cut before their first supervised token."""
    lengths = torch.as_tensor(dataset.lengths).clamp(max=max_length)
    return (torch.as_tensor(dataset.first_supervised) < lengths).nonzero()[:, 0]


def without_short_stage(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The configuration without the first stage of the default recipe, if almost no sample fits into it."""
    if config.stages != recipe(config.teacher, config.optimizer):
        return config
    num_usable = len(usable_samples(dataset, config.stages[0].max_length))
    if num_usable >= _FEWEST_SHORT * len(dataset.lengths):
        return config
    return dataclasses.replace(config, stages=config.stages[1:])


def anchored(length: int, offset: int) -> Tensor:
    """The first few positions, then `offset` of them left out, then the rest: int64 [length]."""
    positions = torch.arange(length)
    return torch.where(positions < NUM_ANCHORS, positions, positions + offset)


def drawn_depths(levels: int, count: int | None, *place: int) -> tuple[int, ...]:
    """Numbers of withheld keys, increasing, from 1 to `levels`: all, or `count` of them drawn for this place."""
    if count is None or count == levels:
        return tuple(range(1, levels + 1))
    drawn = torch.randperm(levels, generator=generator_of(*place))[:count] + 1
    return tuple(sorted(drawn.tolist()))


def generator_of(*place: int) -> torch.Generator:
    digest = hashlib.sha256(repr(place).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
