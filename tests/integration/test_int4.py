# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits, with vLLM's kernel for CPUs."""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.utils.torch_utils import set_default_torch_dtype

from benchmarks import PAIR
from tests.integration.test_glide_draft import one_process  # noqa: F401
from vllm_longspec.proposers.glide.int4 import GROUPS, NAME, TYPE, Int4Config, quantise


GROUP = GROUPS[0]


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[num_outputs, num_inputs]"""
    return ((codes - TYPE.bias) * scales.float().repeat_interleave(GROUP, dim=0)).t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (5000, 256)])
def test_a_weight_is_within_half_a_step(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    weight[3] = 0
    codes, scales = quantise(weight, GROUP)
    assert codes.dtype == torch.int32 and codes.min() >= 0 and codes.max() <= 15
    assert scales.shape == (shape[1] // GROUP, shape[0]) and scales.dtype == dtype
    found = dequantised(codes, scales)
    steps = scales.float().repeat_interleave(GROUP, dim=0).t()
    inside = (codes.t() > 0) & (codes.t() < 15)
    assert ((found - weight.float()).abs() <= 0.5001 * steps)[inside].all()
    assert inside.float().mean() > 0.95 and (found[3] == 0).all()
    # Better than the largest magnitude alone, which is 0.11.
    assert (found - weight.float()).norm() / weight.float().norm() < 0.104


def test_a_layer_multiplies_by_what_was_quantised():
    torch.manual_seed(0)
    assert get_quantization_config(NAME) is Int4Config
    weight, bias = (torch.randn(96, 256) * 0.05).bfloat16(), torch.randn(96).bfloat16()
    config = EngineArgs(model=str(PAIR / "target"), dtype="bfloat16", skip_tokenizer_init=True).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        layer = ReplicatedLinear(256, 96, bias=True, quant_config=Int4Config(), prefix="mlp")
        layer.weight.weight_loader(layer.weight, weight)
        layer.bias.weight_loader(layer.bias, bias)
        rows = torch.randn(7, 256).bfloat16()
        found, _ = layer(rows)
    expected = rows.float() @ dequantised(*quantise(weight, GROUP)).t() + bias.float()
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
