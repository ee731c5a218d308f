# SPDX-License-Identifier: Apache-2.0
"""The worker's side of a step: the speculator, independent of the proposer, and the target's model state."""
