# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of the draft: the target's module, or its table for kernels that rotate what they load.

Most modules rotate by a table of cosines and sines. The draft's self-attention and the writes into its window read that
table themselves, which saves a kernel a level. Other modules (longrope) are called, and kernels get rotated tensors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

# (positions, query, key or None) -> rotated query and key
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, Any]]


class RotaryTable(NamedTuple):
    """Position p rotates pair i of the first `rotary_dim` channels of a head by the angle of entry i of row p."""

    cos_sin: torch.Tensor  # [num_positions, rotary_dim] cosines of all pairs, then sines; contiguous
    is_neox_style: bool  # pair i is channels i and i + rotary_dim / 2, otherwise 2i and 2i + 1


def table_arguments(table: RotaryTable | None) -> dict[str, Any]:
    """The arguments of `load_rotated` that describe a table, or None: nothing is rotated."""
    if table is None:
        return {"cos_sin_ptr": None, "ROTARY_DIM": 0, "IS_NEOX_STYLE": True}
    return {
        "cos_sin_ptr": table.cos_sin,
        "ROTARY_DIM": table.cos_sin.shape[1],
        "IS_NEOX_STYLE": table.is_neox_style,
    }


def rotary_table(module: nn.Module, dtype: torch.dtype) -> RotaryTable | None:
    """The table by which a module of vLLM's rotates tensors of `dtype`; None if it does more than that."""
    cls = type(module)
    if not isinstance(module, RotaryEmbedding) or module.use_flashinfer or module.cos_sin_cache.dtype != dtype:
        return None
    if cls.forward_cuda is not RotaryEmbedding.forward_cuda or cls.forward_native is not RotaryEmbedding.forward_native:
        return None
    return RotaryTable(module.cos_sin_cache, module.is_neox_style)


def rotate_by(module: nn.Module, head_size: int) -> Rotate:
    """The rotation of a module of vLLM's; queries and keys are [num_tokens, heads * head_size]."""
    if not isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
        return module.forward_cuda if current_platform.is_cuda() else module

    def rotate_long(
        positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # This module has PyTorch's operations only, and needs a key: without one, a head of the query.
        rotated_query, rotated_key = module(positions, query, query[:, :head_size] if key is None else key)
        return rotated_query, None if key is None else rotated_key

    return rotate_long


@triton.jit
def load_rotated(
    row_ptr,  # pointers [n] to the first channel of a head
    is_row,  # bool [n]
    position,  # [n], or [1] for all rows
    cos_sin_ptr,  # of `RotaryTable`, or None: nothing is rotated
    ROTARY_DIM: tl.constexpr,
    IS_NEOX_STYLE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Rows of queries or keys, rotated, in their own dtype: [n, HEAD_BLOCK], zero where masked.

    Products are in float32 and rounded once.
    """
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    rows = tl.load(row_ptr[:, None] + channel, mask=is_row[:, None] & (channel < HEAD_SIZE), other=0.0)
    if cos_sin_ptr is not None:
        HALF: tl.constexpr = ROTARY_DIM // 2
        if IS_NEOX_STYLE:
            is_first = channel < HALF
            pair = channel % HALF
            other = tl.where(is_first, channel + HALF, channel - HALF)
        else:
            is_first = channel % 2 == 0
            pair = channel // 2
            other = channel ^ 1
        is_rotated = channel < ROTARY_DIM
        others = tl.load(row_ptr[:, None] + other, mask=is_row[:, None] & is_rotated, other=0.0)
        angle_ptr = cos_sin_ptr + position[:, None] * ROTARY_DIM + pair
        cosine = tl.load(angle_ptr, mask=is_rotated, other=1.0).to(tl.float32)
        sine = tl.load(angle_ptr + HALF, mask=is_rotated, other=0.0).to(tl.float32)
        turned = rows.to(tl.float32) * cosine + others.to(tl.float32) * tl.where(is_first, -sine, sine)
        rows = turned.to(rows.dtype)
    return rows
