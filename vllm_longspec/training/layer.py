# SPDX-License-Identifier: Apache-2.0
"""The GLIDE draft layer of LongSpec (arXiv 2502.17421) in plain PyTorch, written from its equations.

    h = embed(token)
    h = h + self_attn(input_layernorm(h))                      # keys in [position - 512, position]
    h = h + cross_attn(post_self_attention_layernorm(h))       # queries only; the target's last layer's keys, values
    h = h + mlp(post_cross_attention_layernorm(h))             # SwiGLU
    logits = target.lm_head(h)                                 # no norm before the head

The layer owns neither embedding nor head; both are the target's. The caller says with masks which keys a row may see,
so one function serves training, drafting in a tree and checking other implementations. Any floating-point type works;
the module needs PyTorch and nothing else, but for RoPE of types yarn and longrope, whose angles are those of
Transformers. Parameter names are those of the published `sail/longspec-*` checkpoints.

Granite multiplies the embedding, what each sublayer adds, and scores by constants; so does its draft. GLM-4 rotates
pairs of neighbours, in a part of each head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# A row attends to the keys of its own sequence at distances 0 to SELF_ATTENTION_WINDOW, both included.
SELF_ATTENTION_WINDOW = 512

KeysValues = tuple[Tensor, Tensor]

_TRANSFORMERS_ROPE = ("yarn", "longrope")


def inverse_frequencies(config: Any) -> Tensor:
    """Angles per position of rotary embedding, float64 [rotated part of head_dim / 2].

    Args:
        config: has hidden_size, num_attention_heads, optionally head_dim, and RoPE either as `rope_parameters`
            (transformers 5) or as `rope_theta` and `rope_scaling` (before); for yarn and longrope it is a Transformers
            config.

    Raises:
        ValueError: for a RoPE type other than default, linear, llama3, yarn and longrope.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = parameters or getattr(config, "rope_scaling", None) or {}
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    rope_type = rope_type_of(config)
    if rope_type in _TRANSFORMERS_ROPE:
        return _transformers_rope(config)[0]
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(
            f"RoPE type {rope_type!r} is not supported: default, linear, llama3, {' and '.join(_TRANSFORMERS_ROPE)} are"
        )
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    size = int(head_size(config) * share)
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope_type == "default":
        return frequencies
    if rope_type == "linear":
        return frequencies / scaling["factor"]
    # Llama 3.1: slow waves are stretched, fast ones are left, with a linear passage between. Turns are counted within
    # the context that the model was first trained for.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rope_type_of(config: Any) -> str:
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def rotary_scale(config: Any) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn and longrope."""
    return _transformers_rope(config)[1] if rope_type_of(config) in _TRANSFORMERS_ROPE else 1.0


def _transformers_rope(config: Any) -> tuple[Tensor, float]:
    """Angles per position and the scale of yarn or longrope, as Transformers computes them.

    Of longrope's two tables it is that for long texts, which vLLM takes if --max-model-len is more than the context
    that the model was first trained for.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = rope_type_of(config)
    if not hasattr(config, "standardize_rope_params"):
        raise ValueError(f"RoPE of type {rope_type!r} needs the config that transformers.AutoConfig reads")
    length = config.max_position_embeddings if rope_type == "longrope" else None
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=length)
    return frequencies.double(), float(scale)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool = False, scale: float = 1.0) -> Tensor:
    """Apply rotary embedding to the first elements of each head, two for each frequency.

    Args:
        x: [batch, rows, heads, head_dim]
        positions: int [batch or 1, rows]
        frequencies: float64 [num_pairs]
        interleaved: neighbours are a pair; otherwise an element of the first half and its like in the second half
        scale: of the rotated elements
    """
    angles = positions[..., None].double() * frequencies.to(positions.device)  # [batch, rows, num_pairs]
    cos, sin = ((scale * wave).to(x.dtype)[:, :, None, :] for wave in (angles.cos(), angles.sin()))
    rotated, rest = x.split([2 * len(frequencies), x.shape[-1] - 2 * len(frequencies)], dim=-1)
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Grouped-query attention; a row that may see no key gets zeros. Scores are divided by sqrt(head_dim) by default.

    Args:
        queries: [batch, rows, heads, head_dim]
        keys, values: [batch, num_keys, kv_heads, head_dim]
        mask: bool [batch or 1, rows, num_keys], true where the row sees the key

    Returns:
        [batch, rows, heads * head_dim]
    """
    batch, rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("brkgd,bskd->bkgrs", grouped, keys) * (head_dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # softmax over no key at all is nan
    return torch.einsum("bkgrs,bskd->brkgd", weights, values).reshape(batch, rows, heads * head_dim)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class AttentionProjections(nn.Module):
    """The four projections of an attention. q, k and v carry a bias, o does not."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = head_size(config)
        query_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def split(self, projected: Tensor) -> Tensor:
        """[batch, rows, heads * head_dim] -> [batch, rows, heads, head_dim]"""
        return projected.unflatten(-1, (-1, self.head_dim))


class GatedMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class GlideLayer(nn.Module):
    """One GLIDE decoder layer.

    Args:
        config: the target's configuration, any object with its attributes: hidden_size, intermediate_size,
            num_attention_heads, num_key_value_heads, rms_norm_eps, the RoPE settings and optionally head_dim and
            model_type.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.frequencies, self.rotary_scale = inverse_frequencies(config), rotary_scale(config)
        model_type = getattr(config, "model_type", None)
        self.interleaved = model_type == "glm4"
        self.embedding_multiplier, self.residual_multiplier, self.scale = 1.0, 1.0, None
        if model_type == "granite":
            self.embedding_multiplier, self.residual_multiplier = (
                config.embedding_multiplier,
                config.residual_multiplier,
            )
            self.scale = config.attention_multiplier
        self.self_attn = AttentionProjections(config)
        # cross_attn.k_proj and v_proj are in every checkpoint and are never used: keys and values come from the target.
        self.cross_attn = AttentionProjections(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_cross_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of the target, of x [batch, rows, heads, head_dim]."""
        return rotate(x, positions, self.frequencies, self.interleaved, self.rotary_scale)

    def self_qkv(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values of the self-attention, each [batch, rows, heads, head_dim]."""
        attention, normed = self.self_attn, self.input_layernorm(embeddings * self.embedding_multiplier)
        return (
            self.rotate(attention.split(attention.q_proj(normed)), positions),
            self.rotate(attention.split(attention.k_proj(normed)), positions),
            attention.split(attention.v_proj(normed)),
        )

    def cross_q(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries of the cross-attention, [batch, rows, heads, head_dim]."""
        attention, normed = self.cross_attn, self.post_self_attention_layernorm(hidden)
        return self.rotate(attention.split(attention.q_proj(normed)), positions)

    def forward(
        self,
        embeddings: Tensor,  # [batch, rows, hidden_size]
        positions: Tensor,  # int [batch or 1, rows]
        self_mask: Tensor,  # bool [batch or 1, rows, num_past + rows]
        cross_keys: Tensor,  # [batch, num_target_keys, kv_heads, head_dim]
        cross_values: Tensor,  # [batch, num_target_keys, kv_heads, head_dim]
        cross_mask: Tensor,  # bool [batch or 1, rows, num_target_keys]
        past_self_kv: KeysValues | None = None,  # each [batch, num_past, kv_heads, head_dim]
    ) -> tuple[Tensor, KeysValues]:
        """The layer's output, to be multiplied by the target's head, and the rows' own self-attention keys and values.

        A self-attention key or value depends on nothing but its token and position, so `past_self_kv` (the keys come
        rotated) can be what earlier calls returned, or `self_qkv` of any window of tokens. `cross_keys` and
        `cross_values` are the target's last layer's cache: keys rotated, values as projected.

        Returns:
            hidden [batch, rows, hidden_size] and (keys, values), each [batch, rows, kv_heads, head_dim].
        """
        queries, new_keys, new_values = self.self_qkv(embeddings, positions)
        keys, values = new_keys, new_values
        if past_self_kv is not None:
            keys, values = (torch.cat(parts, dim=1) for parts in zip(past_self_kv, (new_keys, new_values), strict=True))
        added = self.residual_multiplier
        attended = attend(queries, keys, values, self_mask, self.scale)
        hidden = embeddings * self.embedding_multiplier + added * self.self_attn.o_proj(attended)
        cross = attend(self.cross_q(hidden, positions), cross_keys, cross_values, cross_mask, self.scale)
        hidden = hidden + added * self.cross_attn.o_proj(cross)
        return hidden + added * self.mlp(self.post_cross_attention_layernorm(hidden)), (new_keys, new_values)
