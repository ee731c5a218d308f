# SPDX-License-Identifier: Apache-2.0
"""The tree walk over a known continuation, in plain PyTorch and without an engine.

At a root, the draft grows a tree from the true prefix; the walk follows the continuation down the tree as far as it
goes and emits one token more, which is the next root. This is exactly what a verification pass does, since a node's
sample is what the target would emit there: at temperature 0 its argmax, above it a draw that does not depend on the
tree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_longspec.options import PartialAttention
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer, KeysValues

# (logits [batch, nodes, vocabulary], positions of the nodes [batch]) -> the same, by which their children are ranked
Rescore = Callable[[Tensor, Tensor], Tensor]
# (roots [batch], depth of the nodes) -> bool [batch or 1, tokens], which of the target's keys before its root a node of
# the draft attends
Kept = Callable[[Tensor, int], Tensor]


class Vocabulary(Protocol):
    """The target's embedding and head, which its draft shares."""

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., hidden_size], before any multiplier."""

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocabulary], as the target samples from."""


@dataclass(frozen=True)
class Passage:
    """Prompts of one length with their continuations, and all that drafting at any root of them needs."""

    ids: Tensor  # int64 [batch, tokens]
    prompt_length: int
    ends: Tensor  # int64 [batch], index of the last token of the continuation
    cross: KeysValues  # the target's last layer, each [batch, tokens, kv_heads, head_dim]
    window: KeysValues  # the draft's self-attention, each [batch, tokens - window_start, kv_heads, head_dim]
    window_start: int = 0  # no root is nearer to it than the window is long, unless it is 0


class Level(NamedTuple):
    """The nodes of a tree at one depth, best first; each [batch, width]."""

    scores: Tensor  # float32 cumulative log-probabilities
    tokens: Tensor  # int64
    parents: Tensor  # int64 index in the level before; 0 is the root at depth 1


# Nodes of each request that are accepted, int64 [batch], of its grown tree and its root's index in `Passage.ids`.
Count = Callable[[Sequence[Level], Tensor], Tensor]


def grow(
    target: Vocabulary,
    glide: GlideLayer,
    passage: Passage,
    roots: Tensor,
    shape: Sequence[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    kept: Kept | None = None,
) -> Iterator[Level]:
    """Grow one tree a request, level by level.

    Level 1 is the root's most probable tokens; every further level the most probable (parent, token) pairs of the whole
    level by cumulative log-probability.

    Args:
        roots: int64 [batch], index of the root token in `passage.ids`
        shape: nodes per level
        drafted: int64 [tokens], the only tokens that the draft draws; None for all
        rescore: makes the logits that rank tokens of the draft's; None ranks by the draft's own
        kept: the part of the target's keys that a level's cross-attention sees; None for all before the root
    """
    ids, device = passage.ids, passage.ids.device
    batch, num_tokens = ids.shape
    window_indices = roots[:, None] + torch.arange(-SELF_ATTENTION_WINDOW, 0, device=device)
    places = (window_indices - passage.window_start).clamp(min=0)
    gather = places[:, :, None, None].expand(-1, -1, *passage.window[0].shape[2:])
    past = tuple(part.gather(1, gather) for part in passage.window)
    # While a tree is drafted, every row sees the target's keys up to the root and without it.
    before_root = torch.arange(num_tokens, device=device) < roots[:, None]

    tokens = ids.gather(1, roots[:, None])
    scores = torch.zeros(batch, 1, device=device)
    ancestors = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)  # [batch, nodes, rows so far], with itself
    for depth, width in enumerate(shape):
        nodes = tokens.shape[1]
        in_window = (window_indices >= 0) & (window_indices >= (roots + depth)[:, None] - SELF_ATTENTION_WINDOW)
        self_mask = torch.cat((in_window[:, None].expand(-1, nodes, -1), ancestors), dim=-1)
        cross_mask = before_root if kept is None else before_root & kept(roots, depth)
        hidden, new = glide(
            target.embed(tokens),
            (roots + depth)[:, None].expand(-1, nodes),
            self_mask,
            *passage.cross,
            cross_mask[:, None].expand(-1, nodes, -1),
            past,
        )
        past = tuple(torch.cat(parts, dim=1) for parts in zip(past, new, strict=True))
        logits = target.head(hidden)
        if drafted is not None:
            logits = logits.index_select(-1, drafted)
        if rescore is not None:
            logits = rescore(logits, roots + depth)
        vocab_size = logits.shape[-1]
        scores, best = (scores[..., None] + logits.log_softmax(-1)).flatten(1).topk(width)
        parents, tokens = best // vocab_size, best % vocab_size
        if drafted is not None:
            tokens = drafted[tokens]
        own = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
        ancestors = ancestors.gather(1, parents[..., None].expand(-1, -1, ancestors.shape[-1]))
        ancestors = torch.cat((ancestors, own), dim=-1)
        yield Level(scores, tokens, parents)


def grow_levels(
    target: Vocabulary,
    glide: GlideLayer,
    passage: Passage,
    roots: Tensor,
    shape: Sequence[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    kept: Kept | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tree of `grow` with the continuation in it.

    Yields:
        of each level, [batch, width]: cumulative log-probabilities, float32, and whether a node is on the
        continuation's path, bool
    """
    on_path = torch.ones(len(roots), 1, dtype=torch.bool, device=roots.device)
    levels = grow(target, glide, passage, roots, shape, drafted, rescore, kept)
    for depth, (scores, tokens, parents) in enumerate(levels, start=1):
        on_path = on_path.gather(1, parents) & (tokens == passage.ids.gather(1, (roots + depth)[:, None]))
        yield scores, on_path


def accepted_nodes(
    target: Vocabulary,
    glide: GlideLayer,
    passage: Passage,
    roots: Tensor,
    shape: Sequence[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Count the nodes of each request's tree that are on the continuation's path, int64 [batch]; see `grow_levels`."""
    levels = grow_levels(target, glide, passage, roots, shape, drafted, rescore, kept)
    return torch.stack([on_path.any(1) for _, on_path in levels]).sum(0)


def accepted_of_listed(
    levels: Sequence[Level],
    request: int,
    expected: Sequence[int],
    num_nodes: int,
    copied: Sequence[int] = (),
    copied_scores: Sequence[float] = (),
) -> int:
    """How many nodes are accepted if the target verifies the best `num_nodes`, as the plugin lists them.

    Args:
        request: index in the batch of `levels`
        expected: tokens after the root
        copied: a path that joins the tree (`vllm_longspec/tree/merge.py`), at most `num_nodes` tokens
        copied_scores: its cumulative log-probabilities
    """
    scores: list[float] = torch.cat([level.scores[request] for level in levels]).tolist()
    # By parent, -1 for the root, and token.
    children: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    first = -1  # node of the level before
    for level in levels:
        for parent, token in zip(level.parents[request].tolist(), level.tokens[request].tolist(), strict=True):
            parents.append(first + parent)
            children[parents[-1], token] = len(parents) - 1
        first = len(parents) - level.tokens.shape[1]
    node = -1
    for token, score in zip(copied, copied_scores, strict=True):
        child = children.setdefault((node, token), len(parents))
        if child < len(parents):
            scores[child] = max(scores[child], score)
        else:
            parents.append(node)
            scores.append(score)
        node = child
    # Ranked by the least score on the path, equal ones as they were drafted (`vllm_longspec/tree/order.py`).
    for child, parent in enumerate(parents):
        if parent >= 0:
            scores[child] = min(scores[child], scores[parent])
    listed = set(sorted(range(len(scores)), key=lambda child: -scores[child])[:num_nodes])
    node, accepted = -1, 0
    for token in expected:
        node = children.get((node, token), -1)
        if node not in listed:
            break
        accepted += 1
    return accepted


def walk(
    target: Vocabulary,
    glide: GlideLayer,
    passage: Passage,
    shape: Sequence[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    count: Count | None = None,
    reach: int | None = None,
    kept: Kept | None = None,
) -> list[tuple[int, int, int]]:
    """All steps of all requests as (request, index of the root in the continuation, tokens emitted).

    A step that could run into the end of the continuation is not counted: it would be cut short.

    Args:
        count: of accepted nodes; None for all of the drafted tree that are on the continuation's path
        reach: the most nodes that `count` accepts; None for the levels of the tree
    """
    reach = len(shape) if reach is None else reach
    # The end of `ids` from which whole trees and copies still fit.
    last = passage.ids.shape[1] - 1 - max(len(shape), reach)
    roots = torch.full_like(passage.ends, passage.prompt_length)  # the token that the prefill emits
    steps: list[tuple[int, int, int]] = []
    while True:
        active = roots + reach + 1 <= passage.ends
        if not active.any():
            return steps
        # Finished requests stay in the batch.
        tried = roots.clamp(max=last)
        if count is None:
            emitted = 1 + accepted_nodes(target, glide, passage, tried, shape, drafted, rescore, kept)
        else:
            emitted = 1 + count(list(grow(target, glide, passage, tried, shape, drafted, rescore, kept)), tried)
        columns = (active, roots - passage.prompt_length, emitted)
        for request, (counts, root, number) in enumerate(zip(*(part.tolist() for part in columns), strict=True)):
            if counts:
                steps.append((request, root, number))
        roots = torch.where(active, roots + emitted, roots)


def kept_part(part: PartialAttention, num_tokens: int, block_size: int, first_depth: int = 1) -> Kept:
    """What nodes from `first_depth` on see of the first `num_tokens` tokens: those of the part, in whole blocks.

    The blocks are those of `vllm_longspec/attention/partial.py`.
    """

    def kept(roots: Tensor, depth: int) -> Tensor:
        tokens = torch.arange(num_tokens, device=roots.device)
        if depth < first_depth:
            return torch.ones_like(tokens, dtype=torch.bool)[None]
        first_recent = (roots - part.budget).clamp(min=0) // block_size * block_size
        num_sinks = -(-part.sinks // block_size) * block_size
        return (tokens < num_sinks) | (tokens >= first_recent[:, None])

    return kept


def coupled(noises: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]) -> Rescore:
    """Ranks a draft's tokens with the noise of the target's draws (Gumbel coupling).

    Args:
        noises: positions [batch] -> the noise that the target draws with there, float32 [batch, vocabulary]
        change: makes of the draft's logits what the noise is added to
    """

    def rescore(logits: Tensor, positions: Tensor) -> Tensor:
        return change(logits) + noises(positions)[:, None]

    return rescore
