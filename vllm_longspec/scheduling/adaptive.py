# SPDX-License-Identifier: Apache-2.0
"""Adaptive verification: the number of nodes K with the highest expected tokens per unit of cost.

A step with K nodes emits 1 + accepted(K) tokens and costs cost(batch size, K, cached tokens) steps of plain decoding
(`vllm_longspec/scheduling/cost.py`). K is one of the schedule's numbers, at most the batch's own, or 0, which is plain
decoding.

accepted(K) is estimated from counts that decay with every step and from a prior: `typical_acceptance(K)` times the
draft's quality, its acceptance relative to the typical one over all K. Counts decay towards the prior, so a K that did
badly is tried again. Every `TRIAL_INTERVAL`-th step tries a neighbour of the best K, since on some texts few nodes
accept as much as many. All is computed from counts, not from clocks, so runs are repeatable.
"""

from collections.abc import Callable, Sequence

# Steps after which a count has half its weight.
HALF_LIFE = 256
DECAY = 0.5 ** (1 / HALF_LIFE)
# Weights of the priors: of the draft's quality in accepted tokens, of a K's acceptance in steps of a request.
QUALITY_PRIOR_WEIGHT = 2.0
ACCEPTANCE_PRIOR_WEIGHT = 8.0
# Steps between trials.
TRIAL_INTERVAL = 32


def typical_acceptance(num_nodes: int) -> float:
    """Accepted tokens per step of the best `num_nodes` nodes of a tree; fitted to benchmarks/README.md."""
    return 2.9 * (1 - (1 + num_nodes) ** -0.5)


class AdaptiveVerification:
    """Replaces the scheduler's lookup table: entry `batch_size` is the K of the next step.

    Args:
        choices: numbers of nodes to choose from, by batch size; entry 0 is not used.
        cost: (requests, nodes per request, cached tokens of all) -> cost of a step in steps of plain decoding.
        num_cached_tokens: returns the cached tokens of all decoding requests.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        cost: Callable[[int, int, int], float],
        num_cached_tokens: Callable[[], int],
    ):
        # Ascending, so that the neighbours of a choice are the ones to try.
        self.choices = [sorted(numbers) for numbers in choices]
        self.cost = cost
        self.num_cached_tokens = num_cached_tokens
        # K -> steps summed over requests, and their accepted tokens; both decayed
        self.steps = {num_nodes: 0.0 for num_nodes in sorted(set().union(*self.choices[1:])) if num_nodes > 0}
        self.accepted = dict.fromkeys(self.steps, 0.0)
        self.num_lookups = 0

    def __getitem__(self, batch_size: int) -> int:
        for num_nodes in self.steps:
            self.steps[num_nodes] *= DECAY
            self.accepted[num_nodes] *= DECAY
        choices, quality = self.choices[batch_size], self._quality()
        # Counting is slow for large batches, which often have a single choice.
        num_tokens = self.num_cached_tokens() if len(choices) > 1 else 0

        def throughput(index: int) -> float:  # tokens per request in the time of a step of plain decoding
            num_nodes = choices[index]
            return (1 + self._acceptance(num_nodes, quality)) / self.cost(batch_size, num_nodes, num_tokens)

        best = max(range(len(choices)), key=throughput)
        self.num_lookups += 1
        if self.num_lookups % TRIAL_INTERVAL == 0:
            # The next lower and the next higher one alternately; K = 0 (index 0) has nothing to observe.
            tried = best + (1 if self.num_lookups % (2 * TRIAL_INTERVAL) == 0 else -1)
            if 0 < tried < len(choices):
                return choices[tried]
        return choices[best]

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts a request's step with `num_nodes` nodes, of which `num_accepted` were accepted."""
        if num_nodes in self.steps:
            self.steps[num_nodes] += 1
            self.accepted[num_nodes] += num_accepted

    def _quality(self) -> float:
        """Accepted tokens relative to those of a typical draft."""
        typical = sum(steps * typical_acceptance(number) for number, steps in self.steps.items())
        return (QUALITY_PRIOR_WEIGHT + sum(self.accepted.values())) / (QUALITY_PRIOR_WEIGHT + typical)

    def _acceptance(self, num_nodes: int, quality: float) -> float:
        """Expected accepted tokens of a request's step with `num_nodes` nodes."""
        if num_nodes == 0:
            return 0.0
        prior = ACCEPTANCE_PRIOR_WEIGHT * min(num_nodes, quality * typical_acceptance(num_nodes))
        return (prior + self.accepted[num_nodes]) / (ACCEPTANCE_PRIOR_WEIGHT + self.steps[num_nodes])
