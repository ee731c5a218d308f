# SPDX-License-Identifier: Apache-2.0
"""How FlashAttention is called for a prefix, against attention as its definition says."""

import pytest
import torch

from tests.oracles.attention import TOLERANCE, attend_slots, make_batch, prefix_slots, quantise, relative_error

if not torch.cuda.is_available():
    pytest.skip("FlashAttention needs a GPU", allow_module_level=True)

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_longspec.attention.flash import TreeFlashAttentionImpl

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
