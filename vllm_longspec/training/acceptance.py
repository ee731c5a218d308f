# SPDX-License-Identifier: Apache-2.0
"""What steps accept, in plain numbers: tokens a step by context, output position and depth, and how sure they are."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_longspec.training.continuations import Bucket, Part
from vllm_longspec.training.predict import Steps

# Where ranges of output positions begin.
OUTPUT_POSITIONS = (0, 64, 256, 1024, 4096)


class Sum(NamedTuple):
    """Of a part's steps."""

    steps: int
    tokens: int  # emitted

    @classmethod
    def of(cls, accepted: Sequence[int]) -> "Sum":
        return cls(len(accepted), len(accepted) + sum(accepted))


class Comparison(NamedTuple):
    """The walk's tokens a step over the engine's, less 1."""

    walk: float
    engine: float
    difference: float
    standard_error: float | None  # of the difference; None of a single part
    engine_steps: int
    steps_needed: int | None  # of the engine, for a standard error of half the tolerance
    verdict: str  # "agree", "differ", or "too few steps"


def tokens_per_step(sums: Sequence[Sum]) -> float:
    return sum(each.tokens for each in sums) / sum(each.steps for each in sums)


def jackknife(parts: int, value: Callable[[list[int]], float]) -> float | None:
    """Standard error of a value of independent parts, from what it is without each; None of fewer than two."""
    if parts < 2:
        return None
    left_out = [value([part for part in range(parts) if part != other]) for other in range(parts)]
    mean = sum(left_out) / parts
    return math.sqrt((parts - 1) / parts * sum((each - mean) ** 2 for each in left_out))


def standard_error(sums: Sequence[Sum]) -> float | None:
    return jackknife(len(sums), lambda kept: tokens_per_step([sums[part] for part in kept]))


def compare(walked: Sequence[Sum], served: Sequence[Sum], tolerance: float) -> Comparison:
    """Whether the two agree, by the same parts.

    Steps of one text are alike, so texts are what is counted: a difference beyond the tolerance may be chance unless it
    is also twice its standard error, which is zero where both took the same steps.
    """

    def difference(kept: Sequence[int]) -> float:
        return tokens_per_step([walked[part] for part in kept]) / tokens_per_step([served[part] for part in kept]) - 1

    found = difference(range(len(walked)))
    error = jackknife(len(walked), difference)
    engine_steps = sum(each.steps for each in served)
    needed = None if error is None else math.ceil(engine_steps * (2 * error / tolerance) ** 2)
    verdict = "agree"
    if abs(found) > tolerance:
        verdict = "differ" if error is not None and abs(found) > 2 * error else "too few steps"
    return Comparison(tokens_per_step(walked), tokens_per_step(served), found, error, engine_steps, needed, verdict)


def by_depth(accepted: Sequence[int], reach: int) -> list[float | None]:
    """Of steps that accepted a node at the depth before, the share that accepted one at this depth, from 1 on."""
    reached = [sum(number >= depth for number in accepted) for depth in range(reach + 1)]
    return [further / before if before else None for before, further in itertools.pairwise(reached)]


def by_output_position(steps: Sequence[Steps]) -> list[dict[str, Any]]:
    """Tokens a step by the root's index in its answer, for the ranges that have some."""
    found = []
    for start, end in zip(OUTPUT_POSITIONS, (*OUTPUT_POSITIONS[1:], math.inf), strict=True):
        accepted = [
            number
            for each in steps
            for root, number in zip(each.roots, each.accepted, strict=True)
            if start <= root < end
        ]
        if accepted:
            found.append(
                {"from": start, "steps": len(accepted), "tokens_per_step": Sum.of(accepted).tokens / len(accepted)}
            )
    return found


def summary(steps: Sequence[Steps], bucket: Bucket, reach: int) -> dict[str, Any]:
    """One bucket's figures at one temperature."""
    sums = [Sum.of(each.accepted) for each in steps]
    accepted = [number for each in steps for number in each.accepted]
    contexts = [context_of(each.part, root) for each in steps for root in each.roots]
    return {
        "context": bucket.name,
        "parts": len(steps),
        "steps": len(accepted),
        "mean_context": round(sum(contexts) / len(contexts)),
        "tokens_per_step": tokens_per_step(sums),
        "standard_error": standard_error(sums),
        "acceptance_by_depth": by_depth(accepted, reach),
        "by_output_position": by_output_position(steps),
    }


def context_of(part: Part, root: int) -> int:
    """Tokens before a root, which is counted from its answer's first token."""
    return part.start - part.output_position + root


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def describe(result: dict[str, Any]) -> str:
    """The figures of one temperature as text."""
    contexts = result["contexts"]
    depths = range(max(len(each["acceptance_by_depth"]) for each in contexts))
    # Copies reach further than a line is wide.
    shown = [depth for depth in depths if depth < 8]
    rows = [["context", "mean", "parts", "steps", "tokens/step", "+-", *(f"depth {depth + 1}" for depth in shown)]]
    for each in contexts:
        shares = [number(each["acceptance_by_depth"][depth]) for depth in shown]
        counts = [str(each[name]) for name in ("mean_context", "parts", "steps")]
        rows.append(
            [each["context"], *counts, number(each["tokens_per_step"]), number(each["standard_error"]), *shares]
        )
    parts = [
        f"Temperature {result['temperature']:g}: tokens a step, and acceptance at each depth that is reached",
        table(rows),
    ]
    starts = sorted({each["from"] for context in contexts for each in context["by_output_position"]})
    rows = [["context", *(f"from token {start}" for start in starts)]]
    for context in contexts:
        found = {each["from"]: each["tokens_per_step"] for each in context["by_output_position"]}
        rows.append([context["context"], *(number(found.get(start)) for start in starts)])
    parts += ["By position in the answer:", table(rows)]
    if "engine" in result:
        rows = [["context", "walk", "engine", "difference", "+-", "engine's steps", "result"]]
        for context in (*contexts, {"context": "all", "engine": result["engine"]}):
            each = Comparison(**context["engine"])
            error = "-" if each.standard_error is None else f"{each.standard_error:.1%}"
            verdict = each.verdict
            if verdict == "too few steps" and each.steps_needed is not None:
                verdict = f"{verdict}, about {each.steps_needed} are needed"
            rows.append(
                [
                    context["context"],
                    number(each.walk),
                    number(each.engine),
                    f"{each.difference:+.1%}",
                    error,
                    str(each.engine_steps),
                    verdict,
                ]
            )
        parts += ["The walk and the engine:", table(rows)]
    return "\n\n".join(parts)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens a step over the context, and acceptance over depth, a line for each temperature.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    # Small files, and the same one for the same results.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "longspec"})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for result in results:
        contexts = result["contexts"]
        label = f"temperature {result['temperature']:g}"
        places = [each["mean_context"] for each in contexts]
        errors = [2 * (each["standard_error"] or 0.0) for each in contexts]
        line = left.errorbar(places, [each["tokens_per_step"] for each in contexts], errors, marker="o", label=label)
        served = [(each["mean_context"], each["engine"]["engine"]) for each in contexts if "engine" in each]
        if served:
            left.plot(
                *zip(*served, strict=True),
                linestyle="none",
                marker="x",
                markersize=9,
                zorder=3,
                color=line[0].get_color(),
                label=f"{label}, engine",
            )
        for each, style in zip(contexts, ("-", "--", ":", "-.") * len(contexts), strict=False):
            shares = [share for share in each["acceptance_by_depth"] if share is not None]
            right.plot(
                range(1, len(shares) + 1),
                shares,
                linestyle=style,
                color=line[0].get_color(),
                marker=".",
                label=f"{each['context']}, {label}",
            )
    left.set_xscale("log")
    left.set_xticks([each["mean_context"] for each in results[0]["contexts"]])
    left.set_xticklabels([each["context"] for each in results[0]["contexts"]])
    left.minorticks_off()
    left.set(xlabel="context, at its mean", ylabel="tokens per step", ylim=(0, None))
    right.set(xlabel="depth", ylabel="accepted where reached", ylim=(0, 1.02))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)
