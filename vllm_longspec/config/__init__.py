# SPDX-License-Identifier: Apache-2.0
"""From what the user asks for to a vLLM configuration: options, checkpoint recognition, refusals."""
