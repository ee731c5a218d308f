# SPDX-License-Identifier: Apache-2.0
"""What the scheduler decides about trees: how many nodes each request verifies in a step, and what is counted."""
