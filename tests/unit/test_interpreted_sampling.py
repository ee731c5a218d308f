# SPDX-License-Identifier: Apache-2.0
"""Many rows in one program draw what vLLM's own kernel draws with one program for each."""

import pytest
import torch
from vllm.v1.worker.gpu.sample import gumbel

from vllm_longspec import interpreted_sampling
from vllm_longspec.interpreted_sampling import gumbel_sample

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
