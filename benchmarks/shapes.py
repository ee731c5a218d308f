# SPDX-License-Identifier: Apache-2.0
"""Models of full size without their weights: the sizes of published targets, and folders that vLLM loads them from.

vLLM fills a model with random numbers when it is told `load_format="dummy"`. Only an EAGLE-3 head needs weights in
files: without them vLLM does not know that it has a head of its own, gives it the target's, and a step then reads
152,064 rows instead of 32,000.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

from vllm_longspec.targets.families import FAMILIES

CONFIG = "config.json"
EAGLE3_VOCAB_SIZE = 32000
# The tensors of vLLM's dummy weights are uniform up to this.
DUMMY_RANGE = 1e-3

_COMMON: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}

# https://huggingface.co/Qwen/QwQ-32B-Preview/blob/main/config.json
QWQ_32B = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# https://huggingface.co/gradientai/Llama-3-8B-Instruct-262k/blob/main/config.json
LLAMA_3_8B_262K = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 283461213.0,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json, with YaRN for 131,072 positions left out
QWEN2_5_7B = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# https://huggingface.co/Qwen/Qwen3-32B/blob/main/config.json; 131,072 positions are what its card gives for YaRN
QWEN3_32B = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "head_dim": 128,
    "intermediate_size": 25600,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct/blob/main/config.json, without the scaling of its RoPE.
# Nothing in this package was set by looking at it.
LLAMA_3_2_3B = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "head_dim": 128,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}

# https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
QWEN3_30B_A3B = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# Small enough for Triton's interpreter. EAGLE-3 reads layers 2, n / 2 and n - 3 of n, which must differ;
# fewer tokens too few for `vllm bench latency`, whose prompts are of the first 10,000.
TOY = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 10240,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES = {
    "qwq-32b": QWQ_32B,
    "llama-3-8b-262k": LLAMA_3_8B_262K,
    "qwen2.5-7b": QWEN2_5_7B,
    "qwen3-32b": QWEN3_32B,
    "llama-3.2-3b": LLAMA_3_2_3B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "toy": TOY,
}


def write_target(folder: Path, config: dict[str, Any]) -> Path:
    """A target for `load_format="dummy"`."""
    return _write_config(folder, config)


def write_glide_draft(folder: Path, config: dict[str, Any]) -> Path:
    """The GLIDE draft of a target, for `load_format="dummy"`."""
    return _write_config(folder, config | {"architectures": [FAMILIES[config["model_type"]]]})


def write_eagle3_head(folder: Path, config: dict[str, Any]) -> Path:
    """An EAGLE-3 head of the target's width with random weights; 1.5 GB for a target of 32B.

    One that is there already, of the same sizes, is kept.
    """
    draft_vocab_size = min(EAGLE3_VOCAB_SIZE, config["vocab_size"] // 2)
    eagle3 = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab_size,
        "tie_word_embeddings": False,
    }
    head_config = {key: value for key, value in config.items() if key != "use_sliding_window"} | eagle3
    if _has(folder / CONFIG, _as_json(head_config)):
        return folder

    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, config["torch_dtype"])
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_size = config.get("head_dim", hidden // config["num_attention_heads"])
    q_size = config["num_attention_heads"] * head_size
    kv_size = config["num_key_value_heads"] * head_size
    shapes = {
        # It reads three of the target's layers, and its attention the embedding beside what comes of them.
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": (q_size, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, q_size),
        "midlayer.mlp.gate_proj.weight": (intermediate, hidden),
        "midlayer.mlp.up_proj.weight": (intermediate, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, intermediate),
        "lm_head.weight": (draft_vocab_size, hidden),
    }
    # One block of random numbers over and over: new ones for all would take longer than an engine to load them.
    noise = torch.empty(1 << 20, dtype=dtype).uniform_(
        -DUMMY_RANGE, DUMMY_RANGE, generator=torch.Generator().manual_seed(0)
    )
    weights = {
        name: noise.repeat(-(-math.prod(shape) // noise.numel()))[: math.prod(shape)].view(shape).clone()
        for name, shape in shapes.items()
    }
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        weights[f"{name}.weight"] = torch.ones(hidden, dtype=dtype)
    # Draft token i is target token i + d2t[i]: spread over the target's vocabulary.
    step = config["vocab_size"] // draft_vocab_size
    weights["d2t"] = torch.arange(draft_vocab_size) * (step - 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    # Last, as it says that the weights are there.
    return _write_config(folder, head_config)


def write_frequent_tokens(path: Path, size: int, vocab_size: int) -> Path:
    """So many random tokens, for timing: what they are does not change the cost of a step."""
    _write(path, json.dumps(random.Random(0).sample(range(vocab_size), size)))
    return path


def _write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG, _as_json(config))
    return folder


def _as_json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _has(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def _write(path: Path, text: str) -> None:
    """Leaves a file as it is that has the text: an engine of another process may be reading it."""
    if not _has(path, text):
        path.write_text(text)
