# SPDX-License-Identifier: Apache-2.0
"""What goes into the draft's window, and where trees begin, out of vLLM's request states."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_longspec.proposers.glide.model import WINDOW_SIZE
from vllm_longspec.proposers.glide.window import MAX_REBUILD_REQS, DraftWindow, list_settled
from vllm_longspec.runner.roots import read_roots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS = 12
MAX_MODEL_LEN = 1500


def window_kv(tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Keys that say which token was written, and values that say where it stands."""
    keys, values = (column.float()[:, None, None].repeat(1, 2, 8) for column in (tokens, positions))
    return keys, values, None


@pytest.fixture
def token_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 50_000, (NUM_SLOTS, MAX_MODEL_LEN), generator=generator, dtype=torch.int32).to(DEVICE)


@pytest.fixture
def window() -> DraftWindow:
    model: Any = SimpleNamespace(self_attn=SimpleNamespace(num_kv_heads=2, head_size=8), window_kv=window_kv)
    window = DraftWindow(NUM_SLOTS, model, torch.float32, DEVICE)
    window.kv.fill_(-1)
    return window


def expected_window(token_ids, slot, positions):
    expected = torch.full((WINDOW_SIZE, 2, 2, 8), -1.0)
    for position in positions:
        expected[position % WINDOW_SIZE, 0] = float(token_ids[slot, position])
        expected[position % WINDOW_SIZE, 1] = float(position)
    return expected


@pytest.mark.parametrize("max_new", [1, 6, 33, 100])
def test_append_writes_the_tokens_before_the_root(token_ids, window, max_new):
    # One that has fewer tokens than are to be written, one that lacks none, and one that only pads the batch.
    slots, roots, num_new = [7, 0, 3, -1, 11], [1000, 2, 600, 9, 511], [max_new, max_new, 0, max_new, 1]
    window.append(
        token_ids,
        torch.tensor(slots, device=DEVICE),
        torch.tensor(roots, device=DEVICE),
        torch.tensor(num_new, dtype=torch.int32, device=DEVICE),
        max_new,
    )
    written = {
        slot: range(max(0, root - count), root)
        for slot, root, count in zip(slots, roots, num_new, strict=True)
        if slot >= 0
    }
    for slot in range(NUM_SLOTS):
        assert torch.equal(window.kv[slot].cpu(), expected_window(token_ids, slot, written.get(slot, ())))


@pytest.mark.parametrize("max_new", [1, 6, 33, 100])
def test_roots_are_listed_before_the_settled_tokens(token_ids, max_new):
    # The second root is past the last position, the last but one only pads the batch.
    slots, roots, num_new = [7, 2, 3, 0, -1, 11], [1000, 1500, 600, 2, 0, 511], [max_new, 1, 0, max_new, max_new, 1]
    root_tokens = torch.tensor([40, 41, 42, 43, 0, 45], device=DEVICE)
    requests = (
        token_ids,
        torch.tensor(slots, device=DEVICE),
        torch.tensor(roots, device=DEVICE),
        torch.tensor(num_new, dtype=torch.int32, device=DEVICE),
        max_new,
    )
    rows = list_settled(*requests, root_tokens, max_position=MAX_MODEL_LEN - 1)
    num_reqs = len(slots)
    assert torch.equal(rows.tokens[:num_reqs], root_tokens)
    assert rows.positions[:num_reqs].tolist() == [1000, 1499, 600, 2, 0, 511]
    assert rows.expanded_idx_mapping[:num_reqs].tolist() == [-1] * num_reqs
    for column, expected in zip(rows, list_settled(*requests), strict=True):
        assert column.dtype == torch.int64 and torch.equal(column[num_reqs:], expected)


@pytest.mark.parametrize("roots", [[3], [512, 1, 1499, 0, 513, 700, 20, 1024, 511, 30]])
def test_rebuild_writes_the_last_tokens(token_ids, window, roots):
    assert len(roots) == 1 or len(roots) > MAX_REBUILD_REQS
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(1))[: len(roots)]
    window.rebuild(token_ids, slots.to(DEVICE), torch.tensor(roots, device=DEVICE), max(roots))
    for slot, root in zip(slots.tolist(), roots, strict=True):
        expected = expected_window(token_ids, slot, range(max(0, root - WINDOW_SIZE), root))
        assert torch.equal(window.kv[slot].cpu(), expected)


@pytest.mark.parametrize("num_reqs", [1, 5, 300])
def test_roots(num_reqs):
    generator = torch.Generator().manual_seed(num_reqs)
    num_computed = torch.randint(2**20, (400,), generator=generator, dtype=torch.int32)
    last_sampled = torch.randint(2**17, (400, 1), generator=generator)
    slots = torch.randperm(400, generator=generator)[:num_reqs]
    slots[num_reqs // 2] = -1
    roots = read_roots(slots.to(DEVICE), num_computed.to(DEVICE), last_sampled.to(DEVICE))
    positions = [0 if slot < 0 else int(num_computed[slot]) for slot in slots]
    assert roots.tokens.tolist() == [0 if slot < 0 else int(last_sampled[slot, 0]) for slot in slots]
    assert roots.positions.tolist() == positions
    assert roots.prefix_lens.tolist() == positions
    assert [each.dtype for each in roots] == [torch.int64, torch.int64, torch.int32]
