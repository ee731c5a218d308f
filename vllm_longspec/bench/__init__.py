# SPDX-License-Identifier: Apache-2.0
"""`vllm-longspec bench`: what a draft gains on real prompts, method beside method. Serving imports nothing of it."""
