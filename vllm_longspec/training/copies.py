# SPDX-License-Identifier: Apache-2.0
"""Copied paths as the plugin finds and scores them (`vllm_longspec/copying`), without its kernels."""

import math
from collections.abc import Sequence

from torch import Tensor

from vllm_longspec.copying.lookup import MAX_MATCH, MIN_MATCH
from vllm_longspec.copying.trust import PRIOR_ERROR, PRIOR_WEIGHT, WINDOW


def find_copy(ids: Tensor, root: int, copy_length: int) -> tuple[list[int], int]:
    """What is expected after the root, and the length of the match; no tokens and 0 if nothing matches.

    Args:
        ids: int64 [tokens]
        root: index of the root token
    """
    # By the match's last token, which is before the root.
    is_match, length = None, None
    for offset in range(min(MAX_MATCH, root)):
        equal = ids[:root].roll(offset) == ids[root - offset]
        # What `roll` brings from the end is before the text's beginning.
        equal[:offset] = False
        is_match = equal if is_match is None else is_match & equal
        length = is_match.int() if length is None else length + is_match
    if length is None:
        return [], 0
    # Of equally long matches the latest.
    last = root - 1 - int(length.flip(0).argmax())
    match_length = int(length[last])
    if match_length < MIN_MATCH:
        return [], 0
    # A copy that reaches the root goes on with its own tokens.
    period = root - last
    source = ids[last + 1 : last + 1 + min(period, copy_length)].tolist()
    return [source[step % period] for step in range(copy_length)], match_length


class Trust:
    """`vllm_longspec/copying/trust.py` for one request at a time."""

    def __init__(self) -> None:
        # By length of a match.
        self.seen: dict[int, int] = {}
        self.right: dict[int, int] = {}
        self.forget()

    def forget(self) -> None:
        """Another request begins."""
        self.root, self.match_length = 0, 0
        self.copied: list[int] = []

    def score(self, ids: Tensor, root: int, copied: list[int], match_length: int) -> list[float]:
        """Learns from the copy at the last root, then scores and keeps this one: cumulative log-probabilities.

        Args:
            ids: int64 [tokens], known up to the root's
        """
        self._observe(ids[self.root + 1 : root + 1].tolist())
        self.root, self.copied, self.match_length = root, copied, match_length
        rates = [math.log(self._rate(match_length + step)) for step in range(len(copied))]
        return [sum(rates[: depth + 1]) for depth in range(len(rates))]

    def _observe(self, known: Sequence[int]) -> None:
        length = self.match_length
        for token, expected in zip(self.copied, known, strict=False):
            self.seen[length] = self.seen.get(length, 0) + 1
            if token != expected:
                break
            self.right[length] = self.right.get(length, 0) + 1
            length += 1
        for length, count in self.seen.items():
            if count >= WINDOW:
                self.seen[length] = count // 2
                self.right[length] = self.right.get(length, 0) // 2

    def _rate(self, length: int) -> float:
        prior = PRIOR_WEIGHT * (1 - PRIOR_ERROR / math.sqrt(length))
        return (self.right.get(length, 0) + prior) / (self.seen.get(length, 0) + PRIOR_WEIGHT)
