# SPDX-License-Identifier: Apache-2.0
"""The best (parent, token) pairs of each request, from raw logits: softmax and top-k without writing log-probabilities.

1. Each chunk of a row is read once: its maximum and its sum of exponentials. The noise with which the target will draw
   is added to the logits first (`vllm_longspec/tree/coupling.py`); it is computed once for several rows of a request.
2. The n best tokens of a row are in the n chunks with the highest maxima. Each of these is read again, and its tokens
   that are no lower than the lowest of these maxima are sorted.
3. Each row merges its chunks into its normaliser, its best tokens and their cumulative log-probabilities.
4. Each request picks the best of its rows' tokens, here or in a kernel that goes on with them.

Top-k repeatedly takes the maximum of integers: of scores, which order as the floats do, or of pairs with a score in the
high bits and an index in the low bits.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.tree.block import block_of
from vllm_longspec.tree.coupling import LevelNoise, add_noise, has_cutoff, level_noise, noised_logits

# Tokens of a program of one warp, 32 per thread.
CHUNK = 1024
# Chunks of a program that only reads.
CHUNKS_READ = 4
# Programs that keep a GPU busy. If there are more chunks of rows, one program takes several rows of a request.
PROGRAMS = 2048
# Less than every pair of score and index, and than every score.
NOTHING = tl.constexpr(-(2**63))
NO_SCORE = tl.constexpr(-(2**31))


def best_children(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    parent_log_probs: torch.Tensor,  # float32 [num_reqs, width] cumulative
    num_children: int,
    noise: LevelNoise | None = None,
    token_ids: torch.Tensor | None = None,  # int64 [vocab_size]; None if the logits are those of the target's tokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `num_children` (parent, token) pairs with the highest cumulative log-probability, best first.

    Ties are broken by the lower parent, then the higher logit, then the lower token. In a row with NaN or +inf, or with
    nothing but -inf, every token has log-probability -inf; the tokens that are picked are still valid.

    With noise the logits of a request with temperature T > 0 are logits / T + g in all of this.

    Args:
        logits: float16, bfloat16 or float32, a row per parent; contiguous in the last dimension.
        parent_log_probs: not NaN; contiguous.
        num_children: at most width * vocab_size.
        noise: of the parents' level; None ranks by the draft alone.
        token_ids: the ids under which the target draws its noise for these tokens.

    Returns parent within the level, token and cumulative log-probability: int64, int64 and float32
    [num_reqs, num_children].
    """
    row_tokens, row_log_probs = best_of_rows(logits, parent_log_probs, num_children, noise, token_ids)
    num_reqs, width = parent_log_probs.shape
    num_kept = row_tokens.shape[1]
    parents = torch.empty(num_reqs, num_children, dtype=torch.int64, device=logits.device)
    tokens = torch.empty_like(parents)
    log_probs = torch.empty(num_reqs, num_children, dtype=torch.float32, device=logits.device)
    _best_of_request_kernel[(num_reqs,)](
        row_tokens,
        row_log_probs,
        parents,
        tokens,
        log_probs,
        num_kept,
        num_children,
        **request_arguments(width, num_kept, num_children),
    )
    return parents, tokens, log_probs


def request_arguments(width: int, num_kept: int, num_children: int) -> dict[str, int]:
    """The arguments of a kernel in which a program calls `best_of_request`."""
    candidates = block_of(width * num_kept)
    return {
        "num_candidates": width * num_kept,
        "CANDIDATES": candidates,
        "CHILDREN_BLOCK": block_of(num_children),
        "num_warps": max(1, min(16, candidates // 512)),
    }


def best_of_rows(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    parent_log_probs: torch.Tensor,  # float32 [num_reqs, width] cumulative
    num_children: int,
    noise: LevelNoise | None = None,
    token_ids: torch.Tensor | None = None,  # int64 [vocab_size]; None if the logits are those of the target's tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best tokens of every parent, best first, among which are the `num_children` best pairs of its request.

    As `best_children` in all else. Returns tokens and cumulative log-probabilities, int64 and float32
    [num_reqs * width, num_kept].
    """
    num_reqs, width = parent_log_probs.shape
    num_rows, vocab_size = logits.shape
    device = logits.device
    # All children may have one parent.
    num_kept = min(num_children, vocab_size)
    chunk = min(CHUNK, triton.next_power_of_2(vocab_size))
    num_chunks = triton.cdiv(vocab_size, chunk)
    num_chosen = min(num_kept, num_chunks)
    num_maxima = triton.cdiv(num_chunks, CHUNKS_READ)
    chunk_block = triton.next_power_of_2(num_chunks)
    kept_block = block_of(num_kept)
    logit_max = None
    if noise is not None:
        # The highest logits, which only rows with a cutoff need.
        logit_max = torch.empty(num_rows, num_maxima, dtype=torch.float32, device=device)
        _max_of_chunks_kernel[(num_rows, num_maxima)](
            logits,
            logits.stride(0),
            logit_max,
            noise.noise.temperature,
            noise.noise.log_cutoffs,
            noise.idx_mapping,
            width,
            vocab_size,
            CHUNK=chunk * CHUNKS_READ,
            num_warps=4,
        )
    noise_arguments = _noise_arguments(noise, token_ids)
    options = {
        "USE_FP64": noise is not None and noise.noise.use_fp64,
        "CHUNK": chunk,
        "MAXIMA_BLOCK": triton.next_power_of_2(num_maxima),
        "num_warps": 1,
    }

    chunk_max = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    chunk_sum = torch.empty_like(chunk_max)
    rows_of_program = max(1, min(width, num_rows * num_chunks // PROGRAMS))
    _weigh_chunk_kernel[(num_chunks, num_reqs, triton.cdiv(width, rows_of_program))](
        logits,
        logits.stride(0),
        chunk_max,
        chunk_sum,
        logit_max,
        *noise_arguments,
        width,
        rows_of_program,
        vocab_size,
        num_maxima,
        **options,
    )
    chosen_best = torch.empty(num_rows, num_chosen, num_kept, dtype=torch.int64, device=device)
    _best_of_chosen_chunk_kernel[(num_rows, num_chosen)](
        logits,
        logits.stride(0),
        chunk_max,
        chosen_best,
        logit_max,
        *noise_arguments,
        width,
        vocab_size,
        num_chunks,
        num_kept,
        num_maxima,
        CHUNK_BLOCK=chunk_block,
        KEPT_BLOCK=kept_block,
        **options,
    )
    row_tokens = torch.empty(num_rows, num_kept, dtype=torch.int64, device=device)
    row_log_probs = torch.empty(num_rows, num_kept, dtype=torch.float32, device=device)
    row_candidates = block_of(num_chosen * num_kept)
    _best_of_row_kernel[(num_rows,)](
        chosen_best,
        chunk_max,
        chunk_sum,
        parent_log_probs,
        row_tokens,
        row_log_probs,
        num_kept,
        num_chosen,
        num_chunks,
        CHUNK_BLOCK=chunk_block,
        CANDIDATES=row_candidates,
        KEPT_BLOCK=kept_block,
        # A maximum within one warp needs no synchronisation.
        num_warps=max(1, min(4, row_candidates // 256)),
    )
    return row_tokens, row_log_probs


def best_children_in_pytorch(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    parent_log_probs: torch.Tensor,  # float32 [num_reqs, width] cumulative
    num_children: int,
    noise: LevelNoise | None = None,
    token_ids: torch.Tensor | None = None,  # int64 [vocab_size]; None if the logits are those of the target's tokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `best_children`, ties in any order. For the interpreter, where the kernels take hundreds of NumPy calls."""
    tokens, candidates = best_of_rows_in_pytorch(logits, parent_log_probs, num_children, noise, token_ids)
    num_reqs, num_kept = parent_log_probs.shape[0], tokens.shape[1]
    log_probs, index = candidates.view(num_reqs, -1).topk(num_children)
    return index // num_kept, tokens.view(num_reqs, -1).gather(1, index), log_probs


def best_of_rows_in_pytorch(
    logits: torch.Tensor,  # [num_reqs * width, vocab_size]
    parent_log_probs: torch.Tensor,  # float32 [num_reqs, width] cumulative
    num_children: int,
    noise: LevelNoise | None = None,
    token_ids: torch.Tensor | None = None,  # int64 [vocab_size]; None if the logits are those of the target's tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `best_of_rows`, ties in any order; for the interpreter likewise."""
    logits = logits.float() if noise is None else noised_logits(logits, noise, token_ids)
    token_log_probs = logits.log_softmax(dim=-1).nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
    per_parent, tokens = token_log_probs.topk(min(num_children, logits.shape[-1]))
    return tokens, parent_log_probs.view(-1, 1) + per_parent


def _noise_arguments(noise: LevelNoise | None, token_ids: torch.Tensor | None) -> tuple[object, ...]:
    if noise is None:
        return None, None, None, None, None, None, 0
    return (
        token_ids,
        noise.noise.temperature,
        noise.noise.seeds,
        noise.noise.log_cutoffs,
        noise.idx_mapping,
        noise.root_positions,
        noise.depth,
    )


@triton.jit(do_not_specialize=["width"])
def _max_of_chunks_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    logit_max_ptr,  # [num_rows, num_chunks], written for rows with a cutoff
    temperature_ptr,  # float32 [max_num_reqs]
    log_cutoffs_ptr,  # float32 [max_num_reqs]
    idx_mapping_ptr,  # int64 [num_reqs]
    width,
    vocab_size,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if not has_cutoff(row // width, temperature_ptr, log_cutoffs_ptr, idx_mapping_ptr):
        return
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf"))
    tl.store(logit_max_ptr + row * tl.num_programs(1) + chunk, tl.max(logit.to(tl.float32), axis=0))


# They differ between levels and must not trigger recompilation.
@triton.jit(do_not_specialize=["depth", "width", "rows_of_program"])
def _weigh_chunk_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_sum_ptr,  # float32 [num_rows, num_chunks] of exp(logit - maximum)
    logit_max_ptr,  # float32 [num_rows, num_maxima], or None without noise
    token_ids_ptr,  # int64 [vocab_size] or None
    temperature_ptr,  # float32 [max_num_reqs], or None without noise
    seeds_ptr,  # int64 [max_num_reqs]
    log_cutoffs_ptr,  # float32 [max_num_reqs]
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    depth,
    width,
    rows_of_program,
    vocab_size,
    num_maxima,
    USE_FP64: tl.constexpr,
    CHUNK: tl.constexpr,
    MAXIMA_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    request = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * rows_of_program
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    is_token = token < vocab_size
    if temperature_ptr is not None:
        token_id = token
        if token_ids_ptr is not None:
            token_id = tl.load(token_ids_ptr + token, mask=is_token, other=0)
        noise, inverse, log_cutoff = level_noise(
            token_id,
            request,
            depth,
            temperature_ptr,
            seeds_ptr,
            log_cutoffs_ptr,
            idx_mapping_ptr,
            root_positions_ptr,
            USE_FP64,
        )
    for parent in range(first, tl.minimum(first + rows_of_program, width)):
        row = request * width + parent
        logit = tl.load(logits_ptr + row * logits_stride + token, mask=is_token, other=float("-inf"))
        value = logit.to(tl.float32)
        if temperature_ptr is not None:
            row_max_ptr = logit_max_ptr + row * num_maxima
            value = add_noise(value, is_token, noise, inverse, log_cutoff, row_max_ptr, num_maxima, MAXIMA_BLOCK)
        # NaN makes the sum NaN, even if tl.max ignores it.
        chunk_max = tl.max(value, axis=0)
        reference = tl.where(chunk_max == float("-inf"), 0.0, chunk_max)
        chunk_sum = tl.sum(tl.exp(value - reference), axis=0)
        tl.store(chunk_max_ptr + row * num_chunks + chunk, chunk_max)
        tl.store(chunk_sum_ptr + row * num_chunks + chunk, chunk_sum)


@triton.jit(do_not_specialize=["depth", "width", "num_kept"])
def _best_of_chosen_chunk_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chosen_best_ptr,  # int64 [num_rows, num_chosen, num_kept] scores and tokens, best first
    logit_max_ptr,  # float32 [num_rows, num_maxima], or None without noise
    token_ids_ptr,  # int64 [vocab_size] or None
    temperature_ptr,  # float32 [max_num_reqs], or None without noise
    seeds_ptr,  # int64 [max_num_reqs]
    log_cutoffs_ptr,  # float32 [max_num_reqs]
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    depth,
    width,
    vocab_size,
    num_chunks,
    num_kept,
    num_maxima,
    USE_FP64: tl.constexpr,
    CHUNK: tl.constexpr,
    MAXIMA_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    num_chosen = tl.num_programs(1)
    # The chunk of this rank by its maximum, the lower of two equal ones first, and the last rank's maximum.
    index = tl.arange(0, CHUNK_BLOCK)
    is_chunk = index < num_chunks
    chunk_max = tl.load(chunk_max_ptr + row * num_chunks + index, mask=is_chunk, other=float("-inf"))
    chunk_score = tl.where(is_chunk, _score(chunk_max), NO_SCORE)
    least = tl.max(chunk_score, axis=0)
    chunk = 0
    for i in range(0, num_chosen):
        least = tl.max(chunk_score, axis=0)
        greatest_chunk = tl.min(tl.where(chunk_score == least, index, CHUNK_BLOCK), axis=0)
        chunk = tl.where(i == rank, greatest_chunk, chunk)
        chunk_score = tl.where(index == greatest_chunk, NO_SCORE, chunk_score)
    # With fewer chunks than tokens to keep, their maxima are no bound.
    least = tl.where(num_chosen < num_kept, NO_SCORE, least)

    place = tl.arange(0, CHUNK)
    token = chunk * CHUNK + place
    is_token = token < vocab_size
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=is_token, other=float("-inf"))
    value = logit.to(tl.float32)
    if temperature_ptr is not None:
        token_id = token
        if token_ids_ptr is not None:
            token_id = tl.load(token_ids_ptr + token, mask=is_token, other=0)
        noise, inverse, log_cutoff = level_noise(
            token_id,
            row // width,
            depth,
            temperature_ptr,
            seeds_ptr,
            log_cutoffs_ptr,
            idx_mapping_ptr,
            root_positions_ptr,
            USE_FP64,
        )
        row_max_ptr = logit_max_ptr + row * num_maxima
        value = add_noise(value, is_token, noise, inverse, log_cutoff, row_max_ptr, num_maxima, MAXIMA_BLOCK)

    score = tl.where(is_token, _score(value), NO_SCORE)
    kept = tl.arange(0, KEPT_BLOCK)
    best = tl.full([KEPT_BLOCK], NOTHING, tl.int64)
    num_found = 0
    greatest = tl.max(score, axis=0)
    # The maxima of `rank` chunks come before this one's. That is kept in any case: a row always has `num_kept` tokens,
    # even if this kernel rounds otherwise than the one that found the maxima.
    while (greatest > NO_SCORE) & (num_found < num_kept - rank) & ((num_found == 0) | (greatest >= least)):
        best_place = tl.min(tl.where(score == greatest, place, CHUNK), axis=0)
        pair = _pair(greatest, 0x7FFFFFFF - (chunk * CHUNK + best_place))
        best = tl.where(kept == num_found, pair, best)
        score = tl.where(place == best_place, NO_SCORE, score)
        greatest = tl.max(score, axis=0)
        num_found += 1
    tl.store(chosen_best_ptr + (row * num_chosen + rank) * num_kept + kept, best, mask=kept < num_kept)


@triton.jit(do_not_specialize=["num_kept", "num_chosen", "num_chunks"])
def _best_of_row_kernel(
    chosen_best_ptr,  # int64 [num_rows, num_chosen, num_kept]
    chunk_max_ptr,  # float32 [num_rows, num_chunks]
    chunk_sum_ptr,  # float32 [num_rows, num_chunks]
    parent_log_probs_ptr,  # float32 [num_rows]
    row_tokens_ptr,  # int64 [num_rows, num_kept]
    row_log_probs_ptr,  # float32 [num_rows, num_kept]
    num_kept,
    num_chosen,
    num_chunks,
    CHUNK_BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, CANDIDATES)
    num_candidates = num_chosen * num_kept
    key = tl.load(chosen_best_ptr + row * num_candidates + candidate, mask=candidate < num_candidates, other=NOTHING)
    rank = tl.arange(0, KEPT_BLOCK)
    best = _greatest(key, num_kept, KEPT_BLOCK)

    chunk = tl.arange(0, CHUNK_BLOCK)
    is_chunk = chunk < num_chunks
    chunk_max = tl.load(chunk_max_ptr + row * num_chunks + chunk, mask=is_chunk, other=float("-inf"))
    chunk_sum = tl.load(chunk_sum_ptr + row * num_chunks + chunk, mask=is_chunk, other=0.0)
    row_max = tl.max(chunk_max, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(chunk_sum * tl.exp(chunk_max - row_max), axis=0)
    log_prob = _value((best >> 32).to(tl.int32)) - row_max - tl.log(row_sum)
    log_prob = tl.load(parent_log_probs_ptr + row) + tl.where(log_prob == log_prob, log_prob, float("-inf"))
    tl.store(row_log_probs_ptr + row * num_kept + rank, log_prob, mask=rank < num_kept)
    tl.store(row_tokens_ptr + row * num_kept + rank, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=rank < num_kept)


@triton.jit(do_not_specialize=["num_kept", "num_children", "num_candidates"])
def _best_of_request_kernel(
    row_tokens_ptr,  # int64 [num_reqs, num_candidates]
    row_log_probs_ptr,  # float32 [num_reqs, num_candidates]
    parents_ptr,  # int64 [num_reqs, num_children]
    tokens_ptr,  # int64 [num_reqs, num_children]
    log_probs_ptr,  # float32 [num_reqs, num_children]
    num_kept,
    num_children,
    num_candidates,
    CANDIDATES: tl.constexpr,
    CHILDREN_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, CHILDREN_BLOCK)
    is_child = rank < num_children
    parent, token, log_prob = best_of_request(
        row_tokens_ptr,
        row_log_probs_ptr,
        request,
        num_kept,
        num_children,
        num_candidates,
        CANDIDATES,
        CHILDREN_BLOCK,
    )
    child = request * num_children + rank
    tl.store(parents_ptr + child, parent, mask=is_child)
    tl.store(tokens_ptr + child, token, mask=is_child)
    tl.store(log_probs_ptr + child, log_prob, mask=is_child)


@triton.jit
def best_of_request(
    row_tokens_ptr,  # int64 [num_reqs, num_candidates]
    row_log_probs_ptr,  # float32 [num_reqs, num_candidates]
    request,  # int64
    num_kept,  # candidates of a parent
    num_children,
    num_candidates,
    CANDIDATES: tl.constexpr,
    CHILDREN_BLOCK: tl.constexpr,
):
    """Parents within the level, tokens and log-probabilities of a request's best children, best first: each
    [CHILDREN_BLOCK], of which `num_children` count."""
    row_tokens_ptr += request * num_candidates
    row_log_probs_ptr += request * num_candidates
    # Candidates are ordered by parent, then best first.
    candidate = tl.arange(0, CANDIDATES)
    is_candidate = candidate < num_candidates
    log_prob = tl.load(row_log_probs_ptr + candidate, mask=is_candidate, other=0.0)
    key = tl.where(is_candidate, _pair(_score(log_prob), 0x7FFFFFFF - candidate), NOTHING)
    best = _greatest(key, num_children, CHILDREN_BLOCK)

    is_child = tl.arange(0, CHILDREN_BLOCK) < num_children
    chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    token = tl.load(row_tokens_ptr + chosen, mask=is_child, other=0)
    return chosen // num_kept, token, tl.load(row_log_probs_ptr + chosen, mask=is_child, other=0.0)


@triton.jit
def _greatest(
    keys,  # int64, distinct except for `NOTHING`
    count,
    BLOCK: tl.constexpr,
):
    """The `count` greatest keys in descending order, then `NOTHING`: [BLOCK]."""
    found = tl.full([BLOCK], NOTHING, tl.int64)
    for i in range(0, count):
        greatest = tl.max(keys, axis=0)
        keys = tl.where(keys == greatest, NOTHING, keys)
        found = tl.where(tl.arange(0, BLOCK) == i, greatest, found)
    return found


@triton.jit
def _score(
    value,  # float32
):
    """int32 that orders as the values do; NaN counts as -inf, -0.0 as 0.0."""
    value = tl.where(value == value, value, float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(
    score,  # int32
):
    """Inverse of `_score`: float32."""
    return tl.where(score < 0, score ^ 0x7FFFFFFF, score).to(tl.float32, bitcast=True)


@triton.jit
def _pair(
    score,  # int32
    backward,  # int32, not negative: breaks ties of scores, the higher first
):
    return (score.to(tl.int64) << 32) | backward
