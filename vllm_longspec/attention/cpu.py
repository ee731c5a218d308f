# SPDX-License-Identifier: Apache-2.0
"""Tree attention without a GPU: trees in Triton's interpreter, everything else in PyTorch.

vLLM's CPU backend packs its cache for vector instructions, which a Triton kernel cannot read. This backend keeps the
unpacked layout and therefore has a causal path of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from vllm_longspec.attention.backend import TreeMetadataBuilderMixin
from vllm_longspec.attention.cache_scales import as_stored, cache_scales
from vllm_longspec.attention.triton import TritonPrefixAttentionMixin


@dataclass
class CausalRequests:
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: torch.Tensor  # int32 [num_reqs, max_num_blocks]


class CausalMetadataBuilder(AttentionMetadataBuilder[CausalRequests]):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CausalRequests:
        return CausalRequests(
            query_start_loc=common_attn_metadata.query_start_loc.tolist(),
            seq_lens=common_attn_metadata.seq_lens.tolist(),
            block_table=common_attn_metadata.block_table_tensor,
        )


class CausalImpl(AttentionImpl):
    """Causal attention over the paged cache, one request at a time."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: nn.Module,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        slot_mapping: torch.Tensor,  # [num_tokens], -1 where nothing is to be written
    ) -> None:
        block_size = kv_cache.shape[2]
        written = slot_mapping >= 0
        slots = slot_mapping[written]
        if (scales := cache_scales(layer)) is not None:
            key, value = _to_fp8(key, scales.key), _to_fp8(value, scales.value)
        kv = torch.cat([key, value], dim=-1)[: slot_mapping.shape[0]][written]
        kv_cache[slots // block_size, :, slots % block_size] = kv.to(kv_cache.dtype)

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: CausalRequests,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        block_size = kv_cache.shape[2]
        scales = cache_scales(layer)
        for request, seq_len in enumerate(attn_metadata.seq_lens):
            start, end = attn_metadata.query_start_loc[request : request + 2]
            if start == end:
                continue
            num_blocks = -(-seq_len // block_size)
            blocks = kv_cache[attn_metadata.block_table[request, :num_blocks].long()]
            # [num_kv_heads, seq_len, 2 * head_size]
            kv = blocks.transpose(0, 1).reshape(self.num_kv_heads, -1, 2 * self.head_size)[:, :seq_len]
            keys, values = as_stored(kv).to(query.dtype).split(self.head_size, dim=-1)
            if scales is not None:
                keys, values = keys * scales.key.view(-1, 1, 1), values * scales.value.view(-1, 1, 1)
            positions = torch.arange(seq_len)
            causal = positions <= positions[seq_len - (end - start) :, None]
            output[start:end] = nn.functional.scaled_dot_product_attention(
                query[start:end].transpose(0, 1), keys, values, attn_mask=causal, scale=self.scale, enable_gqa=True
            ).transpose(0, 1)
        return output


def _to_fp8(
    values: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    scale: torch.Tensor,  # [] or [num_kv_heads]
) -> torch.Tensor:  # the same shape, as bytes
    """Rounds towards zero like vLLM's CPU backend, unlike a GPU, so that the cache equals that of plain decoding."""
    fp8 = current_platform.fp8_dtype()
    limit = torch.finfo(fp8).max
    scaled = (values.float() / scale.view(-1, 1)).clamp(-limit, limit)
    nearest = scaled.to(fp8)
    # Sign and magnitude are separate bits, so one less is one step towards zero.
    return nearest.view(torch.uint8) - (nearest.float().abs() > scaled.abs()).to(torch.uint8)


class TreeCpuAttentionMetadataBuilder(TreeMetadataBuilderMixin, CausalMetadataBuilder):  # type: ignore[misc]
    pass


class TreeCpuAttentionImpl(TritonPrefixAttentionMixin, CausalImpl):  # type: ignore[misc]
    pass


class TreeCpuAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_name() -> str:
        return "LONGSPEC_CPU"

    @staticmethod
    def get_impl_cls() -> type[TreeCpuAttentionImpl]:
        return TreeCpuAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCpuAttentionMetadataBuilder]:
        return TreeCpuAttentionMetadataBuilder
