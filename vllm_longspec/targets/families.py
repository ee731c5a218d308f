# SPDX-License-Identifier: Apache-2.0
"""The families of targets that are supported, and where their parts are. A new one is an entry here."""

from typing import Any, NamedTuple

from torch import nn

# `model_type` of a target's config.json, and the architecture that its GLIDE drafts are served as.
FAMILIES = {
    "llama": "LlamaGlideDecoderLayer",
    "qwen2": "Qwen2GlideDecoderLayer",
}


class TargetModules(NamedTuple):
    """The modules of vLLM's model that a draft shares."""

    embed_tokens: nn.Module
    # of the last layer
    rotary_emb: nn.Module
    lm_head: nn.Module
    logits_processor: nn.Module


def modules_of(target: nn.Module) -> TargetModules:
    """Where a model of any of the families has them."""
    return TargetModules(
        target.model.embed_tokens,
        target.model.layers[-1].self_attn.rotary_emb,
        target.lm_head,
        target.logits_processor,
    )


def layer_sizes(config: Any) -> list[int]:
    """Hidden and intermediate size, heads, KV heads and head size of a layer."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return [size_of(config, name) for name in names]


def layer_weights(target: Any) -> int:
    """Weights of one of the target's layers."""
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target)
    return 2 * hidden * heads * head_size + 2 * hidden * kv_heads * head_size + 3 * hidden * intermediate


def size_of(config: Any, name: str) -> Any:
    """A size of a Hugging Face config, or what it means to leave it out."""
    value = getattr(config, name, None)
    if value is None and name == "num_key_value_heads":
        return config.num_attention_heads
    if value is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    return value
