# SPDX-License-Identifier: Apache-2.0
"""What stands in for vLLM's sampling kernels in Triton's interpreter does what they do."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.sample import gumbel

from vllm_longspec.compat.versions import IS_0_32
from vllm_longspec.interpreter import sampling as interpreted_sampling
from vllm_longspec.interpreter.sampling import apply_grammar_bitmask, get_num_nans, gumbel_sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unexpected(*args, **kwargs):
    raise AssertionError("vLLM's function was called")


@pytest.mark.parametrize("vocab_size", [5, 1024, 1500])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_the_same_draws(monkeypatch, vocab_size, num_rows):
    # Several programs, the last of them not full.
    monkeypatch.setattr(interpreted_sampling, "_MAX_ELEMENTS", 8 * 2048)
    source = torch.Generator().manual_seed(vocab_size + num_rows)
    logits = torch.randn(num_rows, vocab_size, generator=source) * 3
    # What top-k leaves: most tokens are out.
    logits[::3, 2:] = float("-inf")
    num_slots = 6
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 0.0, 1.3])
    seeds = torch.randint(-(2**62), 2**62, (num_slots,), generator=source)
    slots = torch.randint(-1, num_slots, (num_rows,), generator=source)
    positions = torch.randint(0, 2**20, (num_rows,), generator=source)
    arguments = [each.to(DEVICE) for each in (logits, slots, temperature, seeds, positions)]
    options = {"apply_temperature": False, "is_drafting": False, "use_fp64": False}
    expected = gumbel.gumbel_sample(*arguments, **options)
    assert gumbel_sample(unexpected, *arguments, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("option", ["apply_temperature", "is_drafting", "use_fp64"])
def test_what_only_other_drafts_ask_for_is_vllms(option):
    options = {"apply_temperature": False, "is_drafting": False} | {option: True}
    with pytest.raises(AssertionError, match="vLLM's function was called"):
        gumbel_sample(unexpected, *[torch.zeros(1, 1)] * 5, **options)


@pytest.mark.parametrize("vocab_size", [32, 50, 1500])
@pytest.mark.parametrize("num_drafts", [None, [3, 0, 5, 2]])
def test_grammar_bitmask(vocab_size, num_drafts):
    source = np.random.default_rng(vocab_size)
    num_reqs, max_rows = 4, 6
    num_rows = [1 + drafts for drafts in num_drafts or [0] * num_reqs]
    # Requests with a grammar, not in the order of the batch.
    grammar_requests = [2, 0, 1]
    starts = np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int32)
    batch: Any = SimpleNamespace(
        req_ids=[f"request {request}" for request in range(num_reqs)],
        cu_num_logits_np=starts,
        cu_num_logits=torch.from_numpy(starts).to(DEVICE),
        num_draft_tokens_per_req=None if num_drafts is None else np.array(num_drafts),
    )
    # From vLLM 0.33 on every request has the same number of masks.
    num_masks = [num_rows[request] if IS_0_32 else max_rows for request in grammar_requests]
    bitmask = source.integers(-(2**31), 2**31, (sum(num_masks), -(-vocab_size // 32))).astype(np.int32)
    logits = torch.from_numpy(source.standard_normal((int(starts[-1]), vocab_size))).float()

    expected = logits.clone()
    for request, first in zip(grammar_requests, np.cumsum([0, *num_masks]), strict=False):
        for row, words in zip(range(starts[request], starts[request + 1]), bitmask[first:], strict=False):
            for token in range(vocab_size):
                if not (int(words[token // 32]) >> (token % 32)) & 1:
                    expected[row, token] = float("-inf")
    assert not torch.equal(expected, logits)

    masked = logits.to(DEVICE)
    worker: Any = SimpleNamespace(num_bonus_tokens=1, mask_stride=max_rows)
    names = [batch.req_ids[request] for request in grammar_requests]
    apply_grammar_bitmask(unexpected, worker, masked, batch, names, bitmask)
    assert torch.equal(masked.cpu(), expected)


def test_nans_of_every_row():
    logits = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, -torch.inf, 0.0], [torch.nan] * 3], device=DEVICE)
    num_nans = get_num_nans(unexpected, logits)
    assert num_nans.dtype == torch.int32
    assert num_nans.tolist() == [1, 0, 3]
