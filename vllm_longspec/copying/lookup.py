# SPDX-License-Identifier: Apache-2.0
"""Finds where the last tokens of a request occurred before, and copies what followed there.

The longest match counts, of the last `MAX_MATCH` down to `MIN_MATCH` tokens, the root's included, and of equally long
ones the latest. A copy that reaches the root goes on with its own tokens, so a period is repeated as often as fits.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.tree.state import NO_TOKEN

MIN_MATCH = 3
MAX_MATCH = 12

# Positions that one program compares. A context of 128k makes 128 programs, which fill a GPU also for one request.
BLOCK = 1024


def find_copies(
    token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len] by req_state_idx, in the device's memory
    idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for padding
    root_positions: torch.Tensor,  # int64 [num_reqs]
    max_root_position: int,  # upper bound; for a CUDA graph, of every batch that it will run
    copy_length: int,  # tokens to copy
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens expected after each root, and the length of the match that they follow.

    Every position before the root is read, up to a bound known on the host: 4 bytes each, and the further ones of a
    match only where the last `MIN_MATCH` tokens agree.

    Returns:
        int64 [num_reqs, copy_length], `NO_TOKEN` throughout where nothing matches and for padding; and int32 [num_reqs]
        from `MIN_MATCH` to `MAX_MATCH`, or 0.
    """
    num_reqs, device = idx_mapping.shape[0], idx_mapping.device
    block = triton.next_power_of_2(max(1, max_root_position)) if interpreting() else BLOCK
    num_blocks = max(1, triton.cdiv(max_root_position, block))
    best = torch.empty(num_reqs, num_blocks, dtype=torch.int64, device=device)
    _find_matches_kernel[(num_reqs, num_blocks)](
        token_ids,
        token_ids.stride(0),
        idx_mapping,
        root_positions,
        best,
        num_blocks,
        MIN_MATCH=MIN_MATCH,
        MAX_MATCH=MAX_MATCH,
        BLOCK=block,
    )
    copied = torch.empty(num_reqs, copy_length, dtype=torch.int64, device=device)
    match_lens = torch.empty(num_reqs, dtype=torch.int32, device=device)
    _copy_best_match_kernel[(num_reqs,)](
        token_ids,
        token_ids.stride(0),
        idx_mapping,
        root_positions,
        best,
        num_blocks,
        copied,
        match_lens,
        copy_length,
        NO_TOKEN=NO_TOKEN,
        MATCH_BLOCK=triton.next_power_of_2(num_blocks),
        COPY_BLOCK=triton.next_power_of_2(copy_length),
    )
    return copied, match_lens


@triton.jit(do_not_specialize=["num_blocks"])
def _find_matches_kernel(
    token_ids_ptr,
    token_ids_stride,
    idx_mapping_ptr,
    root_positions_ptr,
    best_ptr,  # int64 [num_reqs, num_blocks] length and last position of each block's best match, 0 for none
    num_blocks,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    best_ptr += request * num_blocks + block
    req_state_idx = tl.load(idx_mapping_ptr + request)
    root = tl.load(root_positions_ptr + request).to(tl.int32)
    # A match ends before the root and has at least MIN_MATCH tokens.
    if (req_state_idx < 0) | (tl.maximum(block * BLOCK, MIN_MATCH - 1) >= root):
        tl.store(best_ptr, tl.zeros((), tl.int64))
        return

    token_ids_ptr += req_state_idx * token_ids_stride
    last = block * BLOCK + tl.arange(0, BLOCK)
    is_match = last < root
    for offset in tl.static_range(0, MIN_MATCH):
        wanted = tl.load(token_ids_ptr + root - offset)
        token = tl.load(token_ids_ptr + last - offset, mask=is_match & (last >= offset), other=-1)
        is_match = is_match & (token == wanted)
    best = tl.zeros((), tl.int64)
    if tl.max(is_match.to(tl.int32), axis=0) > 0:
        length = tl.where(is_match, MIN_MATCH, 0)
        for offset in tl.static_range(MIN_MATCH, MAX_MATCH):
            # The request's first tokens end every match: -2 is never -1.
            wanted = tl.load(token_ids_ptr + root - offset, mask=root >= offset, other=-2)
            token = tl.load(token_ids_ptr + last - offset, mask=is_match & (last >= offset), other=-1)
            is_match = is_match & (token == wanted)
            length += is_match.to(tl.int32)
        best = tl.max(tl.where(length > 0, (length.to(tl.int64) << 32) + last, 0), axis=0)
    tl.store(best_ptr, best)


@triton.jit(do_not_specialize=["num_blocks"])
def _copy_best_match_kernel(
    token_ids_ptr,
    token_ids_stride,
    idx_mapping_ptr,
    root_positions_ptr,
    best_ptr,
    num_blocks,
    copied_ptr,
    match_lens_ptr,
    copy_length,
    NO_TOKEN: tl.constexpr,
    MATCH_BLOCK: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    root = tl.load(root_positions_ptr + request)
    block = tl.arange(0, MATCH_BLOCK)
    best = tl.max(tl.load(best_ptr + request * num_blocks + block, mask=block < num_blocks, other=0), axis=0)
    match_len = (best >> 32).to(tl.int32)
    last = best & 0xFFFFFFFF

    step = tl.arange(0, COPY_BLOCK)
    is_copied = step < tl.where(match_len > 0, copy_length, 0)
    period = tl.where(match_len > 0, root - last, 1)
    source = last + 1 + step % period
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + source, mask=is_copied, other=NO_TOKEN)
    tl.store(copied_ptr + request * copy_length + step, token.to(tl.int64), mask=step < copy_length)
    tl.store(match_lens_ptr + request, match_len)
