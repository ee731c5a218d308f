# SPDX-License-Identifier: Apache-2.0
"""Prefix attention in parts: merged on its own, and merged by the tree attention."""

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    PagedBatch,
    ancestors,
    attend_slots,
    attention_cases,
    chain,
    make_batch,
    pack_masks,
    prefix_slots,
    relative_error,
    row_slots,
)
from vllm_longspec.attention import shared_prefix
from vllm_longspec.attention.shared_prefix import (
    PrefixParts,
    PrefixTiles,
    choose_num_parts,
    shared_prefix_attention,
    shared_prefix_parts,
)
from vllm_longspec.step.verify import tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def undefined_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no part wrote must not be read."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(shared_prefix.torch, "empty", poisoned)


def use_parts(monkeypatch: pytest.MonkeyPatch, num_parts: int) -> None:
    monkeypatch.setattr(shared_prefix, "choose_num_parts", lambda *_: num_parts)


def prefix_of(batch: PagedBatch) -> list[list[list[int]]]:
    query_lens = batch.query_start_loc.diff().tolist()
    return [[prefix_slots(batch, request)] * query_len for request, query_len in enumerate(query_lens)]


def arguments(batch: PagedBatch) -> tuple:
    return (
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        batch.query_start_loc,
        batch.max_query_len,
        batch.scale,
    )


def check(batch: PagedBatch) -> None:
    num_tokens = batch.query.shape[0]
    output, lse = batch.empty_results(num_further_tokens=3)
    shared_prefix_attention(*arguments(batch), output, lse)
    expected, expected_lse = attend_slots(batch, prefix_of(batch))
    assert relative_error(output[:num_tokens], expected) < TOLERANCE[batch.query.dtype]
    torch.testing.assert_close(
        lse[:, :num_tokens].cpu().double(), expected_lse, rtol=0, atol=TOLERANCE[batch.query.dtype]
    )
    assert output[num_tokens:].isnan().all()
    assert lse[:, num_tokens:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "block_size", "layout"), attention_cases()[::2], ids=str
)
def test_ragged_batch(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that use every number of parts up to three, full tiles and rests of tiles."""
    use_parts(monkeypatch, 3)
    check(
        make_batch(
            [1, 0, 600, block_size, 790],
            [3, 2, 1, 4, 5],
            num_heads,
            num_kv_heads,
            head_size,
            block_size,
            dtype,
            layout,
            DEVICE,
        )
    )


@pytest.mark.parametrize("layout", ["tokens_first", "heads_first", "layers_interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_within_a_block(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose keys lie in one block are fetched whole."""
    use_parts(monkeypatch, 2)
    check(make_batch([700, 256, 30], [5, 1, 3], 4, 2, 64, 256, dtype, layout, DEVICE))


@pytest.mark.parametrize("num_parts", [1, 2, 5, 64])
def test_number_of_parts(num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number that a batch may be given, also one that no prefix is long enough for."""
    use_parts(monkeypatch, num_parts)
    check(make_batch([1500, 255, 513], [2, 1, 1], 2, 1, 32, 16, torch.float32, "tokens_first", DEVICE))


def test_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tile begins or ends in the middle of a group."""
    use_parts(monkeypatch, 2)
    monkeypatch.setattr(shared_prefix, "choose_tiles", lambda *_: PrefixTiles(16, 32, 4, 2, 2))
    check(make_batch([530, 64, 33], [12, 7, 3], 5, 1, 64, 48, torch.float32, "heads_first", DEVICE))


def test_requests_without_a_query_are_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph's batch is padded with requests that have no tokens; whatever their lengths and blocks say."""
    use_parts(monkeypatch, 2)
    batch = make_batch([600, 7, 20], [3, 0, 2], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    expected, _ = attend_slots(batch, prefix_of(batch))
    batch.prefix_lens[1] = 1 << 30
    batch.block_table[1] = 1 << 30
    output, lse = batch.empty_results()
    shared_prefix_attention(*arguments(batch), output, lse)
    assert relative_error(output, expected) < TOLERANCE[torch.float32]


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    use_parts(monkeypatch, 2)
    batch = make_batch([600], [4], 2, 1, 64, 16, torch.float32, "tokens_first", DEVICE)
    batch.scale = 20.0
    output, lse = batch.empty_results()
    shared_prefix_attention(*arguments(batch), output, lse)
    expected, expected_lse = attend_slots(batch, prefix_of(batch))
    assert expected_lse.min() > 89
    assert relative_error(output, expected) < 1e-3
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_attention_merges_the_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use_parts(monkeypatch, 6)
    batch = make_batch([1600, 0, 40, 520], [5, 3, 1, 7], 6, 2, 64, 16, dtype, "tokens_first", DEVICE)
    trees = [ancestors(chain(7)) for _ in range(4)]
    output, _ = batch.empty_results(num_further_tokens=2)
    parts = shared_prefix_parts(*arguments(batch))
    assert parts.outputs.shape == (6, 16, 6, 64)
    tree_attention(
        batch.query,
        batch.kv_cache,
        batch.slot_mapping,
        batch.query_start_loc,
        pack_masks(trees, 7, DEVICE),
        batch.max_query_len,
        batch.scale,
        parts,
        output,
    )
    attended = []
    for request, tree in enumerate(trees):
        own, before = row_slots(batch, request), prefix_slots(batch, request)
        attended.append([before + [own[other] for other in tree[row]] for row in range(len(own))])
    expected, _ = attend_slots(batch, attended)
    assert relative_error(output[:16], expected) < TOLERANCE[dtype]
    assert output[16:].isnan().all()


def test_parts_of_lower_precision() -> None:
    batch = make_batch([1100], [4], 2, 1, 64, 16, torch.bfloat16, "tokens_first", DEVICE)
    parts = shared_prefix_parts(*arguments(batch), num_parts=4, part_dtype=torch.bfloat16)
    assert isinstance(parts, PrefixParts)
    assert parts.outputs.dtype == torch.bfloat16
    output, _ = batch.empty_results()
    masks = pack_masks([[[row] for row in range(4)]], 4, DEVICE)
    tree_attention(
        batch.query, batch.kv_cache, batch.slot_mapping, batch.query_start_loc, masks, 4, batch.scale, parts, output
    )
    own = row_slots(batch, 0)
    expected, _ = attend_slots(batch, [[[*prefix_slots(batch, 0), slot] for slot in own]])
    assert relative_error(output, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("num_programs", "max_tiles", "expected"),
    [
        # Three tiles of 128 rows for each of 8 KV heads, 2 programs on each of 132 multiprocessors: one full wave.
        (24, 512, 11),
        # One tile.
        (8, 512, 33),
        # Two full waves without any.
        (528, 512, 1),
        (24, 1, 1),
    ],
)
def test_choice_of_the_number_of_parts(num_programs: int, max_tiles: int, expected: int) -> None:
    assert choose_num_parts(num_programs, 264, max_tiles) == expected
