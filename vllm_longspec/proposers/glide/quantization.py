# SPDX-License-Identifier: Apache-2.0
"""The default of `quantization` in the speculative configuration."""

from typing import TYPE_CHECKING

import torch

from vllm_longspec.proposers.glide.cost import LEVEL, GlideCost
from vllm_longspec.targets.families import layer_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


def default_quantization(
    engine_args: "EngineArgs", target: "ModelConfig", parallel_config: "ParallelConfig"
) -> str | None:
    """fp8 on the GPUs where it was measured to pay (docs/tuning.md#fp8-drafts), if a level that drafts all tokens
    spends most of its time reading the weights that each rank has.

    Of all tokens, as otherwise a smaller head, chosen to save time, could take it away and cost more than it saves. The
    target may be quantised in any way: a draft has weights, and mostly a copy of the head, of its own.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() and current_platform.is_device_capability_family(90)):
        return None
    if target.dtype not in (torch.float16, torch.bfloat16):
        return None
    # Not every linear kernel that a user may choose supports the scales of an fp8 draft.
    kernels = engine_args.kernel_config
    if {engine_args.linear_backend, kernels.linear_backend} != {"auto"} or kernels.linear_backend_per_quant:
        return None
    num_ranks = parallel_config.tensor_parallel_size
    if not _shards_can_be_quantised(target.hf_text_config, num_ranks):
        return None
    cost = GlideCost.of_shape(target.hf_text_config, draft_vocab_size=target.get_vocab_size(), num_ranks=num_ranks)
    return "fp8_per_channel" if cost.level > LEVEL else None


def _shards_can_be_quantised(target: "PretrainedConfig", num_ranks: int) -> bool:
    """Whether fp8 kernels take the layer's weights as they are divided: whole tiles in both dimensions.

    A head that they do not take stays as it is (`can_be_quantised`).
    """
    from vllm_longspec.proposers.glide.head import TILE_ROWS

    hidden_size, intermediate_size, num_heads, _, head_size = layer_sizes(target)
    sides = (hidden_size, intermediate_size // num_ranks, num_heads * head_size // num_ranks, head_size)
    return all(side % TILE_ROWS == 0 for side in sides)
