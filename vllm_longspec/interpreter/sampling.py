# SPDX-License-Identifier: Apache-2.0
"""Replacements for parts of vLLM's sampling that Triton's interpreter cannot run, or only slowly.

- Gumbel sampling with many rows in one program. vLLM's kernel has a program for every row, for each of which the
  interpreter takes about ten milliseconds, and a tree has a row for every node. The draws are the same, bit for bit,
  because vLLM's own functions make the noise.
- Grammar bitmasks in PyTorch. vLLM's kernel combines a scalar condition with conditions of elements into the mask of a
  store. The interpreter makes integers of that, and accepts only boolean masks.
- NaN counts in PyTorch. vLLM's kernel calls a function of the device's library, which the interpreter does not have.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from vllm_longspec.compat.differences import grammar_mapping

# Elements of a program's block; larger blocks are no faster in NumPy.
_MAX_ELEMENTS = 1 << 18


def gumbel_sample(
    original: Callable[..., torch.Tensor],
    logits: torch.Tensor,  # float32 [num_rows, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_rows] req_state_idx of each row's request
    temperature: torch.Tensor,  # float32 [max_num_reqs]
    seed: torch.Tensor,  # int64 [max_num_reqs]
    pos: torch.Tensor,  # int64 [num_rows]
    apply_temperature: bool,
    is_drafting: bool,
    use_fp64: bool = False,
    **logits_cache: Any,
) -> torch.Tensor:
    """The token drawn at every row, int64 [num_rows]: the argmax for temperature 0, otherwise under Gumbel noise.

    A row without a request (-1) gets its argmax. Calls vLLM's function, `original`, for arguments of other drafts.
    """
    if apply_temperature or is_drafting or use_fp64 or logits_cache:
        return original(
            logits,
            expanded_idx_mapping,
            temperature,
            seed,
            pos,
            apply_temperature,
            is_drafting,
            use_fp64=use_fp64,
            **logits_cache,
        )
    sampled = logits.argmax(dim=-1)
    drawn = ((expanded_idx_mapping >= 0) & (temperature[expanded_idx_mapping] != 0.0)).nonzero()[:, 0]
    if len(drawn) == 0:
        return sampled
    # Transposed, so that the reduction runs along the vocabulary as in vLLM's kernel.
    columns = logits[drawn].float().t().contiguous()
    seeds, positions = seed[expanded_idx_mapping[drawn]], pos[drawn].contiguous()
    tokens = torch.empty_like(positions)
    vocab_block = triton.next_power_of_2(columns.shape[0])
    row_block = min(triton.next_power_of_2(len(drawn)), max(1, _MAX_ELEMENTS // vocab_block))
    _gumbel_sample_rows_kernel[(triton.cdiv(len(drawn), row_block),)](
        tokens,
        columns,
        columns.stride(0),
        seeds,
        positions,
        columns.shape[0],
        len(drawn),
        VOCAB_BLOCK=vocab_block,
        ROW_BLOCK=row_block,
    )
    sampled[drawn] = tokens
    return sampled


@triton.jit
def _gumbel_sample_rows_kernel(
    tokens_ptr,  # [num_rows]
    logits_ptr,  # [vocab_size, num_rows]
    logits_stride,
    seeds_ptr,  # [num_rows]
    positions_ptr,  # [num_rows]
    vocab_size,
    num_rows,
    VOCAB_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    is_row = row < num_rows
    token = tl.arange(0, VOCAB_BLOCK)[:, None]
    mask = (token < vocab_size) & is_row[None, :]
    logits = tl.load(logits_ptr + token * logits_stride + row[None, :], mask=mask, other=float("-inf"))
    seed = tl.load(seeds_ptr + row, mask=is_row, other=0)[None, :]
    position = tl.load(positions_ptr + row, mask=is_row, other=0)[None, :]
    _, drawn = gumbel_noised_argmax(
        logits, token, mask, seed, position, 1.0, IS_DRAFTING=False, USE_FP64=False, APPLY_TEMPERATURE=False
    )
    tl.store(tokens_ptr + row, drawn.to(tl.int64), mask=is_row)


def apply_grammar_bitmask(
    original: Callable[..., None],
    self: StructuredOutputsWorker,
    logits: torch.Tensor,  # [num_logits, vocab_size], written
    input_batch: InputBatch,
    grammar_req_ids: list[str],
    grammar_bitmask: np.ndarray,  # int32 [num_masks, vocab_size / 32]
) -> None:
    """Sets the logits of all tokens that a grammar forbids to -inf.

    There is a mask for every row of the requests in `grammar_req_ids`, and from vLLM 0.33 on also for rows that they do
    not have in this step; a set bit allows a token.
    """
    mapping = grammar_mapping(self, input_batch, grammar_req_ids)
    requests, positions = np.divmod(np.array(mapping, dtype=np.int64), self.mask_stride)
    # The device's, as in vLLM's kernel: the host's may include rows that were dropped since.
    cu_num_logits = input_batch.cu_num_logits.cpu().numpy()
    is_row = positions < cu_num_logits[requests + 1] - cu_num_logits[requests]
    rows = torch.from_numpy((cu_num_logits[requests] + positions)[is_row]).to(logits.device)
    words = torch.from_numpy(grammar_bitmask[is_row]).to(logits.device)
    bits = (words[:, :, None] >> torch.arange(32, device=logits.device)) & 1
    is_forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(is_forbidden, float("-inf"))


def get_num_nans(original: Callable[..., torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """NaNs in every row of `logits` [num_rows, vocab_size], int32 [num_rows]."""
    return logits.isnan().sum(dim=-1, dtype=torch.int32)


def use_pytorch_top_k_top_p() -> None:
    """Selects vLLM's PyTorch function: its Triton kernel fails in the interpreter (a scalar has no `.to`)."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
