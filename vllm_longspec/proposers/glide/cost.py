# SPDX-License-Identifier: Apache-2.0
"""What growing a GLIDE draft's tree takes, in weights of the target that could be read meanwhile.

Each level reads the draft's layer, its head and the K and V of the target's last layer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec.frequent_tokens import read_frequent_tokens
from vllm_longspec.options import DEFAULT_LEVELS, options_of
from vllm_longspec.targets.families import layer_sizes, layer_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

# What a level takes besides reading: 0.09 ms, in which its kernels start.
LEVEL = 165e6


@dataclass(frozen=True)
class GlideCost:
    """A `DraftingCost`.

    Args:
        level: weights that each GPU reads of the draft's layer and head, in weights of the target's size.
        num_layers: of the target.
        max_depth: levels of the whole tree.
    """

    level: float
    num_layers: int
    max_depth: int

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "GlideCost":
        config = vllm_config.speculative_config
        options = options_of(config)
        assert config is not None and options is not None
        vocab_size = vllm_config.model_config.get_vocab_size()
        path = options.frequent_tokens
        return cls.of_shape(
            vllm_config.model_config.hf_text_config,
            vocab_size=vocab_size,
            draft_vocab_size=len(read_frequent_tokens(path, vocab_size)) if path else vocab_size,
            is_quantised=config.quantization is not None,
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
            max_depth=options.tree_shape.max_depth,
        )

    @classmethod
    def of_shape(
        cls,
        target: "PretrainedConfig",
        *,
        vocab_size: int,
        draft_vocab_size: int,
        is_quantised: bool = False,
        num_ranks: int = 1,
        max_depth: int = len(DEFAULT_LEVELS),
    ) -> "GlideCost":
        """A quantised draft has one byte, its head too, where the target's weights have two.

        Args:
            num_ranks: GPUs that the layer and a whole head are split over; a head of some tokens is whole on each.
        """
        hidden, _, heads, _, head_size = layer_sizes(target)
        # A layer of the target's with a second attention, which has no keys and values of its own.
        layer = layer_weights(target) + 2 * hidden * heads * head_size
        head_ranks = num_ranks if draft_vocab_size == vocab_size else 1
        level = layer / num_ranks + draft_vocab_size * hidden / head_ranks
        return cls(level * (0.5 if is_quantised else 1.0), target.num_hidden_layers, max_depth)

    def __call__(self, num_nodes: int, cache: float) -> float:
        # A tree of few nodes is not deeper than there are nodes.
        return min(num_nodes, self.max_depth) * (LEVEL + self.level + cache / self.num_layers)
