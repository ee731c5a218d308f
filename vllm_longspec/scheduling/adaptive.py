# SPDX-License-Identifier: Apache-2.0
"""Adaptive verification: the number of nodes K with the highest expected tokens per unit of cost.

A step with K nodes emits 1 + accepted(K) tokens and costs cost(batch size, K, cached tokens) steps of plain decoding
(`vllm_longspec/scheduling/cost.py`). K is one of the schedule's numbers, at most the batch's own, or 0, which is plain
decoding. K also says how many levels are drafted (`TreeShape.num_levels`): where the levels are chosen, each number of
levels has numbers of nodes of its own.

accepted(K) is estimated from counts that decay with every step and from a prior: what a typical draft has accepted of K
nodes, times the draft's quality, its acceptance relative to the typical one over all K. Counts decay towards the prior,
so a K that did badly is tried again; after plain decoding no sooner than a trial would be. How many nodes a typical
draft has accepted depends on K (`typical_acceptance`) and on the levels, by the probability that a path which has
reached a depth goes on (`_PathLengths`), which alone says what a chain accepts. It is counted too, over all K, so that
steps of one number of levels say what another would accept.

Every `TRIAL_INTERVAL`-th step tries a neighbour of the best K, since on some texts few nodes accept as much as many,
and few levels as much as many. A K that would not pay if all of its nodes were accepted is not tried, and one that
costs much more than the best is tried less often. All is computed from counts, not from clocks, so runs are repeatable.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_longspec.tree.shape import TreeShape


class Memory(NamedTuple):
    half_life: int  # steps after which a count has half its weight
    prior_weight: float  # of a K's acceptance, in steps of a request


# With the same levels for every K a wrong K costs little, and its own counts say best what it accepts. Levels that a
# text does not reach cost more, so they must follow faster, and many K share few counts: the prior, which all of them
# make, says more.
NODES_MEMORY = Memory(half_life=256, prior_weight=8.0)
LEVELS_MEMORY = Memory(half_life=32, prior_weight=64.0)
# Weights of the other priors: of the draft's quality in accepted tokens, of the probability that a path goes on in
# paths.
QUALITY_PRIOR_WEIGHT = 2.0
PATH_PRIOR_WEIGHT = 8.0
# Steps between trials, at least.
TRIAL_INTERVAL = 32
# Time that trials may take on top of what the same steps with the best K take, if nothing is accepted.
MAX_TRIAL_TIME = 0.015
# The same where the best K is 0: no slower than 0.99 times plain decoding, which users compare with, and of which the
# kernels around a step without nodes take about as much.
MAX_TRIAL_TIME_OF_PLAIN = 0.004
# After so many half-lives without a count what was counted before does not matter.
MOST_HALF_LIVES = 8
# Levels of the trees that `typical_acceptance` was fitted to, and the probability that a path goes on at which their
# best 24 nodes accept as much as it says.
TYPICAL_LEVELS = 5
TYPICAL_CONTINUATION = 0.75


def typical_acceptance(num_nodes: int) -> float:
    """Accepted tokens per step of the best `num_nodes` nodes of a tree of `TYPICAL_LEVELS` levels.

    Fitted to benchmarks/README.md.
    """
    return 2.9 * (1 - (1 + num_nodes) ** -0.5)


class _PathLengths:
    """How far accepted paths reach, whatever the number of levels that were drafted.

    A path that ends at the last level says nothing of what is below, so the probability that a path goes on is counted
    for each depth among the paths that reached the depth before and could have gone on (the Kaplan-Meier estimate).
    The prior is the probability at the depth before.
    """

    def __init__(self, max_levels: int):
        # By depth - 1; both decayed.
        self.paths = [0.0] * max_levels
        self.continued = [0.0] * max_levels

    def decay(self, factor: float) -> None:
        self.paths = [factor * count for count in self.paths]
        self.continued = [factor * count for count in self.continued]

    def observe(self, num_accepted: int, num_levels: int) -> None:
        # A path below the drafted levels was not drafted level by level: deeper levels would not have added to it.
        if num_accepted > num_levels:
            return
        for depth in range(min(num_accepted + 1, num_levels)):
            self.paths[depth] += 1
        for depth in range(num_accepted):
            self.continued[depth] += 1

    def means(self, scale: float = 1.0) -> list[float]:
        """Mean length of a path by the number of levels, from 0 levels on; by so many times the counts."""
        means, reached, continuation = [0.0], 1.0, TYPICAL_CONTINUATION
        for paths, continued in zip(self.paths, self.continued, strict=True):
            continuation = (PATH_PRIOR_WEIGHT * continuation + scale * continued) / (PATH_PRIOR_WEIGHT + scale * paths)
            reached *= continuation
            means.append(means[-1] + reached)
        return means


class NodesByCost:
    """Replaces the scheduler's lookup table: entry `batch_size` is the K of the next step, here without feedback.

    Args:
        choices: numbers of nodes to choose from, by batch size; entry 0 is not used.
        cost: (requests, nodes per request, cached tokens of all) -> cost of a step in steps of plain decoding.
        num_cached_tokens: returns the cached tokens of all decoding requests.
        shape: the tree, and the levels that are drafted for a number of nodes.
        accepted: tokens that a step accepts of each number of nodes; by default those of a typical draft.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        cost: Callable[[int, int, int], float],
        num_cached_tokens: Callable[[], int],
        shape: TreeShape,
        accepted: Mapping[int, float] | None = None,
    ):
        self.choices = [sorted(numbers) for numbers in choices]
        self.cost = cost
        self.num_cached_tokens = num_cached_tokens
        numbers = sorted(set().union(*self.choices[1:]) - {0})
        self.levels = {num_nodes: shape.num_levels(num_nodes) for num_nodes in numbers}
        self.typical = {num_nodes: typical_acceptance(num_nodes) for num_nodes in numbers}
        self.is_chain = shape.max_width == 1
        self.paths = _PathLengths(max([TYPICAL_LEVELS, *self.levels.values()]))
        if accepted is None:
            accepted = {number: min(number, typical) for number, typical in self._typical_acceptance().items()}
        self.acceptance = {0: 0.0, **accepted}

    def __getitem__(self, batch_size: int) -> int:
        choices = self.choices[batch_size]
        # Counting is slow for large batches, which often have a single choice.
        return self.best(batch_size, self.num_cached_tokens()) if len(choices) > 1 else choices[0]

    def best(self, batch_size: int, num_tokens: int) -> int:
        """The K of a batch with so many cached tokens, of a draft that is accepted as given or as typical."""
        return max(
            self.choices[batch_size],
            key=lambda number: (1 + self.acceptance[number]) / self.cost(batch_size, number, num_tokens),
        )

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts a request's step with `num_nodes` nodes, of which `num_accepted` were accepted."""
        return None

    def _typical_acceptance(self, scale: float = 1.0) -> dict[int, float]:
        """Accepted tokens of a typical draft whose paths are as long as so many times the counts say, by nodes."""
        means = self.paths.means(scale)
        if self.is_chain:
            # Each node is a level, so its probability to be accepted is that of the path to reach it.
            return {number: means[levels] for number, levels in self.levels.items()}
        return {
            number: self.typical[number] * means[levels] / means[min(number, TYPICAL_LEVELS)]
            for number, levels in self.levels.items()
        }


class AdaptiveVerification(NodesByCost):
    """The same with feedback: the K whose nodes have lately been worth most."""

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        cost: Callable[[int, int, int], float],
        num_cached_tokens: Callable[[], int],
        shape: TreeShape,
    ):
        super().__init__(choices, cost, num_cached_tokens, shape)
        # K -> steps summed over requests, and their accepted tokens; both decayed
        self.steps = dict.fromkeys(self.levels, 0.0)
        self.accepted = dict.fromkeys(self.steps, 0.0)
        self.memory = LEVELS_MEMORY if shape.plans or self.is_chain else NODES_MEMORY
        self.decay = 0.5 ** (1 / self.memory.half_life)
        self.num_lookups = 0
        self.num_trials = 1
        self.last_trial = 0
        self.num_rested = 0  # steps of K = 0 since the last with another K, in which nothing could be counted

    def __getitem__(self, batch_size: int) -> int:
        for num_nodes in self.steps:
            self.steps[num_nodes] *= self.decay
            self.accepted[num_nodes] *= self.decay
        self.paths.decay(self.decay)
        choices = self.choices[batch_size]
        # Counting is slow for large batches, which often have a single choice.
        num_tokens = self.num_cached_tokens() if len(choices) > 1 else 0

        def cost(num_nodes: int) -> float:
            return self.cost(batch_size, num_nodes, num_tokens)

        number = self._choose(choices, cost)
        self.num_rested = 0 if number > 0 else self.num_rested + 1
        return number

    def _choose(self, choices: Sequence[int], cost: Callable[[int], float]) -> int:
        def throughput(number: int, acceptance: Mapping[int, float]) -> float:
            # Tokens per request in the time of a step of plain decoding.
            return (1 + acceptance[number]) / cost(number)

        def best_of(acceptance: Mapping[int, float]) -> int:
            return max(choices, key=lambda number: throughput(number, acceptance))

        acceptance = self._acceptance()
        best = best_of(acceptance)
        self.num_lookups += 1
        if best > 0 and self.num_rested > 0:
            half_lives = min(self.num_rested / self.memory.half_life, MOST_HALF_LIVES)
            if best_of(self._acceptance(2**half_lives)) == 0:
                # By the counts as they were before the rest it would not pay, so it is a trial.
                if not self._may_try(best, 0, cost):
                    return 0
                self.last_trial = self.num_lookups
                return best
        if self.num_lookups % TRIAL_INTERVAL == 0:
            least = throughput(best, acceptance)
            return self._trial(best, [number for number in choices if (1 + number) / cost(number) > least], cost)
        return best

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts a request's step with `num_nodes` nodes, of which `num_accepted` were accepted.

        These may be more than there are levels, if candidates from elsewhere were verified with the draft's.
        """
        if num_nodes in self.steps:
            self.steps[num_nodes] += 1
            self.accepted[num_nodes] += num_accepted
            self.paths.observe(num_accepted, self.levels[num_nodes])

    def _trial(self, best: int, choices: Sequence[int], cost: Callable[[int], float]) -> int:
        """A neighbour of the best K, or that itself if trials of the neighbour would take too much time."""
        neighbours = self._neighbours(best, choices)
        if not neighbours:
            return best
        number = neighbours[self.num_trials % len(neighbours)]
        if not self._may_try(number, best, cost):
            return best
        self.num_trials += 1
        self.last_trial = self.num_lookups
        return number

    def _may_try(self, number: int, best: int, cost: Callable[[int], float]) -> bool:
        """Whether trials that are so far apart take little enough time, if nothing is accepted."""
        most = MAX_TRIAL_TIME if best > 0 else MAX_TRIAL_TIME_OF_PLAIN
        return (cost(number) / cost(best) - 1) / (self.num_lookups - self.last_trial) <= most

    def _neighbours(self, best: int, choices: Sequence[int]) -> list[int]:
        """The next K of both sides, and those with as many levels; without K = 0, which has nothing to observe."""
        fewer = [number for number in reversed(choices) if 0 < number < best]
        more = [number for number in choices if number > best]
        found: dict[int, None] = {}
        for numbers in (fewer, more):
            same = [number for number in numbers if self.levels[number] == self.levels.get(best)]
            found.update(dict.fromkeys(numbers[:1] + same[:1]))
        return list(found)

    def _acceptance(self, scale: float = 1.0) -> dict[int, float]:
        """Expected accepted tokens of a request's step by its number of nodes, by so many times the counts."""
        typical = self._typical_acceptance(scale)
        # Accepted tokens relative to those of a typical draft.
        quality = (QUALITY_PRIOR_WEIGHT + scale * sum(self.accepted.values())) / (
            QUALITY_PRIOR_WEIGHT + scale * sum(steps * typical[number] for number, steps in self.steps.items())
        )
        acceptance = {0: 0.0}
        for number, steps in self.steps.items():
            weight = self.memory.prior_weight
            prior = weight * min(number, quality * typical[number])
            acceptance[number] = (prior + scale * self.accepted[number]) / (weight + scale * steps)
        return acceptance
