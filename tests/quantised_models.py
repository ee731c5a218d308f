# SPDX-License-Identifier: Apache-2.0
"""Quantised copies of a target, as the tools that users have write them: compressed-tensors, GPTQ and AWQ."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 32
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}
# AWQ's order of eight values in a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_int8(path: Path, target: Path) -> Path:
    """Compressed-tensors W8A8: a scale for each channel of a weight, and for each token as it comes."""
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": scheme | {"strategy": "channel", "dynamic": False},
        "input_activations": scheme | {"strategy": "token", "dynamic": True},
    }

    def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    config = COMPRESSED_TENSORS | {"format": "int-quantized", "config_groups": {"group_0": group}}
    return _write(path, target, config, quantise)


def write_cache_scales(path: Path, target: Path, key: float, value: float) -> Path:
    """Weights as they are; the checkpoint asks for a KV cache of fp8, with scales that no two layers share."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    config = COMPRESSED_TENSORS | {"format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor([scale * (1 + layer / 8)])
        for layer in range(json.loads((target / "config.json").read_text())["num_hidden_layers"])
        for name, scale in (("k_scale", key), ("v_scale", value))
    }
    return _write(path, target, config, more=scales)


def write_gptq(path: Path, target: Path) -> Path:
    """With a head of four bits too, if the target has one of its own."""
    tied = json.loads((target / "config.json").read_text())["tie_word_embeddings"]

    def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scales, _ = _to_four_bits(weight, symmetric=True)
        zeros = torch.full_like(scales, 7, dtype=torch.int64)  # the format subtracts one
        return {
            "qweight": _pack(values.T.contiguous()).T.contiguous(),
            "qzeros": _pack(zeros),
            "scales": scales.half(),
            "g_idx": (torch.arange(weight.shape[1]) // GROUP_SIZE).int(),
        }

    config: dict = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True}
    config["lm_head"] = not tied
    return _write(path, target, config, quantise)


def write_awq(path: Path, target: Path) -> Path:
    def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scales, zeros = _to_four_bits(weight, symmetric=False)
        return {
            "qweight": _pack(values, AWQ_ORDER),
            "qzeros": _pack(zeros, AWQ_ORDER),
            "scales": scales.half(),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
    return _write(path, target, config, quantise)


def _to_four_bits(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [in, out], scales and zeros [in / GROUP_SIZE, out] of a weight [out, in]."""
    groups = weight.T.reshape(-1, GROUP_SIZE, weight.shape[0])
    if symmetric:
        scales = groups.abs().amax(dim=1) / 7
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
    values = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.reshape(weight.shape[1], -1).long(), scales, zeros.long()


def _pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values of four bits along the last dimension to a word."""
    eights = values.view(*values.shape[:-1], -1, 8)[..., list(order)]
    words = (eights << (4 * torch.arange(8))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _write(
    path: Path,
    target: Path,
    quantization_config: dict,
    quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None,
    more: dict[str, torch.Tensor] | None = None,
) -> Path:
    path.mkdir(parents=True)
    for file in target.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    weights = dict(more or {})
    quantised = ("_proj", "lm_head") if quantization_config.get("lm_head") else ("_proj",)
    for name, weight in load_file(target / "model.safetensors").items():
        module, kind = name.rsplit(".", 1)
        if quantise is not None and kind == "weight" and module.endswith(quantised):
            weights |= {f"{module}.{part}": value for part, value in quantise(weight.float()).items()}
        else:
            weights[name] = weight
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
