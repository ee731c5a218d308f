# SPDX-License-Identifier: Apache-2.0
"""A head of the draft's own: the target's rows, of some tokens only or of all, quantised if the draft is.

Each level of a tree reads the head once, and with a large vocabulary it is more than the draft's layer.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import set_default_torch_dtype


def has_rows(head: nn.Module) -> bool:
    """Whether a head's weight has a row for each token: a quantised one has not."""
    return isinstance(head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))


def copy_head(
    head: nn.Module,  # weight: [num_rows, hidden_size], this rank's
    token_ids: torch.Tensor | None,  # int64 [num_tokens], rows of the head; None for all of them
    quant_config: QuantizationConfig | None,
) -> ReplicatedLinear:
    """What vLLM's LogitsProcessor takes for a head, with a weight of its own; `has_rows(head)`.

    All rows of a rank's shard stay the rank's shard, which the processor gathers as it does the target's.
    """
    weight = head.weight if token_ids is None else head.weight[token_ids]
    with set_default_torch_dtype(weight.dtype), weight.device:
        copied = ReplicatedLinear(
            weight.shape[1], weight.shape[0], bias=False, quant_config=quant_config, prefix="draft_head"
        )
        # vLLM quantises a layer as soon as all of its weight has come through its loader.
        parameter: Any = copied.get_parameter("weight")
        parameter.weight_loader(parameter, weight.data)
    if quant_config is None:
        copied.quant_method.process_weights_after_loading(copied)
    copied.tp_size = head.tp_size
    return copied
