# SPDX-License-Identifier: Apache-2.0
"""Small models repeat themselves under greedy decoding, which is easy to draft: where a text begins to."""

MAX_LOOP_PERIOD = 64


def loop_start(tokens: list[int]) -> int:
    """Where a continuation starts to repeat itself until its end: at least three times and over at least 24 tokens.

    Its length if it does not.
    """
    start = len(tokens)
    for period in range(1, MAX_LOOP_PERIOD + 1):
        first = len(tokens)
        while first > period and tokens[first - 1] == tokens[first - 1 - period]:
            first -= 1
        if len(tokens) - (first - period) >= max(3 * period, 24):
            start = min(start, first - period)
    return start
