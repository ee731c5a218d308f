# SPDX-License-Identifier: Apache-2.0
"""Presence, frequency and repetition penalties with a node's ancestors among the output tokens."""

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

from vllm_longspec.tree.history.paths import FollowsPaths, Paths

BLOCK_SIZE = 8192


class PathPenaltiesState(FollowsPaths, PenaltiesState):
    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Penalises `logits`, float32 [num_logits, vocab_size], in place."""
        if np.any(self.use_penalty[ctx.idx_mapping_np]):
            apply_penalties(
                logits,
                ctx.expanded_idx_mapping,
                self.paths(ctx),
                self.repetition_penalty.gpu,
                self.frequency_penalty.gpu,
                self.presence_penalty.gpu,
                self.prompt_bin_mask,
                self.output_bin_counts,
            )
        return logits


def apply_penalties(
    logits: torch.Tensor,  # float32 [num_logits, vocab_size], changed in place
    expanded_idx_mapping: torch.Tensor,  # [num_logits] req_state_idx
    paths: Paths,
    repetition_penalty: torch.Tensor,  # float32 [max_num_reqs]
    frequency_penalty: torch.Tensor,  # float32 [max_num_reqs]
    presence_penalty: torch.Tensor,  # float32 [max_num_reqs]
    prompt_bin_mask: torch.Tensor,  # int32 [max_num_reqs, ceil(vocab_size / 32)] a bit for every token of the prompt
    output_bin_counts: torch.Tensor,  # int32 [max_num_reqs, vocab_size] of emitted tokens
) -> None:
    """vLLM's function of this name, for rows that follow a path."""
    num_logits, vocab_size = logits.shape
    _path_penalties_kernel[(num_logits, triton.cdiv(vocab_size, BLOCK_SIZE))](
        logits,
        logits.stride(0),
        expanded_idx_mapping,
        paths.tokens,
        paths.tokens.stride(0),
        paths.depths,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        prompt_bin_mask,
        prompt_bin_mask.stride(0),
        output_bin_counts,
        output_bin_counts.stride(0),
        vocab_size,
        BLOCK_SIZE=BLOCK_SIZE,
    )


# Floating-point operations are vLLM's, in vLLM's order: a seeded request draws the tokens of plain decoding only if its
# logits are equal bit for bit.
@triton.jit
def _path_penalties_kernel(
    logits_ptr,
    logits_stride,
    expanded_idx_mapping_ptr,
    path_tokens_ptr,
    path_tokens_stride,
    path_depths_ptr,
    repetition_penalty_ptr,
    frequency_penalty_ptr,
    presence_penalty_ptr,
    prompt_bin_mask_ptr,
    prompt_bin_mask_stride,
    output_bin_counts_ptr,
    output_bin_counts_stride,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    logits_row = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(expanded_idx_mapping_ptr + logits_row).to(tl.int64)
    rep_penalty = tl.load(repetition_penalty_ptr + req_state_idx)
    freq_penalty = tl.load(frequency_penalty_ptr + req_state_idx)
    pres_penalty = tl.load(presence_penalty_ptr + req_state_idx)
    use_rep_penalty = rep_penalty != 1.0
    if not (use_rep_penalty or freq_penalty != 0.0 or pres_penalty != 0.0):
        return

    block_idx = tl.program_id(1)
    block = block_idx * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = block < vocab_size
    logits = tl.load(logits_ptr + logits_row * logits_stride + block, mask=mask)
    output_bin_counts = tl.load(
        output_bin_counts_ptr + req_state_idx * output_bin_counts_stride + block, mask=mask, other=0
    )
    for i in tl.range(tl.load(path_depths_ptr + logits_row)):
        token = tl.load(path_tokens_ptr + logits_row * path_tokens_stride + i)
        output_bin_counts = output_bin_counts + (block == token).to(tl.int32)
    output_bin_mask = output_bin_counts > 0

    if use_rep_penalty:
        packed_block = block_idx * BLOCK_SIZE // 32 + tl.arange(0, BLOCK_SIZE // 32)
        packed_mask = tl.load(
            prompt_bin_mask_ptr + req_state_idx * prompt_bin_mask_stride + packed_block,
            mask=packed_block < tl.cdiv(vocab_size, 32),
            other=0,
        )
        prompt_bin_mask = (packed_mask[:, None] >> (tl.arange(0, 32)[None, :])) & 1
        prompt_bin_mask = prompt_bin_mask.to(tl.int1).reshape(BLOCK_SIZE)
        scale = tl.where(prompt_bin_mask | output_bin_mask, rep_penalty, 1.0)
        logits *= tl.where(logits > 0, 1.0 / scale, scale)
    logits -= freq_penalty * output_bin_counts
    logits -= pres_penalty * output_bin_mask
    tl.store(logits_ptr + logits_row * logits_stride + block, logits, mask=mask)
