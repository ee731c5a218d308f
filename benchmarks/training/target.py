# SPDX-License-Identifier: Apache-2.0
"""The small target in plain PyTorch: a Qwen2 model, with parameter names and files as Hugging Face has them.

Written out here so that training and measuring can reach the last layer's keys and values, which the draft attends to.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from vllm_longspec.training.layer import AttentionProjections, GatedMLP, KeysValues, RMSNorm, inverse_frequencies

WEIGHTS = "model.safetensors"
# Sizes of a toy.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def target_config(vocab_size: int, end_of_text: int, **sizes: int) -> dict:
    """config.json of the target. `rope_theta` is repeated for readers older than transformers 5."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "use_cache": True,
        "dtype": "bfloat16",
        **sizes,
    }


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate_fast`, each [1, 1, tokens, head_dim]."""
    angles = positions.double()[:, None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype)[None, None], angles.sin().to(dtype)[None, None]


def rotate_fast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """`RMSNorm.forward` as PyTorch's one fused kernel."""
    return rms_norm(x, module.weight.shape, module.weight.to(x.dtype), module.eps)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads, keys, head_dim] -> [batch, heads, keys, head_dim]; not every attention kernel groups heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


class TargetLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = AttentionProjections(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Causal over the past (which only a single new token may have) and the new tokens."""
        attention, normed = self.self_attn, norm(self.input_layernorm, hidden)
        queries, keys, values = (
            attention.split(projection(normed)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = rotate_fast(queries, cos, sin), rotate_fast(keys, cos, sin)
        if past is not None:
            keys, values = torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)
        heads = queries.shape[1]
        output = scaled_dot_product_attention(
            queries, repeat_heads(keys, heads), repeat_heads(values, heads), is_causal=past is None
        )
        hidden = hidden + attention.o_proj(output.transpose(1, 2).flatten(2))
        return hidden + self.mlp(norm(self.post_attention_layernorm, hidden)), (keys, values)


class Decoder(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TargetLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Target(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        namespace = SimpleNamespace(**config)
        self.frequencies = inverse_frequencies(namespace)
        self.model = Decoder(namespace)

    def embed(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.model.embed_tokens(ids).to(dtype or self.model.embed_tokens.weight.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.model.embed_tokens.weight)

    def forward(
        self,
        ids: Tensor,  # int [batch, tokens]
        positions: Tensor,  # int [tokens]
        past: list[KeysValues] | None = None,  # per layer, each [batch, kv_heads, num_past, head_dim]
        dtype: torch.dtype | None = None,  # of the residual stream; the weights' by default
    ) -> tuple[Tensor, list[KeysValues]]:
        """The normed hidden states [batch, tokens, hidden_size], for `head`, and every layer's rotated keys and values.

        With a past there can be only one new token.
        """
        hidden = self.embed(ids, dtype)
        cos, sin = rotation(positions, self.frequencies, hidden.dtype)
        caches = []
        for index, layer in enumerate(self.model.layers):
            hidden, cache = layer(hidden, cos, sin, None if past is None else past[index])
            caches.append(cache)
        return norm(self.model.norm, hidden), caches


def save_model(module: nn.Module, config: dict, folder: Path) -> None:
    """Write config.json and the weights, in bfloat16, as Hugging Face lays them out (a tied head is not stored)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load what `save_model` wrote, in the module's own type. Raises RuntimeError for missing or unknown names."""
    module.load_state_dict(load_file(folder / WEIGHTS))


def load_target(folder: Path) -> Target:
    """The saved target in float32 on the CPU."""
    target = Target(json.loads((folder / "config.json").read_text()))
    load_weights(target, folder)
    return target.eval()
