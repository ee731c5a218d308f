# SPDX-License-Identifier: Apache-2.0
"""The plot of a report: speed-up, tokens per step, acceptance by depth and by position, as an SVG."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vllm_longspec.bench.figures import Figures
from vllm_longspec.bench.methods import VANILLA


def check_matplotlib() -> None:
    """Raises ValueError if there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report's plot needs matplotlib: pip install 'vllm-longspec[bench]'")


def draw(figures: Sequence[Figures]) -> str:
    """An `svg` element of all methods and workloads at one temperature, which refers to nothing outside itself."""
    # Of its own, not pyplot's: pyplot's settings are the whole process's.
    import matplotlib
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(each.workload for each in figures))
    methods = list(dict.fromkeys(each.method for each in figures))
    colours = {method: f"C{number}" for number, method in enumerate(methods)}
    figure = Figure(figsize=(11, 7), layout="constrained")
    ((speed, steps), (depth, position)) = figure.subplots(2, 2)

    has_speedup = any(each.speedup is not None for each in figures)
    speeds = {
        (each.workload, each.method): each.speedup if has_speedup else each.user_tokens_per_second
        for each in figures
        if not has_speedup or each.speedup is not None
    }
    bars(speed, workloads, methods, colours, speeds)
    speed.set_title("speed-up over vanilla" if has_speedup else "tokens/s per user")
    if has_speedup:
        speed.axhline(1.0, color="black", linewidth=1, linestyle="--")
    tokens = {(each.workload, each.method): each.tokens_per_step for each in figures if each.method != VANILLA}
    bars(steps, workloads, methods, colours, tokens)
    steps.set_title("tokens per step")

    for method in methods:
        own = [each for each in figures if each.method == method and method != VANILLA]
        deepest = max((len(each.by_depth) for each in own), default=0)
        if deepest:
            shares = [
                fmean(each.by_depth[index] if index < len(each.by_depth) else 0.0 for each in own)
                for index in range(deepest)
            ]
            depth.plot(range(1, deepest + 1), shares, marker="o", markersize=3, color=colours[method])
        for each in own:
            if each.by_position:
                position.plot(list(each.by_position), list(each.by_position.values()), color=colours[method], alpha=0.7)
    depth.set_title("share of steps accepting a depth, mean of workloads")
    depth.set_xlabel("depth")
    depth.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    position.set_title("tokens per step by position, a line per workload")
    position.set_xlabel("output token")
    for axis in (speed, steps, depth, position):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    # Speed-ups, tokens per step and acceptance have nothing of vanilla.
    named = [method for method in methods if method != VANILLA or not has_speedup]
    handles = [matplotlib.patches.Patch(color=colours[method], label=method) for method in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)))

    return svg(figure)


def svg(figure: Any) -> str:
    """An `svg` element of a figure of matplotlib's, the same for the same figure."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    # Small files, and the same one for the same results.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longspec"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(text, metadata=nothing)
    # Without the declaration and the document type, which a page cannot hold.
    return text.getvalue()[text.getvalue().index("<svg") :]


def bars(
    axis: Any,
    workloads: Sequence[str],
    methods: Sequence[str],
    colours: Mapping[str, str],
    values: Mapping[tuple[str, str], float | None],
) -> None:
    """Groups of bars: a group for each workload, a bar for each method."""
    shown = [method for method in methods if any((workload, method) in values for workload in workloads)]
    width = 0.8 / max(1, len(shown))
    for index, method in enumerate(shown):
        heights = [values.get((workload, method)) or 0.0 for workload in workloads]
        places = [number + (index - (len(shown) - 1) / 2) * width for number in range(len(workloads))]
        bars = axis.bar(places, heights, width, color=colours[method])
        axis.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7)
    axis.set_xticks(range(len(workloads)), workloads)
    # Room beside a single group, and above the bars for their labels.
    axis.set_xlim(-0.8, len(workloads) - 0.2)
    axis.margins(y=0.1)
