# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: a progress bar, metrics.jsonl, and the trackers that are asked for."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

METRICS = "metrics.jsonl"


class Reporter:
    """Of the first rank; the others report nothing.

    Args:
        step: of the checkpoint that the run goes on from. What was reported after it is dropped.
    """

    def __init__(self, run: Path, step: int, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._is_first = accelerator.is_main_process
        self._bar: tqdm | None = None
        if not self._is_first:
            return
        path = run / METRICS
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(kept))
            temporary.replace(path)
            self._file = path.open("a")
        except OSError as error:
            raise _unwritten(path, error) from None

    def stage(self, name: str) -> None:
        if self._is_first:
            self._close_bar()
            # A log that is no terminal gets a line now and then.
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(
                desc=name, total=1.0, mininterval=interval, bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}"
            )
            self._started = time.monotonic()
            self._done_at_start: float | None = None

    def progress(self, done: float, step: int, loss: float, tokens_per_second: float) -> None:
        """Args:
        done: share of the stage
        """
        if self._bar is None:
            return
        if self._done_at_start is None:
            self._done_at_start = done
        advanced, elapsed = done - self._done_at_start, time.monotonic() - self._started
        left = tqdm.format_interval(elapsed / advanced * (1 - done)) if advanced > 0 else "?"
        self._bar.set_postfix_str(
            f"step {step}, loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {left} left", refresh=False
        )
        self._bar.update(done - self._bar.n)

    def metrics(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if not self._is_first:
            return
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritten(self._file.name, error) from None
        self._accelerator.log({f"{kind}/{name}": value for name, value in _flat(values)}, step=step)

    def say(self, text: str) -> None:
        if self._is_first:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_first:
            self._close_bar()
            self._file.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _unwritten(path: Path | str, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written ({error.strerror}): make room, and give --resume")


def _lines(path: Path) -> list[str]:
    """Whole lines: the last one may have been cut when a run was killed."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _flat(values: dict[str, Any], name: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{name}{key}/")
        elif isinstance(value, list):
            found += [(f"{name}{key}/{index}", each) for index, each in enumerate(value)]
        elif isinstance(value, int | float):
            found.append((f"{name}{key}", value))
    return found
