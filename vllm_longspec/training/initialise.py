# SPDX-License-Identifier: Apache-2.0
"""First weights of a draft: normal, or those of the target's last layer."""

import math

import torch
from torch import Tensor, nn

from vllm_longspec.targets.families import num_experts
from vllm_longspec.training.layer import GlideLayer, head_size
from vllm_longspec.training.target import SharedTarget

_STD = 0.02


def initialise(glide: GlideLayer, generator: torch.Generator) -> None:
    """Normal weights, smaller where they write into the residual stream; biases of zero, norms of one.

    Keys and values of the cross-attention are the target's: those projections stay at zero and are not trained.
    """
    for name, parameter in glide.named_parameters():
        if parameter.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=_STD / math.sqrt(2) if into_residual else _STD, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("layernorm.weight") else 0.0)
    freeze_unused(glide)


def freeze_unused(glide: GlideLayer) -> None:
    for projection in (glide.cross_attn.k_proj, glide.cross_attn.v_proj):
        projection.requires_grad_(False)
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)


def initialise_from_last_layer(glide: GlideLayer, target: SharedTarget, generator: torch.Generator) -> None:
    """Both attentions, MLP and norms of the target's last layer, where it has them.

    A norm of queries and keys (Qwen3) cannot be copied, since it depends on what it is given. In its place a head's
    rows are divided by the size that its output has on average, if the normed input is the same in all directions, and
    multiplied by the norm's weights. The MLP of a mixture of experts is left normal.

    Raises:
        ValueError: the family has norms after its sublayers (GLM-4), which no projection can stand for.
    """
    config = target.config
    if config.model_type == "glm4":
        raise ValueError("init last_layer is not supported for glm4, which has norms after its sublayers: give normal")
    initialise(glide, generator)
    layer = {name: weight.float() for name, weight in target.last_layer().items()}
    if "self_attn.qkv_proj.weight" in layer:  # Phi
        sizes = [count * head_size(config) for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
        layer |= dict(zip(names, layer["self_attn.qkv_proj.weight"].split(sizes), strict=True))
    if "mlp.gate_up_proj.weight" in layer:
        layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"] = layer["mlp.gate_up_proj.weight"].chunk(2)
    input_norm = layer["input_layernorm.weight"]
    copied = {
        "input_layernorm.weight": input_norm,
        "post_self_attention_layernorm.weight": input_norm,
        "post_cross_attention_layernorm.weight": layer["post_attention_layernorm.weight"],
    }
    for projection in "qkvo":
        weight = layer[f"self_attn.{projection}_proj.weight"]
        bias = layer.get(f"self_attn.{projection}_proj.bias")
        if (norm := layer.get(f"self_attn.{projection}_norm.weight")) is not None:
            weight = _with_norm(weight, norm, input_norm)
        for attention in ("self_attn", "cross_attn"):
            if attention == "cross_attn" and projection in "kv":
                continue
            copied[f"{attention}.{projection}_proj.weight"] = weight
            if bias is not None and projection != "o":
                copied[f"{attention}.{projection}_proj.bias"] = bias
    if num_experts(config) == 0:
        copied |= {f"mlp.{name}_proj.weight": layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    missing = glide.load_state_dict(copied, strict=False)
    assert not missing.unexpected_keys


def _with_norm(
    weight: Tensor,  # [heads * head_dim, hidden_size]
    norm: Tensor,  # [head_dim]
    input_norm: Tensor,  # [hidden_size]
) -> Tensor:
    heads = weight.unflatten(0, (-1, len(norm)))
    size = (heads * input_norm).square().sum(2).mean(1).sqrt()  # [heads], root mean square of a head's output
    return (heads / size[:, None, None] * norm[:, None]).flatten(0, 1)
