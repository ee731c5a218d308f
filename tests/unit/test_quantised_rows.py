# SPDX-License-Identifier: Apache-2.0
"""Kernels that quantise what they compute, against the computation and the quantisation one after the other."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticTensorSym

from vllm_longspec.proposers.glide import attention_splits, fp8_inputs
from vllm_longspec.proposers.glide.attention_splits import AttentionSplits, merge_splits
from vllm_longspec.proposers.glide.embedding import can_embed, embed_and_normalise
from vllm_longspec.proposers.glide.fp8_inputs import (
    MAX_ROW,
    accept_quantised_rows,
    activate,
    add,
    empty_activation,
    fused_norm,
    normalise,
    padded_rows,
    quantise,
    some_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, WIDTH, EPSILON = 64, 48, 1e-6
FP8 = torch.float8_e4m3fn


def quantise_rows(rows):
    scales = rows.float().abs().amax(dim=-1, keepdim=True) / torch.finfo(FP8).max
    return (rows.float() / scales).to(FP8), scales


def norm_and_quantise(norm, hidden, residual, rows, scales):
    """In PyTorch."""
    if residual is not None:
        hidden = residual.add_(hidden)
    normed = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    for written, values in zip((rows, scales), quantise_rows(normed), strict=True):
        written.copy_(values)


@pytest.fixture(params=[80, 90])
def capability(request, monkeypatch):
    """Of the device; 90 is Hopper, where rows are padded."""
    monkeypatch.setattr(
        fp8_inputs, "current_platform", SimpleNamespace(is_device_capability=lambda asked: asked == request.param)
    )
    return request.param


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, 1), (16, 16), (17, 64), (64, 64), (65, 128), (128, 128), (129, 129), (300, 300)]
)
def test_rows_are_padded_to_whole_tiles_on_hopper(capability, num_rows, expected):
    assert padded_rows(num_rows) == (expected if capability == 90 else num_rows)


class Norm(nn.Module):
    """vLLM's module without a configuration."""

    variance_epsilon = EPSILON

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden, residual=None):
        total = hidden if residual is None else hidden + residual
        normed = nn.functional.rms_norm(total.float(), total.shape[-1:], self.weight.float(), EPSILON).to(hidden.dtype)
        return normed if residual is None else (normed, total)


class Kernel(CutlassFP8ScaledMMLinearKernel):
    """All of vLLM's kernel but what needs a GPU."""

    def __init__(self, activation_quant_key):
        self.config: Any = SimpleNamespace(activation_quant_key=activation_quant_key, out_dtype=None)
        self.layer_param_names = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
        self.fp8_dtype = FP8
        self.quant_fp8: Any = lambda rows, scale, bound: quantise_rows(rows)

    def apply_scaled_mm(self, *, A, B, out_dtype, As, Bs, bias, output_shape):
        self.num_rows = A.shape[0]
        return ((A.float() * As) @ (B.float() * Bs) + bias).to(out_dtype).view(output_shape)


def linear_layer(activation_quant_key=kFp8DynamicTokenSym, kernel=Kernel):
    weight, scale = quantise_rows(torch.randn(WIDTH, SIZE))
    layer = SimpleNamespace(weight=weight.t(), weight_scale=scale.t(), bias=torch.randn(WIDTH))
    layer.quant_method = SimpleNamespace(fp8_linear=kernel(activation_quant_key))
    return layer


def run(layer, norm, hidden, residual):
    activation, total = normalise(norm, layer, hidden.clone(), None if residual is None else residual.clone())
    return layer.quant_method.fp8_linear.apply_weights(layer, activation, layer.bias), total


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_norm_quantises_what_it_gives(num_tokens, has_residual, capability, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        norm_and_quantise(*args)

    monkeypatch.setattr(fp8_inputs, "_norm_and_quantise", counted)
    torch.manual_seed(num_tokens)
    layer, norm = linear_layer(), Norm(torch.rand(SIZE) + 0.5)
    hidden, residual = torch.randn(2, num_tokens, SIZE)
    inputs = (layer, norm, hidden, residual if has_residual else None)
    apart = run(*inputs)
    assert not calls
    accept_quantised_rows(layer)
    at_once = run(*inputs)
    assert calls
    assert layer.quant_method.fp8_linear.num_rows == (64 if (num_tokens, capability) == (37, 90) else num_tokens)
    torch.testing.assert_close(at_once, apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(at_once[1], hidden + residual if has_residual else hidden)


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_rows_are_quantised_with_padding(num_tokens, capability, monkeypatch):
    def scaled_fp8_quant(hidden, num_token_padding, use_per_token_if_dynamic):
        """What vLLM's function does; nothing is said of the padding."""
        assert use_per_token_if_dynamic
        rows = torch.full((max(num_token_padding, len(hidden)), SIZE), float("nan")).to(FP8)
        scales = torch.full((len(rows), 1), float("nan"))
        rows[:num_tokens], scales[:num_tokens] = quantise_rows(hidden)
        return rows, scales

    monkeypatch.setattr(ops, "scaled_fp8_quant", scaled_fp8_quant)
    torch.manual_seed(num_tokens)
    layer, hidden = linear_layer(), torch.randn(num_tokens, SIZE)
    kernel = layer.quant_method.fp8_linear
    assert quantise(layer, hidden) is hidden
    expected = kernel.apply_weights(layer, hidden, layer.bias)
    accept_quantised_rows(layer)
    # Also rows that the layer quantises.
    for rows, num_rows in ((quantise(layer, hidden), padded_rows(num_tokens)), (hidden, num_tokens)):
        output = kernel.apply_weights(layer, rows, layer.bias)
        assert kernel.num_rows == num_rows and output.is_contiguous()
        assert torch.equal(output, expected)


def test_other_layers_read_what_they_always_did(monkeypatch):
    others = [
        SimpleNamespace(quant_method=object()),
        # One scale, known beforehand.
        linear_layer(kFp8StaticTensorSym),
        linear_layer(kernel=lambda key: SimpleNamespace(config=SimpleNamespace(activation_quant_key=key))),
    ]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    others.append(linear_layer())
    norm, hidden = Norm(torch.ones(SIZE)), torch.randn(3, SIZE)
    for layer in others:
        accept_quantised_rows(layer)
        activation, residual = normalise(norm, layer, hidden)
        assert torch.equal(activation, norm(hidden)) and residual is hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 16, 37])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_fused_norm_is_the_norm(num_tokens, has_residual, dtype):
    torch.manual_seed(num_tokens)
    norm = Norm((torch.rand(SIZE) + 0.5).to(DEVICE, dtype))
    hidden, residual = torch.randn(2, num_tokens, SIZE, device=DEVICE).to(dtype)
    normed, total = fused_norm(norm, hidden.clone(), residual.clone() if has_residual else None)
    expected = norm(hidden, residual) if has_residual else (norm(hidden), hidden)
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close((normed, total), expected, rtol=tolerance, atol=tolerance)


def _silu_and_mul(gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


# In the place of vLLM's module.
silu_and_mul: Any = _silu_and_mul


def check_quantised(activation, expected, dtype):
    """Against rows that are not quantised."""
    assert activation.quant_key == kFp8DynamicTokenSym and activation.orig_dtype == dtype
    assert activation.orig_shape == expected.shape
    num_tokens = len(expected)
    assert activation.data.shape == (padded_rows(num_tokens), *expected.shape[1:])
    assert activation.scale.shape == (padded_rows(num_tokens), 1)
    activation = replace(activation, data=activation.data[:num_tokens], scale=activation.scale[:num_tokens])
    largest = torch.finfo(FP8).max
    scales = (expected.float().abs().amax(dim=-1, keepdim=True) / largest).clamp(min=1 / (largest * 512))
    torch.testing.assert_close(activation.scale, scales, rtol=1e-4, atol=0)
    found = activation.data.float() * activation.scale
    is_near = torch.isclose(found, expected, rtol=0.13, atol=0) | ((found - expected).abs() <= scales * 2**-8)
    if DEVICE == "cpu":
        # The interpreter gives half of what it has to round up to a power of two.
        is_near |= torch.isclose(2 * found, expected, rtol=0.13, atol=0)
    assert is_near.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_float_weight", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("size", [64, 96, 5120])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 24])
def test_a_norm_is_quantised_by_the_row(
    num_tokens, size, has_residual, has_float_weight, dtype, capability, monkeypatch
):
    def marked(*args):
        activation = empty_activation(*args)
        activation.data.view(torch.uint8).fill_(7)
        activation.scale.fill_(-1)
        return activation

    monkeypatch.setattr(fp8_inputs, "empty_activation", marked)
    torch.manual_seed(size)
    hidden, residual = torch.randn(2, num_tokens, size, device=DEVICE).to(dtype)
    # A row that is large, and one of zeros.
    hidden[0] *= 10
    hidden[1:2] = residual[1:2] = 0
    weight = torch.rand(size, device=DEVICE) + 0.5
    norm, linear = Norm(weight if has_float_weight else weight.to(dtype)), linear_layer()
    accept_quantised_rows(linear)
    expected_total = hidden.float() + residual.float() if has_residual else hidden.float()
    activation, total = normalise(norm, linear, hidden, residual if has_residual else None)
    assert total is (residual if has_residual else hidden)
    # The interpreter cuts off what a GPU rounds.
    tolerance = torch.finfo(dtype).eps if has_residual else 0
    torch.testing.assert_close(total.float(), expected_total, rtol=tolerance, atol=0)
    expected = nn.functional.rms_norm(total.float(), (size,), norm.weight.float(), EPSILON)
    check_quantised(activation, expected, dtype)
    assert (activation.data[num_tokens:].view(torch.uint8) == 7).all()
    assert (activation.scale[num_tokens:] == -1).all()


@pytest.mark.parametrize("has_residual", [False, True])
def test_vllm_normalises_rows_that_no_program_holds(has_residual, monkeypatch):
    def vllm_norm(rows, hidden, weight, scales, epsilon, bound, residual):
        assert weight is norm.weight and epsilon == EPSILON and bound is None
        norm_and_quantise(norm, hidden, residual, rows, scales)

    monkeypatch.setattr(torch.ops._C, "rms_norm_dynamic_per_token_quant", vllm_norm, raising=False)
    hidden, residual = torch.randn(2, 2, MAX_ROW + 16, device=DEVICE).bfloat16()
    norm, linear = Norm(torch.ones(MAX_ROW + 16, device=DEVICE).bfloat16()), linear_layer()
    accept_quantised_rows(linear)
    expected_total = hidden + residual if has_residual else hidden.clone()
    activation, total = normalise(norm, linear, hidden, residual if has_residual else None)
    assert torch.equal(total, expected_total)
    check_quantised(activation, norm(expected_total.float()), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 16), (3, 704), (5, 2816), (16, 27648), (20, 64)])
def test_an_activation_is_quantised_by_the_row(num_tokens, size, dtype, capability):
    torch.manual_seed(size)
    gate_up = torch.randn(num_tokens, 2 * size, device=DEVICE).to(dtype)
    # A row of zeros, and one that is large.
    gate_up[num_tokens // 2] = 0
    gate_up[0] *= 10
    layer = linear_layer()
    accept_quantised_rows(layer)
    activation = activate(silu_and_mul, layer, gate_up)
    check_quantised(activation, silu_and_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "size", "multiplier"), [(1, 16, 1.0), (3, 704, 0.22), (16, 3584, 1.0), (20, 64, 1.0)]
)
def test_a_sum_is_quantised_for_the_head(num_tokens, size, multiplier, dtype, capability):
    torch.manual_seed(size)
    hidden, residual = torch.randn(2, num_tokens, size, device=DEVICE).to(dtype)
    hidden[num_tokens // 2] = residual[num_tokens // 2] = 0
    residual[0] *= 10
    head = linear_layer()
    expected = multiplier * hidden.float() + residual.float()
    summed = add(head, hidden, multiplier, residual)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(summed, expected.to(dtype), rtol=tolerance, atol=tolerance)
    accept_quantised_rows(head)
    summed = add(head, hidden, multiplier, residual)
    check_quantised(summed, expected, dtype)
    # All of them keep their padding.
    assert some_rows(summed, slice(0, num_tokens + 2)) is summed
    some = some_rows(summed, slice(1, 3))
    assert torch.equal(some.data.float(), summed.data[1:3].float()) and torch.equal(some.scale, summed.scale[1:3])
    assert some.orig_shape == some.data.shape and torch.equal(some_rows(hidden, slice(1, 3)), hidden[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_splits", "num_tokens", "num_heads", "head_size"),
    [(2, 1, 1, 16), (4, 3, 5, 80), (8, 16, 40, 128), (8, 20, 4, 32), (3, 2, 12, 256)],
)
def test_splits_of_attention_are_merged_and_quantised(
    num_splits, num_tokens, num_heads, head_size, dtype, capability, monkeypatch
):
    torch.manual_seed(num_heads)
    values = torch.randn(num_splits, num_tokens, num_heads, head_size, device=DEVICE).to(dtype)
    lse = 10 * torch.randn(num_splits, num_tokens, num_heads, device=DEVICE)
    # A split that saw nothing of a token, and a token of which none did.
    lse[0, 0] = float("-inf")
    lse[:, num_tokens // 2] = float("-inf")
    values[lse == float("-inf")] = 0
    # Scores that no float32 has the exponential of.
    lse[:, -1] += 1000
    weights = torch.where(lse.isinf().all(0), 0.0, (lse.double() * math.log(2)).softmax(0))
    expected = (weights[..., None] * values.double()).sum(0).flatten(1).float()
    splits, layer = AttentionSplits(values, lse), linear_layer()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(merge_splits(layer, splits), expected.to(dtype), rtol=tolerance, atol=tolerance)
    accept_quantised_rows(layer)
    check_quantised(merge_splits(layer, splits), expected, dtype)
    # Rows that no program holds whole.
    monkeypatch.setattr(attention_splits, "MAX_ROW", 8)
    monkeypatch.setattr(attention_splits, "quantise", lambda linear, rows: rows if linear is layer else None)
    torch.testing.assert_close(merge_splits(layer, splits), expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_whole_attention_is_only_quantised(monkeypatch):
    monkeypatch.setattr(ops, "scaled_fp8_quant", lambda rows, **_: quantise_rows(rows))
    layer, attended = linear_layer(), torch.randn(2, 3, 4, SIZE // 4)
    rows = attended.view(6, SIZE)
    assert torch.equal(merge_splits(layer, attended), rows)
    assert torch.equal(merge_splits(layer, attended.flatten(0, 1)), rows)
    accept_quantised_rows(layer)
    check_quantised(merge_splits(layer, attended), rows, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "size", "multiplier"), [(1, 16, 1.0), (5, 100, 12.0), (16, 3584, 1.0), (20, 64, 1.0)]
)
def test_embeddings_are_normalised_at_once(num_tokens, size, multiplier, dtype, capability):
    torch.manual_seed(size)
    embedding = torch.randn(50, size, device=DEVICE).to(dtype)
    norm, linear = Norm((torch.rand(size, device=DEVICE) + 0.5).to(dtype)), linear_layer()
    tokens = torch.randint(50, (num_tokens,), device=DEVICE)
    assert can_embed(embedding, norm)
    expected_residual = (embedding[tokens] * multiplier).float()
    expected = nn.functional.rms_norm(expected_residual, (size,), norm.weight.float(), EPSILON)
    tolerance = 4 * torch.finfo(dtype).eps
    rows, residual = embed_and_normalise(tokens, embedding, multiplier, norm, linear)
    assert isinstance(rows, torch.Tensor)
    assert rows.dtype == residual.dtype == dtype
    torch.testing.assert_close(residual.float(), expected_residual, rtol=tolerance, atol=0)
    torch.testing.assert_close(rows.float(), expected, rtol=tolerance, atol=tolerance)
    accept_quantised_rows(linear)
    activation, residual = embed_and_normalise(tokens, embedding, multiplier, norm, linear)
    torch.testing.assert_close(residual.float(), expected_residual, rtol=tolerance, atol=0)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        # Of what the interpreter cut off.
        expected = nn.functional.rms_norm(residual.float(), (size,), norm.weight.float(), EPSILON)
    check_quantised(activation, expected, dtype)


def test_what_is_not_embedded_at_once():
    embedding, norm = torch.zeros(2, SIZE), Norm(torch.ones(SIZE))
    assert can_embed(embedding, norm)
    assert not can_embed(embedding.bfloat16(), norm)
    assert not can_embed(torch.zeros(SIZE, 2).t(), norm)
    assert not can_embed(torch.zeros(1, MAX_ROW + 1), norm)


def test_an_activation_for_other_layers(monkeypatch):
    layer, gate_up = linear_layer(), torch.randn(3, 2 * SIZE)
    assert torch.equal(activate(silu_and_mul, layer, gate_up), silu_and_mul(gate_up))
    accept_quantised_rows(layer)
    wide = torch.randn(1, 2 * (MAX_ROW + 16))
    assert torch.equal(activate(silu_and_mul, layer, wide), silu_and_mul(wide))


@pytest.mark.skipif(DEVICE == "cpu", reason="vLLM has this kernel for GPUs")
@pytest.mark.parametrize("num_tokens", [17, 24, 65])
def test_padding_changes_no_product(num_tokens):
    torch.manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 1024, device=DEVICE).bfloat16()
    weight, weight_scale = (each.t() for each in quantise_rows(torch.randn(512, 1024, device=DEVICE)))

    def product(rows, scales):
        return ops.cutlass_scaled_mm(rows, weight, scale_a=scales, scale_b=weight_scale, out_dtype=hidden.dtype)

    alone = product(*ops.scaled_fp8_quant(hidden, use_per_token_if_dynamic=True))
    rows, scales = ops.scaled_fp8_quant(hidden, num_token_padding=128, use_per_token_if_dynamic=True)
    rows[num_tokens:], scales[num_tokens:] = float("nan"), float("nan")
    torch.testing.assert_close(product(rows, scales)[:num_tokens], alone, rtol=0.01, atol=0.01)
