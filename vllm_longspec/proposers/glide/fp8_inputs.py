# SPDX-License-Identifier: Apache-2.0
"""Norms of the draft; norms, activations and sums that quantise the input of the fp8 layer after them, row by row.

A linear layer with fp8 weights otherwise quantises its input in a kernel of its own, whose launch counts in a small
draft. vLLM's compiler fuses the two; the draft is not compiled. vLLM has no fused activation or sum with one scale per
row, so they are here. So is the norm: for 4 to 16 rows of 5,120 vLLM's takes 4.7 to 5.2 us on an H200 where activation
and sum, a program a row, take 2.0.

Rows that are quantised here may be followed by padding, with which a GEMM takes less time (`padded_rows`). It is never
written nor read but by that GEMM, whose rows do not depend on each other.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.kernels.linear import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    expose_input_quant_key,
    get_input_quant_key,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import round_up

# Elements of a row, which a program holds whole.
MAX_ROW = 32768
# The largest fp8 value, and the smallest scale of a row in vLLM's kernels.
FP8_MAX = tl.constexpr(torch.finfo(kFp8DynamicTokenSym.dtype).max)
LEAST_SCALE = tl.constexpr(1.0 / (FP8_MAX.value * 512.0))
# vLLM's fp8 GEMMs for Hopper have a kernel of their own for up to this many rows.
FEW_ROWS = 16
# Of the tiles of the others.
TILE_ROWS = 64
# Beyond these padding gains nothing.
MOST_PADDED_ROWS = 128


def accept_quantised_rows(linear: LinearBase) -> None:
    """Lets a layer take inputs that the functions below quantised, and padded, if its kernel can.

    vLLM's kernel declares this for static scales only, but also reads one scale per row.
    """
    kernel = getattr(linear.quant_method, "fp8_linear", None)
    if (
        isinstance(kernel, CutlassFP8ScaledMMLinearKernel)
        and kernel.config.activation_quant_key == kFp8DynamicTokenSym
        and not envs.VLLM_BATCH_INVARIANT
    ):
        kernel.input_quant_key = lambda: kFp8DynamicTokenSym  # type: ignore[method-assign]
        kernel.apply_scaled_mm = _without_padding(kernel.apply_scaled_mm)  # type: ignore[method-assign]
        expose_input_quant_key(linear, kernel)


def _without_padding(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The kernel's `apply_scaled_mm` for rows that may be padded; `output_shape` says how many of them count."""

    def multiply_padded(*, A: torch.Tensor, output_shape: list[int], **arguments: Any) -> torch.Tensor:
        product = multiply(A=A, output_shape=[A.shape[0], *output_shape[1:]], **arguments)
        return product[: output_shape[0]]

    return multiply_padded


def padded_rows(num_rows: int) -> int:
    """Rows with which vLLM's fp8 GEMM takes the least time, at least `num_rows`.

    On Hopper it takes the longer the more rows of a tile are missing: with the sizes of QwQ-32B's layers 24 rows take
    206 us and 64 take 161 (docs/performance.md#what-makes-a-draft-cheaper).
    """
    if not FEW_ROWS < num_rows <= MOST_PADDED_ROWS or not current_platform.is_device_capability(90):
        return num_rows
    return round_up(num_rows, TILE_ROWS)


def normalise(
    norm: RMSNorm,
    linear: LinearBase,
    hidden: torch.Tensor,  # [num_tokens, hidden_size], contiguous
    residual: torch.Tensor | None = None,  # [num_tokens, hidden_size], contiguous; with one both may be written
) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:
    """Returns the norm of hidden + residual, quantised if `linear` takes it so, and the sum itself."""
    if get_input_quant_key(linear) != kFp8DynamicTokenSym:
        # By default vLLM leaves norms to its compiler. The draft is not compiled but run by a CUDA graph, where the
        # number of kernels counts.
        if hidden.is_cuda and norm.weight.dtype == hidden.dtype and not envs.VLLM_BATCH_INVARIANT:
            return fused_norm(norm, hidden, residual)
        return (norm(hidden), hidden) if residual is None else norm(hidden, residual)
    num_tokens, size = hidden.shape
    activation = empty_activation(num_tokens, size, hidden.dtype, hidden.device)
    _norm_and_quantise(norm, hidden, residual, activation.data[:num_tokens], activation.scale[:num_tokens])
    return activation, hidden if residual is None else residual


def _norm_and_quantise(
    norm: RMSNorm,
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
    residual: torch.Tensor | None,  # [num_tokens, hidden_size], written
    rows: torch.Tensor,  # float8_e4m3fn [num_tokens, hidden_size], written
    scales: torch.Tensor,  # float32 [num_tokens, 1], written
) -> None:
    num_tokens, size = hidden.shape
    if size > MAX_ROW:
        # vLLM's Python function for this kernel allocates what it returns, without padding.
        torch.ops._C.rms_norm_dynamic_per_token_quant(
            rows, hidden, norm.weight, scales, norm.variance_epsilon, None, residual
        )
        return
    block = triton.next_power_of_2(size)
    _norm_quantise_kernel[(num_tokens,)](
        hidden,
        residual,
        norm.weight,
        rows,
        scales,
        size,
        norm.variance_epsilon,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


def fused_norm(
    norm: RMSNorm,  # with a weight of the input's type
    hidden: torch.Tensor,  # [num_tokens, hidden_size], written if there is a residual
    residual: torch.Tensor | None,  # [num_tokens, hidden_size], written
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm of hidden + residual and the sum itself, by one kernel."""
    if residual is not None:
        ops.fused_add_rms_norm(hidden, residual, norm.weight, norm.variance_epsilon)
        return hidden, residual
    normalised = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    ops.rms_norm(normalised, hidden, norm.weight, norm.variance_epsilon)
    return normalised, hidden


def quantise(
    linear: LinearBase,
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
) -> torch.Tensor | QuantizedActivation:
    """The same rows, quantised if `linear` takes them so."""
    if get_input_quant_key(linear) != kFp8DynamicTokenSym:
        return hidden
    rows, scales = ops.scaled_fp8_quant(
        hidden, num_token_padding=padded_rows(hidden.shape[0]), use_per_token_if_dynamic=True
    )
    return QuantizedActivation(rows, scales, hidden.dtype, hidden.shape, kFp8DynamicTokenSym)


def activate(
    activation: SiluAndMul,
    linear: LinearBase,
    gate_up: torch.Tensor,  # [num_tokens, 2 * intermediate_size]
) -> torch.Tensor | QuantizedActivation:
    """silu(gate) * up, quantised if `linear` takes it so."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if get_input_quant_key(linear) != kFp8DynamicTokenSym or size > MAX_ROW:
        return activation(gate_up)
    quantised_rows = empty_activation(num_tokens, size, gate_up.dtype, gate_up.device)
    block = triton.next_power_of_2(size)
    _silu_mul_quantise_kernel[(num_tokens,)](
        gate_up, quantised_rows.data, quantised_rows.scale, size, BLOCK=block, num_warps=num_warps_for(block)
    )
    return quantised_rows


def add(
    head: nn.Module,
    hidden: torch.Tensor,  # [num_tokens, hidden_size], contiguous
    multiplier: float,  # of hidden
    residual: torch.Tensor,  # [num_tokens, hidden_size], contiguous
) -> torch.Tensor | QuantizedActivation:
    """multiplier * hidden + residual, quantised if the head takes it so."""
    num_tokens, size = hidden.shape
    if get_input_quant_key(head) != kFp8DynamicTokenSym or size > MAX_ROW:
        # A kernel less for families without multipliers.
        return hidden + residual if multiplier == 1.0 else hidden * multiplier + residual
    total = empty_activation(num_tokens, size, hidden.dtype, hidden.device)
    block = triton.next_power_of_2(size)
    _add_quantise_kernel[(num_tokens,)](
        hidden, residual, total.data, total.scale, size, multiplier, BLOCK=block, num_warps=num_warps_for(block)
    )
    return total


def some_rows(hidden: torch.Tensor | QuantizedActivation, rows: slice) -> torch.Tensor | QuantizedActivation:
    """Some of the rows of an input, which are not padded, or all of them."""
    if isinstance(hidden, torch.Tensor):
        return hidden[rows]
    if rows.indices(hidden.orig_shape[0]) == (0, hidden.orig_shape[0], 1):
        return hidden
    data = hidden.data[rows]
    return replace(hidden, data=data, scale=hidden.scale[rows], orig_shape=data.shape)


def num_warps_for(block: int) -> int:
    """Warps of a program that holds a row of `block` elements."""
    return max(1, min(16, block // 1024))


def empty_activation(num_tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> QuantizedActivation:
    """For `num_tokens` rows of `dtype` that a kernel quantises: float8_e4m3fn data and float32 scales, with padding."""
    num_rows = padded_rows(num_tokens)
    return QuantizedActivation(
        torch.empty(num_rows, size, dtype=kFp8DynamicTokenSym.dtype, device=device),
        torch.empty(num_rows, 1, dtype=torch.float32, device=device),
        dtype,
        torch.Size((num_tokens, size)),
        kFp8DynamicTokenSym,
    )


@triton.jit
def row_scale(
    value,  # float32 [num_rows, n]
):
    """The scale of each row, float32 [num_rows]."""
    return tl.maximum(tl.max(tl.abs(value), axis=1) / FP8_MAX, LEAST_SCALE)


@triton.jit
def quantised(
    value,  # float32 [num_rows, n]
    scale,  # float32 [num_rows]
):
    """What is to be rounded to fp8."""
    return tl.clamp(value / scale[:, None], -FP8_MAX, FP8_MAX)


@triton.jit
def rms_normalised(
    value,  # float32 [num_rows, n], 0 from `size` on
    weight,  # float32 [1, n]
    size,
    epsilon,
):
    """The norm of each row, float32 [num_rows, n]."""
    return value * tl.rsqrt(tl.sum(value * value, axis=1) / size + epsilon)[:, None] * weight


@triton.jit(do_not_specialize=["epsilon"])
def _norm_quantise_kernel(
    hidden_ptr,  # [num_tokens, size]
    residual_ptr,  # [num_tokens, size], written, or None
    weight_ptr,  # [size], of any type
    rows_ptr,  # float8_e4m3fn [num_tokens, size]
    scales_ptr,  # float32 [num_tokens, 1]
    size,
    epsilon,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < size
    hidden = tl.load(hidden_ptr + token[:, None] * size + column, mask=is_column, other=0.0)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token[:, None] * size + column, mask=is_column, other=0.0)
        # The norm is that of the sum as it is written.
        hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(hidden.dtype)
        tl.store(residual_ptr + token[:, None] * size + column, hidden, mask=is_column)
    value = rms_normalised(hidden.to(tl.float32), weight, size, epsilon)
    _store_quantised(value, token, rows_ptr, scales_ptr, size, is_column)


@triton.jit
def _silu_mul_quantise_kernel(
    gate_up_ptr,  # [num_tokens, 2 * size]
    rows_ptr,  # float8_e4m3fn [num_tokens, size]
    scales_ptr,  # float32 [num_tokens, 1]
    size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < size
    gate = tl.load(gate_up_ptr + token[:, None] * 2 * size + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (token[:, None] * 2 + 1) * size + column, mask=is_column, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    _store_quantised(value, token, rows_ptr, scales_ptr, size, is_column)


@triton.jit(do_not_specialize=["multiplier"])
def _add_quantise_kernel(
    hidden_ptr,  # [num_tokens, size]
    residual_ptr,  # [num_tokens, size]
    rows_ptr,  # float8_e4m3fn [num_tokens, size]
    scales_ptr,  # float32 [num_tokens, 1]
    size,
    multiplier,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < size
    hidden = tl.load(hidden_ptr + token[:, None] * size + column, mask=is_column, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + token[:, None] * size + column, mask=is_column, other=0.0).to(tl.float32)
    _store_quantised(hidden * multiplier + residual, token, rows_ptr, scales_ptr, size, is_column)


@triton.jit
def _store_quantised(
    value,  # float32 [1, BLOCK]
    token,  # [1]
    rows_ptr,
    scales_ptr,
    size,
    is_column,
):
    scale = row_scale(value)
    column = tl.arange(0, value.shape[1])[None, :]
    tl.store(scales_ptr + token, scale)
    rows = quantised(value, scale).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + token[:, None] * size + column, rows, mask=is_column)
