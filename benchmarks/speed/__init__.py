# SPDX-License-Identifier: Apache-2.0
"""The speed measurement: `python -m benchmarks.speed`, and `python -m benchmarks.speed.report` for its tables."""
