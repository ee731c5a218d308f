# SPDX-License-Identifier: Apache-2.0
"""Attention that several programs share, and the merge of what each of them has, with the rows quantised at once.

One program for all keys of a query takes them tile by tile. With few queries most of a GPU is idle meanwhile, so the
keys are split (Dao et al., "Flash-Decoding for long-context inference", 2023). The merge is in the kernel that the next
layer's input needs anyway if it is quantised. Splits are added up in their order: results do not differ between runs.
"""

from dataclasses import dataclass

import torch
from vllm import envs
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation, get_input_quant_key
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym
from vllm.triton_utils import tl, triton

from vllm_longspec.attention.tree import num_multiprocessors
from vllm_longspec.proposers.glide.fp8_inputs import MAX_ROW, empty_activation, quantise, quantised, row_scale

MAX_SPLITS = 8


@dataclass
class AttentionSplits:
    """What each split of the keys gives by itself."""

    # The mean of its values, 0 without any. It is rounded as the attention over all keys would be.
    values: torch.Tensor  # [num_splits, num_tokens, num_heads, head_size]
    # The log2 of its sum of weights exp(score), -inf without any.
    lse: torch.Tensor  # float32 [num_splits, num_tokens, num_heads]

    @property
    def shape(self) -> torch.Size:
        """Of the attention when it is merged: num_tokens, num_heads, head_size."""
        return self.values.shape[1:]


def choose_num_splits(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Splits of `num_tiles` tiles of keys, if `num_programs` would be without: a power of two.

    As many as run at once. One, which needs no merge, if the device is half busy without splits; so it is on a CPU. And
    where results may not depend on the batch.
    """
    num_splits = 1
    limit = num_multiprocessors(device)
    if 2 * num_programs >= limit or envs.VLLM_BATCH_INVARIANT:
        return num_splits
    while 2 * num_splits <= min(num_tiles, MAX_SPLITS) and 2 * num_splits * num_programs <= limit:
        num_splits *= 2
    return num_splits


def merge_splits(
    linear: LinearBase,
    attended: torch.Tensor | AttentionSplits,  # [..., num_heads, head_size]
) -> torch.Tensor | QuantizedActivation:  # [num_tokens, num_heads * head_size]
    """Attention, merged if it is split, as `linear` takes it: quantised or not."""
    if isinstance(attended, torch.Tensor):
        return quantise(linear, attended.reshape(-1, attended.shape[-2] * attended.shape[-1]))
    num_tokens, num_heads, head_size = attended.shape
    size, dtype, device = num_heads * head_size, attended.values.dtype, attended.values.device
    head_block, all_heads = triton.next_power_of_2(head_size), triton.next_power_of_2(num_heads)
    if get_input_quant_key(linear) == kFp8DynamicTokenSym and all_heads * head_block <= MAX_ROW:
        activation = empty_activation(num_tokens, size, dtype, device)
        _merge(attended, activation.data, activation.scale, all_heads, head_block)
        return activation
    rows = torch.empty(num_tokens, size, dtype=dtype, device=device)
    _merge(attended, rows, None, min(all_heads, max(1, 1024 // head_block)), head_block)
    return quantise(linear, rows)


def _merge(
    attended: AttentionSplits,
    rows: torch.Tensor,  # [num_tokens, num_heads * head_size], written
    scales: torch.Tensor | None,  # float32 [num_tokens, 1], written; None if rows are not to be quantised
    heads: int,  # of a program: with scales, all
    head_block: int,
) -> None:
    num_splits, num_tokens, num_heads, head_size = attended.values.shape
    assert num_splits <= MAX_SPLITS
    _merge_splits_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        attended.values,
        attended.lse,
        rows,
        scales,
        num_splits,
        num_tokens,
        num_heads,
        HEAD_SIZE=head_size,
        HEAD_BLOCK=head_block,
        HEADS=heads,
        MAX_SPLITS=MAX_SPLITS,
        # There are few programs, and each holds a part of all splits.
        num_warps=max(4, min(16, heads * head_block // 512)),
    )


# They differ between levels and batches and must not trigger recompilation.
@triton.jit(do_not_specialize=["num_splits", "num_tokens"])
def _merge_splits_kernel(
    values_ptr,  # [num_splits, num_tokens, num_heads, HEAD_SIZE]
    lse_ptr,  # float32 [num_splits, num_tokens, num_heads]
    rows_ptr,  # [num_tokens, num_heads * HEAD_SIZE]
    scales_ptr,  # float32 [num_tokens, 1], or None: rows are not quantised
    num_splits,
    num_tokens,
    num_heads,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    mask = is_head[:, None] & (channel < HEAD_SIZE)

    splits = tl.arange(0, MAX_SPLITS)[None, :]
    lse = tl.load(
        lse_ptr + (splits * num_tokens + token[:, None]) * num_heads + head[:, None],
        mask=is_head[:, None] & (splits < num_splits),
        other=float("-inf"),
    )
    highest = tl.max(lse, axis=1)
    # Padding may have seen no key.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(lse - reference[:, None]), axis=1)

    weighted = tl.zeros([HEADS, HEAD_BLOCK], tl.float32)
    # Unrolled, so that no split's load waits for another's.
    for split in tl.static_range(MAX_SPLITS):
        row = (split * num_tokens + token) * num_heads + head
        is_split = split < num_splits
        split_lse = tl.load(lse_ptr + row, mask=is_head & is_split, other=float("-inf"))
        values = tl.load(values_ptr + row[:, None] * HEAD_SIZE + channel, mask=mask & is_split, other=0.0)
        weighted += tl.exp2(split_lse - reference)[:, None] * values.to(tl.float32)

    value = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
    if scales_ptr is not None:
        scale = row_scale(tl.max(tl.abs(value), axis=1)[None, :])
        tl.store(scales_ptr + token, scale)
        value = quantised(value, scale)
    offset = (token * num_heads + head)[:, None] * HEAD_SIZE + channel
    tl.store(rows_ptr + offset, value.to(rows_ptr.dtype.element_ty), mask=mask)
