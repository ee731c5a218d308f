# SPDX-License-Identifier: Apache-2.0
"""Tree attention over FlashAttention, for half-precision targets on CUDA."""

from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_longspec.attention.backend import TreeAttentionImplMixin, TreeMetadataBuilderMixin, TreeRequests
from vllm_longspec.attention.cache_scales import CacheScales, as_stored
from vllm_longspec.attention.tree import num_multiprocessors

# From this share of its multiprocessors on a GPU is busy without splits: on an H200 0.73 is, 0.48 is not (`splits` of
# `benchmarks.kernels`).
BUSY = 0.7
# With more tokens to attend, one long request among shorter ones would take too long as a single thread block.
MOST_UNSPLIT = 2048


class TreeFlashAttentionMetadataBuilder(TreeMetadataBuilderMixin, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # FlashAttention 3's schedule, computed once per step, not per layer. Prompts in the batch have their own.
        if self.use_full_cuda_graph and self.aot_schedule:
            self.tree_schedule = torch.zeros_like(self.scheduler_metadata)

    def expect_equal_lengths(self, num_reqs: int, max_seq_len: int) -> None:
        if not (self.use_full_cuda_graph and self.aot_schedule):
            # FlashAttention decides on splits when it is called.
            return
        # For CUDA graphs vLLM sets a bound instead, since lengths are other ones in each replay and a long request
        # among short ones has to be split. Above 1 a kernel that adds the splits up follows in every layer, even where
        # the schedule has one split each. A request has one thread block for each KV head.
        busy = num_reqs * self.num_heads_kv >= BUSY * num_multiprocessors(self.device)
        most = self.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self.max_num_splits = 1 if busy and max_seq_len <= MOST_UNSPLIT else most

    def schedule_prefix(self, trees: TreeRequests) -> torch.Tensor | None:
        schedule = self._get_scheduler_metadata(
            aot_schedule=self.aot_schedule,
            batch_size=trees.num_reqs,
            cu_query_lens=trees.query_start_loc,
            max_query_len=trees.max_query_len,
            seqlens=trees.prefix_lens,
            max_seq_len=trees.max_prefix_len,
            causal=False,
            max_num_splits=0,
        )
        if schedule is None or not trees.in_graph:
            return schedule
        # Thread blocks without an entry must read zeros.
        self.tree_schedule[schedule.shape[0] :].zero_()
        return self.tree_schedule[: schedule.shape[0]].copy_(schedule)


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
        scales: CacheScales | None,
        schedule: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self.vllm_flash_attn_version is not None
        # With a single KV head per rank, the stride of that dimension may be one that TMA does not accept.
        key_cache, value_cache = (
            canonicalize_singleton_dim_strides(half)
            for half in as_stored(kv_cache).transpose(1, 2).split(self.head_size, dim=-1)
        )
        descales = {}
        if scales is not None:
            shape = (prefix_lens.shape[0], self.num_kv_heads)
            assert scales.query is not None
            descales = {
                "q_descale": scales.query.expand(shape),
                "k_descale": scales.key.expand(shape),
                "v_descale": scales.value.expand(shape),
            }
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
            scheduler_metadata=schedule,
            **descales,
        )
        return lse


class TreeFlashAttentionBackend(FlashAttentionBackend):
    # From vLLM 0.33 on: layers that write the cache themselves would give no K and V, which tree attention reads.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return "LONGSPEC_FLASH"

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionMetadataBuilder]:
        return TreeFlashAttentionMetadataBuilder
