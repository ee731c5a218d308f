# SPDX-License-Identifier: Apache-2.0
"""Supported versions of vLLM, and what differs between them. No other folder depends on vLLM's version."""
