# SPDX-License-Identifier: Apache-2.0
"""Scales of an fp8 KV cache (`--kv-cache-dtype fp8`).

vLLM stores K and V divided by a scale of their layer. Where a backend supports it, the layer quantises queries in the
same way before it calls the backend. A scale is a tensor on the device and is never read on the host.
"""

from typing import NamedTuple

import torch
from torch import nn
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache


class CacheScales(NamedTuple):
    """Factors of the stored values, each float32 [], [1] or [num_kv_heads]."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor | None = None  # None: queries are not quantised


def cache_scales(layer: nn.Module) -> CacheScales | None:
    """The scales of one of vLLM's attention layers; None if its cache is not quantised."""
    if not is_quantized_kv_cache(layer.kv_cache_dtype):
        return None
    return CacheScales(layer._k_scale, layer._v_scale, layer._q_scale if layer.query_quant is not None else None)


def quantise_query(layer: nn.Module, query: torch.Tensor) -> torch.Tensor:
    """Quantises a query [num_tokens, num_heads, head_size], shape unchanged, as the layer does for its backend."""
    if layer.query_quant is None:
        return query
    # Not through the dispatch of vLLM's custom operators, which may recompile for every width of a tree.
    quantised, _ = layer.query_quant.forward_cuda(query.flatten(1), layer._q_scale)
    return quantised.view(query.shape)


def as_stored(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache as its own dtype; vLLM allocates an fp8 cache as uint8."""
    return kv_cache.view(current_platform.fp8_dtype()) if kv_cache.dtype == torch.uint8 else kv_cache
