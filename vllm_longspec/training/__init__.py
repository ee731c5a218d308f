# SPDX-License-Identifier: Apache-2.0
"""Drafts for one's own target: `vllm-longspec generate`, `train` and `evaluate`. Serving imports nothing of it."""
