# SPDX-License-Identifier: Apache-2.0
"""A norm that leaves its result the way a quantised layer reads it.

A linear layer with fp8 weights quantises its input first, row by row, in a kernel of its own. A draft's layers are so
small that one more kernel shows, and vLLM has one that normalises and quantises at once. It uses that where it compiles
a model; the draft is not compiled.
"""

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.kernels.linear import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    expose_input_quant_key,
    get_input_quant_key,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym


def accept_quantised_rows(linear: LinearBase) -> None:
    """Lets a layer of the draft read what `normalise` gives it, if its kernel can.

    vLLM's layers take quantised inputs, but this kernel declares it for scales that are known beforehand only, although
    it reads one scale a row all the same.
    """
    kernel = getattr(linear.quant_method, "fp8_linear", None)
    if (
        isinstance(kernel, CutlassFP8ScaledMMLinearKernel)
        and kernel.config.activation_quant_key == kFp8DynamicTokenSym
        and not envs.VLLM_BATCH_INVARIANT
    ):
        kernel.input_quant_key = lambda: kFp8DynamicTokenSym  # type: ignore[method-assign]
        expose_input_quant_key(linear, kernel)


def normalise(
    norm: RMSNorm,
    linear: LinearBase,
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
    residual: torch.Tensor | None = None,  # [num_tokens, hidden_size], may be written
) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:
    """The norm of `hidden`, plus `residual` if there is one, as `linear` reads it; and that sum, not normalised."""
    if get_input_quant_key(linear) != kFp8DynamicTokenSym:
        return (norm(hidden), hidden) if residual is None else norm(hidden, residual)
    rows, scales = ops.rms_norm_dynamic_per_token_quant(
        hidden, norm.weight, norm.variance_epsilon, kFp8DynamicTokenSym.dtype, residual=residual
    )
    activation = QuantizedActivation(rows, scales, hidden.dtype, hidden.shape, kFp8DynamicTokenSym)
    return activation, hidden if residual is None else residual
