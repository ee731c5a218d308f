# SPDX-License-Identifier: Apache-2.0
"""MagicDec: the target drafts a chain for itself over a part of its own KV cache (arXiv:2408.11049)."""
