# SPDX-License-Identifier: Apache-2.0
"""How many nodes each request verifies in a step, and metrics."""
