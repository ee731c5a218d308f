# SPDX-License-Identifier: Apache-2.0
"""The default of `quantization` in the speculative configuration."""

from typing import TYPE_CHECKING

import torch

from vllm_longspec.proposers.glide.cost import LEVEL, GlideCost

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


def default_quantization(
    engine_args: "EngineArgs", target: "ModelConfig", parallel_config: "ParallelConfig", draft_vocab_size: int
) -> str | None:
    """fp8 where it was measured to pay (docs/tuning.md#fp8-drafts): if a level spends most time reading weights."""
    from vllm.platforms import current_platform

    is_hopper = current_platform.is_cuda() and current_platform.is_device_capability_family(90)
    if not is_hopper or parallel_config.tensor_parallel_size > 1:
        return None
    if target.quantization is not None or target.dtype not in (torch.float16, torch.bfloat16):
        return None
    # Not every linear kernel that a user may choose supports the scales of an fp8 draft.
    kernels = engine_args.kernel_config
    if {engine_args.linear_backend, kernels.linear_backend} != {"auto"} or kernels.linear_backend_per_quant:
        return None
    cost = GlideCost.of_shape(
        target.hf_text_config, vocab_size=target.get_vocab_size(), draft_vocab_size=draft_vocab_size
    )
    return "fp8_per_channel" if cost.level > LEVEL else None
