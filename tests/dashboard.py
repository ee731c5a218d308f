# SPDX-License-Identifier: Apache-2.0
"""What docs/grafana.json asks Prometheus for."""

import json
import re
from typing import Any

from benchmarks import ROOT

DASHBOARD = ROOT / "docs" / "grafana.json"
METRIC = re.compile(r"vllm:\w+")
LABEL = re.compile(r"(\w+)=~?\"")


def read() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in read()["panels"] for target in panel["targets"]]


def missing(served: str) -> list[str]:
    """Metrics and labels that the dashboard asks for and a server's /metrics does not have."""
    labels: dict[str, set[str]] = {}
    for line in served.splitlines():
        if (match := re.match(r"(vllm:\w+)\{(.*)\}", line)) is not None:
            labels.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2]))
    lacking = []
    for expression in expressions():
        for name, selector in re.findall(r"(vllm:\w+)(?:\{([^}]*)\})?", expression):
            wanted = set(LABEL.findall(selector)) | ({"le"} if name.endswith("_bucket") else set())
            if name not in labels:
                lacking.append(name)
            else:
                lacking += sorted(f"{name}{{{label}}}" for label in wanted - labels[name])
    return lacking
