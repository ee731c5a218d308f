# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of tree drafting with the pair, in plain PyTorch and without an engine.

The target's continuation of every prompt is generated first, one token at a time. Then the walk: at a root, the draft
grows a tree from the true prefix; the walk follows the continuation down the tree as far as it goes and emits one token
more, which is the next root. This is exactly what a verification pass does, since a node's sample is what the target
would emit there: at temperature 0 its argmax, above it a draw that does not depend on the tree.

    python -m benchmarks.training.acceptance [--pair FOLDER] [--device cpu] [--prompts-per-length 2] [--tokens 128]
        [--frequent-tokens FILE]
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import PAIR
from benchmarks.repetition import loop_start
from benchmarks.training.target import Target, load_target, load_weights
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer, KeysValues

# Nodes per level. The second is the sequential method with gamma = 4.
SHAPES = ([1], [1, 1, 1, 1], [2, 4, 4], [4, 16, 16, 16, 16])


# (logits [batch, nodes, vocabulary], positions of the nodes [batch]) -> the same, by which their children are ranked
Rescore = Callable[[Tensor, Tensor], Tensor]
# roots [batch] -> bool [batch, tokens], which keys of the target's the draft attends, of those before its root
Kept = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Passage:
    """Prompts of one length with their continuations, and all that drafting at any root of them needs."""

    ids: Tensor  # int64 [batch, tokens]
    prompt_length: int
    ends: Tensor  # int64 [batch], index of the last token of the continuation
    cross: KeysValues  # the target's last layer, each [batch, tokens, kv_heads, head_dim]
    window: KeysValues  # the draft's self-attention at every position, same shape


def generate(
    target: Target,
    prompts: Tensor,
    num_tokens: int,
    temperature: float,
    generator: torch.Generator,
    truncate: Callable[[Tensor], Tensor] = lambda scaled: scaled,
    noises: list[Tensor] | None = None,
) -> Tensor:
    """Continue every prompt by exactly num_tokens tokens.

    Args:
        prompts: int64 [batch, prompt_length]
        generator: on the CPU; draws the noise when temperature > 0
        truncate: takes improbable tokens out of logits / temperature, [batch, vocabulary], when temperature > 0
        noises: gets the Gumbel noise that drew each token, float32 [batch, vocabulary], when temperature > 0

    Returns:
        int64 [batch, prompt_length + num_tokens]
    """
    ids, past = prompts, None
    for _ in range(num_tokens):
        new = ids if past is None else ids[:, -1:]
        positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1], device=ids.device)
        hidden, past = target(new, positions, past)
        logits = target.head(hidden[:, -1])
        if temperature > 0:
            exponential = torch.empty(logits.shape).exponential_(generator=generator)
            noise = -exponential.to(logits.device).log()
            logits = truncate(logits / temperature) + noise
            if noises is not None:
                noises.append(noise)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


def make_passage(target: Target, glide: GlideLayer, ids: Tensor, prompt_length: int, end_of_text: int) -> Passage:
    positions = torch.arange(ids.shape[1], device=ids.device)
    _, caches = target(ids, positions)
    keys, values = (part.transpose(1, 2) for part in caches[-1])
    _, window_keys, window_values = glide.self_qkv(target.embed(ids), positions[None])
    # A request ends with its first end-of-text token.
    stops = (ids == end_of_text) & (positions >= prompt_length)
    ends = torch.where(stops.any(1), stops.int().argmax(1), ids.shape[1] - 1)
    return Passage(ids, prompt_length, ends, (keys, values), (window_keys, window_values))


def coupled(noises: list[Tensor], prompt_length: int, change: Callable[[Tensor], Tensor]) -> Rescore:
    """Ranks a draft's tokens with the noise of the target's draws (Gumbel coupling).

    Args:
        noises: of `generate`
        change: makes of the draft's logits what the noise is added to
    """

    def rescore(logits: Tensor, positions: Tensor) -> Tensor:
        # The first noise is that at the prompt's last position.
        rows = [noises[position + 1 - prompt_length][row] for row, position in enumerate(positions.tolist())]
        return change(logits) + torch.stack(rows)[:, None]

    return rescore


def grow_levels(
    target: Target,
    glide: GlideLayer,
    passage: Passage,
    roots: Tensor,
    shape: Sequence[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    kept: Kept | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Grow one tree a request, level by level.

    Level 1 is the root's most probable tokens; every further level the most probable (parent, token) pairs of the whole
    level by cumulative log-probability. Rows of the tree are numbered level by level, the root first.

    Args:
        roots: int64 [batch], index of the root token in `passage.ids`
        shape: nodes per level
        drafted: int64 [tokens], the only tokens that the draft draws; None for all
        rescore: makes the logits that rank tokens of the draft's; None ranks by the draft's own
        kept: the part of the target's keys that the cross-attention sees; None for all before the root

    Yields:
        of each level, [batch, width]: cumulative log-probabilities, float32, and whether a node is on the
        continuation's path, bool
    """
    ids, device = passage.ids, passage.ids.device
    batch, num_tokens = ids.shape
    window_indices = roots[:, None] + torch.arange(-SELF_ATTENTION_WINDOW, 0, device=device)
    gather = window_indices.clamp(min=0)[:, :, None, None].expand(-1, -1, *passage.window[0].shape[2:])
    past = tuple(part.gather(1, gather) for part in passage.window)
    # While a tree is drafted, every row sees the target's keys up to the root and without it.
    cross_mask = torch.arange(num_tokens, device=device) < roots[:, None]
    if kept is not None:
        cross_mask &= kept(roots)
    cross_mask = cross_mask[:, None]

    tokens = ids.gather(1, roots[:, None])
    scores = torch.zeros(batch, 1, device=device)
    ancestors = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)  # [batch, nodes, rows so far], with itself
    on_path = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for depth, width in enumerate(shape):
        nodes = tokens.shape[1]
        in_window = (window_indices >= 0) & (window_indices >= (roots + depth)[:, None] - SELF_ATTENTION_WINDOW)
        self_mask = torch.cat((in_window[:, None].expand(-1, nodes, -1), ancestors), dim=-1)
        hidden, new = glide(
            target.embed(tokens),
            (roots + depth)[:, None].expand(-1, nodes),
            self_mask,
            *passage.cross,
            cross_mask.expand(-1, nodes, -1),
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
        on_path = on_path.gather(1, parents) & (tokens == ids.gather(1, (roots + depth + 1)[:, None]))
        yield scores, on_path


def accepted_nodes(
    target: Target,
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


def walk(
    target: Target,
    glide: GlideLayer,
    passage: Passage,
    shape: list[int],
    drafted: Tensor | None = None,
    rescore: Rescore | None = None,
    kept: Kept | None = None,
) -> list[tuple[int, int, int]]:
    """All steps of all requests as (request, index of the root in the continuation, tokens emitted).

    A step that could run into the end of the continuation is not counted: it would be cut short.
    """
    roots = torch.full_like(passage.ends, passage.prompt_length)  # the token that the prefill emits
    steps: list[tuple[int, int, int]] = []
    while True:
        active = roots + len(shape) + 1 <= passage.ends
        if not active.any():
            return steps
        # Finished requests stay in the batch, at a root from where a whole tree still fits.
        emitted = 1 + accepted_nodes(
            target,
            glide,
            passage,
            roots.clamp(max=passage.ids.shape[1] - len(shape) - 1),
            shape,
            drafted,
            rescore,
            kept,
        )
        columns = (active, roots - passage.prompt_length, emitted)
        for request, (counts, root, count) in enumerate(zip(*(part.tolist() for part in columns), strict=True)):
            if counts:
                steps.append((request, root, count))
        roots = torch.where(active, roots + emitted, roots)


def mean(numbers: list[int]) -> float | None:
    return round(sum(numbers) / len(numbers), 3) if numbers else None


@torch.inference_mode()
def measure(
    target: Target,
    glide: GlideLayer,
    prompts: dict[int, Tensor],  # by length: int64 [batch, length]
    num_tokens: int,
    temperature: float,
    seed: int = 0,
    drafted: Tensor | None = None,  # int64 [tokens], the only tokens that the draft draws
) -> dict:
    """Mean tokens per step for all SHAPES, over all steps and over those before a continuation starts to loop."""
    generator = torch.Generator().manual_seed(seed)
    end_of_text = target.config["eos_token_id"]
    emitted: dict[str, list[int]] = defaultdict(list)
    before_loop: dict[str, list[int]] = defaultdict(list)
    by_length: dict[str, dict[int, float | None]] = defaultdict(dict)
    total = looping = 0
    for length, ids in sorted(prompts.items()):
        full = generate(target, ids, num_tokens, temperature, generator)
        passage = make_passage(target, glide, full, length, end_of_text)
        loops = []
        for row, end in zip(full.tolist(), passage.ends.tolist(), strict=True):
            continuation = row[length : end + 1]
            loops.append(loop_start(continuation))
            total += len(continuation)
            looping += len(continuation) - loops[-1]
        for shape in SHAPES:
            steps = walk(target, glide, passage, shape, drafted)
            emitted[str(shape)] += [count for _, _, count in steps]
            before_loop[str(shape)] += [count for request, root, count in steps if root < loops[request]]
            by_length[str(shape)][length] = mean([count for _, _, count in steps])
    return {
        "temperature": temperature,
        "prompts": sum(len(ids) for ids in prompts.values()),
        "prompt_lengths": sorted(prompts),
        "generated_tokens": total,
        "tokens_in_loops": looping,
        "tokens_per_step": {shape: mean(counts) for shape, counts in emitted.items()},
        "tokens_per_step_before_loops": {shape: mean(counts) for shape, counts in before_loop.items()},
        "tokens_per_step_by_prompt_length": by_length,
    }


def load_prompts(prompts: Path, tokenizer_file: Path, per_length: int, device: str) -> dict[int, Tensor]:
    """The first `per_length` prompts of each length in prompts.jsonl, as token ids."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    by_length = defaultdict(list)
    for line in prompts.read_text().splitlines():
        prompt = json.loads(line)
        ids = tokenizer.encode(prompt["text"]).ids
        if len(ids) != prompt["num_tokens"]:
            raise ValueError(f"{prompt['path']} has {len(ids)} tokens, not {prompt['num_tokens']}: another tokenizer?")
        by_length[len(ids)].append(ids)
    return {length: torch.tensor(ids[:per_length], device=device) for length, ids in by_length.items()}


def load_pair(folder: Path, device: str) -> tuple[Target, GlideLayer]:
    """The saved pair in float32."""
    target = load_target(folder / "target")
    glide = GlideLayer(SimpleNamespace(**json.loads((folder / "draft" / "config.json").read_text())))
    load_weights(glide, folder / "draft")
    return target.to(device), glide.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts-per-length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--frequent-tokens", type=Path, help="JSON list of the only token ids that the draft draws")
    args = parser.parse_args()
    started = time.perf_counter()
    target, glide = load_pair(args.pair, args.device)
    prompts = load_prompts(
        args.pair / "prompts.jsonl", args.pair / "target" / "tokenizer.json", args.prompts_per_length, args.device
    )
    drafted = None
    if args.frequent_tokens:
        drafted = torch.tensor(json.loads(args.frequent_tokens.read_text()), device=args.device)
    print(json.dumps(measure(target, glide, prompts, args.tokens, args.temperature, drafted=drafted), indent=2))
    print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
