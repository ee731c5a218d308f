# SPDX-License-Identifier: Apache-2.0
"""Tree attention in Triton alone, for what FlashAttention does not support on CUDA, such as float32."""

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_longspec.attention.backend import TreeAttentionImplMixin, TreeMetadataBuilderMixin
from vllm_longspec.attention.cache_scales import CacheScales
from vllm_longspec.attention.prefix import prefix_attention


class TritonPrefixAttentionMixin(TreeAttentionImplMixin):
    def prefix_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        prefix_lens: torch.Tensor,
        max_prefix_len: int,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        output: torch.Tensor,
        scales: CacheScales | None,
        schedule: torch.Tensor | None = None,
    ) -> torch.Tensor:
        lse = torch.empty(self.num_heads, query.shape[0], dtype=torch.float32, device=query.device)
        prefix_attention(
            query, kv_cache, block_table, prefix_lens, query_start_loc, max_query_len, self.scale, output, lse, scales
        )
        return lse


class TreeTritonAttentionMetadataBuilder(TreeMetadataBuilderMixin, TritonAttentionMetadataBuilder):  # type: ignore[misc]
    pass


class TreeTritonAttentionImpl(TritonPrefixAttentionMixin, TritonAttentionImpl):  # type: ignore[misc]
    pass


class TreeTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LONGSPEC_TRITON"

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonAttentionMetadataBuilder]:
        return TreeTritonAttentionMetadataBuilder
