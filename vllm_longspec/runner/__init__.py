# SPDX-License-Identifier: Apache-2.0
"""The worker's side of a step: the speculator that every tree needs, and the target's model state."""
