# SPDX-License-Identifier: Apache-2.0
"""Losses between the draft's next-token distribution q and the target's p, fused with the head that both share.

    next_token   -log q(the token that follows)
    kl           sum p log(p / q)
    tv           1 - sum min(p, q), which is one less the probability that a drafted token is accepted
    lk           -log sum min(p, q)
    lk_hybrid    share * kl + (1 - share) * tv with share = exp(-3 * acceptance)

The last two are the LK losses of arXiv 2602.23881, which uses a decay of 3; the acceptance is a running estimate,
without gradient. Logits of a few rows exist at a time: their gradient with respect to the draft's hidden states is
computed with the loss.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# Columns of the statistics of each depth, sums over rows.
LOSS, ACCEPTED, AGREED = range(3)
_LK_DECAY = 3.0
# Logits of one chunk of rows, in float32, of the target and of all depths, take so much: on a GPU the head is worth
# reading for many rows at a time.
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_SMALLEST = 1e-20


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses in their sum."""

    next_token: float = 0.1
    kl: float = 0.9
    tv: float = 0.0
    lk: float = 0.0
    lk_hybrid: float = 0.0

    def __post_init__(self) -> None:
        weights = [getattr(self, each.name) for each in fields(self)]
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError("weights of losses are 0 or more, and one of them more than 0: see loss in the config")


def row_losses(
    draft: Tensor,  # float32 or float64 [depths, rows, vocab_size] logits
    target: Tensor,  # float32 or float64 [rows, vocab_size] logits
    labels: Tensor,  # int64 [rows]
    weights: LossWeights,
    acceptance: Tensor,  # float32 [depths], estimates
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, sum min(p, q), and whether both have the same most probable token, each [depths, rows]."""
    log_q, log_p = draft.log_softmax(-1), target.log_softmax(-1)
    p = log_p.exp()
    accepted = torch.minimum(log_q.exp(), p).sum(-1)
    loss = torch.zeros_like(accepted)
    if weights.next_token:
        label = labels[None, :, None].expand(len(log_q), -1, 1)
        loss = loss - weights.next_token * log_q.gather(-1, label)[..., 0]
    if weights.kl or weights.lk_hybrid:
        divergence = (p * (log_p - log_q)).sum(-1)
        share = (-_LK_DECAY * acceptance.to(loss.dtype)).exp()[:, None]
        loss = loss + weights.kl * divergence
        loss = loss + weights.lk_hybrid * (share * divergence + (1 - share) * (1 - accepted))
    if weights.tv:
        loss = loss + weights.tv * (1 - accepted)
    if weights.lk:
        loss = loss - weights.lk * accepted.clamp(min=_SMALLEST).log()
    agreed = (draft.argmax(-1) == target.argmax(-1)).to(loss.dtype)
    return loss, accepted.detach(), agreed


def draft_loss(
    hidden: Tensor,  # [depths, num_rows, hidden_size] of the draft, with gradient
    target_hidden: Tensor,  # [num_rows, hidden_size]
    labels: Tensor,  # int64 [num_rows]
    head: Tensor,  # [vocab_size, hidden_size], frozen
    scale: float,  # of logits
    depth_weights: Tensor,  # float32 [depths]
    acceptance: Tensor,  # float32 [depths], estimates
    weights: LossWeights,
    compiled: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over rows and depths of weighted losses, with gradient, and the statistics.

    Args:
        compiled: whether to fuse what is done with logits by torch.compile
        chunk: rows at a time; as many as `CHUNK_BYTES` hold by default

    Returns:
        float32 or float64 [], and of the same type [depths, 3] sums over rows by `LOSS`, `ACCEPTED`, `AGREED`
    """
    if chunk is None:
        chunk = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(head) * (len(hidden) + 1)))
    return _ChunkedLoss.apply(
        hidden, target_hidden, labels, head, scale, depth_weights, acceptance, weights, compiled, chunk
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target_hidden: Tensor,
        labels: Tensor,
        head: Tensor,
        scale: float,
        depth_weights: Tensor,
        acceptance: Tensor,
        weights: LossWeights,
        compiled: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        depths, num_rows, _ = hidden.shape
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        statistics = torch.zeros(depths, 3, dtype=wide, device=hidden.device)
        function = _compiled_losses() if compiled else row_losses
        chunk = min(chunk, num_rows)
        # The last chunk has as many rows as the others, so that there is one shape: some come again, and do not count.
        for start in range(0, num_rows, chunk):
            begin = min(start, num_rows - chunk)
            counted = torch.ones(chunk, dtype=wide, device=hidden.device)
            counted[: start - begin] = 0
            rows = slice(begin, begin + chunk)
            target_logits = _logits(target_hidden[rows].to(head.dtype), head, scale, wide)
            with torch.enable_grad():
                part = hidden[:, rows].detach().requires_grad_(needs_gradient)
                logits = _logits(part.to(head.dtype), head, scale, wide)
                loss, accepted, agreed = function(logits, target_logits, labels[rows], weights, acceptance)
                weighted = ((loss * counted).sum(1) * depth_weights.to(wide)).sum()
            if gradient is not None:
                (of_part,) = torch.autograd.grad(weighted, part)
                gradient[:, start : begin + chunk] = of_part[:, start - begin :]
            total += weighted.detach()
            statistics += torch.stack([(each.detach() * counted).sum(1) for each in (loss, accepted, agreed)], dim=1)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_total.to(gradient.dtype), *[None] * 9


def _logits(hidden: Tensor, head: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ head.T).to(dtype)
    return logits if scale == 1.0 else logits * scale


@functools.cache
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(row_losses)


def depth_weights(acceptance: Tensor, withheld: tuple[int, ...], expected: bool) -> Tensor:
    """What a row counts at each depth, 1 on average over all depths, however few of them are drawn.

    Args:
        acceptance: float32 [levels], estimates of what is accepted at depths 0, 1, ..
        expected: by the probability that a tree's path gets to this depth; otherwise equally
    """
    if not expected:
        return torch.ones(len(withheld), device=acceptance.device)
    reached = torch.cat((torch.ones_like(acceptance[:1]), acceptance[:-1].cumprod(0)))
    return at_depths(reached, withheld) / reached.mean()


def at_depths(values: Tensor, withheld: tuple[int, ...]) -> Tensor:
    """Of `values` [levels] those of the drawn depths, without an index that would be copied to the device."""
    return torch.stack([values[number - 1] for number in withheld])
