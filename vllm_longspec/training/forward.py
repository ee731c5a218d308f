# SPDX-License-Identifier: Apache-2.0
"""The draft at the supervised rows of packed samples, at several depths of a tree at once.

Self-attention keys and values depend on nothing but token and position, so only the rows and the tokens of their
windows are computed. A node at depth d sees the target's keys up to its root and without it: the last d + 1 of those
before the next token are withheld. What comes before the cross-attention is the same at all depths, and of the
cross-attention all but the last few keys.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_longspec.training.attention import Intervals, interval_attention
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer
from vllm_longspec.training.teachers import Lesson, Sample

# Rows times depths above which the MLP is computed by parts, and again in the backward pass.
RECOMPUTE_ABOVE = 1 << 16


class Layout(NamedTuple):
    """Where the rows of packed samples are, and what they see."""

    ids: Tensor  # int64 [num_window_tokens], of the tokens in any row's window
    positions: Tensor  # int64 [num_window_tokens]
    rows: Tensor | None  # int64 [num_rows], the rows among these tokens; None if they are all of them
    row_positions: Tensor  # int64 [num_rows]
    labels: Tensor  # int64 [num_rows], the tokens that follow
    window: Intervals  # of these tokens, that a row's self-attention sees
    # Of all tokens, from the first of a row's sample to the row itself. What is withheld is taken off the end.
    context: Intervals


class Packed(NamedTuple):
    """Lessons behind each other."""

    layout: Layout
    keys: Tensor  # [num_tokens, num_kv_heads, head_dim] of the target's last layer, rotated
    values: Tensor  # [num_tokens, num_kv_heads, head_dim]
    hidden: Tensor  # [num_rows, hidden_size], the target's, which its head multiplies


def lay_out(samples: Sequence[Sample]) -> Layout:
    """Computed on the CPU, so that no GPU waits for a number of rows. Raises ValueError without any row."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    starts = lengths.cumsum(0) - lengths
    ids = torch.cat([sample.input_ids for sample in samples])
    positions = torch.cat([sample.positions for sample in samples])
    rows = torch.cat([sample.rows + start for sample, start in zip(samples, starts.tolist(), strict=True)])
    if len(rows) == 0:
        raise ValueError("a batch has no supervised token: leave such samples out")
    owner = torch.arange(len(samples)).repeat_interleave(lengths)
    # Samples are so far apart that no window reaches into another one.
    apart = positions.max() + SELF_ATTENTION_WINDOW + 1
    places = positions + owner * apart
    first = torch.searchsorted(places, places[rows] - SELF_ATTENTION_WINDOW)
    context = Intervals(starts[owner[rows]], rows + 1)
    row_positions, labels = positions[rows], ids[rows + 1]
    begun = torch.zeros(len(ids) + 1, dtype=torch.int64)
    begun.index_add_(0, first, torch.ones_like(first))
    begun.index_add_(0, rows + 1, -torch.ones_like(rows))
    is_needed = begun.cumsum(0)[:-1] > 0
    # Index among the tokens that are needed.
    places = is_needed.cumsum(0) - 1
    within = Intervals(places[first], places[rows] + 1)
    is_dense = int(is_needed.sum()) == len(rows)
    return Layout(
        ids[is_needed], positions[is_needed], None if is_dense else places[rows], row_positions, labels, within, context
    )


def pack(lessons: Sequence[Lesson], layout: Layout, device: torch.device | str) -> Packed:
    """Args:
    layout: of the lessons' samples
    """

    def moved(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
            # A copy from pageable memory waits for the device.
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    window, context = (Intervals(*map(moved, bounds)) for bounds in (layout.window, layout.context))
    return Packed(
        Layout(
            moved(layout.ids),
            moved(layout.positions),
            None if layout.rows is None else moved(layout.rows),
            moved(layout.row_positions),
            moved(layout.labels),
            window,
            context,
        ),
        *(torch.cat([moved(getattr(lesson, name)) for lesson in lessons]) for name in ("keys", "values", "hidden")),
    )


def draft_hidden(
    glide: GlideLayer,
    embeddings: Tensor,  # [num_window_tokens, hidden_size] of `packed.layout.ids`
    packed: Packed,
    withheld: Sequence[int],
    recompute_above: int = RECOMPUTE_ABOVE,
) -> Tensor:
    """`GlideLayer.forward` of every row, for each number of withheld keys, of which 1 is the row's own.

    Args:
        withheld: increasing, from 1 on
        recompute_above: rows times depths above which the MLP is computed by parts. The backward pass then computes it
            again, in place of keeping what it needs of all rows

    Returns:
        [len(withheld), num_rows, hidden_size]
    """
    layout, added = packed.layout, glide.residual_multiplier
    residual = embeddings * glide.embedding_multiplier
    attention, normed = glide.self_attn, glide.input_layernorm(residual)
    keys, values = attention.split(attention.k_proj(normed)), attention.split(attention.v_proj(normed))
    keys = glide.rotate(keys[None], layout.positions[None])[0]
    if layout.rows is not None:
        residual, normed = residual[layout.rows], normed[layout.rows]
    positions = layout.row_positions[None]
    queries = glide.rotate(attention.split(attention.q_proj(normed))[None], positions)[0]
    attended, _ = interval_attention(queries, keys, values, layout.window, glide.scale)
    hidden = residual + added * attention.o_proj(attended.flatten(1).to(residual.dtype))

    queries = glide.cross_q(hidden[None], positions)[0]
    crosses = _at_depths(queries, packed, withheld, glide.scale)

    def finish(hidden: Tensor, cross: Tensor) -> Tensor:
        hidden = hidden + added * glide.cross_attn.o_proj(cross.flatten(-2).to(residual.dtype))
        return hidden + added * glide.mlp(glide.post_cross_attention_layernorm(hidden))

    if len(hidden) * len(withheld) <= recompute_above:
        return finish(hidden, torch.stack(crosses))
    by_part = functools.partial(checkpoint, finish, use_reentrant=False) if torch.is_grad_enabled() else finish
    return torch.stack(
        [
            torch.cat(
                [
                    by_part(*part)
                    for part in zip(hidden.split(recompute_above), cross.split(recompute_above), strict=True)
                ]
            )
            for cross in crosses
        ]
    )


def _at_depths(
    queries: Tensor,  # [num_rows, num_heads, head_dim]
    packed: Packed,
    withheld: Sequence[int],
    scale: float | None,
) -> list[Tensor]:
    """Attention to the target's keys with each number of them withheld, each [num_rows, num_heads, head_dim].

    Keys that are seen at all depths are attended to once; the few others, a row's own, are added one by one.
    """
    first, end = packed.layout.context
    # The row's own key is the first that is withheld.
    shared = Intervals(first, torch.maximum(first, end - withheld[-1]))
    output, log_sum = interval_attention(queries, packed.keys, packed.values, shared, scale)
    if len(withheld) == 1:
        return [output]
    rows, _, head_dim = queries.shape
    wide, kv_heads = log_sum.dtype, packed.keys.shape[1]
    # [rows, kv_heads, group, head_dim]; without the last for what belongs to a head
    grouped = queries.to(wide).reshape(rows, kv_heads, -1, head_dim)
    mixed, log_sum = output.to(wide).view_as(grouped), log_sum.view(rows, kv_heads, -1)
    factor = head_dim**-0.5 if scale is None else scale
    outputs = [output]
    for number in range(withheld[-1] - 1, withheld[0] - 1, -1):
        # The key that is seen with `number` withheld, and not with one more.
        index = end - 1 - number
        is_there = (index >= first)[:, None, None]
        index = index.clamp(min=0)
        key, value = packed.keys[index].to(wide)[:, :, None], packed.values[index].to(wide)[:, :, None]
        score = ((grouped * key).sum(-1) * factor).masked_fill(~is_there, NOTHING_THERE)
        total = torch.logaddexp(log_sum, score)
        share = (score - total).exp().masked_fill(~is_there, 0.0)[..., None]
        mixed, log_sum = mixed + share * (value - mixed), total
        if number in withheld:
            outputs.append(mixed.to(queries.dtype).view_as(output))
    return outputs[::-1]


# Below `attention.NOTHING`, so that it adds nothing to a sum over no key.
NOTHING_THERE = -2e30
