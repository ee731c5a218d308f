# SPDX-License-Identifier: Apache-2.0
"""Cost of a step with a tree from times that this engine's own CUDA graphs took (`vllm_longspec/runner/timing.py`).

A step of plain decoding with b requests and t cached tokens takes

    verify(0, b) + read(0, b) * t

and one with K nodes

    WALK + verify(K, b) + read(K, b) * t + draft(K, b) + what the draft reads of the cache,

where `verify` is the forward pass of 1 + K rows a request with the head and greedy sampling, `draft` the draft without
a context, and `read` the time that a cached token adds to the forward pass. Between batch sizes that were timed all
three are linear. The host prepares a step while the GPU computes the one before, so it counts only where it is the
slower of the two: no step is shorter than `HOST` or, with nodes, `HOST_OF_TREE`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

    from vllm_longspec.proposers.interface import DraftingCost

# Milliseconds of what only steps with trees run outside of these graphs: layout, walk and compaction.
WALK = 0.1
# Milliseconds of vLLM's host code and the plugin's in a step, on the fastest host of those that were measured, with the
# 242M pair (docs/performance.md#speed-with-trained-weights). A slower host favours drafting.
HOST = 1.5
HOST_OF_TREE = 2.3
# Share of a time that two measurements of the same may differ by.
NOISE = 0.03
# Attribute of vLLM's SpeculativeConfig in the process of the scheduler.
_ATTRIBUTE = "longspec_step_times"

# Number of nodes -> (batch size, time) by batch size.
Times = Mapping[int, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class StepTimes:
    """All in milliseconds. Numbers of nodes without a CUDA graph are in none of the three, and 0 is in all but `draft`.

    Batch sizes of `verify` are those of `draft` for a number of nodes, and some in between.
    """

    device: str  # name of the GPU
    verify: Times
    draft: Times
    read: Times  # per cached token of the batch, in all layers
    # Number of nodes -> (requests of a CUDA graph of the target, requests of a larger one that takes less time). The
    # times of `verify` are of the latter.
    larger: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StepTimes":
        """Raises ValueError if it is not what `to_json` writes."""
        try:
            found = json.loads(text)
            tables = {name: _read_times(found[name]) for name in ("verify", "draft", "read")}
            larger = {
                int(number): [(int(size), int(other)) for size, other in pairs]
                for number, pairs in found["larger"].items()
            }
            times = cls(str(found["device"]), **tables, larger=larger)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"these are no times of steps: {error!r}") from None
        if (
            0 not in times.verify
            or not times.draft
            or times.verify.keys() != {0, *times.draft}
            or times.read.keys() != times.verify.keys()
        ):
            raise ValueError("these are no times of steps: a number of nodes is missing")
        if not (times.larger.keys() <= times.verify.keys()) or any(
            size >= other for pairs in times.larger.values() for size, other in pairs
        ):
            raise ValueError("these are no times of steps: graphs must be larger than those they are taken instead of")
        return times

    def numbers(self) -> list[int]:
        """Numbers of nodes that were timed, without 0."""
        return sorted(self.draft)


def _read_times(found: Mapping[str, Any]) -> Times:
    times: dict[int, list[tuple[int, float]]] = {}
    for number, points in found.items():
        times[int(number)] = [(int(batch_size), float(time)) for batch_size, time in points]
        sizes = [batch_size for batch_size, _ in times[int(number)]]
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError("these are no times of steps: batch sizes must ascend")
        if not all(math.isfinite(time) and time >= 0 for _, time in times[int(number)]):
            raise ValueError("these are no times of steps: a time is negative or not finite")
    return times


def attach_times(config: "SpeculativeConfig", times: StepTimes | None) -> None:
    """Makes `times_of(config)` return the times, in this process."""
    setattr(config, _ATTRIBUTE, times)


def times_of(config: "SpeculativeConfig | None") -> StepTimes | None:
    """The times of this engine's steps; None if they were not measured."""
    return getattr(config, _ATTRIBUTE, None)


class Curve:
    """Linear between batch sizes that were timed, and beyond the last of them; there it never falls.

    Beyond the last it goes on as from half of it: the last two may be next to each other, with a bend or noise between.

    Where it `rises`, what is less than with fewer requests by up to `NOISE` counts as the same. More than that is not
    noise: some GEMMs are faster with the rows of a whole tile than with a few of them.
    """

    def __init__(self, points: Sequence[tuple[int, float]], rises: bool):
        self.sizes = [size for size, _ in points]
        times = [time for _, time in points]
        self.times = list(accumulate(times, _at_least)) if rises else times
        self.rises = rises
        self.known: dict[int, float] = {}  # it is asked for several times a step

    def __call__(self, batch_size: int) -> float:
        time = self.known.get(batch_size)
        if time is None:
            time = self.known[batch_size] = self._interpolate(batch_size)
        return time

    def _interpolate(self, batch_size: int) -> float:
        sizes, times = self.sizes, self.times
        if len(sizes) == 1 or batch_size <= sizes[0]:
            return times[0]
        if batch_size >= sizes[-1] and not self.rises:
            return times[-1]
        last = next((place for place, size in enumerate(sizes) if size >= batch_size), len(sizes) - 1)
        first = last - 1
        if batch_size > sizes[-1]:
            first = max((place for place, size in enumerate(sizes) if 2 * size <= sizes[-1]), default=0)
        part = (batch_size - sizes[first]) / (sizes[last] - sizes[first])
        time = times[first] + part * (times[last] - times[first])
        return time if batch_size <= sizes[-1] else max(time, times[-1])


def _at_least(before: float, time: float) -> float:
    return before if before * (1 - NOISE) <= time < before else time


class MeasuredCost:
    """(batch size, nodes per request, cached tokens of all requests) -> cost in steps of plain decoding.

    Args:
        times: of this engine.
        drafting: the proposer's model, which says how what a draft reads grows with the cache.
        token: K and V of a cached token in all layers, in weights, which `drafting` counts in.
        others: the same function for numbers of nodes that were not timed.
    """

    def __init__(
        self, times: StepTimes, drafting: "DraftingCost", token: float, others: Callable[[int, int, int], float]
    ):
        self.times = times
        self.drafting = drafting
        self.token = token
        self.others = others
        self.verify = {number: Curve(points, rises=True) for number, points in times.verify.items()}
        self.draft = {number: Curve(points, rises=True) for number, points in times.draft.items()}
        self.read = {number: Curve(points, rises=False) for number, points in times.read.items()}

    def milliseconds(self, batch_size: int, num_nodes: int, num_tokens: int) -> float:
        """Of a step; `num_nodes` is 0 or was timed."""
        step = self.verify[num_nodes](batch_size) + self.read[num_nodes](batch_size) * num_tokens
        if num_nodes == 0:
            return max(HOST, step)
        cache = self.token * num_tokens
        whole = self.drafting(batch_size, num_nodes, cache)
        if math.isinf(whole):
            return whole
        of_weight = self.read[0](batch_size) / self.token
        reading = (whole - self.drafting(batch_size, num_nodes, 0.0)) * of_weight
        return max(HOST_OF_TREE, step + WALK + self.draft[num_nodes](batch_size) + reading)

    def __call__(self, batch_size: int, num_nodes: int, num_tokens: int) -> float:
        if num_nodes == 0:
            return 1.0
        if num_nodes not in self.draft:
            return self.others(batch_size, num_nodes, num_tokens)
        plain = self.milliseconds(batch_size, 0, num_tokens)
        return self.milliseconds(batch_size, num_nodes, num_tokens) / plain


def describe_times(times: StepTimes, num_levels: Callable[[int], int]) -> str:
    """What a step, a node and a level take for a single request, for start-up's log."""
    most = max(times.numbers())
    plain, verify = Curve(times.verify[0], rises=True)(1), Curve(times.verify[most], rises=True)(1)
    draft = Curve(times.draft[most], rises=True)(1)
    return (
        f"plain decoding {max(HOST, plain):.2f} ms, a node {max(0.0, verify - plain) / most * 1000:.0f} us of "
        f"verification, a level {draft / num_levels(most):.2f} ms of drafting"
    )


def describe_numbers(numbers: Sequence[int]) -> str:
    """Numbers of nodes by batch size, entry 0 not used, such as "24 up to 4, 7 up to 16, 0 above"."""
    runs: list[tuple[int, int]] = []  # number, largest batch of the run
    for batch_size, number in enumerate(numbers[1:], start=1):
        if runs and runs[-1][0] == number:
            runs.pop()
        runs.append((number, batch_size))
    *parts, (final, _) = runs
    said = [f"{number} up to {size}" for number, size in parts]
    return ", ".join([*said, f"{final} above" if said else str(final)])
