# SPDX-License-Identifier: Apache-2.0
"""Plain references for copied paths: lookup, trust and merge."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vllm_longspec.copying.lookup import MAX_MATCH, MIN_MATCH
from vllm_longspec.copying.trust import PRIOR_ERROR, PRIOR_WEIGHT, WINDOW


def find_copy(tokens: Sequence[int], copy_length: int) -> tuple[list[int], int]:
    """What is expected after `tokens`, and the length of the match; no tokens and 0 if nothing matches."""
    text = list(tokens)
    for length in range(min(MAX_MATCH, len(text) - 1), MIN_MATCH - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                copied: list[int] = []
                for source in range(start + length, start + length + copy_length):
                    copied.append((text + copied)[source])
                return copied, length
    return [], 0


class Trust:
    """The statistic in Python numbers, with the copies of every request by name."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.right: dict[int, int] = {}
        self.copies: dict[Hashable, tuple[int, list[int], int]] = {}

    def observe(self, texts: Mapping[Any, Sequence[int]]) -> None:
        """Counts what these requests' last copies turned out to be, then forgets a part of what is full."""
        for name, text in texts.items():
            root, copied, length = self.copies.pop(name, (0, [], 0))
            for token, expected in zip(copied, text[root + 1 :], strict=False):
                self.seen[length] = self.seen.get(length, 0) + 1
                if token != expected:
                    break
                self.right[length] = self.right.get(length, 0) + 1
                length += 1
        for length, count in self.seen.items():
            if count >= WINDOW:
                self.seen[length] = count // 2
                self.right[length] = self.right.get(length, 0) // 2

    def keep(self, name: Hashable, text: Sequence[int], copied: list[int], length: int) -> None:
        self.copies[name] = (len(text) - 1, copied, length)

    def rate(self, length: int) -> float:
        prior = PRIOR_WEIGHT * (1 - PRIOR_ERROR / math.sqrt(length))
        return (self.right.get(length, 0) + prior) / (self.seen.get(length, 0) + PRIOR_WEIGHT)

    def scores(self, length: int, copy_length: int) -> list[float]:
        return [sum(math.log(self.rate(length + step)) for step in range(depth)) for depth in range(1, copy_length + 1)]


Node = tuple[int, ...]  # the tokens on the path to it


def merge(
    tokens: list[int], log_probs: list[float], parents: list[int], path: list[int], scores: list[float]
) -> dict[Node, float]:
    """Every node of the tree with the path in it, and its log-probability."""
    names: list[Node] = []
    for token, parent in zip(tokens, parents, strict=True):
        names.append((names[parent] if parent >= 0 else ()) + (token,))
    merged: dict[Node, float] = {}
    for name, log_prob in zip(names, log_probs, strict=True):
        merged.setdefault(name, log_prob)
    for depth, score in enumerate(scores[: len(path)], start=1):
        name = tuple(path[:depth])
        log_prob = merged.get(name, -math.inf)
        merged[name] = score if math.isnan(log_prob) else max(score, log_prob)
    return merged
