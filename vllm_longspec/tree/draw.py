# SPDX-License-Identifier: Apache-2.0
"""Draws from what top-k, top-p and min-p leave, without filtering every row (docs/design.md#draws-without-filtering).

vLLM's filter finds the exact logit at which a row is cut. A draw does not need it: a token that is certainly above the
cut and has the greatest noised logit of all tokens that may be above it is what a filtered row would have drawn. The
cut is enclosed by counts and sums of probabilities above a few thresholds, over all rows at once and only where a row
can be cut. The bounds allow for what vLLM's kernels round. If the greatest noised logit is between the bounds, and not
alone there, the draw is undecided, and vLLM's own filter settles it, for rows that the walk depends on.

Everything is relative to a row's highest logit, whose probability counts as 1.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax, gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.min_p import apply_min_p
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_longspec.interpreter import interpreting

# Tokens whose maximum is known, so that they can be left out. vLLM's draw has blocks of as many.
SLICE = 1024
# Of a program.
SLICES = 8
# Thresholds of a round. In two rounds a range of 15 nats is narrowed down to 0.06.
_RUNGS = tl.constexpr(16)
# vLLM's search for the cut of top-p ends after 18 halvings of the range of probabilities: twice what then remains.
_PROBABILITY_SLACK = tl.constexpr(2.0**-17)
# Its other kernel ends after 5 rounds that divide the logarithm of the range, at most 69, by 9.
_TOP_P_SLACK = tl.constexpr(2e-3)
# Rounding of logits and of the searches among them, to which that of large logits is added.
_LOGIT_SLACK = tl.constexpr(1e-3)
_RELATIVE_SLACK = tl.constexpr(1e-6)
# Relative rounding of sums of probabilities, in any order.
_SUM_SLACK = tl.constexpr(1e-4)
# Below a row's highest logit, where nothing tells how low the cut of top-k can be.
_LOWEST = tl.constexpr(-40.0)
# Greater than any vocabulary, for rows without top-k.
_NO_TOP_K = tl.constexpr(1 << 30)

# Of a row's bounds.
_FIELDS = tl.constexpr(9)


def draws_without_filtering(
    sampler: Sampler,
    idx_mapping_np: np.ndarray,  # [num_reqs] req_state_idx
    return_processed: bool,  # whether the filtered logits are asked for
) -> bool:
    """Whether `FilteredDraw` replaces `sampler.sample` for some requests."""
    is_random = bool(np.any(sampler.sampling_states.temperature.np[idx_mapping_np] != 0.0))
    has_own_draw = sampler.use_flashinfer or sampler.use_xpu_sampler
    # In the interpreter a program takes milliseconds.
    return is_random and not (return_processed or has_own_draw or interpreting())


def _changes_logits(sampler: Sampler, idx_mapping_np: np.ndarray) -> bool:
    """Whether more than temperature, min-p, top-k and top-p lies between logits and draws of some request."""
    thinking = sampler.thinking_budget_state
    if thinking.enabled and np.any(thinking.use_thinking_budget[idx_mapping_np]):
        return True
    for processor in sampler.logits_processors:
        if isinstance(processor, LogitBiasState):
            changes = bool(np.any(processor.use_logit_bias[idx_mapping_np]))
        elif isinstance(processor, PenaltiesState):
            changes = bool(np.any(processor.use_penalty[idx_mapping_np]))
        elif isinstance(processor, BadWordsState):
            changes = bool(np.any(processor.num_bad_words.np[idx_mapping_np]))
        else:
            changes = True
        if changes:
            return True
    return False


class Rows(NamedTuple):
    """The rows of a step to draw from."""

    logits: torch.Tensor  # [num_rows, vocab_size]
    expanded_idx_mapping: torch.Tensor  # [num_rows] req_state_idx
    positions: torch.Tensor  # int64 [num_rows]
    is_scaled: bool  # whether the logits are divided by the temperature, and cut by min-p


def rows_to_draw(
    sampler: Sampler,
    logits: torch.Tensor,  # [num_rows, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_rows] req_state_idx
    idx_mapping: torch.Tensor,
    idx_mapping_np: np.ndarray,  # [num_reqs] req_state_idx
    positions: torch.Tensor,  # int64 [num_rows]
    *others: Any,
) -> Rows:
    """The rows that `sampler.sample` would sample with these arguments, as they come if that is enough."""
    is_scaled = _changes_logits(sampler, idx_mapping_np)
    if is_scaled:
        arguments = (logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, positions, *others)
        logits = partial(sampler.apply_sampling_params, skip_top_k_top_p=True)(*arguments)
    return Rows(logits, expanded_idx_mapping, positions, is_scaled)


class FilteredDraw:
    """One draw from every row of some requests.

    `sampled`, int64 [num_rows], is what vLLM's sampler draws where `undecided`, int8 [num_rows], is 0. `settle` makes
    it so for the rows that a walk has come to. Nothing is ever undecided, and `undecided` is None, if no request has
    top-k, top-p or min-p.
    """

    def __init__(
        self,
        sampler: Sampler,
        rows: Rows,
        idx_mapping_np: np.ndarray,  # [num_reqs] req_state_idx of the requests that the rows belong to
    ):
        self.states = states = sampler.sampling_states
        self.use_fp64 = sampler.use_fp64_gumbel
        self.rows = rows
        logits = rows.logits
        top_k = states.top_k.np[idx_mapping_np]
        self.has_top_k = bool(np.any(top_k != states.vocab_size))
        self.has_top_p = bool(np.any(states.top_p.np[idx_mapping_np] != 1.0))
        self.has_min_p = not rows.is_scaled and bool(np.any(states.min_p.np[idx_mapping_np] != 0.0))
        num_rows, self.vocab_size = logits.shape
        self.num_slices = triton.cdiv(self.vocab_size, SLICE)
        self.grid = (num_rows, triton.cdiv(self.num_slices, SLICES))
        # Without a bound from the maxima of slices the first round knows little of the cut.
        self.num_rounds = 3 if np.any((top_k > self.num_slices) & (top_k < self.vocab_size)) else 2
        self.undecided: torch.Tensor | None = None
        if self.has_top_k or self.has_top_p or self.has_min_p:
            self.sampled = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
            self.undecided = torch.empty(num_rows, dtype=torch.int8, device=logits.device)
            self._draw_all()
        else:
            self.sampled = self._draw_without_filters()

    def warm_up(self, *walked: torch.Tensor) -> None:
        """Compiles all kernels for rows like these; takes the arguments of `settle`."""
        self.settle(*walked)
        self._draw_without_filters()

    def settle(
        self,
        cu_num_logits: torch.Tensor,  # int32 [num_reqs + 1]
        path_rows: torch.Tensor,  # int32 [num_reqs, width] of a walk over `sampled`
        num_emitted: torch.Tensor,  # int32 [num_reqs]
    ) -> None:
        """Draws the undecided rows of requests whose walk came to such a row from what vLLM's own filter leaves.

        The walk may then take another way, and rows off it are settled too. Nothing happens if no walk did.
        """
        assert self.undecided is not None
        num_rows, states = len(self.sampled), self.states
        due = torch.zeros_like(self.undecided)
        top_k = torch.empty(num_rows, dtype=torch.int32, device=due.device)
        top_p, min_p = torch.empty_like(top_k, dtype=torch.float32), torch.empty_like(top_k, dtype=torch.float32)
        _rows_to_filter_kernel[(len(num_emitted),)](
            self.undecided,
            cu_num_logits,
            path_rows,
            path_rows.stride(0),
            num_emitted,
            self.rows.expanded_idx_mapping,
            states.top_k.gpu,
            states.top_p.gpu,
            states.min_p.gpu,
            due,
            top_k,
            top_p,
            min_p,
            self.vocab_size,
            PATH_BLOCK=triton.next_power_of_2(path_rows.shape[1]),
            ROW_BLOCK=128,
        )
        # Rows that are not due are neither written nor read.
        logits = torch.empty(num_rows, self.vocab_size, device=due.device)
        _copy_scaled_kernel[self.grid](
            self.rows.logits,
            self.rows.logits.stride(0),
            self.rows.expanded_idx_mapping,
            states.temperature.gpu,
            due,
            logits,
            self.vocab_size,
            IS_SCALED=self.rows.is_scaled,
            BLOCK=SLICE * SLICES,
        )
        if self.has_min_p:
            apply_min_p(logits, torch.arange(num_rows, device=due.device), min_p)
        logits = apply_top_k_top_p(logits, top_k if self.has_top_k else None, top_p if self.has_top_p else None)
        self._draw(self.rows._replace(logits=logits, is_scaled=True), due, None)

    def _draw_without_filters(self) -> torch.Tensor:
        return gumbel_sample(
            self.rows.logits,
            self.rows.expanded_idx_mapping,
            self.states.temperature.gpu,
            self.states.seeds.gpu,
            self.rows.positions,
            apply_temperature=not self.rows.is_scaled,
            is_drafting=False,
            use_fp64=self.use_fp64,
        )

    def _draw_all(self) -> None:
        rows, states = self.rows, self.states
        num_rows, num_chunks = self.grid
        device = rows.logits.device
        slices = torch.empty(2, num_rows, self.num_slices, device=device)
        # The highest logits, and sums of exp(logit - highest logit).
        tops = torch.empty(2, num_rows, device=device)
        # Before each round, and what the round counts.
        bounds = torch.empty(self.num_rounds, num_rows, _FIELDS.value, device=device)
        above = torch.empty(self.num_rounds, 2, num_rows, num_chunks, _RUNGS.value, device=device)
        filters = (
            rows.expanded_idx_mapping,
            states.temperature.gpu,
            states.top_k.gpu,
            states.top_p.gpu,
            None if rows.is_scaled else states.min_p.gpu,
        )
        _weigh_slices_kernel[self.grid](
            rows.logits,
            rows.logits.stride(0),
            *filters,
            slices,
            self.vocab_size,
            self.num_slices,
            IS_SCALED=rows.is_scaled,
            SLICE=SLICE,
            SLICES=SLICES,
            num_warps=8,
        )
        _first_bounds_kernel[(num_rows,)](
            *filters,
            slices,
            tops,
            bounds[0],
            self.vocab_size,
            self.num_slices,
            SLICES_BLOCK=triton.next_power_of_2(self.num_slices),
            num_warps=4,
        )
        for index in range(self.num_rounds):
            _count_above_kernel[self.grid](
                rows.logits,
                rows.logits.stride(0),
                *filters,
                slices,
                tops,
                bounds[max(index - 1, 0)],
                above[index - 1] if index > 0 else None,
                bounds[index],
                above[index],
                self.vocab_size,
                self.num_slices,
                IS_FIRST=index < 2,
                IS_SCALED=rows.is_scaled,
                SLICE=SLICE,
                SLICES=SLICES,
                CHUNKS_BLOCK=triton.next_power_of_2(num_chunks),
                num_warps=8,
            )
        self._draw(rows, None, (slices, tops, bounds[-1], above[-1]))

    def _draw(
        self,
        rows: Rows,
        due: torch.Tensor | None,  # int8 [num_rows] which rows are drawn; None for all
        cut: tuple[torch.Tensor, ...] | None,  # what `_draw_all` knows of the cuts; None if the rows are filtered
    ) -> None:
        states = self.states
        num_rows, num_chunks = self.grid
        device = rows.logits.device
        dtype = torch.float64 if self.use_fp64 else torch.float32
        best = torch.empty(num_rows, num_chunks, dtype=dtype, device=device)
        best_tokens = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
        # The best tokens' logits, and how many tokens are between the bounds of the cut.
        seen = torch.empty(2, num_rows, num_chunks, device=device)
        # Logits above the first are not cut; whether the only token between the bounds is not cut either.
        verdicts = torch.empty(num_rows, 3, device=device)
        slices, tops, bounds, above = cut if cut is not None else (None,) * 4
        filters = (
            rows.expanded_idx_mapping,
            states.temperature.gpu,
            states.top_k.gpu,
            states.top_p.gpu,
            None if rows.is_scaled else states.min_p.gpu,
        )
        chunks_block = triton.next_power_of_2(num_chunks)
        _draw_kernel[self.grid](
            rows.logits,
            rows.logits.stride(0),
            *filters,
            states.seeds.gpu,
            rows.positions,
            due,
            slices,
            tops,
            bounds,
            above,
            best,
            best_tokens,
            seen,
            verdicts,
            self.vocab_size,
            self.num_slices,
            IS_SCALED=rows.is_scaled,
            USE_FP64=self.use_fp64,
            SLICE=SLICE,
            SLICES=SLICES,
            CHUNKS_BLOCK=chunks_block,
            num_warps=8,
        )
        _decide_kernel[(num_rows,)](
            best,
            best_tokens,
            seen,
            verdicts,
            due,
            self.sampled,
            self.undecided,
            num_chunks,
            CHUNKS_BLOCK=chunks_block,
            num_warps=1,
        )


@triton.jit
def _filters(row, mapping_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, IS_SCALED: tl.constexpr):
    """Temperature by which the logits are to be divided, top-k (`_NO_TOP_K` for none), top-p and min-p of a row."""
    req_state_idx = tl.load(mapping_ptr + row).to(tl.int64)
    temperature = 1.0
    if not IS_SCALED:
        temperature = tl.load(temperature_ptr + req_state_idx)
        # vLLM divides by neither.
        temperature = tl.where(temperature == 0.0, 1.0, temperature)
    top_k = tl.load(top_k_ptr + req_state_idx)
    top_k = tl.where(top_k < vocab_size, top_k, _NO_TOP_K)
    top_p = tl.load(top_p_ptr + req_state_idx)
    min_p = 0.0
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + req_state_idx)
    return temperature, top_k, top_p, min_p


@triton.jit
def _scaled_logits(logits_ptr, token, mask, temperature):
    """As vLLM's temperature kernel, bit for bit; -inf elsewhere."""
    logits = tl.load(logits_ptr + token, mask=mask, other=float("-inf")).to(tl.float32)
    if temperature != 1.0:
        logits = logits / temperature
    return logits


@triton.jit
def _min_p_threshold(top, min_p):
    """As in vLLM's min-p kernel: logits below are cut."""
    threshold = float("-inf")
    if min_p > 0.0:
        threshold = top + tl.log(min_p)
    return threshold


@triton.jit
def _weigh_slices_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    mapping_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    slices_ptr,  # [2, num_rows, num_slices] maximum, sum of exp(logit - maximum)
    vocab_size,
    num_slices,
    IS_SCALED: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, min_p = _filters(
        row, mapping_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, IS_SCALED
    )
    if (top_k == _NO_TOP_K) & (top_p >= 1.0) & (min_p == 0.0):
        return
    index = tl.program_id(1) * SLICES + tl.arange(0, SLICES)
    token = index[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    logits = _scaled_logits(logits_ptr + row * logits_stride, token, token < vocab_size, temperature)
    maximum = tl.max(logits, axis=1)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(logits - base[:, None]), axis=1)
    slices_ptr += row * num_slices
    tl.store(slices_ptr + index, maximum, mask=index < num_slices)
    tl.store(slices_ptr + tl.num_programs(0) * num_slices + index, total, mask=index < num_slices)


@triton.jit
def _first_bounds_kernel(
    mapping_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    slices_ptr,
    tops_ptr,  # [2, num_rows] written: highest logit, sum of exp(logit - highest logit)
    bounds_ptr,  # [num_rows, _FIELDS] written
    vocab_size,
    num_slices,
    SLICES_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    _, top_k, top_p, min_p = _filters(
        row, mapping_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, True
    )
    if (top_k == _NO_TOP_K) & (top_p >= 1.0) & (min_p == 0.0):
        return
    index = tl.arange(0, SLICES_BLOCK)
    slices_ptr += row * num_slices
    maxima = tl.load(slices_ptr + index, mask=index < num_slices, other=float("-inf"))
    sums = tl.load(slices_ptr + tl.num_programs(0) * num_slices + index, mask=index < num_slices, other=0.0)
    top = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - top), axis=0)
    # Everything up to `floor` is cut; the cut is above `low`, or there is nothing to be known about it.
    floor = float("-inf")
    low = _LOWEST
    if top_k < _NO_TOP_K:
        # The k-th highest token is not below the k-th highest maximum, which is -inf if there are fewer.
        highest_first = tl.sort(maxima, descending=True)
        highest = tl.max(tl.where(index == top_k - 1, highest_first, float("-inf")), axis=0)
        if (highest > float("-inf")) & (highest >= _min_p_threshold(top, min_p)):
            floor = highest - top - _LOGIT_SLACK
            low = floor
    else:
        if top_p < 1.0:
            # Tokens below this have less than 1 - top_p together.
            low = tl.log((1.0 - top_p) * total / vocab_size) - 0.1
    if min_p > 0.0:
        low = tl.maximum(low, tl.log(min_p) - _LOGIT_SLACK)
    low = tl.minimum(low, -_LOGIT_SLACK)

    tl.store(tops_ptr + row, top)
    tl.store(tops_ptr + tl.num_programs(0) + row, total)
    bounds_ptr += row * _FIELDS
    _store_bounds(bounds_ptr, floor, low, float("-inf"), 0.0, 0.0, 0.0, total, float("-inf"), 0.0)


@triton.jit
def _store_bounds(bounds_ptr, floor, low, k_low, k_high, count, inside, outside, p_low, p_high):
    """What is known of a row's cuts.

    The k-th highest logit is above `k_low` and not above `k_high`. `count` logits are above the latter, with a mass
    (the sum of exp(logit - highest logit)) of `inside`, and `outside` is not less than the mass of the k highest ones.
    The lowest logit that top-p leaves is above `p_low` and not above `p_high`. `floor` and `low` are those of
    `_first_bounds_kernel`.
    """
    tl.store(bounds_ptr, floor)
    tl.store(bounds_ptr + 1, low)
    tl.store(bounds_ptr + 2, k_low)
    tl.store(bounds_ptr + 3, k_high)
    tl.store(bounds_ptr + 4, count)
    tl.store(bounds_ptr + 5, inside)
    tl.store(bounds_ptr + 6, outside)
    tl.store(bounds_ptr + 7, p_low)
    tl.store(bounds_ptr + 8, p_high)


@triton.jit
def _rungs(floor, low, k_low, k_high, p_low, p_high, top_p, IS_FIRST: tl.constexpr):
    """The thresholds of a round, float32 [_RUNGS], from the bounds before it."""
    rung = tl.arange(0, _RUNGS)
    if IS_FIRST:
        share = (rung - 1).to(tl.float32) / (_RUNGS - 1)
        rungs = tl.where(rung == 0, floor, low * (1.0 - share))
    else:
        # With top-k and top-p, half of them for each.
        num_of_k = tl.where(top_p < 1.0, _RUNGS // 2, _RUNGS)
        num_of_k = tl.where(k_low > float("-inf"), num_of_k, 0)
        of_k = tl.where(num_of_k > 0, k_low, 0.0)
        k_range = tl.where(num_of_k > 0, k_high - of_k, 0.0)
        of_p = tl.maximum(p_low, k_low)
        of_p = tl.where(of_p > float("-inf"), of_p, tl.minimum(low, p_high))
        k_share = rung.to(tl.float32) / tl.maximum(num_of_k, 1)
        p_share = tl.maximum(rung - num_of_k, 0).to(tl.float32) / tl.maximum(_RUNGS - num_of_k, 1)
        rungs = tl.where(rung < num_of_k, of_k + k_range * k_share, of_p + (p_high - of_p) * p_share)
    return rungs


@triton.jit
def _narrowed(bounds_ptr, above_ptr, top_k, top_p, num_chunks, IS_FIRST: tl.constexpr, CHUNKS_BLOCK: tl.constexpr):
    """A row's bounds after a round, as `_store_bounds` takes them.

    `bounds_ptr` is at the row's bounds before the round, `above_ptr` at the row's part of what the round counted.
    """
    rung = tl.arange(0, _RUNGS)
    chunk = tl.arange(0, CHUNKS_BLOCK)
    k_low = tl.load(bounds_ptr + 2)
    k_high = tl.load(bounds_ptr + 3)
    p_low = tl.load(bounds_ptr + 7)
    p_high = tl.load(bounds_ptr + 8)
    rungs = _rungs(tl.load(bounds_ptr), tl.load(bounds_ptr + 1), k_low, k_high, p_low, p_high, top_p, IS_FIRST)
    offsets = chunk[:, None] * _RUNGS + rung[None, :]
    is_chunk = (chunk < num_chunks)[:, None]
    counts = tl.sum(tl.load(above_ptr + offsets, mask=is_chunk, other=0.0), axis=0)
    above_ptr += tl.num_programs(0).to(tl.int64) * num_chunks * _RUNGS
    masses = tl.sum(tl.load(above_ptr + offsets, mask=is_chunk, other=0.0), axis=0)

    is_low = counts >= top_k
    k_low = tl.maximum(k_low, tl.max(tl.where(is_low, rungs, float("-inf")), axis=0))
    k_high = tl.minimum(k_high, tl.min(tl.where(is_low, float("inf"), rungs), axis=0))
    count = tl.maximum(tl.load(bounds_ptr + 4), tl.max(tl.where(is_low, 0.0, counts), axis=0))
    inside = tl.maximum(tl.load(bounds_ptr + 5), tl.max(tl.where(is_low, 0.0, masses), axis=0))
    outside = tl.minimum(tl.load(bounds_ptr + 6), tl.min(tl.where(is_low, masses, float("inf")), axis=0))
    if top_p < 1.0:
        # The other tokens up to the k-th are above `k_low`.
        least = inside + tl.maximum(top_k - count, 0.0) * tl.exp(k_low)
        is_low = masses >= top_p * outside * (1.0 + _SUM_SLACK)
        p_low = tl.maximum(p_low, tl.max(tl.where(is_low, rungs, float("-inf")), axis=0))
        is_high = masses < top_p * least * (1.0 - _SUM_SLACK)
        p_high = tl.minimum(p_high, tl.min(tl.where(is_high, rungs, float("inf")), axis=0))
    return k_low, k_high, count, inside, outside, p_low, p_high


@triton.jit
def _count_above_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    mapping_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    slices_ptr,
    tops_ptr,
    bounds_ptr,  # [num_rows, _FIELDS] before the last round; of the first round if it is this one
    above_ptr,  # [2, num_rows, num_chunks, _RUNGS] what the last round counted; None if this is the first
    new_bounds_ptr,  # [num_rows, _FIELDS] written, but for the first round
    # [2, num_rows, num_chunks, _RUNGS] written: number (for top-k) and mass (for top-p) of logits above each threshold
    new_above_ptr,
    vocab_size,
    num_slices,
    IS_FIRST: tl.constexpr,  # whether the last round, or this one, is the first
    IS_SCALED: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature, top_k, top_p, min_p = _filters(
        row, mapping_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, IS_SCALED
    )
    if (top_k == _NO_TOP_K) & (top_p >= 1.0):
        return
    bounds_ptr += row * _FIELDS
    top = tl.load(tops_ptr + row)
    floor = tl.load(bounds_ptr)
    low = tl.load(bounds_ptr + 1)
    if above_ptr is None:
        rungs = _rungs(floor, low, 0.0, 0.0, 0.0, 0.0, top_p, True)
    else:
        k_low, k_high, count, inside, outside, p_low, p_high = _narrowed(
            bounds_ptr, above_ptr + row * num_chunks * _RUNGS, top_k, top_p, num_chunks, IS_FIRST, CHUNKS_BLOCK
        )
        rungs = _rungs(floor, low, k_low, k_high, p_low, p_high, top_p, False)
        if chunk == 0:
            new_bounds_ptr += row * _FIELDS
            _store_bounds(new_bounds_ptr, floor, low, k_low, k_high, count, inside, outside, p_low, p_high)
    lowest = tl.min(rungs, axis=0)
    threshold = _min_p_threshold(top, min_p)

    counts = tl.zeros([_RUNGS], tl.float32)
    masses = tl.zeros([_RUNGS], tl.float32)
    for index in range(chunk * SLICES, tl.minimum((chunk + 1) * SLICES, num_slices)):
        maximum = tl.load(slices_ptr + row * num_slices + index)
        if (maximum - top > lowest) & (maximum >= threshold):
            token = index * SLICE + tl.arange(0, SLICE)
            logits = _scaled_logits(logits_ptr + row * logits_stride, token, token < vocab_size, temperature)
            logits = tl.where(logits < threshold, float("-inf"), logits) - top
            is_above = logits[None, :] > rungs[:, None]
            if top_k < _NO_TOP_K:
                counts += tl.sum(is_above.to(tl.float32), axis=1)
            if top_p < 1.0:
                masses += tl.sum(tl.where(is_above, tl.exp(logits)[None, :], 0.0), axis=1)
    new_above_ptr += (row * num_chunks + chunk) * _RUNGS + tl.arange(0, _RUNGS)
    tl.store(new_above_ptr, counts)
    tl.store(new_above_ptr + num_rows * num_chunks * _RUNGS, masses)


@triton.jit
def _bounds_of_cut(top, bounds_ptr, above_ptr, top_k, top_p, num_chunks, CHUNKS_BLOCK: tl.constexpr):
    """After all rounds: vLLM cuts no logit above `high`, and every one up to `low`.

    Returns low, high, and whether a logit is not cut if it is the only one between them.
    """
    k_low, k_high, _, _, _, p_low, p_high = _narrowed(
        bounds_ptr, above_ptr, top_k, top_p, num_chunks, False, CHUNKS_BLOCK
    )
    slack = _LOGIT_SLACK + _RELATIVE_SLACK * tl.abs(top)
    low = k_low - slack
    high = k_high + slack
    keeps_single = top_k < _NO_TOP_K
    if top_p < 1.0:
        # vLLM finds the lowest logit that top-p leaves if the next one is well below. Where top-k cuts in between, its
        # search begins at that cut, which may be anywhere between two logits.
        keeps_single = (top_k == _NO_TOP_K) | (p_low >= k_high)
        high = tl.log(tl.exp(p_high) + _PROBABILITY_SLACK) + slack
        probability = tl.exp(p_low) - _PROBABILITY_SLACK
        if probability > 0.0:
            low = tl.maximum(low, tl.log(probability) - _TOP_P_SLACK - slack)
    return low, high, keeps_single


@triton.jit
def _draw_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    mapping_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    due_ptr,  # int8 [num_rows] or None
    slices_ptr,  # None if the logits are filtered
    tops_ptr,
    bounds_ptr,
    above_ptr,
    best_ptr,  # [num_rows, num_chunks] written: the greatest noised logit
    best_tokens_ptr,  # [num_rows, num_chunks] written: the token it is of
    seen_ptr,  # [2, num_rows, num_chunks] written: that token's logit; number of logits between the bounds
    verdicts_ptr,  # [num_rows, 3] written: upper bound; whether a single logit is not cut; whether there is a filter
    vocab_size,
    num_slices,
    IS_SCALED: tl.constexpr,
    USE_FP64: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    # Triton reads a pointer that is None unless the conditions are nested.
    if due_ptr is not None:  # noqa: SIM102
        if tl.load(due_ptr + row) == 0:
            return
    scale, top_k, top_p, min_p = _filters(
        row, mapping_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size, IS_SCALED
    )
    req_state_idx = tl.load(mapping_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + req_state_idx)
    seed = tl.load(seeds_ptr + req_state_idx)
    position = tl.load(positions_ptr + row)

    top = 0.0
    low = float("-inf")
    high = float("-inf")
    keeps_single = False
    threshold = float("-inf")
    is_cut = False
    has_maxima = False
    if slices_ptr is not None:
        has_maxima = (top_k < _NO_TOP_K) | (top_p < 1.0) | (min_p > 0.0)
        if has_maxima:
            top = tl.load(tops_ptr + row)
            threshold = _min_p_threshold(top, min_p)
            # Not if there are NaNs, infinite logits, or none that is allowed.
            total = tl.load(tops_ptr + num_rows + row)
            if not ((total > 0.0) & (total < float("inf"))):
                high = float("inf")
                is_cut = True
        if (top_k < _NO_TOP_K) | (top_p < 1.0):
            is_cut = True
            if high != float("inf"):
                low, high, keeps_single = _bounds_of_cut(
                    top,
                    bounds_ptr + row * _FIELDS,
                    above_ptr + row * num_chunks * _RUNGS,
                    top_k,
                    top_p,
                    num_chunks,
                    CHUNKS_BLOCK,
                )
    if chunk == 0:
        tl.store(verdicts_ptr + row * 3, high)
        tl.store(verdicts_ptr + row * 3 + 1, tl.where(keeps_single, 1.0, 0.0))
        tl.store(verdicts_ptr + row * 3 + 2, tl.where(is_cut, 1.0, 0.0))

    best = tl.full([], float("-inf"), tl.float64 if USE_FP64 else tl.float32)
    best_token = chunk * SLICES * SLICE
    best_logit = float("-inf")
    num_between = 0.0
    for index in range(chunk * SLICES, tl.minimum((chunk + 1) * SLICES, num_slices)):
        is_possible = True
        if slices_ptr is not None:  # noqa: SIM102
            if has_maxima:
                maximum = tl.load(slices_ptr + row * num_slices + index)
                is_possible = (maximum - top > low) & (maximum >= threshold)
        if is_possible:
            offset = tl.arange(0, SLICE)
            token = index * SLICE + offset
            mask = token < vocab_size
            logits = _scaled_logits(logits_ptr + row * logits_stride, token, mask, scale)
            if slices_ptr is not None:
                relative = logits - top
                is_left = (relative > low) & (logits >= threshold)
                logits = tl.where(is_left, logits, float("-inf"))
                num_between += tl.sum((is_left & (relative <= high)).to(tl.float32), axis=0)
            noised, winner = gumbel_noised_argmax(
                logits, token, mask, seed, position, temperature, False, USE_FP64, APPLY_TEMPERATURE=False
            )
            if noised > best:
                best = noised
                best_token = index * SLICE + winner
                best_logit = tl.max(tl.where(offset == winner, logits - top, float("-inf")), axis=0)
    place = row * num_chunks + chunk
    tl.store(best_ptr + place, best)
    tl.store(best_tokens_ptr + place, best_token)
    tl.store(seen_ptr + place, best_logit)
    tl.store(seen_ptr + num_rows * num_chunks + place, num_between)


@triton.jit
def _decide_kernel(
    best_ptr,
    best_tokens_ptr,
    seen_ptr,
    verdicts_ptr,
    due_ptr,  # int8 [num_rows] or None
    sampled_ptr,  # int64 [num_rows] written where due
    undecided_ptr,  # int8 [num_rows] likewise
    num_chunks,
    CHUNKS_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if due_ptr is not None:  # noqa: SIM102
        if tl.load(due_ptr + row) == 0:
            return
    chunk = tl.arange(0, CHUNKS_BLOCK)
    is_chunk = chunk < num_chunks
    place = row * num_chunks + chunk
    noised = tl.load(best_ptr + place, mask=is_chunk, other=float("-inf"))
    # Of equal ones the first, as in vLLM.
    _, winner = tl.max(noised, axis=0, return_indices=True)
    winner = tl.minimum(winner, num_chunks - 1)
    token = tl.load(best_tokens_ptr + row * num_chunks + winner)
    logit = tl.load(seen_ptr + row * num_chunks + winner)
    num_rows = tl.num_programs(0).to(tl.int64)
    between = tl.load(seen_ptr + num_rows * num_chunks + place, mask=is_chunk, other=0.0)
    high = tl.load(verdicts_ptr + row * 3)
    keeps_single = tl.load(verdicts_ptr + row * 3 + 1) != 0.0
    is_cut = tl.load(verdicts_ptr + row * 3 + 2) != 0.0
    is_decided = (logit > high) | (keeps_single & (tl.sum(between, axis=0) == 1.0))
    tl.store(sampled_ptr + row, token.to(tl.int64))
    tl.store(undecided_ptr + row, (is_cut & (is_decided == 0)).to(tl.int8))


@triton.jit
def _rows_to_filter_kernel(
    undecided_ptr,  # int8 [num_rows]
    cu_num_logits_ptr,  # int32 [num_reqs + 1]
    path_rows_ptr,  # int32 [num_reqs, width]
    path_rows_stride,
    num_emitted_ptr,  # int32 [num_reqs]
    mapping_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    due_ptr,  # int8 [num_rows] written, as are those below; not past the last request
    top_k_of_row_ptr,  # int32 [num_rows] none where a row is not due
    top_p_of_row_ptr,  # float32 [num_rows] likewise
    min_p_of_row_ptr,  # float32 [num_rows] likewise
    vocab_size,
    PATH_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    first = tl.load(cu_num_logits_ptr + request)
    end = tl.load(cu_num_logits_ptr + request + 1)
    step = tl.arange(0, PATH_BLOCK)
    is_on_path = step < tl.load(num_emitted_ptr + request)
    path_row = tl.load(path_rows_ptr + request * path_rows_stride + step, mask=is_on_path, other=0)
    is_due = tl.max(tl.load(undecided_ptr + first + path_row, mask=is_on_path, other=0), axis=0) != 0
    for start in range(first, end, ROW_BLOCK):
        row = start + tl.arange(0, ROW_BLOCK)
        mask = row < end
        due = tl.load(undecided_ptr + row, mask=mask, other=0)
        due = tl.where(is_due, due, tl.zeros_like(due))
        req_state_idx = tl.load(mapping_ptr + row, mask=mask, other=0).to(tl.int64)
        is_row = mask & (due != 0)
        tl.store(due_ptr + row, due, mask=mask)
        tl.store(top_k_of_row_ptr + row, tl.load(top_k_ptr + req_state_idx, mask=is_row, other=vocab_size), mask=mask)
        tl.store(top_p_of_row_ptr + row, tl.load(top_p_ptr + req_state_idx, mask=is_row, other=1.0), mask=mask)
        tl.store(min_p_of_row_ptr + row, tl.load(min_p_ptr + req_state_idx, mask=is_row, other=0.0), mask=mask)


@triton.jit
def _copy_scaled_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    mapping_ptr,
    temperature_ptr,
    due_ptr,  # int8 [num_rows]
    copy_ptr,  # float32 [num_rows, vocab_size] written where due
    vocab_size,
    IS_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(due_ptr + row) == 0:
        return
    temperature = 1.0
    if not IS_SCALED:
        temperature = tl.load(temperature_ptr + tl.load(mapping_ptr + row).to(tl.int64))
        temperature = tl.where(temperature == 0.0, 1.0, temperature)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = _scaled_logits(logits_ptr + row * logits_stride, token, token < vocab_size, temperature)
    tl.store(copy_ptr + row * vocab_size + token, logits, mask=token < vocab_size)
