# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a target that drafts for itself over a part of its own cache, in plain PyTorch, without an engine.

The target's continuation of every prompt is generated first, with the noise that drew it. Then the walk, as in
`benchmarks/training/acceptance.py`: from a root, the target drafts a chain of `gamma` tokens with the noise of its own
draws, in which every layer sees only what a `Selection` keeps of the cache; the emitted tokens are those that agree
with the continuation, and one more. A drafted token's K and V stand in the cache until the verification writes its
own.

What is kept is counted in tokens: sinks, a recent window, and for the rest of the budget the units of the cache that
the last verification attended most, layer by layer. A unit is a run of tokens as long as a block of the cache, or some
blocks. Every `interval`-th verification measures scores; the first step after the prompt has none yet and takes the
most recent units instead.

    python -m benchmarks.training.sparse [budget unit recent interval rows heads share] [--models FOLDER] [--device cpu]
        [--contexts 3584] [--budgets 128,256,512] [--prompts 8] [--tokens 96] [--temperatures 0,1]
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import PAIR
from benchmarks.repetition import loop_start
from benchmarks.reporting import markdown
from benchmarks.training.acceptance import generate, load_prompts
from benchmarks.training.target import Target, load_target, norm
from vllm_longspec.training.layer import rotate

SINKS = 32
# What is chosen unless a sweep varies it.
RECENT = 64
UNIT = 32
INTERVAL = 8
BUDGETS = (128, 256, 512)
SWEEPS = ("budget", "unit", "recent", "interval", "rows", "heads", "share")


@dataclass(frozen=True)
class Selection:
    """What a draft step attends of the cached tokens, in tokens."""

    budget: int  # all but the sinks and what is drafted
    recent: int | None = None  # of the budget, the window before the root; None for all of it
    unit: int = UNIT
    interval: int = INTERVAL  # verifications from one selection to the next
    rows: str = "all"  # whose attention counts: "all" verified rows, or the "root"'s
    heads: str = "sum"  # of query heads' attention: "sum" or "max"; "kv" chooses for each KV head, by sums
    share: int = 1  # consecutive layers that use the selection of the first of them
    sinks: int = SINKS


@dataclass
class Counts:
    tried: int = 0  # drafted tokens up to the first that the target does not emit
    accepted: int = 0
    steps: int = 0
    emitted: int = 0

    def summary(self) -> dict[str, float | int]:
        return {
            "steps": self.steps,
            "acceptance": round(self.accepted / self.tried, 3),
            "tokens_per_step": round(self.emitted / self.steps, 2),
        }


@dataclass(frozen=True)
class Passages:
    """Prompts of one length, continued, with the target's K and V at every position."""

    ids: Tensor  # int64 [batch, tokens]
    prompt_length: int
    ends: list[int]  # index of the last token that counts
    noises: list[Tensor]  # of `generate`; empty at temperature 0
    temperature: float
    caches: list[tuple[Tensor, Tensor]]  # per layer, each [batch, kv_heads, tokens, head_dim]


def make_passages(target: Target, prompts: Tensor, num_tokens: int, temperature: float) -> Passages:
    noises: list[Tensor] = []
    generator = torch.Generator().manual_seed(prompts.shape[1])
    ids = generate(target, prompts, num_tokens, temperature, generator, noises=noises)
    _, caches = target(ids, torch.arange(ids.shape[1], device=ids.device))
    length, end_of_text = prompts.shape[1], target.config["eos_token_id"]
    ends = []
    for row in ids.tolist():
        continuation = row[length:]
        if end_of_text in continuation:
            continuation = continuation[: continuation.index(end_of_text) + 1]
        # A loop is easy to draft, and no text that anybody wants.
        ends.append(length + min(len(continuation) - 1, loop_start(continuation)))
    return Passages(ids, length, ends, noises, temperature, caches)


def forward(
    target: Target,
    ids: Tensor,  # int64 [batch, rows]
    positions: Tensor,  # int64 [batch, rows]
    caches: list[tuple[Tensor, Tensor]],  # as in `Passages`; the rows' K and V are written
    visible: Sequence[Tensor],  # per layer, bool [batch, 1 or kv_heads, rows, tokens]
) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch, rows, vocabulary] and every layer's rotated queries [batch, heads, rows, head_dim]."""
    hidden, queries_of_layers = target.embed(ids), []
    slots = positions[:, None, :, None]
    for layer, (keys, values), mask in zip(target.model.layers, caches, visible, strict=True):
        attention, normed = layer.self_attn, norm(layer.input_layernorm, hidden)
        queries, new_keys, new_values = (
            attention.split(projection(normed)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries = rotate(queries, positions, target.frequencies).transpose(1, 2)
        new_keys = rotate(new_keys, positions, target.frequencies).transpose(1, 2)
        index = slots.expand(-1, keys.shape[1], -1, keys.shape[3])
        keys.scatter_(2, index, new_keys)
        values.scatter_(2, index, new_values.transpose(1, 2))
        # The rows of a group's heads lie behind each other, so that K and V are not repeated.
        grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        grouped_mask = mask.repeat(1, 1, queries.shape[1] // keys.shape[1], 1)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=grouped_mask)
        output = output.unflatten(2, (-1, ids.shape[1])).flatten(1, 2)
        hidden = hidden + attention.o_proj(output.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(norm(layer.post_attention_layernorm, hidden))
        queries_of_layers.append(queries)
    return target.head(norm(target.model.norm, hidden)), queries_of_layers


def unit_scores(
    queries: Tensor,  # [batch, heads, rows, head_dim]
    keys: Tensor,  # [batch, kv_heads, tokens, head_dim]
    roots: Tensor,  # int64 [batch]
    selection: Selection,
) -> Tensor:
    """Attention of a verification to each unit of the prefix, [batch, 1 or kv_heads, units]."""
    num_kv_heads, num_tokens, head_dim = keys.shape[1:]
    if selection.rows == "root":
        queries = queries[:, :, :1]
    rows = queries.shape[2]
    grouped = queries.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    scores = grouped @ keys.transpose(-1, -2) * head_dim**-0.5
    in_prefix = torch.arange(num_tokens, device=keys.device) < roots[:, None]
    weights = scores.masked_fill(~in_prefix[:, None, None], float("-inf")).softmax(-1)
    padding = -num_tokens % selection.unit
    mass = torch.nn.functional.pad(weights, (0, padding)).unflatten(-1, (-1, selection.unit)).sum(-1)
    if selection.heads == "max":
        return mass.unflatten(2, (-1, rows)).sum(3).amax((1, 2))[:, None]
    by_head = mass.sum(2)
    return by_head if selection.heads == "kv" else by_head.sum(1, keepdim=True)


def keep(scores: Tensor | None, roots: Tensor, num_tokens: int, selection: Selection) -> Tensor:
    """The cached tokens that a draft at these roots sees, bool [batch, 1 or kv_heads, num_tokens].

    Args:
        scores: of `unit_scores`; None before there are any
    """
    unit = selection.unit
    num_units = -(-num_tokens // unit)
    units = torch.arange(num_units, device=roots.device)
    recent = selection.budget if selection.recent is None or scores is None else selection.recent
    first_recent = (roots - recent).clamp(min=0) // unit
    kept = (units < -(-selection.sinks // unit)) | (units >= first_recent[:, None])
    kept = kept[:, None]
    if scores is not None and selection.budget > recent:
        best = scores.masked_fill(kept, -1.0).topk(min(num_units, (selection.budget - recent) // unit)).indices
        kept = kept.expand_as(scores).scatter(-1, best, True)
    return kept.repeat_interleave(unit, dim=-1)[..., :num_tokens]


@torch.inference_mode()
def walk(target: Target, passages: Passages, selection: Selection, gamma: int, counts: Counts) -> None:
    """Draft and verify along the continuations, and add what happened to `counts`."""
    ids, device = passages.ids, passages.ids.device
    batch, num_tokens = ids.shape
    num_layers = len(passages.caches)
    tokens = torch.arange(num_tokens, device=device)
    caches = [(keys.clone(), values.clone()) for keys, values in passages.caches]
    roots = torch.full((batch,), passages.prompt_length, device=device)
    leaders = range(0, num_layers, selection.share)
    scores: list[Tensor | None] = [None] * len(leaders)
    last_root = num_tokens - gamma - 1
    for step in range(num_tokens):
        active = [root + gamma + 1 <= end for root, end in zip(roots.tolist(), passages.ends, strict=True)]
        if not any(active):
            break
        roots = roots.clamp(max=last_root)
        kept = [keep(layer_scores, roots, num_tokens, selection) for layer_scores in scores]
        kept = [kept[layer // selection.share] for layer in range(num_layers)]
        kept = [mask & (tokens < roots[:, None])[:, None] for mask in kept]
        rows = [ids.gather(1, roots[:, None])]
        for index in range(gamma):
            drafted = (tokens >= roots[:, None]) & (tokens <= roots[:, None] + index)
            visible = [(mask | drafted[:, None])[:, :, None] for mask in kept]
            logits, _ = forward(target, rows[-1], roots[:, None] + index, caches, visible)
            rows.append(draw(logits[:, -1], roots + index, passages)[:, None])
        chain = torch.cat(rows, dim=1)
        positions = roots[:, None] + torch.arange(gamma + 1, device=device)
        agrees = (chain == ids.gather(1, positions)).int().cumprod(1).sum(1) - 1
        if step % selection.interval == 0 and selection.recent is not None:
            causal = (tokens <= positions[..., None])[:, None]
            _, queries = forward(target, chain, positions, caches, [causal] * num_layers)
            scores = [unit_scores(queries[layer], caches[layer][0], roots, selection) for layer in leaders]
        # What the target computes at these positions, which later steps see.
        for cache, true in zip(caches, passages.caches, strict=True):
            for part, true_part in zip(cache, true, strict=True):
                index = positions[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
                part.scatter_(2, index, true_part.gather(2, index))
        for is_active, accepted in zip(active, agrees.tolist(), strict=True):
            if is_active:
                counts.steps += 1
                counts.emitted += 1 + accepted
                counts.accepted += accepted
                counts.tried += min(gamma, accepted + 1)
        roots = torch.where(torch.tensor(active, device=device), roots + 1 + agrees, roots)


def draw(logits: Tensor, positions: Tensor, passages: Passages) -> Tensor:
    """The drafted next tokens, int64 [batch], with the noise of the target's draws at these positions."""
    if passages.temperature > 0:
        rows = [
            passages.noises[position + 1 - passages.prompt_length][row]
            for row, position in enumerate(positions.tolist())
        ]
        logits = logits / passages.temperature + torch.stack(rows)
    return logits.argmax(-1)


def selections(sweep: str, budgets: Sequence[int]) -> Iterator[Selection]:
    """What a sweep compares: for each budget the recent tokens alone, and choices that differ in one setting."""
    for budget in budgets:
        yield Selection(budget)
        base = Selection(budget, recent=min(RECENT, budget // 2))
        match sweep:
            case "budget":
                yield base
            case "unit":
                yield from (replace(base, unit=unit) for unit in (16, 32, 64))
            case "recent":
                yield from (replace(base, recent=recent) for recent in (16, 32, 64, 128, 256) if recent < budget)
            case "interval":
                yield from (replace(base, interval=interval) for interval in (1, 2, 4, 8, 16))
            case "rows":
                yield from (replace(base, rows=rows) for rows in ("all", "root"))
            case "share":
                yield from (replace(base, share=share, interval=i) for share in (2, 3) for i in (1, 2))
            case "heads":
                yield from (replace(base, heads=heads) for heads in ("sum", "max", "kv"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], help="settings to vary, one at a time")
    parser.add_argument("--models", type=Path, default=PAIR, help="folder with target/ and prompts.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--contexts", type=numbers, default=[3584], help="ends of the longest prompts")
    parser.add_argument("--budgets", type=numbers, default=list(BUDGETS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument(
        "--prompts-at-once", type=int, default=4, help="bounds memory: their caches are kept in float32"
    )
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument(
        "--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 1.0]
    )
    parser.add_argument("--out", type=Path, help="JSON lines to add to")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target = load_target(args.models / "target").to(args.device)
    by_length = load_prompts(
        args.models / "prompts.jsonl", args.models / "target" / "tokenizer.json", args.prompts, args.device
    )
    prompts = by_length[max(by_length)]
    variants = list(dict.fromkeys(s for sweep in args.sweeps or SWEEPS for s in selections(sweep, args.budgets)))
    names = list(asdict(variants[0]))
    rows = [["context", "temperature", *names, "acceptance", "tokens a step"]]
    for context in args.contexts:
        if context > prompts.shape[1]:
            parser.error(f"--contexts: the longest prompts have {prompts.shape[1]} tokens")
        for temperature in args.temperatures:
            counts = {selection: Counts() for selection in variants}
            for some in prompts[:, -context:].split(args.prompts_at_once):
                with torch.inference_mode():
                    passages = make_passages(target, some, args.tokens, temperature)
                for selection in variants:
                    walk(target, passages, selection, args.gamma, counts[selection])
            for selection, count in counts.items():
                row = {"context": context, "temperature": temperature, **asdict(selection), **count.summary()}
                rows.append([str(row[name]) for name in ("context", "temperature", *names)])
                rows[-1] += [f"{row['acceptance']:.3f}", f"{row['tokens_per_step']:.2f}"]
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            print(markdown([rows[0], *rows[-len(variants) :]]), flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
