# SPDX-License-Identifier: Apache-2.0
"""What all results share: the machine that they were measured on, and tables."""

import subprocess

from benchmarks import ROOT
from vllm_longspec.bench import environment as machine
from vllm_longspec.bench.tables import markdown

__all__ = ["environment", "markdown"]


def environment(commit: str | None) -> dict[str, str]:
    """The machine and the versions. `commit` names the plugin's where there is no git to ask."""
    if commit is None:
        try:
            describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    found = machine.environment()
    # In the place that earlier results have it in.
    return {"device": found.pop("device"), "driver": found.pop("driver"), "commit": commit, **found}
