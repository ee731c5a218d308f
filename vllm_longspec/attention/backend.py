# SPDX-License-Identifier: Apache-2.0
"""The common part of the tree attention backends: splits a batch into requests with a tree and requests without.

Requests with a tree lead the batch. Their rows attend the cached prefix without a mask (the concrete backend's
`prefix_attention`) and each other through `tree_attention`, which merges both. All other requests (prompts, single
tokens) take the concrete backend's causal path.

The mixins precede a vLLM backend's builder and implementation in the bases of flash.py, triton.py and cpu.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_longspec.attention.cache_scales import CacheScales, cache_scales
from vllm_longspec.attention.tree import tree_attention


@dataclass(frozen=True)
class TreesToAttend(ModelSpecificAttnMetadata):
    """Passed to the builders: the leading `num_tree_reqs` requests of the batch have a tree."""

    num_tree_reqs: int
    ancestor_masks: torch.Tensor  # int32 [max_num_reqs, num_rows, num_words]
    prefix_lens: torch.Tensor  # int32 [max_num_reqs]
    max_prefix_len: int  # upper bound; when captured in a CUDA graph, for all batches that it will run
    in_graph: bool  # attention is part of a CUDA graph of the whole forward pass
    idx_mapping: torch.Tensor  # int64 [max_num_reqs] req_state_idx, -1 for padding
    observers: Mapping[str, "Observer"] = field(default_factory=dict)  # by layer name

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"to_attend": self}


@dataclass
class TreeRequests:
    """The leading `num_reqs` requests and `num_tokens` rows of a batch, which have a tree."""

    num_reqs: int
    num_tokens: int
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    max_query_len: int
    prefix_lens: torch.Tensor  # int32 [num_reqs] cached tokens before the root
    max_prefix_len: int
    block_table: torch.Tensor  # int32 [num_reqs, max_num_blocks]
    slot_mapping: torch.Tensor  # int64 [num_tokens]
    ancestor_masks: torch.Tensor  # int32 [num_reqs, num_rows, num_words]
    in_graph: bool  # a CUDA graph keeps the addresses of all of these tensors
    idx_mapping: torch.Tensor  # int64 [num_reqs] req_state_idx, -1 for padding
    observers: Mapping[str, "Observer"] = field(default_factory=dict)  # by layer name
    prefix_schedule: torch.Tensor | None = None  # of `schedule_prefix`


@dataclass(frozen=True)
class PrefixAttention:
    """The attention of the rows of trees to their cached prefixes in one layer, as it was computed."""

    trees: TreeRequests
    query: torch.Tensor  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    scale: float  # factor of the scores
    lse: torch.Tensor  # float32 [num_heads, num_tokens] log-sum-exp
    scales: CacheScales | None


# Called right after the attention, also in CUDA graphs. It must not change what it is given, nor wait for the host.
Observer = Callable[[PrefixAttention], None]


@dataclass
class TreeAttentionMetadata:
    trees: TreeRequests | None
    causal: Any | None  # the concrete backend's metadata for the requests without a tree, if there are any

    def with_block_table(self, block_table: torch.Tensor) -> "TreeAttentionMetadata":
        """The same batch, which has no trees, over other blocks of as many tokens; int32 [num_reqs, max_num_blocks]."""
        assert self.trees is None and self.causal is not None
        return replace(self, causal=replace(self.causal, block_table=block_table))


class TreeMetadataBuilderMixin:
    # A full CUDA graph has either trees with the same number of rows or single tokens.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False
    supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        to_attend: TreesToAttend | None = None,
    ) -> TreeAttentionMetadata:
        num_tree_reqs = to_attend.num_tree_reqs if to_attend is not None else 0
        if num_tree_reqs == 0:
            causal = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
            return TreeAttentionMetadata(trees=None, causal=causal)

        assert to_attend is not None
        trees = _tree_requests(common_attn_metadata, to_attend)
        trees.prefix_schedule = self.schedule_prefix(trees)
        rest = _requests_after(common_attn_metadata, num_tree_reqs, trees.num_tokens)
        causal = super().build(0, rest, fast_build) if rest is not None else None  # type: ignore[misc]
        return TreeAttentionMetadata(trees=trees, causal=causal)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> TreeAttentionMetadata:
        # Not called for batches with trees, see `TreeModelState.prepare_attn`.
        return self.build(0, common_attn_metadata)

    def schedule_prefix(self, trees: TreeRequests) -> torch.Tensor | None:
        """How the prefix kernel splits its work, if that can be computed once for all layers."""
        return None

    def expect_equal_lengths(self, num_reqs: int, max_seq_len: int) -> None:
        """The next batch to build has so many requests, each with one row and most of them `max_seq_len` tokens."""


def _tree_requests(common: CommonAttentionMetadata, to_attend: TreesToAttend) -> TreeRequests:
    num_reqs = to_attend.num_tree_reqs
    query_start_loc = common.query_start_loc[: num_reqs + 1]
    query_start_loc_cpu = common.query_start_loc_cpu[: num_reqs + 1]
    num_tokens = int(query_start_loc_cpu[-1])
    return TreeRequests(
        num_reqs=num_reqs,
        num_tokens=num_tokens,
        query_start_loc=query_start_loc,
        max_query_len=int((query_start_loc_cpu[1:] - query_start_loc_cpu[:-1]).max()),
        prefix_lens=to_attend.prefix_lens[:num_reqs],
        max_prefix_len=to_attend.max_prefix_len,
        block_table=common.block_table_tensor[:num_reqs],
        slot_mapping=common.slot_mapping[:num_tokens],
        ancestor_masks=to_attend.ancestor_masks[:num_reqs],
        in_graph=to_attend.in_graph,
        idx_mapping=to_attend.idx_mapping[:num_reqs],
        observers=to_attend.observers,
    )


def _requests_after(
    common: CommonAttentionMetadata, num_tree_reqs: int, num_tree_tokens: int
) -> CommonAttentionMetadata | None:
    """The same batch without its leading tree requests."""
    num_reqs = common.num_reqs - num_tree_reqs
    if num_reqs == 0:
        return None

    def tail(values: Any, start: int) -> Any:
        return None if values is None else values[start:]

    query_start_loc_cpu = common.query_start_loc_cpu[num_tree_reqs:] - num_tree_tokens
    return common.replace(
        query_start_loc=common.query_start_loc[num_tree_reqs:] - num_tree_tokens,
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=common.seq_lens[num_tree_reqs:],
        num_reqs=num_reqs,
        num_actual_tokens=common.num_actual_tokens - num_tree_tokens,
        max_query_len=int((query_start_loc_cpu[1:] - query_start_loc_cpu[:-1]).max()),
        block_table_tensor=common.block_table_tensor[num_tree_reqs:],
        slot_mapping=common.slot_mapping[num_tree_tokens:],
        positions=tail(common.positions, num_tree_tokens),
        is_prefilling=tail(common.is_prefilling, num_tree_reqs),
        seq_lens_cpu_upper_bound=tail(common.seq_lens_cpu_upper_bound, num_tree_reqs),
        req_idx=tail(common.req_idx, num_tree_reqs),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class TreeAttentionImplMixin:
    # Set by vLLM's implementations.
    num_heads: int
    scale: float

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
        sinks: torch.Tensor | None = None,
        chunk_lookback: int = -1,
        **kwargs: Any,
    ):
        """Raises ValueError for a layer that attends in a way which trees do not, whatever start-up knew of it."""
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a soft cap of attention logits": bool(logits_soft_cap),
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": sinks is not None,
            "chunked attention": chunk_lookback >= 0,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        }
        for feature, applies in unsupported.items():
            if applies:
                raise ValueError(
                    f"a target that has {feature} is not supported with trees: serve without speculative decoding"
                )
        super().__init__(  # type: ignore[call-arg]
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **kwargs,
        )

    def prefix_attention(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks]
        prefix_lens: torch.Tensor,  # int32 [num_reqs]
        max_prefix_len: int,
        query_start_loc: torch.Tensor,  # int32 [num_reqs + 1]
        max_query_len: int,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
        scales: CacheScales | None,  # None: neither cache nor query is quantised
        schedule: torch.Tensor | None = None,  # of the builder's `schedule_prefix`
    ) -> torch.Tensor:  # float32 [num_heads, num_tokens] log-sum-exp
        """Unmasked attention of every query to its request's cached tokens before the root."""
        raise NotImplementedError

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tree attention does not quantise its output")
        if attn_metadata is None:  # vLLM's memory profiling
            return output.fill_(0)

        trees = attn_metadata.trees
        num_tree_tokens = 0
        if trees is not None:
            num_tree_tokens = trees.num_tokens
            scales = cache_scales(layer)
            prefix_lse = self.prefix_attention(
                query[:num_tree_tokens],
                kv_cache,
                trees.block_table,
                trees.prefix_lens,
                trees.max_prefix_len,
                trees.query_start_loc,
                trees.max_query_len,
                output[:num_tree_tokens],
                scales,
                trees.prefix_schedule,
            )
            observe = trees.observers.get(layer.layer_name)
            if observe is not None:
                observe(PrefixAttention(trees, query[:num_tree_tokens], kv_cache, self.scale, prefix_lse, scales))
            tree_attention(
                query[:num_tree_tokens],
                kv_cache,
                trees.slot_mapping,
                trees.query_start_loc,
                trees.ancestor_masks,
                trees.max_query_len,
                self.scale,
                prefix_lse,
                output[:num_tree_tokens],
                scales,
            )
        if attn_metadata.causal is not None:
            rest = slice(num_tree_tokens, None)
            super().forward(  # type: ignore[misc]
                layer, query[rest], key[rest], value[rest], kv_cache, attn_metadata.causal, output[rest]
            )
        return output
