# SPDX-License-Identifier: Apache-2.0
"""The GLIDE draft: one decoder layer that reads the target's KV cache, and the window of its own K and V."""
