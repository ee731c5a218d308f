# SPDX-License-Identifier: Apache-2.0
"""A smaller head that follows what is served (docs/design.md#a-head-that-learns).

A head of fewer rows than the vocabulary has slots, and each slot a token. The tokens of prompts and of answers are
counted on the device, and now and then those that the target might as well have emitted, which tell more of a language
than has been said in it. Tokens that are like those counted are expected, too (`resemblance.py`). Every few steps the
most counted and expected tokens outside take the slots of the least counted and expected ones inside.

The work of an exchange is bounded, nothing waits for the device, and what is exchanged depends on integers only: with
tensor parallelism all ranks do the same in the same step. Slots change between two drafts, on their stream, so that a
draft never sees a token with the row of another.

How often is decided by numbers of steps and of prompts' tokens, which the host knows.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.model import GlideForCausalLM
from vllm_longspec.proposers.interface import Requests, Roots

# What an occurrence of a token adds to its count. Counts are halved after HALVING steps, so that old texts lose their
# weight; an occurrence is forgotten after 16 halvings.
UNIT = 1 << 16
HALVING = 1024
# What a token adds that is probable at one of the rows that are looked at, no more than so many of a step before each
# exchange: at least exp(-PROBABLE) times as probable as the row's most probable one.
ALTERNATIVE = UNIT // 16
PROBABLE = 7.0
MAX_ROWS = 16
# Slots that are exchanged at a time, and steps from one exchange to the next.
EXCHANGED = 1024
INTERVAL = 32
# Exchanges that it takes at least to replace all slots, so that a few prompts' alternatives do not replace all of a
# small head.
MIN_EXCHANGES = 4
# While tokens of new prompts are to be added: no more than so much of the time of a step may go into exchanges.
URGENT_INTERVAL = 4
# Exchanges for prompts that are due at most. What a longer prompt still has to add comes in later.
MAX_URGENT = 4
# Of a token in an exchange (int64).
MAX_RANK = torch.iinfo(torch.int64).max
# Tokens of a program; one size, so that no prompt triggers compilation.
TOKEN_BLOCK = 128


class HeadLearner:
    """Counts what is served and exchanges the tokens of a draft's head, which must be one that learns."""

    def __init__(self, model: GlideForCausalLM, num_pinned: int):
        """The first `num_pinned` slots keep their tokens. Without `model.resemblance` none is expected."""
        assert model.token_ids is not None and model.token_counts is not None
        self.model = model
        self.num_pinned = num_pinned
        num_slots = len(model.token_ids)
        self.num_exchanged = min(EXCHANGED, num_slots - num_pinned, triton.cdiv(num_slots, MIN_EXCHANGES))
        self.num_steps = 0
        self.num_urgent = 0  # exchanges that new prompts need
        self.since_exchange = URGENT_INTERVAL

    def start_step(
        self,
        hidden_states: torch.Tensor,  # [num_rows, hidden_size] of the target, what its head multiplies
    ) -> None:
        """Sees a step of the target, of prompts too. Never part of a CUDA graph."""
        assert self.model.token_counts is not None
        self.num_steps += 1
        self.since_exchange += 1
        if self.num_steps % HALVING == 0:
            self.model.token_counts.bitwise_right_shift_(1)
        if self.num_steps % INTERVAL == 1:
            self._count_alternatives(hidden_states)
        if self.since_exchange >= (URGENT_INTERVAL if self.num_urgent else INTERVAL):
            self._exchange()

    def _count_alternatives(self, hidden_states: torch.Tensor) -> None:
        assert self.model.token_counts is not None
        some = hidden_states[:: triton.cdiv(hidden_states.shape[0], MAX_ROWS)]
        logits = self.model.target_logits(some).float()
        # No top-k: in which order it takes equal ones is not defined, and ranks must agree.
        is_probable = logits >= logits.amax(dim=1, keepdim=True) - PROBABLE
        self.model.token_counts.add_(is_probable.sum(dim=0), alpha=ALTERNATIVE)

    def count_emitted(self, requests: Requests) -> None:
        """Counts what the last step emitted; in CUDA graphs, too."""
        assert self.model.token_counts is not None
        count_tokens(
            self.model.token_counts,
            requests.token_ids,
            requests.idx_mapping,
            requests.roots.positions,
            requests.num_new_tokens,
            requests.max_new_tokens,
        )

    def add_prompts(
        self,
        idx_mapping: torch.Tensor,  # int64 [num_reqs] of requests that leave their prompt
        roots: Roots,
        token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len]
        max_root_position: int,
    ) -> None:
        """Counts whole prompts and exchanges slots for them before the first draft, or soon after. In no CUDA graph."""
        assert self.model.token_counts is not None
        num_new = torch.full_like(idx_mapping, max_root_position, dtype=torch.int32)
        count_tokens(self.model.token_counts, token_ids, idx_mapping, roots.positions, num_new, max_root_position)
        self.num_urgent = min(MAX_URGENT, self.num_urgent + triton.cdiv(max_root_position, self.num_exchanged))
        if self.num_urgent and self.since_exchange >= URGENT_INTERVAL:
            self._exchange()

    def _exchange(self) -> None:
        assert self.model.token_ids is not None and self.model.token_counts is not None
        self.num_urgent = max(0, self.num_urgent - 1)
        self.since_exchange = 0
        counts = self.model.token_counts
        if self.model.resemblance is not None:
            counts = counts + self.model.resemblance.expected(counts, UNIT)
        slots, tokens = choose_exchange(counts, self.model.token_ids, self.num_pinned, self.num_exchanged)
        self.model.replace_tokens(slots, tokens)


def count_tokens(
    counts: torch.Tensor,  # int64 [vocab_size], added to
    token_ids: torch.Tensor,  # int32 [max_num_reqs, max_model_len] by req_state_idx
    idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for padding
    root_positions: torch.Tensor,  # int64 [num_reqs]
    num_new: torch.Tensor,  # int32 [num_reqs] tokens right before the root to count
    max_new: int,  # upper bound of num_new, or more than there are tokens before the root
) -> None:
    """Adds `UNIT` for each of the last `num_new` tokens before each root, or for all where there are fewer."""
    if max_new == 0:
        return
    block = triton.next_power_of_2(max_new) if interpreting() else TOKEN_BLOCK
    _count_tokens_kernel[(idx_mapping.shape[0], triton.cdiv(max_new, block))](
        counts,
        token_ids,
        token_ids.stride(0),
        idx_mapping,
        root_positions,
        num_new,
        counts.shape[0],
        UNIT=UNIT,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _count_tokens_kernel(
    counts_ptr,  # int64 [vocab_size]
    token_ids_ptr,  # int32 [max_num_reqs, max_model_len]
    token_ids_stride,
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    num_new_ptr,  # int32 [num_reqs]
    vocab_size,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    if req_state_idx < 0:
        return
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(root_positions_ptr + request) - 1 - offset
    is_new = (offset < tl.load(num_new_ptr + request)) & (position >= 0)
    token = tl.load(token_ids_ptr + req_state_idx * token_ids_stride + position, mask=is_new, other=0)
    # A prompt may have ids that only the tokenizer knows.
    is_counted = is_new & (token >= 0) & (token < vocab_size)
    # Sums of integers do not depend on their order.
    tl.atomic_add(counts_ptr + token, tl.full([BLOCK], UNIT, tl.int64), mask=is_counted, sem="relaxed")


def choose_exchange(
    counts: torch.Tensor,  # int64 [vocab_size]
    token_ids: torch.Tensor,  # int64 [num_slots] different tokens
    num_pinned: int,  # first slots, which are not exchanged
    num_exchanged: int,  # at most num_slots - num_pinned
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots with the least counted tokens, and the most counted tokens outside that are counted more than those.

    A slot whose token stays is returned with that token, so that the shapes do not depend on the counts. Of equal
    counts the token of lower id is kept or added.

    Returns slots and their tokens, each int64 [num_exchanged].
    """
    vocab_size = counts.shape[0]
    # Pairs of a count and a token in an integer: no two are equal, so that all ranks sort them alike. Counts of a
    # billion occurrences, which long cached prompts make, would not fit.
    counts = counts.clamp(max=MAX_RANK // vocab_size - 1)
    ranks = counts * vocab_size + torch.arange(vocab_size - 1, -1, -1, device=counts.device)
    inside = ranks[token_ids]
    outside = ranks.index_fill_(0, token_ids, -1)
    least, slots = inside[num_pinned:].topk(num_exchanged, largest=False)
    slots = slots + num_pinned
    most, tokens = outside.topk(num_exchanged)
    # The first are exchanged: from pair to pair one grows and the other falls.
    is_exchanged = most.div(vocab_size, rounding_mode="floor") > least.div(vocab_size, rounding_mode="floor")
    return slots, tokens.where(is_exchanged, token_ids[slots])
