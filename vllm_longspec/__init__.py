# SPDX-License-Identifier: Apache-2.0
"""vllm-longspec: LongSpec GLIDE drafts and MagicDec as speculative-decoding methods of vLLM."""

from vllm_longspec.version import __version__

__all__ = ["__version__"]
