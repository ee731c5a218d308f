# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard is one; tests/e2e/test_chat.py asks a server for its metrics."""

import re

from tests import dashboard


def test_panels_are_laid_out_and_ask_for_something():
    panels = dashboard.read()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    titles = [panel["title"] for panel in panels]
    for title in ("Acceptance by depth", "Draft tokens verified per step", "Tokens of copies per step"):
        assert title in titles
    assert all(dashboard.METRIC.search(expression) for expression in dashboard.expressions())


def test_expressions_are_balanced_and_their_variables_there():
    variables = {variable["name"] for variable in dashboard.read()["templating"]["list"]}
    for expression in dashboard.expressions():
        for opening, closing in ("()", "{}", "[]"):
            text = re.sub(r'"[^"]*"', "", expression)
            assert text.count(opening) == text.count(closing), expression
        assert {name for name in re.findall(r"\$(\w+)", expression) if name != "__rate_interval"} <= variables


def test_levels_choose_the_positions_beyond_them():
    [levels] = [each for each in dashboard.read()["templating"]["list"] if each["name"] == "beyond"]
    assert levels["current"]["text"] == "5"
    assert levels["query"] == ", ".join(f"{each['text']} : {each['value']}" for each in levels["options"])
    for each in levels["options"]:
        beyond = [position for position in range(255) if re.fullmatch(each["value"], str(position))]
        assert beyond == list(range(int(each["text"]), 255))


def test_what_a_server_lacks_is_named():
    assert "vllm:num_requests_running" in dashboard.missing("")
    served = 'vllm:num_requests_running{engine="0"} 1.0'
    assert "vllm:num_requests_running{model_name}" in dashboard.missing(served)


def test_tokens_per_step_count_steps_without_drafts():
    """Two requests of 15 tokens: 14 in 7 steps each, of which 5 had drafts."""
    served = {"generation_tokens_total": 30, "time_to_first_token_seconds_count": 2}
    served |= {"spec_decode_num_accepted_tokens_total": 14, "spec_decode_num_drafts_total": 10}
    [panel] = [panel for panel in dashboard.read()["panels"] if panel["title"] == "Tokens per step"]
    [target] = panel["targets"]
    value = re.sub(
        r"sum\(rate\(vllm:(\w+)\{[^}]*\}\[\$__rate_interval\]\)\)", lambda m: str(served[m[1]]), target["expr"]
    )
    assert eval(value, {"__builtins__": {}}) == 28 / 14
