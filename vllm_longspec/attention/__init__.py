# SPDX-License-Identifier: Apache-2.0
"""Attention over the target's paged KV cache: prefix, tree, and their backends. Must not import a proposer."""
