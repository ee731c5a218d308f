# SPDX-License-Identifier: Apache-2.0
"""Attention over the target's paged KV cache: the prefix that a whole tree shares, and the backends that use it."""
