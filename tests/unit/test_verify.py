# SPDX-License-Identifier: Apache-2.0
"""The tree half of verification attention, and the two halves together."""

import random

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    PagedBatch,
    ancestors,
    attend,
    attend_slots,
    attention_cases,
    chain,
    gather,
    make_batch,
    pack_masks,
    prefix_slots,
    quantise,
    quantised_cases,
    random_tree,
    relative_error,
    row_slots,
)
from vllm_longspec.attention import prefix
from vllm_longspec.attention.prefix import prefix_attention
from vllm_longspec.attention.tree import tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_trees(batch: PagedBatch, num_rows: int, seed: int = 0) -> list[list[list[int]]]:
    """For each request, the ancestors of each row of a random tree of `num_rows`; a query may hold fewer rows."""
    rng = random.Random(seed)
    return [ancestors(random_tree(num_rows, rng)) for _ in range(len(batch.prefix_lens))]


def attended_slots(batch: PagedBatch, trees: list[list[list[int]]], with_prefix: bool) -> list[list[list[int]]]:
    """The slots that each row of each request attends."""
    result = []
    for request, tree in enumerate(trees):
        own = row_slots(batch, request)
        before = prefix_slots(batch, request) if with_prefix else []
        result.append([before + [own[other] for other in tree[row]] for row in range(len(own))])
    return result


def run_tree(batch: PagedBatch, masks: torch.Tensor, output: torch.Tensor, prefix_lse: torch.Tensor) -> None:
    tree_attention(
        batch.query,
        batch.kv_cache,
        batch.slot_mapping,
        batch.query_start_loc,
        masks,
        batch.max_query_len,
        batch.scale,
        prefix_lse,
        output,
        batch.scales,
    )


def run_both(batch: PagedBatch, masks: torch.Tensor, num_further_tokens: int = 0) -> torch.Tensor:
    output, lse = batch.empty_results(num_further_tokens)
    prefix_attention(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        batch.query_start_loc,
        batch.max_query_len,
        batch.scale,
        output,
        lse,
        batch.scales,
    )
    run_tree(batch, masks, output, lse)
    return output


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "block_size", "layout"), attention_cases(), ids=str
)
def test_prefix_and_tree_are_full_attention(
    dtype: torch.dtype, head_size: int, num_heads: int, num_kv_heads: int, block_size: int, layout: str
) -> None:
    """Both halves together are attention under the mask that says which key each row sees, written out."""
    prefix_lens = [block_size, 0, 1, 310, block_size - 1, block_size + 1]
    query_lens = [3, 2, 1, 36, 9, 5]
    batch = make_batch(prefix_lens, query_lens, num_heads, num_kv_heads, head_size, block_size, dtype, layout, DEVICE)
    trees = random_trees(batch, num_rows=36)
    output = run_both(batch, pack_masks(trees, 36, DEVICE), num_further_tokens=3)

    num_tokens = batch.query.shape[0]
    expected, _ = attend_slots(batch, attended_slots(batch, trees, with_prefix=True))
    assert relative_error(output[:num_tokens], expected) < TOLERANCE[dtype]
    assert output[num_tokens:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "per_head", "with_query", "num_heads", "num_kv_heads", "block_size", "layout"), quantised_cases(), ids=str
)
def test_quantised_cache(
    dtype: torch.dtype,
    per_head: bool,
    with_query: bool,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    layout: str,
) -> None:
    batch = make_batch([block_size, 0, 70], [3, 2, 36], num_heads, num_kv_heads, 80, block_size, dtype, layout, DEVICE)
    batch = quantise(batch, per_head, with_query)
    trees = random_trees(batch, num_rows=36)
    expected, _ = attend_slots(batch, attended_slots(batch, trees, with_prefix=True))
    assert relative_error(run_both(batch, pack_masks(trees, 36, DEVICE)), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("max_rows", "max_keys", "layout"),
    [(16, 128, "tokens_first"), (64, 32, "heads_first"), (2048, 512, "layers_interleaved")],
)
def test_several_tiles_and_mask_words(
    max_rows: int, max_keys: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows and more keys than one tile holds, three words a mask, and lists that are cut anywhere."""
    monkeypatch.setattr(prefix, "INTERPRETER_ROWS", max_rows)
    monkeypatch.setattr(prefix, "INTERPRETER_KEYS", max_keys)
    batch = make_batch([20, 35, 50, 1], [69, 33, 64, 1], 5, 1, 64, 48, torch.float32, layout, DEVICE)
    trees = random_trees(batch, num_rows=69)
    expected, _ = attend_slots(batch, attended_slots(batch, trees, with_prefix=True))
    assert relative_error(run_both(batch, pack_masks(trees, 69, DEVICE)), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_rows", [32, 33, 256])
def test_every_bit_of_a_mask(num_rows: int) -> None:
    """Any set of rows can be attended, the last bit of a word and of a mask among them."""
    batch = make_batch([0], [num_rows], 1, 1, 32, 16, torch.float32, "tokens_first", DEVICE)
    rng = random.Random(num_rows)
    sets = [[sorted({row, num_rows - 1 - row, rng.randrange(num_rows)}) for row in range(num_rows)]]
    output, lse = torch.zeros_like(batch.query), torch.full((1, num_rows), -torch.inf, device=DEVICE)
    run_tree(batch, pack_masks(sets, num_rows, DEVICE), output, lse)
    expected, _ = attend_slots(batch, attended_slots(batch, sets, with_prefix=False))
    assert relative_error(output, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_rows", [1, 2, 17, 40])
@pytest.mark.parametrize("prefix_len", [0, 1, 61])
def test_a_chain_is_causal_attention(num_rows: int, prefix_len: int) -> None:
    batch = make_batch([prefix_len], [num_rows], 4, 2, 64, 16, torch.float32, "tokens_first", DEVICE)
    output = run_both(batch, pack_masks([ancestors(chain(num_rows))], num_rows, DEVICE))

    keys, values = gather(batch, prefix_slots(batch, 0) + row_slots(batch, 0))
    causal = torch.ones(num_rows, prefix_len + num_rows, dtype=torch.bool).tril(prefix_len)
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.query.cpu().double().transpose(0, 1), keys, values, attn_mask=causal, scale=batch.scale, enable_gqa=True
    )
    assert relative_error(output, expected.transpose(0, 1)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("prefix_lse", [-torch.inf, torch.inf, -80.0, -2.0, 3.0, 80.0])
def test_merge(prefix_lse: float) -> None:
    """The prefix counts as one key with score `prefix_lse` and value `output`; an infinite one does not count."""
    num_rows = 7
    batch = make_batch([0], [num_rows], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    trees = random_trees(batch, num_rows)
    prefix_output = torch.randn(batch.query.shape, generator=torch.Generator().manual_seed(1))
    # Differs by row and head, so that a merge with another's shows.
    lse = prefix_lse + torch.randn(4, num_rows, generator=torch.Generator().manual_seed(2))
    output = prefix_output.to(DEVICE, copy=True)
    if abs(prefix_lse) == torch.inf:
        output.fill_(torch.nan)
    run_tree(batch, pack_masks(trees, num_rows, DEVICE), output, lse.to(DEVICE))

    tree_output, tree_lse = attend_slots(batch, attended_slots(batch, trees, with_prefix=False))
    weight = torch.sigmoid(lse.double() - tree_lse).T[..., None]
    expected = weight * prefix_output.double() + (1 - weight) * tree_output
    if abs(prefix_lse) == torch.inf:
        expected = tree_output
    assert relative_error(output, expected) < TOLERANCE[torch.float32]


def test_rows_beyond_the_query_do_not_exist() -> None:
    """A list cut to `query_len` rows: what the masks say of the others has no effect."""
    batch = make_batch([30, 18], [5, 3], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    trees = random_trees(batch, num_rows=40)
    expected = run_both(batch, pack_masks(trees, 40, DEVICE))
    beyond = [
        [path + list(range(query_len, 40)) if row < query_len else list(range(40)) for row, path in enumerate(tree)]
        for tree, query_len in zip(trees, [5, 3], strict=True)
    ]
    assert torch.equal(run_both(batch, pack_masks(beyond, 40, DEVICE)), expected)


def test_padding_is_harmless() -> None:
    """Requests without rows, with any mask; and rows without a slot, which no row attends."""
    batch = make_batch([20, 0, 33], [4, 0, 6], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    trees = [ancestors(chain(6))] * 3
    masks = pack_masks(trees, 6, DEVICE)
    masks[1] = -1
    batch.slot_mapping[-2:] = -1
    output = run_both(batch, masks)

    rows = attended_slots(batch, trees, with_prefix=True)
    rows[2][4] = [slot for slot in rows[2][4] if slot >= 0]
    rows[2][5] = [slot for slot in rows[2][5] if slot >= 0]
    expected, _ = attend_slots(batch, rows)
    assert relative_error(output, expected) < TOLERANCE[torch.float32]

    # Nothing at all to attend: not even NaN comes out.
    batch.slot_mapping.fill_(-1)
    batch.prefix_lens.zero_()
    assert (run_both(batch, masks) == 0).all()


def test_reads_keys_and_values_from_the_cache() -> None:
    """The same query over another cache gives another result, and one row's slot matters only to its descendants."""
    batch = make_batch([20], [4], 2, 1, 32, 16, torch.float32, "tokens_first", DEVICE)
    masks = pack_masks([ancestors([-1, 0, 0, 1])], 4, DEVICE)
    before = run_both(batch, masks)
    slot = int(batch.slot_mapping[1])
    batch.kv_cache[slot // 16, :, slot % 16] += 1.0
    changed = (run_both(batch, masks) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, True]


def test_attend_matches_torch() -> None:
    """The oracle itself."""
    query, keys, values = torch.randn(3, 5, 16, dtype=torch.float64).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], scale=0.3)[0]
    for row in range(5):
        torch.testing.assert_close(attend(query[row], keys, values, 0.3)[0], expected[row])
