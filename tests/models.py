# SPDX-License-Identifier: Apache-2.0
"""Small targets and drafts in the layouts that users load: Hugging Face folders with a config and safetensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GLIDE_ARCHITECTURES = {
    family: f"{name}GlideDecoderLayer"
    for family, name in {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "qwen3_moe": "Qwen3Moe",
        "mistral": "Mistral",
        "ministral3": "Ministral3",
        "phi3": "Phi3",
        "glm4": "Glm4",
        "granite": "Granite",
    }.items()
}

# What the configs of released models of a family have, in small.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    # 4 heads of 64, not of hidden_size / 4.
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mistral": {"head_dim": 64},
    "ministral3": {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    # Phi-4-mini: a part of each head is rotated, by one table for short contexts and one for long ones.
    "phi3": {
        "original_max_position_embeddings": 256,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * i for i in range(12)],
            "long_factor": [1.5 + 0.5 * i for i in range(12)],
        },
    },
    "glm4": {"pad_token_id": 0},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
}
# Llama 3.1 to 3.3, in small
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_target(
    path: Path, family: str, *, vocab_size: int = 64, tied: bool = False, seed: int = 0, **overrides: object
) -> Path:
    """A target with random weights. A small vocabulary lets even a random draft be right now and then."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        **SIZES,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    settings |= {**FAMILY_SETTINGS.get(family, {}), **overrides}
    if family == "phi3":
        # Its heads have the size that follows from the others.
        settings.pop("head_dim", None)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    # transformers starts biases at zero and norms at one, which would not notice one that is not loaded.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(path)
    return path


def write_wrapper(path: Path) -> Path:
    """A multimodal target around a Ministral 3 with random weights, as Mistral publishes them."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    text: dict[str, Any] = {**SIZES, "vocab_size": 64, "initializer_range": 0.3, "tie_word_embeddings": False}
    text |= {"model_type": "ministral3", **FAMILY_SETTINGS["ministral3"]}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(vision_config=vision, text_config=text, tie_word_embeddings=False)
    model: Any = Mistral3ForConditionalGeneration(config)
    model.save_pretrained(path)
    return path


def glide_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the published GLIDE checkpoints for a target's config."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_size = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads = {
        "q_proj": config["num_attention_heads"] * head_size,
        "k_proj": config["num_key_value_heads"] * head_size,
        "v_proj": config["num_key_value_heads"] * head_size,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for attention in ("self_attn", "cross_attn"):
        for name, size in heads.items():
            shapes[f"{attention}.{name}.weight"] = (size, hidden)
            shapes[f"{attention}.{name}.bias"] = (size,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, heads["q_proj"])
    shapes["mlp.gate_proj.weight"] = (intermediate, hidden)
    shapes["mlp.up_proj.weight"] = (intermediate, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, intermediate)
    for norm in ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm"):
        shapes[f"{norm}.weight"] = (hidden,)
    return shapes


def write_draft(path: Path, target: Path, *, seed: int = 1, prefix: str = "", std: float = 0.2) -> Path:
    """A GLIDE draft with random weights that fits `target`."""
    path.mkdir(parents=True)
    config = json.loads((target / "config.json").read_text())
    config = config.get("text_config", config)
    config["architectures"] = [GLIDE_ARCHITECTURES[config["model_type"]]]
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in glide_shapes(config).items():
        noise = torch.randn(shape, generator=generator) * std
        weights[prefix + name] = 1 + noise if name.endswith("layernorm.weight") else noise
    save_file(weights, path / "model.safetensors")
    return path


def write_agreeing_pair(path: Path, tokenizer: Path, tokens: Sequence[int]) -> tuple[Path, Path]:
    """A small target that says `tokens`, with a draft that says much the same, and the tokenizer of another model.

    Both say next what their shared head makes of the last token's embedding, give or take what a layer adds to it.
    """
    vocab_size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    target = write_target(
        path / "target", "llama", vocab_size=vocab_size, num_hidden_layers=1, initializer_range=0.1, **sizes
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_bytes((tokenizer / file).read_bytes())
    weights = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    # The target's norm leaves an embedding of this size as it is, so the draft, which has none, gets the same logits.
    weights["model.embed_tokens.weight"] = torch.randn(vocab_size, 64, generator=generator)
    weights["lm_head.weight"] *= 0.1
    weights["lm_head.weight"][list(tokens)] = 0.8 * torch.randn(len(tokens), 64, generator=generator)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target, write_draft(path / "draft", target, std=0.1)


def agreeing(path: Path, target: Path) -> Path:
    """The same target, with layers that add little: like a draft of small weights, it says what its head makes of the
    last token's embedding."""
    path.mkdir(parents=True)
    for file in target.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        # GLM-4 has a norm after each sublayer.
        if any(part in name for part in ("o_proj.", "down_proj.", "post_self_attn_layernorm", "post_mlp_layernorm")):
            weight *= 0.002
        if name.endswith("embed_tokens.weight"):
            weights[name] = torch.randn(weight.shape, generator=generator)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def as_llama(path: Path, target: Path, draft: Path) -> tuple[Path, Path]:
    """The same pair as a Llama model: a Qwen2 layer is a Llama layer with `attention_bias` and no bias on o_proj."""
    config = json.loads((target / "config.json").read_text())
    config.update(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=False)
    weights = load_file(target / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        like = weights[f"model.layers.{layer}.input_layernorm.weight"]
        weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros_like(like)
    return _write_pair(path, config, weights, target, draft)


def untied(path: Path, target: Path, draft: Path) -> tuple[Path, Path]:
    """The same pair with a head of its own that equals the embedding."""
    config = json.loads((target / "config.json").read_text())
    config["tie_word_embeddings"] = False
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return _write_pair(path, config, weights, target, draft)


def _write_pair(path: Path, config: dict, weights: dict, target: Path, draft: Path) -> tuple[Path, Path]:
    for folder, source in ((path / "target", target), (path / "draft", draft)):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    (path / "target" / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "target" / "model.safetensors", metadata={"format": "pt"})
    draft_config = config | {"architectures": [GLIDE_ARCHITECTURES[config["model_type"]]]}
    (path / "draft" / "config.json").write_text(json.dumps(draft_config))
    return path / "target", path / "draft"


def load_target(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
