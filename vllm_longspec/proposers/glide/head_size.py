# SPDX-License-Identifier: Apache-2.0
"""How many tokens a head that learns them has room for: as many as make a token cheapest to decode.

A smaller head is read faster by each level, and now and then the next token has no row. What that costs was measured
with texts whose language changes, in a vocabulary of 131,072 tokens (docs/performance.md#a-head-that-learns).
"""

from typing import TYPE_CHECKING

from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.proposers.glide.cost import LEVEL, GlideCost
from vllm_longspec.targets.families import target_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Share of the tokens per step that is lost by number of tokens: the most in any window of steps from the 200th on after
# the texts change, of all kinds of texts (benchmarks/results/learned-head.json).
LOST = {32768: 0.070, 49152: 0.032, 65536: 0.015}
# No more may be lost, whatever is gained: what is lost depends on the texts.
MAX_LOST = 0.02
# Less is not worth a head of its own.
MIN_GAIN = 0.01
MIN_HEAD_SIZE = 16


def choose_head_size(target: "PretrainedConfig", vocab_size: int, num_ranks: int) -> int | None:
    """The size of a head that learns, for one request with a short context; None if the whole vocabulary is best."""
    plain = target_weights(target, vocab_size, num_ranks)

    def time(size: int) -> float:
        # Of a quantised draft, whose head takes less of the time.
        cost = GlideCost.of_shape(target, draft_vocab_size=size, num_ranks=num_ranks, is_quantised=True)
        return plain + len(DEFAULT_LEVELS) * (LEVEL + cost.level)

    # By time per token.
    times = {size: time(size) / (1 - lost) for size, lost in LOST.items() if size < vocab_size and lost <= MAX_LOST}
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - MIN_GAIN) * time(vocab_size) else None
