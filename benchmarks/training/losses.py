# SPDX-License-Identifier: Apache-2.0
"""Losses of a target and of its GLIDE draft over whole windows of text.

The draft is trained as LongSpec trains (arXiv 2502.17421): the target is frozen; the draft sees token ids through the
target's embedding; its cross-attention sees the target's keys with the last few withheld, as while drafting; positions
start with a few anchors and go on at a random offset, so that short windows train large positions. The loss is the
cross-entropy with the next token, mixed with that with the target's own distribution, which the draft is to predict.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention

from benchmarks.training.target import Target, repeat_heads
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer

# Rows at depths 0 to 4 are fed to the draft while it grows a tree of five levels. A row at depth d sees the target's
# keys up to the root and without it, that is, at distances above d.
MAX_WITHHELD = 5
NUM_ANCHORS = 4
# The rest of the draft's loss is the cross-entropy with the target's distribution.
NEXT_TOKEN_WEIGHT = 0.1


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def mixed_precision(device: str) -> AbstractContextManager:
    return torch.autocast(device.split(":")[0], compute_dtype(device), enabled=device.startswith("cuda"))


def target_loss(target: Target, windows: Tensor, device: str) -> Tensor:
    with mixed_precision(device):
        positions = torch.arange(windows.shape[1] - 1, device=device)
        hidden, _ = target(windows[:, :-1], positions, dtype=compute_dtype(device))
        return cross_entropy(target.head(hidden).flatten(0, 1), windows[:, 1:].flatten())


def windowed_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Causal attention over the last 512 positions, in chunks that see themselves and the chunk before.

    Args:
        queries, keys, values: [batch, heads, tokens, head_dim]; tokens a multiple of 512
        positions: int [tokens], strictly increasing
    """
    size = SELF_ATTENTION_WINDOW
    batch, heads, tokens, head_dim = queries.shape
    chunks = tokens // size

    def chunked(x: Tensor) -> Tensor:  # [chunks, batch * heads, size, head_dim]
        return x.reshape(batch * heads, chunks, size, head_dim).transpose(0, 1)

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=2)

    own = positions.reshape(chunks, size)
    # Nothing precedes the first chunk: a position beyond all others is never in the past.
    before = torch.cat((torch.full_like(own[:1], torch.iinfo(own.dtype).max // 2), own[:-1]))
    distances = own[:, :, None] - torch.cat((before, own), dim=1)[:, None, :]
    mask = (distances >= 0) & (distances <= size)
    output = scaled_dot_product_attention(
        chunked(queries), with_previous(chunked(keys)), with_previous(chunked(values)), attn_mask=mask[:, None]
    )
    return output.transpose(0, 1).reshape(batch, heads, tokens, head_dim)


def draft_forward(
    glide: GlideLayer,
    embeddings: Tensor,  # [batch, tokens, hidden_size]
    positions: Tensor,  # int [tokens]
    cross_keys: Tensor,  # [batch, kv_heads, tokens, head_dim]
    cross_values: Tensor,
    withheld: int,
) -> Tensor:
    """`GlideLayer.forward` for whole windows, with fast attention: token i sees target keys 0 to i - withheld."""
    queries, keys, values = (part.transpose(1, 2) for part in glide.self_qkv(embeddings, positions[None]))
    heads, tokens = queries.shape[1:3]
    output = windowed_attention(queries, repeat_heads(keys, heads), repeat_heads(values, heads), positions)
    hidden = embeddings + glide.self_attn.o_proj(output.transpose(1, 2).flatten(2))
    # Token i against keys up to i - withheld is plain causal attention once the first `withheld` queries, which see
    # nothing, and the last `withheld` keys, which nobody sees, are cut off.
    queries = glide.cross_q(hidden, positions[None]).transpose(1, 2)[:, :, withheld:]
    keys, values = (repeat_heads(part[:, :, : tokens - withheld], heads) for part in (cross_keys, cross_values))
    output = pad(scaled_dot_product_attention(queries, keys, values, is_causal=True), (0, 0, withheld, 0))
    hidden = hidden + glide.cross_attn.o_proj(output.transpose(1, 2).flatten(2))
    return hidden + glide.mlp(glide.post_cross_attention_layernorm(hidden))


def anchored_positions(length: int, offset: int, device: str) -> Tensor:
    """The first few positions, then `offset` of them left out, then the rest: int64 [length]."""
    positions = torch.arange(length, device=device)
    return torch.where(positions < NUM_ANCHORS, positions, positions + offset)


@dataclass
class DraftStep:
    """Losses of the draft next to a frozen target."""

    target: Target
    glide: GlideLayer
    device: str

    def logits(self, windows: Tensor, offset: int, withheld: int) -> tuple[Tensor, Tensor]:
        """The target's and the draft's logits for every next token, each [batch, tokens, vocab_size]."""
        dtype = compute_dtype(self.device)
        ids = windows[:, :-1]
        positions = anchored_positions(ids.shape[1], offset, self.device)
        with torch.no_grad():
            hidden, caches = self.target(ids, positions, dtype=dtype)
            expected = self.target.head(hidden)
            embeddings = self.target.embed(ids, dtype)
        keys, values = caches[-1]
        hidden = draft_forward(self.glide, embeddings, positions, keys, values, withheld)
        return expected, self.target.head(hidden)

    def loss(self, windows: Tensor, offset: int, withheld: int) -> Tensor:
        with mixed_precision(self.device):
            expected, drafted = self.logits(windows, offset, withheld)
            labels = expected.flatten(0, 1).float().softmax(-1).mul_(1 - NEXT_TOKEN_WEIGHT)
            next_tokens = windows[:, 1:].reshape(-1, 1)
            labels.scatter_add_(1, next_tokens, torch.full_like(next_tokens, NEXT_TOKEN_WEIGHT, dtype=labels.dtype))
            return cross_entropy(drafted.flatten(0, 1), labels)

    @torch.no_grad()
    def agreement(self, windows: Tensor, withheld: int) -> float:
        """How often the draft's most probable next token is the target's."""
        with mixed_precision(self.device):
            expected, drafted = self.logits(windows, 0, withheld)
            return (expected.argmax(-1) == drafted.argmax(-1)).float().mean().item()
