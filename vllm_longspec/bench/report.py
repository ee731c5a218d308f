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
.plot svg { display: block; height: auto; margin: auto; max-width: 100%; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
"""


@dataclass
class Report:
    """A run and its figures.

    Args:
        settings: of the run.
        environments: the machine and versions; more than one if the run was resumed elsewhere.
        prompts: a line for each workload, of what it consists and what was left out.
        figures: of all cells.
        baseline: figures of another run, and its name.
    """

    settings: dict[str, Any]
    environments: list[dict[str, str]]
    prompts: list[str]
    figures: list[Figures]
    baseline: tuple[str, list[dict[str, Any]]] | None

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

    def _sections(self, figures: list[Figures]) -> Iterator[tuple[str, list[list[str]]]]:
        """Titles and tables of one temperature; none without a row."""
        makers: list[tuple[str, Callable[[list[Figures]], list[list[str]]]]] = [
            ("Speed", _speeds),
            ("Accepted by depth, share of the steps with draft tokens", _depths),
            ("Tokens per step by position in the output", _positions),
            ("Draft tokens verified, share of the steps", _drafted),
        ]
        if self.baseline is not None:
            makers.append((f"Compared with {self.baseline[0]}", self._compared))
        for title, make in makers:
            rows = make(figures)
            if len(rows) > 1:
                yield title, rows

    def _compared(self, figures: list[Figures]) -> list[list[str]]:
        assert self.baseline is not None
        before = {(each["method"], each["workload"], each["temperature"]): each for each in self.baseline[1]}
        rows = [["workload", "method", "tokens/s per user", "before", "ratio", "tokens per step", "before"]]
        for each in figures:
            other = before.get((each.method, each.workload, each.temperature))
            if other is None:
                continue
            now, then = each.user_tokens_per_second, other["user_tokens_per_second"]
            ratio = now / then if now is not None and then is not None else None
            rows.append(
                [
                    *(each.workload, each.method, _number(now, 1), _number(then, 1), _times(ratio)),
                    *(_number(each.tokens_per_step, 2), _number(other["tokens_per_step"], 2)),
                ]
            )
        return rows

    def _facts(self) -> Iterator[tuple[str, str]]:
        for environment in self.environments:
            yield "Measured on", ", ".join(f"{name} {value}" for name, value in environment.items())
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
            parts += [f"### {title}\n\n{markdown(rows)}" for title, rows in self._sections(self._at(temperature))]
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
            '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">',
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        ]
        for temperature in self.temperatures:
            parts.append(f'<h2>Temperature {temperature:g}</h2>\n<div class="plot">{plots[temperature]}</div>')
            for heading, rows in self._sections(self._at(temperature)):
                parts.append(f'<h3>{html.escape(heading)}</h3>\n<div class="wide">{html_table(rows)}</div>')
        facts = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in self._facts())
        parts += ["<h2>Set-up</h2>\n<dl>", *facts, f"</dl><p>{html.escape(_EXPLANATION)}</p></body></html>\n"]
        return "\n".join(parts)

    def summary(self) -> str:
        """The speeds, for a terminal."""
        tables = (f"Temperature {each:g}\n\n{markdown(_speeds(self._at(each)))}" for each in self.temperatures)
        return "\n".join(tables)

    @property
    def _title(self) -> str:
        return f"vllm-longspec bench: {self.settings['target']}"


_EXPLANATION = (
    "A step is one forward pass of the target after the prompt's. Tokens/s per user is a request's speed after its "
    "first token; speed-up is over vanilla's. TTFT is the time to the first token, TPOT the time per token after it. "
    "Identical counts the answers that are vanilla's token for token: in half precision, near-ties between two tokens "
    "fall differently from batch to batch, with and without speculation."
)


def read_baseline(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The figures of another run, by its folder.

    Raises:
        ValueError: there is no report.
    """
    report = path / REPORT if path.is_dir() else path
    try:
        return str(path), json.loads(report.read_text())["figures"]
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
