# SPDX-License-Identifier: Apache-2.0
"""How far copies are trusted: a running statistic of what copies have lately turned out to be right.

A copy after a match of m tokens whose first d tokens were right is a match of m + d tokens. So one rate for each length
of a match, that of its next token being right, tells all depths of all copies, and few copies suffice to learn it. A
copied node's score is the sum of the logarithms of the rates on its path: the same as the cumulative log-probability of
a drafted node.

The path that was copied for a request is kept until its next draft, when some of the tokens after its root are known.
Whether a copied token was right is then known too, if all before it were, and whether or not it was verified. Counts
are integers on the device: nothing waits for the host, and all ranks compute the same.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.copying.lookup import MAX_MATCH, MIN_MATCH

# Before copies have been seen, the token after a match of n tokens is taken to be wrong with probability
# PRIOR_ERROR / sqrt(n), with the weight of PRIOR_WEIGHT copies. Fitted to texts of the trained pair at temperatures 0
# and 1.
PRIOR_ERROR = 0.7
PRIOR_WEIGHT = 8
# Counts of a length are halved when it has been seen this often, so that old copies lose their weight.
WINDOW = 1024


class CopyTrust:
    """The statistic of an engine, and the paths that are being tried, by req_state_idx.

    Its tensors are allocated once, because CUDA graphs keep their addresses.
    """

    def __init__(self, max_num_reqs: int, copy_length: int, device: torch.device):
        self.copy_length = copy_length
        # The longest match is one of MAX_MATCH tokens of which all but the last copied one were right.
        num_lengths = MAX_MATCH - MIN_MATCH + copy_length
        # int32 [num_lengths], from MIN_MATCH on: copied tokens that followed a match of this length, and right ones
        self.num_seen = torch.zeros(num_lengths, dtype=torch.int32, device=device)
        self.num_right = torch.zeros_like(self.num_seen)
        self.log_rates = torch.zeros(num_lengths, dtype=torch.float32, device=device)
        # Of each request's last copy: tokens, length of the match (0 for no copy), position of the root
        self.tokens = torch.zeros(max_num_reqs, copy_length, dtype=torch.int64, device=device)
        self.match_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.root_positions = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)

    def forget(self, idx_mapping: torch.Tensor) -> None:
        """Drops the copies of req_state_indices, int64 [num_reqs], that a request enters: they were another one's."""
        self.match_lens.index_fill_(0, idx_mapping, 0)

    def score(
        self,
        copied: torch.Tensor,  # int64 [num_reqs, copy_length] of `find_copies`
        match_lens: torch.Tensor,  # int32 [num_reqs], likewise
        token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len] by req_state_idx
        idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for padding, for which nothing is kept
        root_positions: torch.Tensor,  # int64 [num_reqs]; the tokens up to the root's are known
    ) -> torch.Tensor:  # float32 [num_reqs, copy_length]
        """Learns from the copies made at earlier roots, then scores these and keeps them."""
        num_reqs = idx_mapping.shape[0]
        copy_block = triton.next_power_of_2(self.copy_length)
        _observe_copies_kernel[(num_reqs,)](
            token_ids,
            token_ids.stride(0),
            idx_mapping,
            root_positions,
            self.tokens,
            self.match_lens,
            self.root_positions,
            self.num_seen,
            self.num_right,
            self.copy_length,
            MIN_MATCH=MIN_MATCH,
            COPY_BLOCK=copy_block,
        )
        num_lengths = self.num_seen.shape[0]
        _update_rates_kernel[(1,)](
            self.num_seen,
            self.num_right,
            self.log_rates,
            num_lengths,
            MIN_MATCH=MIN_MATCH,
            PRIOR_ERROR=PRIOR_ERROR,
            PRIOR_WEIGHT=PRIOR_WEIGHT,
            WINDOW=WINDOW,
            BLOCK=triton.next_power_of_2(num_lengths),
        )
        scores = torch.empty(num_reqs, self.copy_length, dtype=torch.float32, device=idx_mapping.device)
        _score_copies_kernel[(num_reqs,)](
            copied,
            match_lens,
            idx_mapping,
            root_positions,
            self.log_rates,
            scores,
            self.tokens,
            self.match_lens,
            self.root_positions,
            self.copy_length,
            MIN_MATCH=MIN_MATCH,
            COPY_BLOCK=copy_block,
        )
        return scores


@triton.jit
def _observe_copies_kernel(
    token_ids_ptr,
    token_ids_stride,
    idx_mapping_ptr,
    root_positions_ptr,
    kept_tokens_ptr,
    kept_match_lens_ptr,
    kept_root_positions_ptr,
    num_seen_ptr,
    num_right_ptr,
    copy_length,
    MIN_MATCH: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    if req_state_idx < 0:
        return
    match_len = tl.load(kept_match_lens_ptr + req_state_idx)
    if match_len == 0:
        return
    step = tl.arange(0, COPY_BLOCK)
    position = tl.load(kept_root_positions_ptr + req_state_idx) + 1 + step
    is_known = (step < copy_length) & (position <= tl.load(root_positions_ptr + request))
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + position, mask=is_known, other=-1)
    copied = tl.load(kept_tokens_ptr + req_state_idx * copy_length + step, mask=is_known, other=-1)
    first_wrong = tl.min(tl.where(is_known & (token != copied), step, COPY_BLOCK), axis=0)
    length = match_len - MIN_MATCH + step
    one = tl.full([COPY_BLOCK], 1, tl.int32)
    # Integers: the sum does not depend on the order.
    tl.atomic_add(num_seen_ptr + length, one, mask=is_known & (step <= first_wrong))
    tl.atomic_add(num_right_ptr + length, one, mask=is_known & (step < first_wrong))


@triton.jit
def _update_rates_kernel(
    num_seen_ptr,
    num_right_ptr,
    log_rates_ptr,
    num_lengths,
    MIN_MATCH: tl.constexpr,
    PRIOR_ERROR: tl.constexpr,
    PRIOR_WEIGHT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    is_length = index < num_lengths
    num_seen = tl.load(num_seen_ptr + index, mask=is_length, other=0)
    num_right = tl.load(num_right_ptr + index, mask=is_length, other=0)
    is_full = num_seen >= WINDOW
    num_seen = tl.where(is_full, num_seen // 2, num_seen)
    num_right = tl.where(is_full, num_right // 2, num_right)
    tl.store(num_seen_ptr + index, num_seen, mask=is_length)
    tl.store(num_right_ptr + index, num_right, mask=is_length)
    prior = 1.0 - PRIOR_ERROR / tl.sqrt((MIN_MATCH + index).to(tl.float32))
    rate = (num_right + PRIOR_WEIGHT * prior) / (num_seen + PRIOR_WEIGHT)
    tl.store(log_rates_ptr + index, tl.log(rate), mask=is_length)


@triton.jit
def _score_copies_kernel(
    copied_ptr,
    match_lens_ptr,
    idx_mapping_ptr,
    root_positions_ptr,
    log_rates_ptr,
    scores_ptr,
    kept_tokens_ptr,
    kept_match_lens_ptr,
    kept_root_positions_ptr,
    copy_length,
    MIN_MATCH: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    match_len = tl.load(match_lens_ptr + request)
    step = tl.arange(0, COPY_BLOCK)
    is_step = step < copy_length
    is_scored = step < tl.where(match_len > 0, copy_length, 0)
    log_rate = tl.load(log_rates_ptr + match_len - MIN_MATCH + step, mask=is_scored, other=0.0)
    score = tl.where(is_scored, tl.cumsum(log_rate, axis=0), float("-inf"))
    tl.store(scores_ptr + request * copy_length + step, score, mask=is_step)

    if req_state_idx >= 0:
        token = tl.load(copied_ptr + request * copy_length + step, mask=is_step)
        tl.store(kept_tokens_ptr + req_state_idx * copy_length + step, token, mask=is_step)
        tl.store(kept_match_lens_ptr + req_state_idx, match_len)
        tl.store(kept_root_positions_ptr + req_state_idx, tl.load(root_positions_ptr + request))
