# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of what `python -m benchmarks.speed` measured.

    python -m benchmarks.speed.report [--out FILE.md] [--plots .data/plots] [RESULTS.jsonl ...]

Of a cell that was measured more than once the last measurement counts, whatever the system's options were. A speedup is
over plain decoding in the same run; where that run has none, it is over the one that the table shows, on the same kind
of GPU, and marked with an asterisk.

Plots need matplotlib: `pip install matplotlib`, or this package's extra `report`.
"""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.reporting import markdown
from benchmarks.speed.records import Record, read
from benchmarks.speed.systems import SYSTEMS

DRAFT_CONTEXTS = (16 * 1024, 128 * 1024, 256 * 1024)

Place = tuple[int, int]  # context, batch


@dataclass
class Comparison:
    """What can be compared: one model on one kind of GPU at one acceptance length and temperature, in engines alike."""

    device: str
    model: str
    temperature: float
    # More arguments of the engine, as JSON.
    engine: str
    acceptance: float | None
    # By system and place; plain decoding among them.
    cells: dict[str, dict[Place, Record]]
    # Plain decoding of every run, by place.
    plain: dict[Place, list[Record]]

    @property
    def title(self) -> str:
        title = f"{self.model}, "
        title += "real acceptance" if self.acceptance is None else f"{self.acceptance:g} tokens a step asked for"
        title += f", temperature {self.temperature:g}" if self.temperature else ""
        title += f", engine {self.engine}" if self.engine != "{}" else ""
        return f"{title}, {self.device}"

    @property
    def systems(self) -> list[str]:
        known = [system for system in SYSTEMS if system in self.cells]
        # Such as default@8 and default@16: by their numbers.
        others = sorted((system for system in self.cells if system not in SYSTEMS), key=lambda name: (len(name), name))
        return known + others

    @property
    def places(self) -> list[Place]:
        return sorted({place for cells in self.cells.values() for place in cells})

    def baseline(self, cell: Record) -> tuple[Record, bool] | None:
        """Plain decoding at the place of a cell, and whether it was measured in the same run."""
        found = [plain for plain in self.plain.get(place_of(cell), []) if is_measured(plain)]
        same_run = [plain for plain in found if plain["run"] == cell["run"]]
        if not found:
            return None
        return (same_run or found)[-1], bool(same_run)

    def speedup(self, cell: Record) -> float | None:
        if not is_measured(cell) or (baseline := self.baseline(cell)) is None:
            return None
        return baseline[0]["ms_per_token"] / cell["ms_per_token"]


def place_of(record: Record) -> Place:
    return record["context"], record["batch"]


def is_measured(record: Record) -> bool:
    return "skipped" not in record


def compare(records: Iterable[Record]) -> list[Comparison]:
    comparisons: dict[tuple[Any, ...], Comparison] = {}
    plain: list[Record] = []
    for record in records:
        if record["kind"] != "cell":
            continue
        if record["system"] == "plain":
            plain.append(record)
            continue
        settings = (*_settings_of(record), record["acceptance"])
        comparison = comparisons.setdefault(settings, Comparison(*settings, {}, {}))
        comparison.cells.setdefault(record["system"], {})[place_of(record)] = record
    # Plain decoding has no acceptance, so it is part of all comparisons of its model. Shown is that of a run with
    # something to compare, if there is one.
    for settings, comparison in comparisons.items():
        runs = {cell["run"] for cells in comparison.cells.values() for cell in cells.values()}
        matching = [record for record in plain if settings[:-1] == _settings_of(record)]
        for record in sorted(matching, key=lambda each: each["run"] in runs):
            comparison.cells.setdefault("plain", {})[place_of(record)] = record
            comparison.plain.setdefault(place_of(record), []).append(record)
    return sorted(
        comparisons.values(),
        key=lambda each: (each.device, each.model, each.acceptance or 0.0, each.temperature, len(each.engine)),
    )


def _settings_of(record: Record) -> tuple[str, str, float, str]:
    """What two measurements must have in common to be compared, but for the acceptance: plain decoding has none."""
    engine = json.dumps(record["engine"], sort_keys=True)
    return record["environment"]["device"], record["model"], record["temperature"], engine


def speedup_table(comparison: Comparison) -> str:
    """Plain decoding's milliseconds a token, and what the others are faster by."""
    others = [system for system in comparison.systems if system != "plain"]
    rows = [["context", "batch", "plain, ms a token", *others]]
    notes: dict[str, None] = {}
    for place in comparison.places:
        found = [cells[place] for cells in comparison.cells.values() if place in cells]
        if not any(map(is_measured, found)):
            reason = found[0]["skipped"]
            notes[f"Skipped by every system: context {place[0]:,}, batch {place[1]} ({reason})."] = None
            continue
        plain = comparison.cells.get("plain", {}).get(place)
        row = [f"{place[0]:,}", str(place[1]), f"{plain['ms_per_token']:.2f}" if plain and is_measured(plain) else ""]
        for system in others:
            cell = comparison.cells[system].get(place)
            if cell is None or (is_measured(cell) and comparison.baseline(cell) is None):
                row.append("")
            elif not is_measured(cell):
                row.append("skipped")
                notes[f"{system} at context {place[0]:,}, batch {place[1]}: {cell['skipped']}."] = None
            else:
                baseline = comparison.baseline(cell)
                assert baseline is not None
                row.append(f"{baseline[0]['ms_per_token'] / cell['ms_per_token']:.2f}x" + "*" * (not baseline[1]))
                if not baseline[1]:
                    notes["\\* Plain decoding was measured in another run."] = None
        rows.append(row)
    return markdown(rows) + "".join(f"\n{note}\n" for note in notes)


def detail_table(comparison: Comparison) -> str:
    """Every cell: times, tokens a step as they were seen, and how many plain steps a step costs."""
    columns = ["context", "batch", "system", "ms a token", "verified", "tokens a step", "ms a step", "in plain steps"]
    looping = any(cell.get("looping") for cells in comparison.cells.values() for cell in cells.values())
    rows = [[*columns, "tokens in loops"] if looping else columns]
    for place in comparison.places:
        for system in comparison.systems:
            cell = comparison.cells[system].get(place)
            if cell is None or not is_measured(cell):
                continue
            baseline = comparison.baseline(cell)
            row = [f"{place[0]:,}", str(place[1]), system, f"{cell['ms_per_token']:.2f}"]
            # Draft tokens that a step verifies; older measurements do not say.
            row.append(f"{cell['drafted_per_step']:g}" if "drafted_per_step" in cell else "")
            row += [f"{cell['tokens_per_step']:.2f}", f"{cell['ms_per_step']:.2f}"]
            row.append(f"{cell['ms_per_step'] / baseline[0]['ms_per_step']:.2f}" if baseline else "")
            rows.append([*row, f"{cell['looping']:.0%}"] if looping else row)
    return markdown(rows)


def memory_table(records: Iterable[Record]) -> str | None:
    """What each draft keeps for a request, as its tensors are, by model and system; None if no draft was measured."""
    rows = [["model", "draft", "bytes a request", "bytes a token"]]
    rows[0] += [f"{context // 1024}k" for context in DRAFT_CONTEXTS]
    seen = set()
    for record in records:
        memory = record.get("draft_memory") or {}
        per_request, per_token = memory.get("bytes_per_request", 0), memory.get("bytes_per_token", 0)
        if not per_request and not per_token:
            continue
        kind = "EAGLE-3" if record["system"] == "eagle3" else "GLIDE"
        if (row := (record["model"], kind, per_request, per_token)) not in seen:
            seen.add(row)
            at_contexts = [f"{(per_request + per_token * context) / 2**20:.1f} MiB" for context in DRAFT_CONTEXTS]
            rows.append([record["model"], kind, f"{per_request:,}", f"{per_token:,}", *at_contexts])
    return markdown(rows) if seen else None


def start_table(records: Iterable[Record]) -> str | None:
    """Seconds from the arguments of an engine to one that takes requests, by model and system, of all engines.

    The first start of a model compiles it, and of a draft it times its steps; later ones find both in vLLM's cache.
    """
    starts: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for record in records:
        # None where other engines started at the same time.
        if record.get("start_seconds") is not None:
            engine = record["run"], json.dumps([record["engine"], record["options"], record["start_seconds"]])
            place = record["environment"]["device"], record["model"], record["system"]
            starts.setdefault(place, {})[engine] = record["start_seconds"]
    rows = [["device", "model", "system", "engines", "shortest start, s", "longest, s"]]
    for place, seconds in starts.items():
        rows.append([*place, f"{len(seconds)}", f"{min(seconds.values()):.0f}", f"{max(seconds.values()):.0f}"])
    return markdown(rows) if starts else None


def cross_check_table(records: Iterable[Record]) -> str | None:
    rows = [["benchmark", "cell", "benchmark, ms", "measured, ms", "difference"]]
    for record in records:
        if record["kind"] == "cross_check":
            cell = f"{record['model']} {record['system']}, context {record['context']:,}, batch {record['batch']}"
            theirs, ours = record["benchmark_ms"], record["measured_ms"]
            rows.append(
                [f"vllm bench {record['benchmark']}", cell, f"{theirs}", f"{ours}", f"{theirs / ours - 1:+.1%}"]
            )
    return markdown(rows) if len(rows) > 1 else None


def environment_table(records: Iterable[Record]) -> str:
    environments: dict[tuple[str, ...], None] = {}
    names: list[str] = []
    for record in records:
        names = list(record["environment"])
        environments[tuple(record["environment"].values())] = None
    return markdown([names, *map(list, environments)])


def report(records: list[Record]) -> str:
    parts = ["# Measured speed\n", environment_table(records)]
    for comparison in compare(records):
        parts += [f"\n## {comparison.title}\n", speedup_table(comparison), detail_table(comparison)]
    if (table := memory_table(records)) is not None:
        parts += ["\n## What a draft keeps for a request\n", table]
    if (table := start_table(records)) is not None:
        parts += ["\n## Start-up\n", table]
    if (table := cross_check_table(records)) is not None:
        parts += ["\n## vLLM's own benchmarks\n", table]
    return "\n".join(parts)


def plot(comparison: Comparison, path: Path) -> None:
    """Speedup over context, a line for each system and a panel for each batch size."""
    import matplotlib

    matplotlib.use("svg")
    # Small files, and the same one for the same results.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "longspec"})
    from matplotlib import pyplot

    batches = sorted({batch for _, batch in comparison.places})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(3.2 * len(batches), 3.2), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for system in comparison.systems:
            points = [
                (context, speedup)
                for (context, size), cell in sorted(comparison.cells[system].items())
                if size == batch and (speedup := comparison.speedup(cell)) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=system)
        axis.set_xscale("log", base=2)
        contexts = sorted({context for context, _ in comparison.places})
        axis.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
        axis.minorticks_off()
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("context")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speedup over plain decoding")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(comparison.title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=[RESULTS / "speed.jsonl"], metavar="RESULTS.jsonl")
    parser.add_argument("--out", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write an SVG for each comparison")
    arguments = parser.parse_args()
    records = read(arguments.results)
    if not records:
        parser.error(f"there are no results in {', '.join(map(str, arguments.results))}")
    text = report(records)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for comparison in compare(records):
            parts = [comparison.model, "real" if comparison.acceptance is None else f"{comparison.acceptance:g}"]
            parts += [f"t{comparison.temperature:g}"] if comparison.temperature else []
            parts += re.findall(r"\w+", comparison.engine)
            plot(comparison, arguments.plots / f"speed-{'-'.join(parts)}.svg")


if __name__ == "__main__":
    main()
