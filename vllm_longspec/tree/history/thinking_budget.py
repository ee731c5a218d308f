# SPDX-License-Identifier: Apache-2.0
"""Thinking budgets that count a node's ancestors, and find the marks of reasoning among them."""

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.thinking_budget import (
    _COLD_SCAN_BLOCK,
    ThinkingBudgetState,
    _update_committed_marker_cache_kernel,
)

from vllm_longspec.tree.history.paths import FollowsPaths, Paths, token_at


class PathThinkingBudgetState(FollowsPaths, ThinkingBudgetState):
    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        """Forces the end of reasoning in `logits`, float32 [num_logits, vocab_size], in place."""
        if not self.enabled or not np.any(self.use_thinking_budget[ctx.idx_mapping_np]):
            return
        self._find_emitted_marks(ctx.idx_mapping)
        apply_thinking_budget(
            logits,
            ctx.expanded_idx_mapping,
            self.paths(ctx),
            self.thinking_token_budget.gpu,
            self.req_states.all_token_ids.gpu,
            self.req_states.total_len.gpu,
            self.cached_last_start,
            self.cached_last_end,
            self.reasoning_start_token_ids,
            self.natural_reasoning_end_token_ids,
            self.reasoning_end_token_ids,
        )

    def _find_emitted_marks(self, idx_mapping: torch.Tensor) -> None:
        """Moves `cached_last_start` and `cached_last_end` on, with vLLM's own kernel: emitted tokens are no tree."""
        start_len, natural_end_len = len(self.reasoning_start_token_ids), len(self.natural_reasoning_end_token_ids)
        all_token_ids = self.req_states.all_token_ids.gpu
        _update_committed_marker_cache_kernel[(idx_mapping.shape[0],)](
            idx_mapping,
            self.thinking_token_budget.gpu,
            all_token_ids,
            all_token_ids.stride(0),
            self.req_states.total_len.gpu,
            self.cached_last_start,
            self.cached_last_end,
            self.cached_scan_pos,
            self.reasoning_start_token_ids,
            self.natural_reasoning_end_token_ids,
            START_LEN=start_len,
            NATURAL_END_LEN=natural_end_len,
            MAX_LEN=max(start_len, natural_end_len),
            BLOCK=_COLD_SCAN_BLOCK,
        )


def apply_thinking_budget(
    logits: torch.Tensor,  # float32 [num_logits, vocab_size], changed in place
    expanded_idx_mapping: torch.Tensor,  # [num_logits] req_state_idx
    paths: Paths,
    thinking_token_budget: torch.Tensor,  # int32 [max_num_reqs] -1 for none
    all_token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len]
    total_len: torch.Tensor,  # int32 [max_num_reqs] tokens of the prompt and emitted ones
    cached_last_start: torch.Tensor,  # int32 [max_num_reqs] where the last mark among those begins, -1 for none
    cached_last_end: torch.Tensor,  # int32 [max_num_reqs] likewise
    reasoning_start_token_ids: torch.Tensor,  # int32 [start_len]
    natural_reasoning_end_token_ids: torch.Tensor,  # int32 [natural_end_len] what ends reasoning
    reasoning_end_token_ids: torch.Tensor,  # int32 [end_len] what is forced
) -> None:
    """vLLM's function of this name, for rows that follow a path; emitted marks have been found."""
    _path_thinking_budget_kernel[(logits.shape[0],)](
        logits,
        logits.stride(0),
        expanded_idx_mapping,
        paths.tokens,
        paths.tokens.stride(0),
        paths.depths,
        thinking_token_budget,
        all_token_ids,
        all_token_ids.stride(0),
        total_len,
        cached_last_start,
        cached_last_end,
        reasoning_start_token_ids,
        natural_reasoning_end_token_ids,
        reasoning_end_token_ids,
        START_LEN=len(reasoning_start_token_ids),
        NATURAL_END_LEN=len(natural_reasoning_end_token_ids),
        END_LEN=len(reasoning_end_token_ids),
    )


@triton.jit
def _path_thinking_budget_kernel(
    logits_ptr,
    logits_stride,
    expanded_idx_mapping_ptr,
    path_tokens_ptr,
    path_tokens_stride,
    path_depths_ptr,
    thinking_token_budget_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    total_len_ptr,
    cached_last_start_ptr,
    cached_last_end_ptr,
    reasoning_start_token_ids_ptr,
    natural_reasoning_end_token_ids_ptr,
    reasoning_end_token_ids_ptr,
    START_LEN: tl.constexpr,
    NATURAL_END_LEN: tl.constexpr,
    END_LEN: tl.constexpr,
):
    logits_row = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(expanded_idx_mapping_ptr + logits_row).to(tl.int64)
    budget = tl.load(thinking_token_budget_ptr + req_state_idx)
    if budget < 0:
        return

    total_len = tl.load(total_len_ptr + req_state_idx)
    history_len = total_len + tl.load(path_depths_ptr + logits_row)
    committed_ptr = all_token_ids_ptr + req_state_idx * all_token_ids_stride
    path_ptr = path_tokens_ptr + logits_row * path_tokens_stride
    last_start = _last_mark(
        committed_ptr,
        path_ptr,
        total_len,
        history_len,
        tl.load(cached_last_start_ptr + req_state_idx),
        reasoning_start_token_ids_ptr,
        START_LEN,
    )
    last_end = _last_mark(
        committed_ptr,
        path_ptr,
        total_len,
        history_len,
        tl.load(cached_last_end_ptr + req_state_idx),
        natural_reasoning_end_token_ids_ptr,
        NATURAL_END_LEN,
    )
    if last_start < 0 or last_start <= last_end or history_len - (last_start + START_LEN) < budget:
        return

    # Where the history ends with the first tokens of what is forced, the next one is forced.
    num_forced = 0
    for length in tl.static_range(1, END_LEN):
        start = history_len - length
        # Nothing is read where `start` is negative.
        is_end = _is_at(committed_ptr, path_ptr, total_len, start, reasoning_end_token_ids_ptr, length)
        num_forced = tl.where((start >= 0) & is_end, length, num_forced)
    token = tl.load(reasoning_end_token_ids_ptr + num_forced)
    tl.store(logits_ptr + logits_row * logits_stride + token, 1.0e9)


@triton.jit
def _last_mark(committed_ptr, path_ptr, total_len, history_len, last, mark_ptr, LENGTH: tl.constexpr):
    """Where the last mark of a row's history begins; `last` is that of the committed tokens."""
    for position in tl.range(tl.maximum(total_len - LENGTH + 1, 0), history_len - LENGTH + 1):
        if _is_at(committed_ptr, path_ptr, total_len, position, mark_ptr, LENGTH):
            last = position
    return last


@triton.jit
def _is_at(committed_ptr, path_ptr, total_len, position, mark_ptr, LENGTH: tl.constexpr):
    """Whether a row's history has the first LENGTH tokens of a mark at `position`, which may be negative."""
    is_same = True
    for j in tl.static_range(0, LENGTH):
        token = token_at(committed_ptr, path_ptr, total_len, position + j)
        is_same = is_same & (token == tl.load(mark_ptr + j))
    return is_same
