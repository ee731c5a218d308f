# SPDX-License-Identifier: Apache-2.0
"""Attention over the target's paged KV cache: the shared prefix, the tree, and their backends. Knows no proposer."""
