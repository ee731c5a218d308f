# SPDX-License-Identifier: Apache-2.0
"""The measurement of a target that drafts over a part of its own cache."""

from dataclasses import replace

import pytest
import torch

from benchmarks import PAIR
from benchmarks.training import sparse
from benchmarks.training.acceptance import load_prompts
from benchmarks.training.sparse import Counts, Passages, Selection
from benchmarks.training.target import Target, load_target

CONTEXT, TOKENS, GAMMA = 200, 28, 3


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(PAIR / "target")


@torch.inference_mode()
def passages_of(target: Target, temperature: float) -> Passages:
    prompts = load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", 2, "cpu")
    passages = sparse.make_passages(target, prompts[max(prompts)][:, -CONTEXT:], TOKENS, temperature)
    # Whether the text goes on or is in a loop does not matter here.
    return replace(passages, ends=[CONTEXT + TOKENS - 1] * 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_of_the_cache_accepts_everything_and_less_of_it_less(target: Target, temperature: float) -> None:
    passages = passages_of(target, temperature)
    whole, chosen, few = Counts(), Counts(), Counts()
    sparse.walk(target, passages, Selection(1000), GAMMA, whole)
    assert whole.accepted == whole.tried == GAMMA * whole.steps
    assert whole.emitted == (1 + GAMMA) * whole.steps
    # All but the latest tokens are chosen, out of as many.
    sparse.walk(target, passages, Selection(1000, recent=32, unit=16), GAMMA, chosen)
    assert chosen == whole
    sparse.walk(target, passages, Selection(16, recent=0, unit=16, sinks=0), GAMMA, few)
    assert few.accepted < few.tried
    assert few.summary()["tokens_per_step"] == round(1 + few.accepted / few.steps, 2)


def test_scores_are_the_attention_of_the_verified_rows() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 50, 8)
    roots = torch.tensor([50, 21])
    selection = Selection(64, unit=16)
    by_head = sparse.unit_scores(queries, keys, roots, replace(selection, heads="kv"))
    for request, root in enumerate(roots.tolist()):
        for kv_head in range(2):
            rows = queries[request, 2 * kv_head : 2 * kv_head + 2].flatten(0, 1)
            weights = (rows @ keys[request, kv_head, :root].T * 8**-0.5).softmax(-1).sum(0)
            expected = torch.stack([part.sum() for part in torch.nn.functional.pad(weights, (0, 64 - root)).split(16)])
            torch.testing.assert_close(by_head[request, kv_head], expected)
    torch.testing.assert_close(sparse.unit_scores(queries, keys, roots, selection), by_head.sum(1, keepdim=True))
    root_row = sparse.unit_scores(queries, keys, roots, replace(selection, rows="root"))
    torch.testing.assert_close(root_row, sparse.unit_scores(queries[:, :, :1], keys, roots, selection))
    greatest = sparse.unit_scores(queries, keys, roots, replace(selection, heads="max"))
    each = [sparse.unit_scores(queries[:, [h]], keys[:, [h // 2]], roots, selection) for h in range(4)]
    torch.testing.assert_close(greatest, torch.stack(each).amax(0))


def test_what_is_kept() -> None:
    roots, selection = torch.tensor([90]), Selection(48, recent=16, unit=16, sinks=16)

    def kept_units(scores: list[float] | None, selection: Selection) -> list[int]:
        kept = sparse.keep(None if scores is None else torch.tensor([[scores]]), roots, 96, selection)[0, 0]
        units = kept.view(-1, 16)
        assert torch.equal(units.all(1), units.any(1))
        return units.all(1).nonzero().flatten().tolist()

    assert kept_units(None, selection) == kept_units(None, replace(selection, recent=None)) == [0, 2, 3, 4, 5]
    # Units 0, 4 and 5 are kept anyway.
    assert kept_units([9.0, 1.0, 3.0, 2.0, 8.0, 7.0], selection) == [0, 2, 3, 4, 5]
    assert kept_units([9.0, 3.0, 1.0, 2.0, 8.0, 7.0], selection) == [0, 1, 3, 4, 5]
    assert kept_units([9.0, 3.0, 1.0, 2.0, 8.0, 7.0], replace(selection, budget=32)) == [0, 1, 4, 5]


def test_layers_that_share_a_selection(target: Target) -> None:
    """Another number of layers that share one is another measurement."""
    passages = passages_of(target, 1.0)
    counts = []
    for share in (1, 3):
        counts.append(Counts())
        base = Selection(48, recent=16, unit=16, sinks=0, interval=1)
        sparse.walk(target, passages, replace(base, share=share), GAMMA, counts[-1])
    assert counts[0] != counts[1]


def test_sweeps() -> None:
    for sweep in sparse.SWEEPS:
        compared = list(sparse.selections(sweep, [128]))
        assert len(set(compared)) == len(compared) >= 2 and compared[0] == Selection(128)
        assert all(selection.budget == 128 and selection.recent in (16, 32, 64) for selection in compared[1:])
