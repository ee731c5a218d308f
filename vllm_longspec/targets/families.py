# SPDX-License-Identifier: Apache-2.0
"""Sizes of targets, and the families that have GLIDE drafts. A new one is an entry in `FAMILIES`."""

from typing import Any, NamedTuple

from torch import nn

# `model_type` of a target's config.json -> architecture of its GLIDE drafts
FAMILIES = {"llama": "LlamaGlideDecoderLayer", "qwen2": "Qwen2GlideDecoderLayer"}


class TargetModules(NamedTuple):
    """The target's modules that a draft shares."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    lm_head: nn.Module
    logits_processor: nn.Module


def modules_of(target: nn.Module) -> TargetModules:
    """Those of the base model: with LoRA, vLLM's wrappers apply the adapters of the target's batch."""
    model = target.model
    return TargetModules(
        _of_base(model.embed_tokens),
        model.layers[-1].self_attn.rotary_emb,
        _of_base(target.lm_head),
        _of_base(target.logits_processor),
    )


def _of_base(module: nn.Module) -> nn.Module:
    # Imported here: it brings hundreds of modules, and families are asked for in every process.
    from vllm.lora.layers import BaseLayerWithLoRA

    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module


def layer_sizes(config: Any) -> list[int]:
    """Hidden size, intermediate size, heads, KV heads and head size."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return [size_of(config, name) for name in names]


def layer_weights(target: Any) -> int:
    """Number of weights of a layer, without biases and norms."""
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target)
    return 2 * hidden * heads * head_size + 2 * hidden * kv_heads * head_size + 3 * hidden * intermediate


def target_weights(target: Any, vocab_size: int, num_ranks: int) -> float:
    """Weights of all layers and of the head that each of `num_ranks` GPUs reads in a step."""
    return (target.num_hidden_layers * layer_weights(target) + vocab_size * size_of(target, "hidden_size")) / num_ranks


def cached_token_weights(target: Any, num_ranks: int, is_quantised: bool) -> float:
    """K and V of a cached token in all layers on each GPU, as so many weights of two bytes."""
    *_, kv_heads, head_size = layer_sizes(target)
    # Each rank has at least one KV head.
    return 2 * head_size * target.num_hidden_layers * max(1, kv_heads / num_ranks) * (0.5 if is_quantised else 1.0)


def size_of(config: Any, name: str) -> Any:
    """A size in a Hugging Face config, or the default of one that is left out."""
    value = getattr(config, name, None)
    if value is None and name == "num_key_value_heads":
        return config.num_attention_heads
    if value is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and name == "intermediate_size":
        # OPT, GPT-2 and Falcon have names of their own; left out, it is four times the hidden size.
        others = (getattr(config, other, None) for other in ("ffn_dim", "n_inner", "ffn_hidden_size"))
        return next((size for size in others if size is not None), 4 * config.hidden_size)
    return value
