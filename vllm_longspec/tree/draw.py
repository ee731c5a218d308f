# SPDX-License-Identifier: Apache-2.0
"""Draws at a temperature from the target's logits as they come (docs/design.md#draws-at-a-temperature).

vLLM's sampler copies all logits to float32 and divides them by the temperature in a kernel of its own, before it draws.
Its Gumbel kernel can divide as it reads, so where nothing else changes the logits, the copy is not needed.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_longspec.interpreter import interpreting


def draws_at_temperature(
    sampler: Sampler,
    idx_mapping_np: np.ndarray,  # [num_reqs] req_state_idx
    return_processed: bool,  # whether processed logits are asked for
) -> bool:
    """Whether `draw_at_temperature` replaces `sampler.sample` for these requests."""
    # In the interpreter a program takes milliseconds, and vLLM's kernel has one for every 1024 logits.
    if return_processed or interpreting():
        return False
    states = sampler.sampling_states
    temperature = states.temperature.np[idx_mapping_np]
    # As vLLM's sampling states decide which of their kernels to launch.
    has_temperature = np.any((temperature != 0.0) & (temperature != 1.0))
    has_filter = (
        np.any(states.top_k.np[idx_mapping_np] != states.vocab_size)
        or np.any(states.top_p.np[idx_mapping_np] != 1.0)
        or np.any(states.min_p.np[idx_mapping_np] != 0.0)
    )
    return bool(has_temperature and not has_filter) and not _has_processors(sampler, idx_mapping_np)


def _has_processors(sampler: Sampler, idx_mapping_np: np.ndarray) -> bool:
    """Whether penalties, bias, bad words, thinking budgets or custom processors may change logits of some request."""
    thinking = sampler.thinking_budget_state
    if thinking.enabled and np.any(thinking.use_thinking_budget[idx_mapping_np]):
        return True
    for processor in sampler.logits_processors:
        state: Any = processor
        if isinstance(processor, LogitBiasState):
            is_used = state.use_logit_bias[idx_mapping_np]
        elif isinstance(processor, PenaltiesState):
            is_used = state.use_penalty[idx_mapping_np]
        elif isinstance(processor, BadWordsState):
            is_used = state.num_bad_words.np[idx_mapping_np]
        else:
            return True
        if np.any(is_used):
            return True
    return False


def draw_at_temperature(
    sampler: Sampler,
    logits: torch.Tensor,  # [num_rows, vocab_size], not written
    expanded_idx_mapping: torch.Tensor,  # [num_rows] req_state_idx
    positions: torch.Tensor,  # int64 [num_rows]
) -> torch.Tensor:
    """What `sampler.sample` draws at every row without filters and processors, int64 [num_rows].

    vLLM's kernel divides in float32 as its temperature kernel does, so the noised logits are equal bit for bit.
    """
    states = sampler.sampling_states
    return gumbel_sample(
        logits,
        expanded_idx_mapping,
        states.temperature.gpu,
        states.seeds.gpu,
        positions,
        apply_temperature=True,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )
