# SPDX-License-Identifier: Apache-2.0
"""The README's plot and table are those of the reports."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import RESULTS, ROOT, gains

REPORTS = sorted(RESULTS.glob("bench-*.json"))


def figures(method, temperature, speedup, speed=100.0, workload="code-8k.jsonl"):
    each = {"method": method, "workload": workload, "temperature": temperature, "speedup": speedup}
    return each | {"tokens_per_step": 2.5 if speedup else 1.0, "user_tokens_per_second": speed}


@pytest.fixture
def report(tmp_path):
    def write(*found, **settings):
        path = tmp_path / f"bench-{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"settings": {"batch": 1, "request_rate": None, **settings}, "figures": found}))
        return path

    return write


def test_a_row_is_a_workload_under_a_load(report):
    first = report(figures("vanilla", 1.0, None), figures("tree", 1.0, 3.0), figures("tree", 0.0, 9.0))
    second = report(
        *(
            figures(name, 1.0, speedup)
            for name, speedup in (("vanilla", None), ("wide", 1.5), ("eagle3", 1.75), ("ngram", 1.25))
        ),
        batch=None,
        request_rate=0.5,
    )
    rows = [row for path in (first, second) for row in gains.read(path, 1.0)]
    assert gains.table(rows).splitlines() == [
        "| prompts | load | plain decoding, tokens/s per user | n-gram | EAGLE-3 | GLIDE tree | wide |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| code-8k | batch 1 | 100 | – | – | 3.00x, 2.50 | – |",  # noqa: RUF001
        "| code-8k | 0.5/s | 100 | 1.25x, 2.50 | 1.75x, 2.50 | – | 1.50x, 2.50 |",  # noqa: RUF001
    ]
    plot = gains.draw(rows)
    texts = {element.text for element in ElementTree.fromstring(plot.encode()).iter() if element.text}
    assert {"code-8k, batch 1", "GLIDE tree", "3", "1.25"} <= {text.strip() for text in texts}
    assert plot == gains.draw(rows)


def test_reports_without_something_to_show_are_refused(report):
    with pytest.raises(SystemExit, match="has nothing at temperature 1"):
        gains.read(report(figures("vanilla", 0.0, None)), 1.0)
    with pytest.raises(SystemExit, match=r"has no vanilla of code-8k\.jsonl"):
        gains.read(report(figures("tree", 1.0, 2.0)), 1.0)


def test_what_is_between_the_marks_is_replaced():
    text = f"a\n{gains.BEGIN}\nold\n{gains.END}\nb\n"
    assert gains.put("new \\1\n", text) == f"a\n{gains.BEGIN}\nnew \\1\n{gains.END}\nb\n"
    for wrong in ("a\n", text + text):
        with pytest.raises(SystemExit, match="there must be one place between"):
            gains.put("new\n", wrong)


def test_the_readme_has_a_place_for_them():
    readme = (ROOT / "README.md").read_text()
    assert gains.put("new\n", readme) != readme


@pytest.mark.skipif(not REPORTS, reason="benchmarks/results has no report yet")
def test_the_readme_has_the_results_of_the_repository():
    rows = [row for path in REPORTS for row in gains.read(path, 1.0)]
    assert gains.table(rows) in (ROOT / "README.md").read_text()
    # Versions of matplotlib draw differently.
    assert all(row.label in gains.PLOT.read_text() for row in rows)
