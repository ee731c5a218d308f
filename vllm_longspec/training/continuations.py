# SPDX-License-Identifier: Apache-2.0
"""Parts of stored answers to walk over, by how much text is before them.

A part of an answer is what the target would write if it were asked to go on from all that is before it. So a text is
cut where a bucket of context lengths ends, and into parts of a few hundred tokens, of which some are drawn for each
bucket. The prompts of parts are never cut: behind another prompt the same answer would not be the target's.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_LENGTH = re.compile(r"(\d+)(k?)")


class Bucket(NamedTuple):
    """Roots with more than `above` and up to `limit` tokens before them."""

    name: str
    above: int
    limit: int


class Stored(NamedTuple):
    """A line of the data."""

    number: int  # among all texts
    place: str  # file and line
    input_ids: list[int]
    loss_mask: list[bool]  # true for the target's answers


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


def read_stored(data: Path) -> Iterator[Stored]:
    """The texts of a JSONL file of {"input_ids", "loss_mask"}, or of all such files in a folder.

    Raises:
        ValueError: there is no such file; or with the number of the line that is no such object.
    """
    files = sorted(data.glob("[!.]*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise ValueError(
            f"--data {data} has no *.jsonl: give a folder that vllm-longspec generate has written, or a file"
        )
    number = 0
    for file in files:
        with file.open() as lines:
            for line, text in enumerate(lines, start=1):
                if text.strip():
                    yield _read(text, number, f"{file}, line {line}")
                    number += 1


def _read(text: str, number: int, place: str) -> Stored:
    try:
        record = json.loads(text)
        ids, mask = record["input_ids"], record["loss_mask"]
        sound = len(ids) == len(mask) > 0 and all(type(token) is int and token >= 0 for token in ids)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{place}: not a JSON object with input_ids and loss_mask, two lists of one length")
    return Stored(number, place, ids, [bool(value) for value in mask])


def answers_of(loss_mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The runs of supervised tokens, [start, end); a first token is predicted from nothing and begins none."""
    start = None
    for index, is_answer in enumerate([*loss_mask, False]):
        if is_answer and index > 0 and start is None:
            start = index
        elif not is_answer and start is not None:
            yield start, index
            start = None


def parts_of(stored: Stored, buckets: Sequence[Bucket], num_tokens: int, overhang: int) -> Iterator[Part]:
    """All parts of a text with at least one step.

    Args:
        num_tokens: what an engine would be asked for
        overhang: the most nodes that a step accepts. As many tokens are added to each part, so that no step is cut
            short by its end; they are the next part's as well.
    """
    for first, end in answers_of(stored.loss_mask):
        for index, bucket in enumerate(buckets):
            start = max(first, bucket.above + 1)
            while start <= min(end - 1, bucket.limit):
                # The last token of a part is no root: nothing after it is asked for.
                last = min(start + num_tokens, bucket.limit + 2)
                part = Part(stored.number, start, min(last + overhang, end), start - first, index)
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
