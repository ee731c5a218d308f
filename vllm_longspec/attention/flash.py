# SPDX-License-Identifier: Apache-2.0
"""Tree attention over FlashAttention, for half-precision targets on CUDA."""

import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_longspec.attention.backend import TreeAttentionImplMixin, TreeMetadataBuilderMixin


class TreeFlashAttentionMetadataBuilder(TreeMetadataBuilderMixin, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    pass


class TreeFlashAttentionImpl(TreeAttentionImplMixin, FlashAttentionImpl):  # type: ignore[misc]
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
    ) -> torch.Tensor:
        assert self.vllm_flash_attn_version is not None
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            out=output,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=max_query_len,
            seqused_k=prefix_lens,
            max_seqlen_k=max_prefix_len,
            softmax_scale=self.scale,
            causal=False,
            block_table=block_table,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
        )
        return lse


class TreeFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LONGSPEC_FLASH"

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionMetadataBuilder]:
        return TreeFlashAttentionMetadataBuilder
