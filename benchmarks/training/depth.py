# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of a trained pair by levels of the tree and by nodes verified, in plain PyTorch, without an engine.

A tree's first L levels do not depend on those below. So one tree of the most levels, drawn at every token of a
continuation, says what every tree of fewer levels and every number of its most probable nodes accepts there, and the
walk from root to root needs no model. `vllm_longspec/training/walk.py` says why this is what an engine accepts.

    python -m benchmarks.training.depth [--pair FOLDER] [--device cpu] [--prompts-per-length 4] [--tokens 96]
        [--temperature 1] [--couple-noise] [--costs-of qwq-32b --batch 1 --context 16384]

With `--costs-of` it also tells what such a draft would be worth with another target, by the cost model: tokens in the
time of a step of plain decoding.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import PAIR
from benchmarks.repetition import loop_start
from benchmarks.reporting import markdown
from benchmarks.shapes import SHAPES
from benchmarks.training.acceptance import coupled, generate, load_pair, load_prompts, make_passage
from benchmarks.training.realsize import SIZES
from benchmarks.training.target import Target
from vllm_longspec.proposers.glide.cost import LEVEL, GlideCost
from vllm_longspec.scheduling.cost import StepCost
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.walk import Passage, Rescore, grow_levels
from vllm_longspec.tree.shape import TreeShape

# Nodes per level, as many levels as the deepest tree that is looked at.
SHAPE = (4, *[16] * 15)
LEVELS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
NODES = (1, 3, 7, 15, 24, 31, 68)
# Targets whose costs are known, with their vocabularies.
COSTS = {
    "qwq-32b": (SHAPES["qwq-32b"], SHAPES["qwq-32b"]["vocab_size"]),
    "llama-3-8b-262k": (SHAPES["llama-3-8b-262k"], SHAPES["llama-3-8b-262k"]["vocab_size"]),
    "242m": (SIZES, 16384),
}
# Rank of a node that was not drafted.
NOT_DRAFTED = 1 << 16


def path_ranks(
    target: Target, glide: GlideLayer, passage: Passage, roots: Tensor, rescore: Rescore | None = None
) -> Tensor:
    """Grows a tree of `SHAPE` for each request and looks up the continuation's nodes in it.

    Args:
        roots: int64 [batch], index of the root token in `passage.ids`
        rescore: as in `grow_levels`

    Returns:
        int64 [batch, levels, depths]: by the number of levels of the tree, from one on, the place of the continuation's
        node at each depth, from one on, in the list of the tree's nodes; `NOT_DRAFTED` if the tree has no such node
    """
    all_scores: list[Tensor] = []  # of each level, [batch, width]
    path_scores: list[Tensor] = []  # of the continuation's node at each depth, [batch]; -inf if there is none
    for scores, on_path in grow_levels(target, glide, passage, roots, SHAPE, rescore=rescore):
        all_scores.append(scores)
        path_scores.append(scores.masked_fill(~on_path, -math.inf).amax(1))

    ranks = torch.full((len(roots), len(SHAPE), len(SHAPE)), NOT_DRAFTED)
    for depth, score in enumerate(path_scores):
        above = torch.stack([(level > score[:, None]).sum(1) for level in all_scores], dim=1).cumsum(1)
        ranks[:, depth:, depth] = torch.where(score[:, None] > -math.inf, above[:, depth:], NOT_DRAFTED)
    return ranks


def accepted(ranks: Tensor, levels: int, num_nodes: int) -> Tensor:
    """Accepted nodes of a tree of so many levels of which the best `num_nodes` are verified.

    Args:
        ranks: int64 [..., levels, depths] from `path_ranks`

    Returns:
        int64 [...]
    """
    return (ranks[..., levels - 1, :] < num_nodes).sum(-1)


def walk(emitted: list[int]) -> list[tuple[int, int]]:
    """Steps as (root, tokens emitted), where a step at root i emits `emitted[i]`."""
    root, steps = 0, []
    while root < len(emitted):
        steps.append((root, emitted[root]))
        root += emitted[root]
    return steps


@torch.inference_mode()
def measure(
    target: Target, glide: GlideLayer, prompts: dict[int, Tensor], num_tokens: int, temperature: float, is_coupled: bool
) -> list[dict]:
    """For every prompt: `ranks`, int64 [roots, levels, depths], and `loop`, the root where the text starts to loop."""
    results = []
    for length, ids in sorted(prompts.items()):
        # Room below the last root for the deepest tree.
        total = num_tokens + len(SHAPE)
        noises: list[Tensor] | None = [] if is_coupled else None
        generator = torch.Generator().manual_seed(length)
        full = generate(target, ids, total, temperature, generator, noises=noises)
        rescore = None if noises is None else coupled(noises, length, lambda logits: logits / temperature)
        passage = make_passage(target, glide, full, length, target.config["eos_token_id"])
        roots = [
            path_ranks(target, glide, passage, torch.full_like(passage.ends, length + index), rescore)
            for index in range(num_tokens - 1)
        ]
        for row, end, ranks in zip(full.tolist(), passage.ends.tolist(), torch.stack(roots, dim=1), strict=True):
            # No tree goes past the end of a request.
            num_roots = max(0, min(num_tokens - 1, end - len(SHAPE) - length))
            results.append({"ranks": ranks[:num_roots], "loop": loop_start(row[length : end + 1])})
    return results


def tokens_per_step(results: list[dict], levels: int, num_nodes: int, before_loops: bool = False) -> float:
    counts = [
        count
        for result in results
        for root, count in walk((1 + accepted(result["ranks"], levels, num_nodes)).tolist())
        if not before_loops or root < result["loop"]
    ]
    return sum(counts) / len(counts)


def table(value: Callable[[int, int], float]) -> str:
    """Of a value by levels and nodes."""
    rows = [["levels", *(f"{number} nodes" for number in NODES)]]
    rows += [[str(levels), *(f"{value(levels, number):.2f}" for number in NODES)] for levels in LEVELS]
    return markdown(rows)


def cost_of(name: str, levels: int) -> StepCost:
    """Of a target with the draft that it has by default on a GPU: in fp8 where that is large."""
    sizes, vocab_size = COSTS[name]
    target, shape = SimpleNamespace(**sizes), TreeShape(SHAPE[:levels])
    drafts = [
        GlideCost.of_shape(target, draft_vocab_size=vocab_size, is_quantised=is_quantised, shape=shape)
        for is_quantised in (False, True)
    ]
    return StepCost.of_shape(target, vocab_size=vocab_size, drafting=drafts[drafts[0].level > LEVEL])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--prompts-per-length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--couple-noise", action="store_true", help="draft with the noise that the target draws with")
    parser.add_argument("--costs-of", choices=COSTS, help="another target, whose steps cost more or less")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=16384)
    args = parser.parse_args()
    if args.couple_noise and args.temperature == 0:
        parser.error("--couple-noise needs a --temperature above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    target, glide = load_pair(args.pair, args.device)
    prompts = load_prompts(
        args.pair / "prompts.jsonl", args.pair / "target" / "tokenizer.json", args.prompts_per_length, args.device
    )
    results = measure(target, glide, prompts, args.tokens, args.temperature, args.couple_noise)
    print(json.dumps({"temperature": args.temperature, "coupled": args.couple_noise, "prompts": len(results)}))
    print(table(lambda levels, nodes: tokens_per_step(results, levels, nodes)))
    print("Before the text starts to loop:\n")
    print(table(lambda levels, nodes: tokens_per_step(results, levels, nodes, before_loops=True)))
    if args.costs_of:
        cached = args.batch * args.context

        def throughput(levels: int, num_nodes: int) -> float:
            cost = cost_of(args.costs_of, levels)(args.batch, num_nodes, cached)
            return tokens_per_step(results, levels, num_nodes) / cost

        print(f"Tokens in a step's time, {args.costs_of}, batch {args.batch}, {args.context} tokens of context:\n")
        print(table(throughput))


if __name__ == "__main__":
    main()
