# SPDX-License-Identifier: Apache-2.0
"""A KV cache of 8-bit floats (`--kv-cache-dtype fp8`): how its values are to be read.

vLLM stores K and V divided by a scale of their layer, rounded to fp8. Where a backend says that it takes queries the
same way, the layer quantises them too before the backend sees them. A scale is a tensor on the device, one for the
layer or one for each KV head, and is never read on the host.
"""

from typing import NamedTuple

import torch
from torch import nn
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache


class CacheScales(NamedTuple):
    """What stored values are multiplied by, each float32 [], [1] or [num_kv_heads]."""

    key: torch.Tensor
    value: torch.Tensor
    # None: queries are as the model computes them
    query: torch.Tensor | None = None


def cache_scales(layer: nn.Module) -> CacheScales | None:
    """The scales of one of vLLM's attention layers; None when its cache is not quantised."""
    if not is_quantized_kv_cache(layer.kv_cache_dtype):
        return None
    return CacheScales(layer._k_scale, layer._v_scale, layer._q_scale if layer.query_quant is not None else None)


def quantise_query(
    layer: nn.Module,
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
) -> torch.Tensor:  # the same shape
    """A query that has not come through the layer, in the form in which the layer hands its own to the backend."""
    if layer.query_quant is None:
        return query
    # Past the dispatch of vLLM's custom operators, which may compile a version of its own for every width of a tree.
    quantised, _ = layer.query_quant.forward_cuda(query.flatten(1), layer._q_scale)
    return quantised.view(query.shape)


def as_stored(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache in its own type; vLLM allocates one of fp8 as bytes."""
    return kv_cache.view(current_platform.fp8_dtype()) if kv_cache.dtype == torch.uint8 else kv_cache
