# SPDX-License-Identifier: Apache-2.0
"""What a step with drafts costs, in steps of plain decoding.

A step takes about as long as reading the weights and the cached K and V, and some time besides. Growing a tree reads,
for each level, the draft's layer, its head and the K and V of the target's last layer. Verifying it reads nothing more,
but each row takes a little time: of the GEMMs, more once arithmetic takes longer than reading, and of attention, whose
tiles it fills. The constants are an H200's: within 8% they fit all that was measured with contexts of 1k to 128k and
batches of 1 to 64 (benchmarks/results/speed.jsonl).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec.frequent_tokens import read_frequent_tokens
from vllm_longspec.options import DEFAULT_LEVELS, frequent_tokens_of, tree_shape_of
from vllm_longspec.proposers.glide.fit import layer_sizes
from vllm_longspec.scheduling.schedule import BATCH_ROWS

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

# What a step and a level take besides reading, in weights that could be read meanwhile: 0.8 ms, as plain decoding of
# two sizes tells, and 0.09 ms, in which the kernels of a level start.
STEP = 1.5e9
LEVEL = 165e6
# Of each row of a batch up to `BATCH_ROWS`, and of each beyond, in readings of the target's weights.
ROW = 0.0013
FURTHER_ROW = 0.003
# Of each node of a request, in readings of its cached K and V.
NODE = 0.006


@dataclass(frozen=True)
class StepCost:
    """`cost(requests, nodes of each, cached tokens of all)`, in steps of plain decoding.

    Args:
        target: weights that each GPU reads of all layers and the head.
        level: the same of the draft's layer and head, in weights of the target's size.
        token: K and V of a cached token, in all layers, as so many weights.
        num_layers: of the target.
        max_depth: levels of the whole tree.
    """

    target: float
    level: float
    token: float
    num_layers: int
    max_depth: int

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "StepCost":
        from vllm.utils.torch_utils import is_quantized_kv_cache

        shape, speculative_config = tree_shape_of(vllm_config), vllm_config.speculative_config
        assert shape is not None and speculative_config is not None
        model_config = vllm_config.model_config
        vocab_size = model_config.get_vocab_size()
        path = frequent_tokens_of(vllm_config)
        return cls.of_shape(
            model_config.hf_text_config,
            vocab_size=vocab_size,
            draft_vocab_size=len(read_frequent_tokens(path, vocab_size)) if path else vocab_size,
            draft_is_quantised=speculative_config.quantization is not None,
            cache_is_quantised=is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
            max_depth=shape.max_depth,
        )

    @classmethod
    def of_shape(
        cls,
        target: "PretrainedConfig",
        *,
        vocab_size: int,
        draft_vocab_size: int,
        draft_is_quantised: bool = False,
        cache_is_quantised: bool = False,
        num_ranks: int = 1,
        max_depth: int = len(DEFAULT_LEVELS),
    ) -> "StepCost":
        """What is quantised has one byte, its head too, where the target's weights have two.

        Args:
            num_ranks: GPUs that weights and cache are split over; a head of some tokens is whole on each.
        """
        hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target)
        query = hidden * heads * head_size
        layer = 2 * query + 2 * hidden * kv_heads * head_size + 3 * hidden * intermediate
        # Two attentions, of which one has no keys and values of its own.
        draft_layer = layer + 2 * query
        draft_head = draft_vocab_size * hidden
        head_ranks = num_ranks if draft_vocab_size == vocab_size else 1
        num_layers = target.num_hidden_layers
        return cls(
            target=(num_layers * layer + vocab_size * hidden) / num_ranks,
            level=(draft_layer / num_ranks + draft_head / head_ranks) * (0.5 if draft_is_quantised else 1.0),
            # Each rank has a KV head at least.
            token=2 * head_size * num_layers * max(1, kv_heads / num_ranks) * (0.5 if cache_is_quantised else 1.0),
            num_layers=num_layers,
            max_depth=max_depth,
        )

    def __call__(self, batch_size: int, num_nodes: int, num_tokens: int) -> float:
        if num_nodes == 0:
            return 1.0
        cache = num_tokens * self.token
        # A tree of few nodes is not deeper than there are nodes.
        drafting = min(num_nodes, self.max_depth) * (LEVEL + self.level + cache / self.num_layers)
        num_rows = batch_size * (1 + num_nodes)
        further = max(0, num_rows - BATCH_ROWS)
        verifying = (ROW * (num_rows - further) + FURTHER_ROW * further) * self.target + NODE * num_nodes * cache
        return 1 + (drafting + verifying) / (STEP + self.target + cache)
