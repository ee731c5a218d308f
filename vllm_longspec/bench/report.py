# SPDX-License-Identifier: Apache-2.0
"""The report of a run: report.json, report.md, a plot for each temperature, and report.html, which holds all of it."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_longspec.bench.figures import Figures
from vllm_longspec.bench.plots import draw
from vllm_longspec.bench.tables import html_table, markdown
from vllm_longspec.training.generate import write_atomically

REPORT = "report.json"
_NONE = "–"  # noqa: RUF001
# Settings that two runs must share to be compared.
_COMPARABLE = ("target", "output_len", "ignore_eos", "batch", "request_rate", "seed")
# The rarest numbers of draft tokens are counted together.
_NAMED_NUMBERS = 4
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 86rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.plot { background: #fff; border-radius: 6px; overflow-x: auto; }
.plot svg { display: block; height: auto; margin: auto; max-width: 100%; min-width: 42rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Baseline:
    """Another run, and its name."""

    name: str
    settings: dict[str, Any]
    figures: list[dict[str, Any]]

    def check(self, settings: dict[str, Any]) -> None:
        """Raises ValueError if a run with these settings was asked for something else."""
        for name in _COMPARABLE:
            if settings.get(name) != self.settings.get(name):
                raise ValueError(
                    f"--baseline {self.name} was measured with {name} {json.dumps(self.settings.get(name))}, not "
                    f"{json.dumps(settings.get(name))}: give the same, or leave --baseline out"
                )


@dataclass
class Report:
    """A run and its figures.

    Args:
        settings: of the run.
        environments: the machine and versions; more than one if the run was resumed elsewhere.
        prompts: a line for each workload, of what it consists and what was left out.
        figures: of all cells.
        baseline: another run, measured with settings that `Baseline.check` takes.
    """

    settings: dict[str, Any]
    environments: list[dict[str, str]]
    prompts: list[str]
    figures: list[Figures]
    baseline: Baseline | None

    def write(self, folder: Path) -> list[Path]:
        """Writes all files, and returns them."""
        plots = {temperature: draw(self._at(temperature)) for temperature in self.temperatures}
        files = {
            REPORT: json.dumps(self._as_json(), indent=2) + "\n",
            "report.md": self.as_markdown(),
            **{_plot_name(temperature): svg for temperature, svg in plots.items()},
            "report.html": self.as_html(plots),
        }
        for name, text in files.items():
            write_atomically(folder / name, text)
        return [folder / name for name in files]

    @property
    def temperatures(self) -> list[float]:
        return sorted({figures.temperature for figures in self.figures})

    def _at(self, temperature: float) -> list[Figures]:
        return [figures for figures in self.figures if figures.temperature == temperature]

    def _as_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "environments": self.environments,
            "prompts": self.prompts,
            "figures": [asdict(figures) for figures in self.figures],
        }

    def _sections(self, figures: list[Figures]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Titles, notes and tables of one temperature; none without a row or a note."""
        makers: list[tuple[str, Callable[[list[Figures]], list[list[str]]]]] = [
            ("Speed", self._speeds),
            ("Accepted by depth, share of the steps with draft tokens", _depths),
            ("Tokens per step by position in the output", _positions),
            ("Draft tokens verified, share of the steps", _drafted),
        ]
        for title, make in makers:
            rows = make(figures)
            if len(rows) > 1:
                yield title, [], rows
        if self.baseline is not None:
            notes, rows = self._compared(self.baseline, figures)
            if notes or len(rows) > 1:
                yield f"Compared with {self.baseline.name}", notes, rows

    def _speeds(self, figures: Sequence[Figures]) -> list[list[str]]:
        """With the number of a row's machine and versions, if there are several."""
        rows = _speeds(figures)
        if len(self.environments) > 1:
            rows[0].append("measured on")
            for row, each in zip(rows[1:], figures, strict=True):
                row.append(str(1 + self.environments.index(each.environment)))
        return rows

    def _compared(self, baseline: Baseline, figures: list[Figures]) -> tuple[list[str], list[list[str]]]:
        """What differs between the runs, and the figures of both."""
        before = {(each["method"], each["workload"], each["temperature"]): each for each in baseline.figures}
        notes = _differences(self.settings, baseline.settings)
        rows = [["workload", "method", "tokens/s per user", "before", "ratio", "tokens per step", "before"]]
        for each in figures:
            other = before.get((each.method, each.workload, each.temperature))
            if other is None:
                continue
            if other.get("prompts_digest") != each.prompts_digest:
                notes.append(f"{each.method} on {each.workload} is left out: its prompts are others")
                continue
            notes += _differences(each.environment, other["environment"])
            if each.speculative_config != other["speculative_config"]:
                notes += _differences(
                    {each.method: each.speculative_config}, {each.method: other["speculative_config"]}
                )
            now, then = each.user_tokens_per_second, other["user_tokens_per_second"]
            ratio = now / then if now is not None and then is not None else None
            rows.append(
                [
                    *(each.workload, each.method, _number(now, 1), _number(then, 1), _times(ratio)),
                    *(_number(each.tokens_per_step, 2), _number(other["tokens_per_step"], 2)),
                ]
            )
        return list(dict.fromkeys(notes)), rows

    def _facts(self) -> Iterator[tuple[str, str]]:
        for number, environment in enumerate(self.environments, start=1):
            which = f"Measured on ({number})" if len(self.environments) > 1 else "Measured on"
            yield which, ", ".join(f"{name} {value}" for name, value in environment.items())
        for name, value in self.settings.items():
            if value is not None and name != "workloads":
                yield name.replace("_", " "), value if isinstance(value, str) else json.dumps(value)
        for line in self.prompts:
            yield "Prompts", line

    def as_markdown(self) -> str:
        parts = [f"# {self._title}\n"]
        for temperature in self.temperatures:
            parts.append(f"## Temperature {temperature:g}\n")
            parts.append(f"![Speed and acceptance]({_plot_name(temperature)})\n")
            for title, notes, rows in self._sections(self._at(temperature)):
                said = "".join(f"- {note}\n" for note in notes)
                parts += [f"### {title}\n", *([said] if notes else ()), *([markdown(rows)] if len(rows) > 1 else ())]
        parts.append("## Set-up\n")
        parts.append("".join(f"- {name}: {value}\n" for name, value in self._facts()))
        parts.append(_EXPLANATION + "\n")
        return "\n".join(parts)

    def as_html(self, plots: dict[float, str]) -> str:
        """One page that needs nothing else.

        Args:
            plots: SVG by temperature.
        """
        title = html.escape(self._title)
        parts = [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            # Browsers would ask the server of the page for an icon.
            '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        ]
        for temperature in self.temperatures:
            parts.append(f'<h2>Temperature {temperature:g}</h2>\n<div class="plot">{plots[temperature]}</div>')
            for heading, notes, rows in self._sections(self._at(temperature)):
                parts.append(f"<h3>{html.escape(heading)}</h3>")
                if notes:
                    parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>")
                if len(rows) > 1:
                    parts.append(f'<div class="wide">{html_table(rows)}</div>')
        facts = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in self._facts())
        parts += ["<h2>Set-up</h2>\n<dl>", *facts, f"</dl><p>{html.escape(_EXPLANATION)}</p></body></html>\n"]
        return "\n".join(parts)

    def summary(self) -> str:
        """The speeds, for a terminal."""
        tables = (f"Temperature {each:g}\n\n{markdown(self._speeds(self._at(each)))}" for each in self.temperatures)
        return "\n".join(tables)

    @property
    def _title(self) -> str:
        return f"vllm-longspec bench: {self.settings['target']}"


_EXPLANATION = (
    "A step is one forward pass of the target after the prompt's. Tokens/s per user is a request's speed after its "
    "first token; speed-up is over vanilla's. TTFT is the time to the first token, TPOT the time per token after it. "
    "Identical counts the answers that are vanilla's token for token: in half precision, near-ties between two tokens "
    "fall differently from batch to batch, with and without speculation. At temperatures above 0 vLLM's own methods "
    "draw other tokens of the same distribution, and are not compared."
)


def _differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    def said(value: Any) -> str:
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value)

    return [
        f"{name.replace('_', ' ')}: {said(now.get(name))}, before {said(before.get(name))}"
        for name in dict.fromkeys((*now, *before))
        if name not in _COMPARABLE and now.get(name) != before.get(name)
    ]


def read_baseline(path: Path) -> Baseline:
    """Another run, by its folder.

    Raises:
        ValueError: there is no report.
    """
    report = path / REPORT if path.is_dir() else path
    try:
        value = json.loads(report.read_text())
        return Baseline(str(path), dict(value["settings"]), list(value["figures"]))
    except FileNotFoundError as error:
        raise ValueError(f"--baseline {path}: there is no {report}; give a folder that --out wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--baseline {path}: {report} is no report of this command") from error


def _plot_name(temperature: float) -> str:
    return f"report-t{temperature:g}.svg"


def _speeds(figures: Sequence[Figures]) -> list[list[str]]:
    head = ["workload", "method", "prompts", "speed-up", "tokens per step", "tokens/s per user", "tokens/s in all"]
    rows = [[*head, "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "identical"]]
    for each in figures:
        identical = f"{each.identical} of {each.compared}" if each.compared is not None else _NONE
        rows.append(
            [
                *(each.workload, each.method, f"{each.num_prompts}", _times(each.speedup)),
                *(_number(each.tokens_per_step, 2), _number(each.user_tokens_per_second, 1)),
                *(_number(each.tokens_per_second, 1), *(_number(ms, 0) for ms in each.ttft_ms)),
                *(*(_number(ms, 2) for ms in each.tpot_ms), identical),
            ]
        )
    return rows


def _depths(figures: Sequence[Figures]) -> list[list[str]]:
    shown = [each for each in figures if each.by_depth]
    deepest = max((len(each.by_depth) for each in shown), default=0)
    rows = [["workload", "method", *map(str, range(1, deepest + 1))]]
    for each in shown:
        shares = [_percent(share) for share in each.by_depth]
        rows.append([each.workload, each.method, *shares, *[""] * (deepest - len(shares))])
    return rows


def _positions(figures: Sequence[Figures]) -> list[list[str]]:
    shown = [each for each in figures if each.by_position and each.method != "vanilla"]
    starts = sorted({start for each in shown for start in each.by_position})
    rows = [["workload", "method", *(f"from {start}" for start in starts)]]
    for each in shown:
        rows.append([each.workload, each.method, *(_number(each.by_position.get(start), 2) for start in starts)])
    return rows


def _drafted(figures: Sequence[Figures]) -> list[list[str]]:
    rows = [["workload", "method", "number of draft tokens: share"]]
    for each in figures:
        if not each.drafted:
            continue
        ranked = sorted(each.drafted.items(), key=lambda item: -item[1])
        named = [f"{number}: {_percent(share)}" for number, share in ranked[:_NAMED_NUMBERS]]
        rest = sum(share for _, share in ranked[_NAMED_NUMBERS:])
        rows.append([each.workload, each.method, ", ".join(named + ([f"others: {_percent(rest)}"] if rest else []))])
    return rows


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _times(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}x"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
