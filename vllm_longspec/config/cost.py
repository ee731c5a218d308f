# SPDX-License-Identifier: Apache-2.0
"""What a step with drafts costs, in steps of plain decoding.

A step takes about as long as reading the weights, and some time besides. Growing a tree reads the draft's layer and the
head once more for each level; verifying it reads nothing more, but every row takes a little time, and more once
arithmetic takes longer than reading. The constants are an H200's (benchmarks/results/speed.jsonl and nodes.json), where
the context made no difference between 1k and 31k.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_longspec.config.fit import layer_sizes
from vllm_longspec.config.options import frequent_tokens_of, tree_shape_of
from vllm_longspec.config.schedule import BATCH_ROWS
from vllm_longspec.frequent_tokens import read_frequent_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

# What a step and a level take besides reading weights, in weights of the target that could be read meanwhile: 0.4 ms,
# as plain decoding of two sizes tells, and 0.04 ms, in which the kernels of a level start.
STEP = 0.75e9
LEVEL = 75e6
# Of each row of a batch up to `BATCH_ROWS`, and of each beyond.
ROW = 0.001
FURTHER_ROW = 0.003


@dataclass(frozen=True)
class StepCost:
    """`cost(batch size, nodes of a request)`, in steps of plain decoding.

    Args:
        level: cost of drafting one level.
        max_depth: levels of the whole tree.
    """

    level: float
    max_depth: int

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "StepCost":
        shape, speculative_config = tree_shape_of(vllm_config), vllm_config.speculative_config
        assert shape is not None and speculative_config is not None
        target = vllm_config.model_config
        vocab_size = target.get_vocab_size()
        path = frequent_tokens_of(vllm_config)
        level = level_cost(
            target.hf_text_config,
            vocab_size=vocab_size,
            draft_vocab_size=len(read_frequent_tokens(path, vocab_size)) if path else vocab_size,
            is_quantised=speculative_config.quantization is not None,
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
        )
        return cls(level, shape.max_depth)

    def __call__(self, batch_size: int, num_nodes: int) -> float:
        if num_nodes == 0:
            return 1.0
        num_rows = batch_size * (1 + num_nodes)
        further = max(0, num_rows - BATCH_ROWS)
        # A tree of few nodes is not deeper than there are nodes.
        drafting = self.level * min(num_nodes, self.max_depth)
        return 1 + drafting + ROW * (num_rows - further) + FURTHER_ROW * further


def level_cost(
    target: "PretrainedConfig", *, vocab_size: int, draft_vocab_size: int, is_quantised: bool, num_ranks: int = 1
) -> float:
    """What drafting a level takes, over what a step of plain decoding takes.

    Args:
        is_quantised: the draft's weights have one byte, its head's too, where the target's have two.
        num_ranks: GPUs that the weights are split over; a head of some tokens is whole on each.
    """
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target)
    query = hidden * heads * head_size
    layer = 2 * query + 2 * hidden * kv_heads * head_size + 3 * hidden * intermediate
    # Two attentions, of which one has no keys and values of its own.
    draft_layer = (layer + 2 * query) * (0.5 if is_quantised else 1.0)
    draft_head = draft_vocab_size * hidden * (0.5 if is_quantised else 1.0)
    level = draft_layer / num_ranks + draft_head / (num_ranks if draft_vocab_size == vocab_size else 1)
    step = (target.num_hidden_layers * layer + vocab_size * hidden) / num_ranks
    return (LEVEL + level) / (STEP + step)
