# SPDX-License-Identifier: Apache-2.0
"""The page of a report in a real browser: it opens without an error and asks for nothing outside itself.

Chromium writes down every request with the page that made it, whether it could be sent or not. Here none can be.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from vllm_longspec.bench.cells import Answer, Cell, Key
from vllm_longspec.bench.figures import all_figures
from vllm_longspec.bench.report import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Set where the test must not be left out.
REQUIRED = "LONGSPEC_REQUIRE_BROWSER"
OPTIONS = [
    "--headless",
    # Containers have none, and the page is the repository's own.
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
]


class Opened(NamedTuple):
    document: str  # what the browser has made of the page
    console: list[str]  # errors, warnings and other messages
    requests: list[str]  # of the page: the browser's own are left out


@pytest.fixture
def browse(tmp_path):
    if BROWSER is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but there is no Chromium: run .ci/install_browser.sh")
        pytest.skip("there is no Chromium to open the page in: install it, as .ci/install_browser.sh does")

    def open_page(page: Path, width: int = 1280) -> Opened:
        log = tmp_path / "net.json"
        command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
        finished = subprocess.run(
            [*command, f"--window-size={width},1000", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        console = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
        return Opened(finished.stdout, console, requests_of_pages(json.loads(log.read_text())))

    return open_page


def requests_of_pages(log: dict) -> list[str]:
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    # An event has a beginning, which says what is asked for, and an end.
    parameters = [
        event["params"] for event in log["events"] if event["type"] == started and "url" in event.get("params", {})
    ]
    # What the browser asks for itself, such as its updates, comes of no page.
    return [each["url"] for each in parameters if each["initiator"] != "not an origin"]


def cell(method: str, temperature: float, answer: Answer, seconds: float, config: dict | None = None) -> Cell:
    result = {"total_output_tokens": 8, "output_throughput": 1.0, "input_lens": [9], "output_lens": [8]}
    result |= {"ttfts": [0.5], "latencies": [0.5 + seconds]}
    result |= {f"{rank}_{name}_ms": 1.0 for rank in ("median", "p99") for name in ("ttft", "tpot")}
    key = Key(method, "own <b>.jsonl", temperature)
    return Cell(key, config, {"device": "x"}, "digest", "1 prompt", result, [answer], config is not None)


def write_report(folder: Path) -> Path:
    plain = Answer(list(range(8)), [1] * 8)
    drafted = Answer(list(range(8)), [1, 4, 3], drafted=[5, 5], accepted=[3, 2])
    cells = [
        each
        for temperature in (0.0, 1.0)
        for each in (cell("vanilla", temperature, plain, 3.0), cell("tree", temperature, drafted, 1.0, {"model": "d"}))
    ]
    Report({"target": "t", "output_len": 8}, [{"device": "x"}], ["1 prompt"], all_figures(cells, 8), None).write(folder)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_opens_without_an_error_or_a_request(browse, tmp_path, width):
    page = write_report(tmp_path)
    # What is wider than the window scrolls within itself: the page itself does not.
    measure = "const root = document.documentElement; document.body.dataset.over = root.scrollWidth - root.clientWidth"
    text = page.read_text()
    assert text.count("</body>") == 1
    page.write_text(text.replace("</body>", f"<script>{measure}</script></body>"))
    opened = browse(page, width)
    assert opened.console == [] and opened.requests == []
    assert 'data-over="0"' in opened.document
    assert opened.document.count("<svg") == 2 and opened.document.count("3.00x") == 2
    assert "own &lt;b&gt;.jsonl" in opened.document


def test_a_page_that_asks_or_fails_is_seen(browse, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<!DOCTYPE html><title>x</title><style>@import "http://style.invalid/";</style>'
        '<img src="https://image.invalid/"><script>nothing.there</script>'
    )
    opened = browse(page)
    assert sorted(opened.requests) == ["http://style.invalid/", "https://image.invalid/"]
    assert len(opened.console) == 1 and "nothing is not defined" in opened.console[0]
