# SPDX-License-Identifier: Apache-2.0
"""Attention of rows that each see an interval of keys: flex_attention on GPUs, chunks of rows on CPUs.

Packed samples, windows and withheld keys are all such intervals, since the keys of a sample follow each other. Kernels
for causal runs (SDPA, varlen functions) do not serve: depths are merged by the logarithms of sums, which need a
gradient, and flex_attention alone gives them one. The self-attention needs none, but its windows are short.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# Rows and keys of a block of flex_attention's masks.
BLOCK = 128
# Rows that a CPU attends with at a time.
_CHUNK = 256
# The logarithm of a sum over no key. Infinity would make gradients of what is made of it nan.
NOTHING = -1e30


class Intervals(NamedTuple):
    """Row i sees keys first[i] to end[i] - 1; none where both are equal."""

    first: Tensor  # int64 [num_rows]
    end: Tensor  # int64 [num_rows]


def interval_attention(
    queries: Tensor,  # [num_rows, num_heads, head_dim]
    keys: Tensor,  # [num_keys, num_kv_heads, head_dim]
    values: Tensor,  # [num_keys, num_kv_heads, head_dim]
    seen: Intervals,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention. Scores are divided by sqrt(head_dim) by default.

    Returns:
        [num_rows, num_heads, head_dim], zeros for a row that sees no key, and the logarithms of the sums of
        exponentiated scores, float32 or float64 [num_rows, num_heads], `NOTHING` for such a row.
    """
    if scale is None:
        scale = queries.shape[-1] ** -0.5
    attend = _flex if queries.is_cuda else _chunked
    return attend(queries, keys.to(queries.dtype), values.to(queries.dtype), seen, scale)


def _chunked(queries: Tensor, keys: Tensor, values: Tensor, seen: Intervals, scale: float) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    for chunk, first, end in zip(queries.split(_CHUNK), seen.first.split(_CHUNK), seen.end.split(_CHUNK), strict=True):
        # At least one key, so that nothing is empty.
        low = min(int(first.min()), len(keys) - 1)
        high = max(int(end.max()), low + 1)
        arguments = (chunk, keys[low:high], values[low:high], first - low, end - low, scale)
        # A chunk's weights are computed again in the backward pass: all of them would not fit for long samples.
        output, log_sum = (
            checkpoint(_dense, *arguments, use_reentrant=False) if torch.is_grad_enabled() else _dense(*arguments)
        )
        outputs.append(output)
        sums.append(log_sum)
    return torch.cat(outputs), torch.cat(sums)


def _dense(
    queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("rkgd,skd->rkgs", grouped, keys) * scale
    if scores.dtype != torch.float64:
        scores = scores.float()
    index = torch.arange(len(keys))
    hidden = (index < first[:, None]) | (index >= end[:, None])
    scores = scores.masked_fill(hidden[:, None, None], NOTHING)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum[..., None]).exp().masked_fill(hidden[:, None, None], 0.0)
    output = torch.einsum("rkgs,skd->rkgd", weights.to(values.dtype), values).reshape(rows, heads, head_dim)
    return output, log_sum.reshape(rows, heads).masked_fill((first >= end)[:, None], NOTHING)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Shapes that come often are worth kernels of their own; after so many PyTorch would no longer compile at all.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Uncompiled it holds all scores.
    return torch.compile(flex_attention)


def _padding(length: int) -> int:
    """To one of a few lengths, so that few kernels are compiled. Padding costs no work: no row sees it."""
    step = max(BLOCK, 1 << max(0, length.bit_length() - 3))
    return -length % step


def _flex(queries: Tensor, keys: Tensor, values: Tensor, seen: Intervals, scale: float) -> tuple[Tensor, Tensor]:
    rows = len(queries)
    # Added rows see nothing.
    first, end = (pad(bound, (0, _padding(rows))) for bound in seen)
    queries, keys, values = (
        pad(part, (0, 0, 0, 0, 0, _padding(len(part)))).transpose(0, 1)[None] for part in (queries, keys, values)
    )
    output, auxiliary = _compiled_flex()(
        queries,
        keys,
        values,
        block_mask=block_mask(first, end, keys.shape[2]),
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    output, log_sum = output[0].transpose(0, 1)[:rows], auxiliary.lse[0].transpose(0, 1)[:rows]
    nothing = (seen.first >= seen.end)[:, None]
    return output.masked_fill(nothing[..., None], 0.0), log_sum.masked_fill(nothing, NOTHING)


def block_mask(first: Tensor, end: Tensor, num_keys: int) -> BlockMask:
    """The mask of rows that see intervals, made of the bounds of blocks: not every row is compared with every key.

    Args:
        first, end: int64 [num_rows], as in `Intervals`; num_rows and num_keys are multiples of `BLOCK`
    """
    rows_first, rows_end = first.view(-1, BLOCK), end.view(-1, BLOCK)
    is_seeing = rows_first < rows_end
    low = rows_first.masked_fill(~is_seeing, num_keys).amin(1, keepdim=True)
    high = rows_end.masked_fill(~is_seeing, 0).amax(1, keepdim=True)
    starts = torch.arange(0, num_keys, BLOCK, device=first.device)
    # [row blocks, key blocks]
    touched = (starts < high) & (starts + BLOCK > low)
    whole = (rows_first.amax(1, keepdim=True) <= starts) & (rows_end.amin(1, keepdim=True) >= starts + BLOCK)
    whole &= is_seeing.all(1, keepdim=True)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None].contiguous()

    first, end = first.int(), end.int()

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (first[row] <= key) & (key < end[row])

    return BlockMask.from_kv_blocks(
        *ordered(touched & ~whole), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(first), num_keys)
    )
