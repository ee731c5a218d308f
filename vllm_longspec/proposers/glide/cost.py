# SPDX-License-Identifier: Apache-2.0
"""GLIDE's `DraftingCost`: each level reads the draft's layer, its head, and K and V of the target's last layer.

Of these the root's level reads all, and those below it perhaps a part of a long request's.

The rows of a level are not counted. With the default numbers of nodes they are no more than those of the verification,
and the GPU computes them while it reads weights.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec.frequent_tokens import num_frequent_tokens
from vllm_longspec.options import DEFAULT_LEVELS, options_of
from vllm_longspec.targets.families import cached_token_weights, layer_sizes, layer_weights
from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

# Constant time of a level, in weights that could be read meanwhile: 0.09 ms of kernel launches.
LEVEL = 165e6

DEFAULT_SHAPE = TreeShape(DEFAULT_LEVELS)


@dataclass(frozen=True)
class GlideCost:
    level: float  # weights of the draft's layer and head that each GPU reads, in weights of two bytes
    num_layers: int  # of the target
    shape: TreeShape
    # K and V of a request's tokens in all layers, in weights; of one layer's, a level below the root reads no more.
    most_read: float = math.inf

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "GlideCost":
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache

        config = vllm_config.speculative_config
        options = options_of(config)
        assert config is not None and options is not None
        vocab_size = vllm_config.model_config.get_vocab_size()
        frequent_tokens = options.frequent_tokens
        num_attended = None
        if (part := options.partial_attention) is not None:
            num_attended = part.sinks + part.budget
        return cls.of_shape(
            vllm_config.model_config.hf_text_config,
            draft_vocab_size=num_frequent_tokens(frequent_tokens, vocab_size) if frequent_tokens else vocab_size,
            is_quantised=config.quantization is not None,
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
            shape=options.tree_shape,
            num_attended=num_attended,
            cache_is_quantised=is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
        )

    @classmethod
    def of_shape(
        cls,
        target: "PretrainedConfig",
        *,
        draft_vocab_size: int,
        is_quantised: bool = False,
        num_ranks: int = 1,
        shape: TreeShape = DEFAULT_SHAPE,
        num_attended: int | None = None,
        cache_is_quantised: bool = False,
    ) -> "GlideCost":
        """As `of`, from sizes. Weights have two bytes, those of a quantised draft and its head have one.

        The layer and the head are split over `num_ranks`. The cross-attention reads at most `num_attended` tokens of a
        request below the root, by default all of them.
        """
        hidden, _, heads, _, head_size = layer_sizes(target)
        # The target's layer, and q_proj and o_proj of the cross-attention.
        layer = layer_weights(target) + 2 * hidden * heads * head_size
        level = (layer + draft_vocab_size * hidden) / num_ranks
        most_read = math.inf
        if num_attended is not None:
            most_read = num_attended * cached_token_weights(target, num_ranks, cache_is_quantised)
        return cls(level * (0.5 if is_quantised else 1.0), target.num_hidden_layers, shape, most_read)

    def __call__(self, batch_size: int, num_nodes: int, cache: float) -> float:
        num_levels = self.shape.num_levels(num_nodes)
        # The root's level reads everything.
        read = min(num_levels, 1) * cache + max(num_levels - 1, 0) * min(cache, batch_size * self.most_read)
        return num_levels * (LEVEL + self.level) + read / self.num_layers
