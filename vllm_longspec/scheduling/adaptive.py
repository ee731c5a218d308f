# SPDX-License-Identifier: Apache-2.0
"""How many nodes the next step verifies: the number that is worth most, by what has been accepted lately.

A step with K nodes emits 1 + accepted(K) tokens and takes as long as cost(batch size, K, cached tokens) steps without
drafts (`vllm_longspec/scheduling/cost.py`). `AdaptiveVerification` chooses the K of the schedule with the best ratio,
none above the schedule's own for the batch, or K = 0. That is plain decoding: a draft that the target does not follow
is not verified at all, and tried again once in a while.

What K nodes have accepted lately is counted, and counts less with every step. It is joined with a guess, which is all
there is of a K that has not been used: K nodes accept as much as `typical_acceptance` says, times how much better or
worse than that the draft has been at all K. So evidence fades into hope, and nothing is given up for good. Every
`TRIAL`-th step tries a number next to the best one, since on some texts few nodes accept as much as many.

The scheduler decides, from what it has counted and not from clocks: the same requests get the same numbers.
"""

from collections.abc import Callable, Sequence

# Steps after which what was seen counts half.
HALF_LIFE = 256
FADING = 0.5 ** (1 / HALF_LIFE)
# What a guess weighs: that the draft is a typical one, in accepted tokens; and that a K accepts in proportion to the
# others, in requests' steps.
WEIGHT_OF_DRAFT = 2.0
WEIGHT_OF_NUMBER = 8.0
# Steps between trials.
TRIAL = 32


def typical_acceptance(num_nodes: int) -> float:
    """Tokens that the best `num_nodes` nodes of a tree accept in a step; fits what benchmarks/README.md measured."""
    return 2.9 * (1 - (1 + num_nodes) ** -0.5)


class AdaptiveVerification:
    """Stands in the place of the scheduler's table: `budget[batch size]` is the K of the next step.

    Args:
        choices: numbers of nodes that a batch of so many requests may verify; entry 0 is not used.
        cost: of a step in steps without drafts, by requests, nodes of each and cached tokens of all.
        num_cached_tokens: of all requests that decode now.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        cost: Callable[[int, int, int], float],
        num_cached_tokens: Callable[[], int],
    ):
        # By batch size, the least first.
        self.choices = [sorted(numbers) for numbers in choices]
        self.cost = cost
        self.num_cached_tokens = num_cached_tokens
        # By K: requests' steps, and the tokens that they accepted.
        self.steps = {num_nodes: 0.0 for num_nodes in sorted(set().union(*self.choices[1:])) if num_nodes > 0}
        self.accepted = dict.fromkeys(self.steps, 0.0)
        self.num_lookups = 0

    def __getitem__(self, batch_size: int) -> int:
        for num_nodes in self.steps:
            self.steps[num_nodes] *= FADING
            self.accepted[num_nodes] *= FADING
        choices, quality = self.choices[batch_size], self._quality()
        # Large batches have nothing to choose from, and are the ones that take a while to count.
        num_tokens = self.num_cached_tokens() if len(choices) > 1 else 0

        def worth(index: int) -> float:
            """Tokens of a request in the time of a step without drafts."""
            num_nodes = choices[index]
            return (1 + self._acceptance(num_nodes, quality)) / self.cost(batch_size, num_nodes, num_tokens)

        best = max(range(len(choices)), key=worth)
        self.num_lookups += 1
        if self.num_lookups % TRIAL == 0:
            # The next lower and the next higher one by turns. Without nodes there is nothing to see.
            tried = best + (1 if self.num_lookups % (2 * TRIAL) == 0 else -1)
            if 0 < tried < len(choices):
                return choices[tried]
        return choices[best]

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """A request's step had `num_nodes` nodes, of which `num_accepted` were accepted."""
        if num_nodes in self.steps:
            self.steps[num_nodes] += 1
            self.accepted[num_nodes] += num_accepted

    def _quality(self) -> float:
        """How much more than a typical draft's nodes this one's have been accepted."""
        typical = sum(steps * typical_acceptance(number) for number, steps in self.steps.items())
        return (WEIGHT_OF_DRAFT + sum(self.accepted.values())) / (WEIGHT_OF_DRAFT + typical)

    def _acceptance(self, num_nodes: int, quality: float) -> float:
        """Tokens that a request's step with `num_nodes` nodes is expected to accept."""
        if num_nodes == 0:
            return 0.0
        # No more than all of them.
        guess = WEIGHT_OF_NUMBER * min(num_nodes, quality * typical_acceptance(num_nodes))
        return (guess + self.accepted[num_nodes]) / (WEIGHT_OF_NUMBER + self.steps[num_nodes])
