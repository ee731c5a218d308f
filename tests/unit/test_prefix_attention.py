# SPDX-License-Identifier: Apache-2.0
"""The prefix attention kernel against attention as its definition says."""

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    PagedBatch,
    attend_slots,
    attention_cases,
    make_batch,
    prefix_slots,
    quantise,
    quantised_cases,
    relative_error,
)
from vllm_longspec.attention import prefix
from vllm_longspec.attention.prefix import prefix_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(batch: PagedBatch, output: torch.Tensor, lse: torch.Tensor, max_query_len: int | None = None) -> None:
    prefix_attention(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        batch.query_start_loc,
        batch.max_query_len if max_query_len is None else max_query_len,
        batch.scale,
        output,
        lse,
        batch.scales,
    )


def check(batch: PagedBatch) -> None:
    num_tokens = batch.query.shape[0]
    output, lse = batch.empty_results(num_further_tokens=3)
    run(batch, output, lse)
    expected_output, expected_lse = attend_slots(
        batch,
        [
            [prefix_slots(batch, request)] * query_len
            for request, query_len in enumerate(batch.query_start_loc.diff().tolist())
        ],
    )
    tolerance = TOLERANCE[output.dtype]
    assert relative_error(output[:num_tokens], expected_output) < tolerance
    torch.testing.assert_close(lse[:, :num_tokens].cpu().double(), expected_lse, rtol=0, atol=tolerance)
    assert output[num_tokens:].isnan().all()
    assert lse[:, num_tokens:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "block_size", "layout"), attention_cases(), ids=str
)
def test_ragged_batch(
    dtype: torch.dtype, head_size: int, num_heads: int, num_kv_heads: int, block_size: int, layout: str
) -> None:
    prefix_lens = [block_size, 0, 1, 330, block_size - 1, block_size + 1]
    query_lens = [3, 2, 1, 12, 1, 5]
    check(make_batch(prefix_lens, query_lens, num_heads, num_kv_heads, head_size, block_size, dtype, layout, DEVICE))


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
    batch = make_batch([block_size, 0, 330], [3, 2, 12], num_heads, num_kv_heads, 80, block_size, dtype, layout, DEVICE)
    check(quantise(batch, per_head, with_query))


@pytest.mark.parametrize(
    ("max_rows", "max_keys", "layout"),
    [(16, 128, "tokens_first"), (64, 32, "heads_first"), (2048, 512, "layers_interleaved")],
)
def test_several_tiles(max_rows: int, max_keys: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and more keys than one tile holds, also where a tile begins or ends in the middle of a group."""
    monkeypatch.setattr(prefix, "INTERPRETER_ROWS", max_rows)
    monkeypatch.setattr(prefix, "INTERPRETER_KEYS", max_keys)
    check(make_batch([130, 600, 64], [69, 7, 33], 5, 1, 64, 48, torch.float32, layout, DEVICE))


def test_requests_without_a_query_are_harmless() -> None:
    """A CUDA graph's batch is padded with requests that have no tokens; whatever their lengths and blocks say."""
    batch = make_batch([40, 7, 20], [3, 0, 2], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    batch.prefix_lens[1] = 1 << 30
    batch.block_table[1] = 1 << 30
    output, lse = batch.empty_results()
    run(batch, output, lse)
    batch.prefix_lens[1] = 0
    expected, _ = attend_slots(batch, [[prefix_slots(batch, 0)] * 3, [], [prefix_slots(batch, 2)] * 2])
    assert relative_error(output, expected) < TOLERANCE[torch.float32]


def test_max_query_len_may_be_a_loose_bound() -> None:
    batch = make_batch([40, 7], [3, 5], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    exact, loose = batch.empty_results(2), batch.empty_results(2)
    run(batch, *exact)
    run(batch, *loose, max_query_len=64)
    for actual, expected in zip(loose, exact, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch([200], [4], 2, 1, 64, 16, torch.float32, "tokens_first", DEVICE)
    batch.scale = 20.0
    output, lse = batch.empty_results()
    run(batch, output, lse)
    expected, expected_lse = attend_slots(batch, [[prefix_slots(batch, 0)] * 4])
    # exp(89) is not a float32. Scores of some hundreds leave four digits behind the point, hence in the weights.
    assert expected_lse.min() > 89
    assert relative_error(output, expected) < 1e-3
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=0)
