# SPDX-License-Identifier: Apache-2.0
"""Embeddings of drafted tokens and the norm after them, quantised if the next layer takes it so, in one kernel.

With few rows each of the three takes longer to launch than to run.
"""

import torch
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, get_input_quant_key
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.fp8_inputs import (
    MAX_ROW,
    empty_activation,
    num_warps_for,
    quantised,
    rms_normalised,
    row_scale,
)


def can_embed(embedding: torch.Tensor, norm: RMSNorm) -> bool:
    """Whether `embed_and_normalise` takes them."""
    return embedding.shape[1] <= MAX_ROW and norm.weight.dtype == embedding.dtype and embedding.stride(1) == 1


def embed_and_normalise(
    tokens: torch.Tensor,  # int64 [num_tokens]
    embedding: torch.Tensor,  # [vocab_size, hidden_size]
    multiplier: float,  # of the embedding
    norm: RMSNorm,
    linear: LinearBase,
) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:
    """Returns the norm of the embeddings, quantised if `linear` takes it so, and the embeddings, as `normalise` does.

    The norm is computed in float32 and rounded once.
    """
    num_tokens, hidden_size = tokens.shape[0], embedding.shape[1]
    embedded = torch.empty(num_tokens, hidden_size, dtype=embedding.dtype, device=tokens.device)
    normalised: torch.Tensor | QuantizedActivation
    if get_input_quant_key(linear) == kFp8DynamicTokenSym:
        normalised = empty_activation(num_tokens, hidden_size, embedding.dtype, tokens.device)
        rows, scales = normalised.data, normalised.scale
    else:
        normalised = rows = torch.empty_like(embedded)
        scales = None
    block = triton.next_power_of_2(hidden_size)
    # All tokens in the interpreter, one a program on a GPU.
    token_block = triton.next_power_of_2(num_tokens) if interpreting() else 1
    _embed_and_normalise_kernel[(triton.cdiv(num_tokens, token_block),)](
        tokens,
        embedding,
        embedding.stride(0),
        norm.weight,
        embedded,
        rows,
        scales,
        num_tokens,
        hidden_size,
        multiplier,
        norm.variance_epsilon,
        BLOCK=block,
        TOKEN_BLOCK=token_block,
        num_warps=num_warps_for(block),
    )
    return normalised, embedded


@triton.jit(do_not_specialize=["num_tokens", "multiplier", "epsilon"])
def _embed_and_normalise_kernel(
    tokens_ptr,  # int64 [num_tokens]
    embedding_ptr,  # [vocab_size, size]
    embedding_stride,
    weight_ptr,  # [size]
    embedded_ptr,  # [num_tokens, size]
    rows_ptr,  # [num_tokens, size]
    scales_ptr,  # float32 [num_tokens, 1], or None: rows are not quantised
    num_tokens,
    size,
    multiplier,
    epsilon,
    BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    is_token = index < num_tokens
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < size
    mask = is_token[:, None] & is_column
    token = tl.load(tokens_ptr + index, mask=is_token, other=0)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    embedded = tl.load(embedding_ptr + token[:, None] * embedding_stride + column, mask=mask, other=0.0)
    # Rounded, as the residual is.
    embedded = (embedded.to(tl.float32) * multiplier).to(embedded.dtype)
    tl.store(embedded_ptr + index[:, None] * size + column, embedded, mask=mask)
    value = rms_normalised(embedded.to(tl.float32), weight, size, epsilon)
    if scales_ptr is not None:
        scale = row_scale(value)
        tl.store(scales_ptr + index, scale, mask=is_token)
        value = quantised(value, scale)
    tl.store(rows_ptr + index[:, None] * size + column, value.to(rows_ptr.dtype.element_ty), mask=mask)
