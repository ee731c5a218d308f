# SPDX-License-Identifier: Apache-2.0
"""Sizes of targets, and the families that have GLIDE drafts. A new one is an entry in `FAMILIES`."""

from typing import Any, NamedTuple

from torch import nn

# `model_type` of a target's config.json -> architecture of its GLIDE drafts. The layer is the same in all: without the
# norms of queries and keys (Qwen3), the norms after a sublayer (GLM-4) and the experts (Qwen3-MoE) of its target. Its
# rotary embedding is the target's own.
FAMILIES = {
    "llama": "LlamaGlideDecoderLayer",
    "qwen2": "Qwen2GlideDecoderLayer",
    "qwen3": "Qwen3GlideDecoderLayer",
    "qwen3_moe": "Qwen3MoeGlideDecoderLayer",
    "mistral": "MistralGlideDecoderLayer",
    "ministral3": "Ministral3GlideDecoderLayer",
    "phi3": "Phi3GlideDecoderLayer",
    "glm4": "Glm4GlideDecoderLayer",
    "granite": "GraniteGlideDecoderLayer",
}


class Multipliers(NamedTuple):
    """Constant factors of a draft's layer, those of its target's layers. The head's is in the logits processor."""

    embedding: float
    residual: float  # of what a sublayer adds
    attention: float  # of the scores


# Families whose configs have them; others may carry settings of these names that vLLM ignores.
_WITH_MULTIPLIERS = ("granite",)


def multiplier_names(model_type: str) -> tuple[str, ...]:
    """Settings of config.json that must be the target's, in the order of `Multipliers`."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    return names if model_type in _WITH_MULTIPLIERS else ()


def multipliers_of(config: Any) -> Multipliers:
    """Those of a Hugging Face config, of a target or of its draft."""
    names = multiplier_names(config.model_type)
    if names:
        return Multipliers(*(getattr(config, name) for name in names))
    return Multipliers(1.0, 1.0, size_of(config, "head_dim") ** -0.5)


# Architectures of multimodal targets whose language model may be of such a family: positions are those of text, and
# vLLM serves them without their other parts (`--language-model-only`).
WRAPPERS = ("Mistral3ForConditionalGeneration",)


class TargetModules(NamedTuple):
    """The target's modules that a draft shares."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    lm_head: nn.Module
    logits_processor: nn.Module


def language_model_of(target: nn.Module) -> nn.Module:
    """The target itself, or the language model inside a multimodal one."""
    # Imported here, because an unsupported vLLM must not fail to import this module.
    from vllm.model_executor.models.interfaces import supports_multimodal

    model: Any = target
    return model.get_language_model() if supports_multimodal(target) else target


def modules_of(target: nn.Module) -> TargetModules:
    """Those of the base model: with LoRA, vLLM's wrappers apply the adapters of the target's batch."""
    target = language_model_of(target)
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
    """Weights of all layers and of the head that each of `num_ranks` GPUs reads in every step: all but the experts'."""
    hidden, intermediate, *_ = layer_sizes(target)
    # In a layer with experts a router stands where others have their MLP.
    router = num_experts(target) * hidden - 3 * hidden * intermediate
    layers = target.num_hidden_layers * layer_weights(target) + num_expert_layers(target) * router
    return (layers + vocab_size * hidden) / num_ranks


class ExpertWeights(NamedTuple):
    """Weights of the experts of all layers that each GPU has, and how many of them a step reads."""

    total: float
    share: float  # of a layer's experts, which a row goes through

    @property
    def of_row(self) -> float:
        return self.share * self.total

    def read(self, num_rows: int) -> float:
        """Weights that a step reads: those of experts with a row.

        Rows choose as if independently. Those of one text choose alike, so that fewer are read.
        """
        return self.total * (1 - (1 - self.share) ** num_rows)


NO_EXPERTS = ExpertWeights(0.0, 0.0)


def expert_weights(target: Any, num_ranks: int) -> ExpertWeights:
    """Those of a target on each of `num_ranks` GPUs; zero without experts."""
    experts = num_experts(target)
    if experts == 0:
        return NO_EXPERTS
    weights = 3 * size_of(target, "hidden_size") * target.moe_intermediate_size
    return ExpertWeights(
        num_expert_layers(target) * experts * weights / num_ranks, target.num_experts_per_tok / experts
    )


def num_experts(target: Any) -> int:
    """Experts of a layer of a Qwen3-MoE, the only supported family that has some; otherwise 0."""
    return target.num_experts if getattr(target, "model_type", None) == "qwen3_moe" else 0


def num_expert_layers(target: Any) -> int:
    if num_experts(target) == 0:
        return 0
    return sum(
        layer not in target.mlp_only_layers and (layer + 1) % target.decoder_sparse_step == 0
        for layer in range(target.num_hidden_layers)
    )


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
