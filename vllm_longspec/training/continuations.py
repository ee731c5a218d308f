# SPDX-License-Identifier: Apache-2.0
"""Parts of stored answers to walk over, by how much text is before them.

A part of an answer is what the target would write if it were asked to go on from all that is before it. So a text is
cut where a bucket of context lengths ends, and into parts of a few hundred tokens, of which some are drawn for each
bucket. The prompts of parts are never cut: behind another prompt the same answer would not be the target's.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LENGTH = re.compile(r"(\d+)(k?)")


class Bucket(NamedTuple):
    """Roots with more than `above` and up to `limit` tokens before them."""

    name: str
    above: int
    limit: int


class Part(NamedTuple):
    """Tokens [start, end) of a text, all of one answer; the walk's first root is the first of them."""

    text: int  # its number
    start: int
    end: int
    output_position: int  # of the first token in its answer
    bucket: int


def parse_contexts(value: str) -> list[Bucket]:
    """Reads a list such as 2k,8k,32k; k is 1024.

    A length stands for contexts of more than half of it and more than the one before, the first for all up to it.

    Raises:
        ValueError: it is none, or not increasing.
    """
    buckets: list[Bucket] = []
    for name in value.split(","):
        match = _LENGTH.fullmatch(name.strip().lower())
        limit = int(match[1]) * (1024 if match[2] else 1) if match else 0
        above = buckets[-1].limit if buckets else 0
        if limit <= above:
            raise ValueError(
                f"--contexts must be increasing lengths such as 2k,8k,32k, got {value!r}: {name.strip()!r} is none"
                if limit == 0
                else f"--contexts must be increasing, got {value!r}: sort them"
            )
        buckets.append(Bucket(name.strip(), max(above, limit // 2) if buckets else 0, limit))
    return buckets


def answers_of(loss_mask: Tensor) -> Iterator[tuple[int, int]]:
    """The runs of supervised tokens, [start, end); a first token is predicted from nothing and begins none.

    Args:
        loss_mask: bool [num_tokens]
    """
    is_answer = torch.nn.functional.pad(loss_mask.int(), (1, 1))
    is_answer[1] = 0
    changes = is_answer.diff()
    yield from zip((changes == 1).nonzero()[:, 0].tolist(), (changes == -1).nonzero()[:, 0].tolist(), strict=True)


def parts_of(text: int, loss_mask: Tensor, buckets: Sequence[Bucket], num_tokens: int, overhang: int) -> Iterator[Part]:
    """All parts of a text with at least one step.

    Args:
        text: its number
        loss_mask: bool [num_tokens], true for the target's answers
        num_tokens: what an engine would be asked for
        overhang: the most nodes that a step accepts. As many tokens are added to each part, so that no step is cut
            short by its end; they are the next part's as well.
    """
    for first, end in answers_of(loss_mask):
        for index, bucket in enumerate(buckets):
            start = max(first, bucket.above + 1)
            while start <= min(end - 1, bucket.limit):
                # The last token of a part is no root: nothing after it is asked for.
                last = min(start + num_tokens, bucket.limit + 2)
                part = Part(text, start, min(last + overhang, end), start - first, index)
                if part.end - part.start >= overhang + 2:
                    yield part
                start += num_tokens


def choose(parts: Iterable[Part], num_buckets: int, per_bucket: int, seed: int) -> list[Part]:
    """At most `per_bucket` parts of each bucket, any of them equally likely, in the order of the data."""
    generator = random.Random(seed)
    chosen: list[list[Part]] = [[] for _ in range(num_buckets)]
    seen = [0] * num_buckets
    for part in parts:
        kept = chosen[part.bucket]
        seen[part.bucket] += 1
        if len(kept) < per_bucket:
            kept.append(part)
        elif (place := generator.randrange(seen[part.bucket])) < per_bucket:
            kept[place] = part
    return sorted(part for bucket in chosen for part in bucket)
