# SPDX-License-Identifier: Apache-2.0
"""How FlashAttention is called, against attention as its definition says."""

from types import SimpleNamespace

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    attend_slots,
    make_batch,
    prefix_slots,
    quantise,
    relative_error,
    row_slots,
)

if not torch.cuda.is_available():
    pytest.skip("FlashAttention needs a GPU", allow_module_level=True)

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_longspec.attention import flash
from vllm_longspec.attention.flash import TreeFlashAttentionImpl, TreeFlashAttentionMetadataBuilder

VERSION = get_flash_attn_version(head_size=128)
# FlashAttention 3 rounds the weights of the softmax to fp8 as well, of which four bits count.
TOLERANCE_FP8 = 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantised", [None, "per layer", "per head"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "layout"), [(8, 2, "tokens_first"), (5, 1, "heads_first")])
def test_prefix(dtype: torch.dtype, quantised: str | None, num_heads: int, num_kv_heads: int, layout: str) -> None:
    if quantised and VERSION != 3:
        pytest.skip("a quantised cache needs FlashAttention 3")
    if quantised and dtype != torch.bfloat16:
        pytest.skip("of a quantised cache FlashAttention 3 writes bfloat16 only, in plain vLLM too")
    batch = make_batch([33, 0, 330], [3, 2, 12], num_heads, num_kv_heads, 128, 32, dtype, layout, "cuda")
    batch.kv_cache.nan_to_num_(0.0)
    if quantised:
        batch = quantise(batch, quantised == "per head", with_query=True)
    impl = object.__new__(TreeFlashAttentionImpl)
    impl.head_size, impl.num_kv_heads, impl.scale, impl.vllm_flash_attn_version = 128, num_kv_heads, 128**-0.5, VERSION
    output, _ = batch.empty_results()
    lse = impl.prefix_attention(
        batch.query.contiguous(),
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        int(batch.prefix_lens.max()),
        batch.query_start_loc,
        batch.max_query_len,
        output,
        batch.scales,
    )
    expected, expected_lse = attend_slots(
        batch,
        [
            [prefix_slots(batch, request)] * query_len
            for request, query_len in enumerate(batch.query_start_loc.diff().tolist())
        ],
    )
    has_prefix = ~expected_lse[0].isinf()
    assert relative_error(output[has_prefix], expected[has_prefix]) < (TOLERANCE_FP8 if quantised else TOLERANCE[dtype])
    torch.testing.assert_close(
        lse.cpu().double()[:, has_prefix], expected_lse[:, has_prefix], rtol=0, atol=TOLERANCE[torch.bfloat16]
    )
    assert lse.cpu()[:, ~has_prefix].isinf().all()


@pytest.mark.parametrize(("num_reqs", "most_splits"), [(3, 32), (40, 1)])
def test_one_row_a_request(monkeypatch: pytest.MonkeyPatch, num_reqs: int, most_splits: int) -> None:
    """As a target decodes that drafts for itself within a CUDA graph; with 40 requests no work is split."""
    if VERSION != 3:
        pytest.skip("only FlashAttention 3 takes a bound on splits")
    num_heads, num_kv_heads, head_size, block_size, dtype = 8, 4, 128, 16, torch.bfloat16
    monkeypatch.setattr(flash, "num_multiprocessors", lambda device: 132)
    builder = object.__new__(TreeFlashAttentionMetadataBuilder)
    vars(builder).update(
        device=torch.device("cuda"),
        use_full_cuda_graph=True,
        aot_schedule=True,
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
        num_heads_q=num_heads,
        num_heads_kv=num_kv_heads,
        headdim=head_size,
        block_size=block_size,
        kv_cache_dtype=dtype,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        aot_sliding_window=(-1, -1),
        dcp_world_size=1,
    )
    builder.expect_equal_lengths(num_reqs, max_seq_len=1056)
    assert builder.max_num_splits == most_splits

    lengths = [1000 + request for request in range(num_reqs)]
    batch = make_batch(
        lengths, [1] * num_reqs, num_heads, num_kv_heads, head_size, block_size, dtype, "tokens_first", "cuda"
    )
    batch.kv_cache.nan_to_num_(0.0)
    seq_lens = batch.prefix_lens + 1
    schedule = builder._get_scheduler_metadata(
        aot_schedule=True,
        batch_size=num_reqs,
        cu_query_lens=batch.query_start_loc,
        max_query_len=1,
        seqlens=seq_lens,
        max_seq_len=2048,
        causal=True,
        max_num_splits=builder.max_num_splits,
    )
    key_cache, value_cache = batch.kv_cache.transpose(1, 2).split(head_size, dim=-1)
    output, _ = batch.empty_results()
    flash.flash_attn_varlen_func(
        q=batch.query.contiguous(),
        k=key_cache,
        v=value_cache,
        out=output,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=1,
        seqused_k=seq_lens,
        max_seqlen_k=2048,
        softmax_scale=batch.scale,
        causal=True,
        block_table=batch.block_table,
        fa_version=VERSION,
        scheduler_metadata=schedule,
        num_splits=builder.max_num_splits,
    )
    slots = [[prefix_slots(batch, request) + row_slots(batch, request)] for request in range(num_reqs)]
    expected, _ = attend_slots(batch, slots)
    assert relative_error(output, expected) < TOLERANCE[dtype]
