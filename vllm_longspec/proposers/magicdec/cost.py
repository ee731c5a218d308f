# SPDX-License-Identifier: Apache-2.0
"""MagicDec's `DraftingCost`: each step reads all of the target's weights, and a part of its cache."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec.options import options_of
from vllm_longspec.targets.families import cached_token_weights, target_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# How long scoring cached tokens and choosing takes, over reading their K at the speed of an H200's memory: for bfloat16
# and for fp8, which the kernel converts (docs/performance.md#blocks-by-scores).
SCORING, SCORING_QUANTISED = 1.9, 3.8
# Constant time of a step in a CUDA graph, in weights that could be read meanwhile. Fitted to steps that draft four
# tokens with Llama-3-8B's shape, contexts of 16k to 128k, batches of 4 and 16 (docs/performance.md#self-drafting).
STEP = 2.5e9


def largest_batch_with_graph(vllm_config: "VllmConfig") -> int:
    """Requests of the largest batch whose draft is a CUDA graph (`vllm_longspec/runner/graphs.py`); 0 without any."""
    config, compilation = vllm_config.speculative_config, vllm_config.compilation_config
    assert config is not None
    mode = compilation.cudagraph_mode
    if config.enforce_eager or mode is None or not mode.has_full_cudagraphs():
        return 0
    # As vLLM captures batches of one row a request: of the sizes that it has, those up to the largest batch.
    most = min(vllm_config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
    return max((size for size in compilation.cudagraph_capture_sizes or () if size <= most), default=0)


@dataclass(frozen=True)
class MagicDecCost:
    target: float  # weights of all layers and the head that each GPU reads
    token: float  # K and V of a cached token in all layers, in weights
    num_attended: int  # most tokens of a request that a step attends
    # Requests of the largest batch whose steps are a CUDA graph. Elsewhere the host launches every kernel of a step, as
    # it does for a step of decoding, and drafting never pays.
    largest_batch: float = math.inf
    # For each token that a verification emits, the share of cached K and V that could be read while blocks are chosen.
    rescored: float = 0.0
    # The same if all layers choose, which each does at most once in a verification.
    most_rescored: float = math.inf

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "MagicDecCost":
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache

        from vllm_longspec.proposers.magicdec.selection import INTERVAL

        options = options_of(vllm_config.speculative_config)
        assert options is not None and options.partial_attention is not None
        model_config = vllm_config.model_config
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        is_quantised = is_quantized_kv_cache(vllm_config.cache_config.cache_dtype)
        config = model_config.hf_text_config
        # K is half of the cache.
        scoring = 0.5 * (SCORING_QUANTISED if is_quantised else SCORING)
        by_scores = options.partial_attention.selection == "scores"
        return cls(
            target_weights(config, model_config.get_vocab_size(), num_ranks),
            cached_token_weights(config, num_ranks, is_quantised),
            options.partial_attention.sinks + options.partial_attention.budget,
            largest_batch_with_graph(vllm_config),
            scoring / INTERVAL if by_scores else 0.0,
            scoring if by_scores else 0.0,
        )

    def __call__(self, batch_size: int, num_nodes: int, cache: float) -> float:
        if num_nodes == 0:
            return 0.0
        if batch_size > self.largest_batch:
            return math.inf
        attended = min(cache, batch_size * self.num_attended * self.token)
        # At most as many tokens are emitted.
        rescored = min(self.rescored * (1 + num_nodes), self.most_rescored)
        return num_nodes * (STEP + self.target + attended) + rescored * cache
