# SPDX-License-Identifier: Apache-2.0
"""The README's plot and table: what each method gains with a trained pair, of reports of `vllm-longspec bench`.

    python -m benchmarks.gains [--temperature 1] [REPORT.json ...]      # prints the table
    python -m benchmarks.gains --write                                  # into README.md and docs/gains.svg

A report is one load, such as a batch size; a row of the table is one of its workloads. Without arguments the reports
are `benchmarks/results/bench-*.json`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import RESULTS, ROOT
from benchmarks.reporting import markdown
from vllm_longspec.bench.methods import VANILLA
from vllm_longspec.bench.plots import bars, check_matplotlib, svg

README = ROOT / "README.md"
PLOT = ROOT / "docs" / "gains.svg"
# What is between these lines is written by `--write`.
BEGIN, END = "<!-- of python -m benchmarks.gains -->", "<!-- end -->"
# As the README names them, in the order of its columns; other methods follow under their own names.
TITLES = {"ngram": "n-gram", "eagle3": "EAGLE-3", "magicdec": "MagicDec", "seq": "GLIDE chain", "tree": "GLIDE tree"}
_NONE = "–"  # noqa: RUF001


class Row(NamedTuple):
    """A workload under a load."""

    workload: str
    load: str
    # By method, as the report has them.
    figures: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        return f"{self.workload}, {self.load}"


def read(path: Path, temperature: float) -> list[Row]:
    """The rows of a report.

    Raises:
        SystemExit: it has none at this temperature, or no plain decoding to compare with.
    """
    report = json.loads(path.read_text())
    settings = report["settings"]
    load = f"{settings['request_rate']:g}/s" if settings["batch"] is None else f"batch {settings['batch']}"
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for each in report["figures"]:
        if each["temperature"] == temperature:
            rows.setdefault(each["workload"], {})[each["method"]] = each
    if not rows:
        raise SystemExit(f"{path} has nothing at temperature {temperature:g}: give another by --temperature")
    for workload, figures in rows.items():
        if VANILLA not in figures:
            raise SystemExit(f"{path} has no {VANILLA} of {workload}, which the others are compared with")
    return [Row(workload.removesuffix(".jsonl"), load, figures) for workload, figures in rows.items()]


def methods_of(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(method for row in rows for method in row.figures if method != VANILLA)
    return [*(name for name in TITLES if name in found), *(name for name in found if name not in TITLES)]


def table(rows: Sequence[Row]) -> str:
    """Speed-up over plain decoding and tokens per step of every method."""
    methods = methods_of(rows)
    lines = [["prompts", "load", "plain decoding, tokens/s per user", *(TITLES.get(name, name) for name in methods)]]
    for row in rows:
        speed = row.figures[VANILLA]["user_tokens_per_second"]
        lines.append([row.workload, row.load, f"{speed:.0f}", *(_cell(row.figures.get(name)) for name in methods)])
    return markdown(lines)


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None or figures["speedup"] is None or figures["tokens_per_step"] is None:
        return _NONE
    return f"{figures['speedup']:.2f}x, {figures['tokens_per_step']:.2f}"


def draw(rows: Sequence[Row]) -> str:
    """An SVG file: speed-ups, a group of bars for each row."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    methods = methods_of(rows)
    colours = {method: f"C{number}" for number, method in enumerate(methods)}
    speedups = {
        (row.label, method): row.figures[method]["speedup"]
        for row in rows
        for method in methods
        if method in row.figures and row.figures[method]["speedup"] is not None
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    bars(axis, [row.label for row in rows], methods, colours, speedups)
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axis.set_ylabel("speed-up over plain decoding")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    handles = [Patch(color=colours[method], label=TITLES.get(method, method)) for method in methods]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)), frameon=False)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg(figure)


def put(text: str, readme: str) -> str:
    """A document with another text between its two marks.

    Raises:
        SystemExit: the marks are not there.
    """
    replaced, count = re.subn(
        rf"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)}\n)", lambda _: text, readme, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"there must be one place between {BEGIN} and {END} in {README.name}, there are {count}")
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="*", metavar="REPORT.json")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--write", action="store_true", help=f"into {README.name} and {PLOT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    reports = arguments.reports or sorted(RESULTS.glob("bench-*.json"))
    if not reports:
        raise SystemExit(f"there is no bench-*.json in {RESULTS.relative_to(ROOT)}: give reports")
    rows = [row for path in reports for row in read(path, arguments.temperature)]
    print(table(rows), end="")
    if arguments.write:
        check_matplotlib()
        PLOT.write_text(draw(rows))
        README.write_text(put(f"![Speed-ups]({PLOT.relative_to(ROOT)})\n\n{table(rows)}", README.read_text()))


if __name__ == "__main__":
    main()
