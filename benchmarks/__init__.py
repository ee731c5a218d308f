# SPDX-License-Identifier: Apache-2.0
"""Everything that measures or checks the plugin and is no test; see README.md. Run from the repository root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The shipped pair: a trained target/, draft/ and prompts.jsonl.
PAIR = ROOT / "benchmarks" / "pair"
