# SPDX-License-Identifier: Apache-2.0
"""Figures of what was measured."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_longspec.bench.cells import Answer, Cell
from vllm_longspec.bench.methods import VANILLA, draws_as_vanilla

# Parts that an answer is looked at in, by position.
_PARTS = 8


@dataclass
class Figures:
    """Of a cell. What could not be measured is None."""

    method: str
    workload: str
    temperature: float
    # What decides whether two figures can be compared, and what may explain how they differ.
    prompts_digest: str
    environment: dict[str, str]
    speculative_config: dict[str, Any] | None
    num_prompts: int
    prompt_tokens: int  # of the prompt in the middle
    output_tokens: int
    tokens_per_step: float | None
    # Share of the steps of which a node at depth 1, 2, ... was accepted, whether the answer had room for it or not.
    by_depth: list[float]
    # Position of the first token of a part of the answers -> tokens per step there.
    by_position: dict[int, float]
    # Number of draft tokens verified -> its share of the steps.
    drafted: dict[int, float]
    user_tokens_per_second: float | None  # after the first token, of a request
    tokens_per_second: float  # of all requests, from the first to the last
    ttft_ms: tuple[float, float]  # p50, p99
    tpot_ms: tuple[float, float]
    speedup: float | None  # of user_tokens_per_second over vanilla's, on the same machine with the same versions
    # Answers that are vanilla's token for token, of how many, and the first token that is not, from 1, of each other.
    # None where they need not be: vLLM's own methods draw other tokens at temperatures above 0.
    identical: int | None
    compared: int | None
    first_differences: list[int]


def figures_of(cell: Cell, vanilla: Cell | None, output_len: int) -> Figures:
    """The figures of a cell.

    Args:
        vanilla: plain decoding of the same workload at the same temperature, if it was measured.
        output_len: the most tokens of an answer, which is divided into the same parts for all cells.
    """
    steps = _steps(cell)
    speed = _user_tokens_per_second(cell)
    figures = Figures(
        method=cell.key.method,
        workload=cell.key.workload,
        temperature=cell.key.temperature,
        prompts_digest=cell.prompts,
        environment=cell.environment,
        speculative_config=cell.speculative_config,
        num_prompts=len(cell.answers),
        prompt_tokens=round(statistics.median(cell.result["input_lens"])),
        output_tokens=cell.result["total_output_tokens"],
        tokens_per_step=_tokens_per_step(cell),
        by_depth=_by_depth(cell),
        by_position=_by_position(steps, output_len),
        drafted=_shares(cell),
        user_tokens_per_second=speed,
        tokens_per_second=cell.result["output_throughput"],
        ttft_ms=(cell.result["median_ttft_ms"], cell.result["p99_ttft_ms"]),
        tpot_ms=(cell.result["median_tpot_ms"], cell.result["p99_tpot_ms"]),
        speedup=None,
        identical=None,
        compared=None,
        first_differences=[],
    )
    # What follows compares like with like only.
    if vanilla is None or vanilla.prompts != cell.prompts or vanilla is cell:
        return figures
    plain = _user_tokens_per_second(vanilla)
    if speed is not None and plain is not None and cell.environment == vanilla.environment:
        figures.speedup = speed / plain
    if cell.key.temperature > 0 and not draws_as_vanilla(cell.speculative_config):
        return figures
    differences = [
        _first_difference(ours.token_ids, theirs.token_ids)
        for ours, theirs in zip(cell.answers, vanilla.answers, strict=True)
    ]
    figures.identical = differences.count(None)
    figures.compared = len(differences)
    figures.first_differences = [each for each in differences if each is not None]
    return figures


def all_figures(cells: Sequence[Cell], output_len: int) -> list[Figures]:
    plain = {cell.key[1:]: cell for cell in cells if cell.key.method == VANILLA}
    return [figures_of(cell, plain.get(cell.key[1:]), output_len) for cell in cells]


def _user_tokens_per_second(cell: Cell) -> float | None:
    """Of a request while it decodes: tokens after the first over the time after the first, of all requests."""
    tokens = sum(max(length - 1, 0) for length in cell.result["output_lens"])
    pairs = zip(cell.result["latencies"], cell.result["ttfts"], strict=True)
    seconds = sum(latency - ttft for latency, ttft in pairs)
    return tokens / seconds if tokens and seconds > 0 else None


def _emitted(answer: Answer) -> int:
    """Tokens of all steps: the first is the prompt's."""
    return max(len(answer.token_ids) - 1, 0)


def _taken(answer: Answer) -> list[int]:
    """Accepted tokens of each step with draft tokens that are in the answer.

    The last step may accept more than an answer takes before it ends. Every chunk after the first has a step or more,
    so what is over, if there were no more steps than that, was not taken.
    """
    accepted = list(answer.accepted or ())
    if accepted:
        least = max(len(accepted), len(answer.chunks) - 1)
        over = sum(accepted) + least - _emitted(answer)
        accepted[-1] -= min(accepted[-1], max(over, 0))
    return accepted


def _undrafted(answer: Answer) -> int:
    """Steps of a request without draft tokens, which its metrics leave out."""
    taken = _taken(answer)
    return max(0, _emitted(answer) - sum(taken) - len(taken))


def _tokens_per_step(cell: Cell) -> float | None:
    if not cell.is_speculative:
        # Of a server that is not ours it is not known whether it speculates without saying so.
        return 1.0 if cell.key.method == VANILLA else None
    known = [answer for answer in cell.answers if answer.accepted is not None]
    if not known:
        return _by_counters(cell)
    steps = sum(len(answer.accepted or ()) + _undrafted(answer) for answer in known)
    return sum(_emitted(answer) for answer in known) / steps if steps else None


def _by_counters(cell: Cell) -> float | None:
    """Tokens per step where the server counts, but not by request."""
    if "spec_decode_accepted_tokens" not in cell.result:
        return None
    emitted = sum(_emitted(answer) for answer in cell.answers)
    # A step emits one token that was not drafted. Of those accepted, the last steps' may not have been taken.
    steps = max(emitted - cell.result["spec_decode_accepted_tokens"], cell.result["spec_decode_num_drafts"])
    return emitted / steps if emitted and steps else None


def _by_depth(cell: Cell) -> list[float]:
    """Over the steps that had draft tokens, as vLLM counts."""
    accepted = Counter(itertools.chain.from_iterable(answer.accepted or () for answer in cell.answers))
    total = sum(accepted.values())
    if not total:
        return cell.result.get("spec_decode_per_position_acceptance_rates", []) if cell.is_speculative else []
    deepest = max(accepted)
    return [
        sum(count for depth, count in accepted.items() if depth >= least) / total for least in range(1, deepest + 1)
    ]


def _shares(cell: Cell) -> dict[int, float]:
    drafted: Counter[int] = Counter()
    for answer in cell.answers:
        if answer.drafted is not None:
            drafted.update(answer.drafted)
            drafted[0] += _undrafted(answer)
    total = sum(drafted.values())
    return {number: count / total for number, count in sorted(drafted.items()) if count}


def _steps(cell: Cell) -> Iterator[tuple[int, int]]:
    """(position of its first token in the answer, tokens) of every step after the prompt's."""
    if not cell.is_speculative and cell.key.method != VANILLA:
        return
    for answer in cell.answers:
        if answer.accepted is not None and not _undrafted(answer):
            position, tokens = 1, [1 + accepted for accepted in _taken(answer)]
        elif answer.chunks:
            # Where a step's place among those with draft tokens is not known: a chunk of the stream is a step, unless
            # the server was so busy that it sent several as one.
            position, *tokens = answer.chunks
        else:
            continue
        for number in tokens:
            yield position, number
            position += number


def _by_position(steps: Iterator[tuple[int, int]], output_len: int) -> dict[int, float]:
    width = -(-output_len // _PARTS)
    parts: dict[int, list[int]] = {}
    for position, tokens in steps:
        parts.setdefault(position // width * width, []).append(tokens)
    return {start: statistics.fmean(tokens) for start, tokens in sorted(parts.items())}


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first token in which two answers differ, from 1; None if they are the same."""
    for number, (left, right) in enumerate(zip(one, other, strict=False), start=1):
        if left != right:
            return number
    return None if len(one) == len(other) else min(len(one), len(other)) + 1
