# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a GLIDE draft together with a part of the target's cache, in plain PyTorch, without an engine.

The part is the first tokens and the last ones, in whole blocks, as in `benchmarks/training/sparse.py`, and the walk is
along the target's continuations as there. Above temperature 0 drafts are ranked with the noise of the target's draws.

`cross`: the draft's cross-attention sees the part instead of the whole prefix.

`deeper`: the root's sees the whole prefix, and only that of the nodes below it the part.

`rounds`: the target checks a chain of the draft's over the part, which is cheap, and the tokens that it draws there
count as drafted; the next chain goes on from them. After some rounds, and one more chain that nothing has checked, it
verifies all of them over its whole cache. Without a round this is the draft's chain alone. K and V that a check writes
stay in the cache until the verification, for the draft and for later checks.

Beside the tokens stand the speeds over plain decoding that the cost of a step expects of them for Llama-3-8B's shape.

`model`: the same speeds for rounds, where a chain's and a check's tokens are right with given probabilities.

    python -m benchmarks.training.partial {cross,deeper,rounds,model} [--models FOLDER] [--device cpu] [--contexts 3584]
        [--budgets 512,1024,2048] [--prompts 8] [--tokens 96] [--temperatures 0,1]
"""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import PAIR, shapes
from benchmarks.reporting import markdown
from benchmarks.training.acceptance import coupled, load_pair, load_prompts
from benchmarks.training.sparse import SINKS, Passages, draw, forward, make_passages, numbers
from benchmarks.training.target import Target
from vllm_longspec.options import PartialAttention
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.proposers.magicdec.cost import MagicDecCost
from vllm_longspec.scheduling.adaptive import typical_acceptance
from vllm_longspec.scheduling.cost import ROW, StepCost
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.walk import Kept, Passage, Rescore, accepted_nodes, kept_part
from vllm_longspec.training.walk import walk as walk_drafts
from vllm_longspec.tree.shape import TreeShape

SHAPES = ([4, 16, 16, 16, 16], [1, 1, 1, 1])
GAMMA = 4
MAX_ROUNDS = 3
BLOCK_SIZE = 16
# For which speeds are modelled: a shape of benchmarks/shapes.py, and contexts with their batches.
MODEL = "llama-3-8b-262k"
LOADS = ((131072, 4), (32768, 16), (16384, 16))


def kept_of(budget: int | None, num_tokens: int, first_depth: int = 0) -> Kept | None:
    """What nodes from `first_depth` on see of the tokens before a root with this budget; None for all of them."""
    if budget is None:
        return None
    return kept_part(PartialAttention(SINKS, budget), num_tokens, BLOCK_SIZE, first_depth)


def passage_of(glide: GlideLayer, target: Target, passages: Passages) -> Passage:
    ids = passages.ids
    keys, values = (part.transpose(1, 2) for part in passages.caches[-1])
    _, window_keys, window_values = glide.self_qkv(
        target.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    )
    ends = torch.tensor(passages.ends, device=ids.device)
    return Passage(ids, passages.prompt_length, ends, (keys, values), (window_keys, window_values))


def rescore_of(passages: Passages) -> Rescore | None:
    if not passages.noises:
        return None
    return coupled(passages.noises, passages.prompt_length, lambda logits: logits / passages.temperature)


@torch.inference_mode()
def cross(
    target: Target,
    glide: GlideLayer,
    passages: Passages,
    shape: list[int],
    budget: int | None,
    first_depth: int = 0,
) -> list[int]:
    """Tokens emitted in each step of drafts whose cross-attention sees a part from a depth on; None for everything."""
    kept = kept_of(budget, passages.ids.shape[1], first_depth)
    passage = passage_of(glide, target, passages)
    steps = walk_drafts(target, glide, passage, shape, rescore=rescore_of(passages), kept=kept)
    return [emitted for _, _, emitted in steps]


@torch.inference_mode()
def rounds(target: Target, glide: GlideLayer, passages: Passages, num_rounds: int, budget: int | None) -> list[int]:
    """Tokens emitted by each verification of each request, after `num_rounds` rounds and a chain that nothing checked.

    Only tokens of the continuation are computed: at the first drafted token that is another one a request's drafts are
    over, whatever comes after.
    """
    ids, device = passages.ids, passages.ids.device
    num_tokens = ids.shape[1]
    kept = kept_of(budget, num_tokens)
    tokens = torch.arange(num_tokens, device=device)
    caches = [(keys.clone(), values.clone()) for keys, values in passages.caches]
    passage, rescore = passage_of(glide, target, passages), rescore_of(passages)
    # The draft attends what checks have written.
    passage = replace(passage, cross=tuple(part.transpose(1, 2) for part in caches[-1]))
    rows = torch.arange(GAMMA + 1, device=device)
    most = num_rounds * len(rows) + GAMMA
    roots = torch.full_like(passage.ends, passages.prompt_length)
    emitted: list[int] = []
    while True:
        active = roots + most + 1 <= passage.ends
        if not active.any():
            return emitted
        # Finished requests stay in the batch, where all of a cycle still fits.
        start = roots.clamp(max=num_tokens - most - 2)
        front, is_right = start, torch.ones_like(active)
        for _ in range(num_rounds):
            drafted = accepted_nodes(target, glide, passage, front, [1] * GAMMA, rescore=rescore, kept=kept)
            positions = front[:, None] + rows
            seen = tokens <= positions[..., None]
            if kept is not None:
                seen &= (kept(front, 0) | (tokens >= front[:, None]))[:, None]
            logits, _ = forward(target, ids.gather(1, positions), positions, caches, [seen[:, None]] * len(caches))
            drawn = torch.stack([draw(logits[:, row], front + row, passages) for row in rows.tolist()], dim=1)
            right = (drawn == ids.gather(1, positions + 1)).int().cumprod(1).sum(1)
            # A check draws one token more than it finds right in the chain.
            front = torch.where(is_right, front + torch.minimum(right, drafted + 1), front)
            is_right &= right > drafted
        drafted = accepted_nodes(target, glide, passage, front, [1] * GAMMA, rescore=rescore, kept=kept)
        counts = 1 + front - start + torch.where(is_right, drafted, 0)
        # The verification writes its own K and V.
        for cache, true in zip(caches, passages.caches, strict=True):
            for part, true_part in zip(cache, true, strict=True):
                part.copy_(true_part)
        emitted += counts[active].tolist()
        roots = torch.where(active, roots + counts, roots)


def speed_up(
    variant: list[int] | int,
    budget: int | None,
    emitted: float,
    context: int,
    batch: int,
    root_reads_all: bool = False,
) -> float:
    """Speed over plain decoding that the cost of a step expects if a verification emits `emitted` tokens.

    Of a tree the likeliest nodes are verified, as many as pay best; how many tokens fewer nodes accept is what it is of
    a typical draft.
    """
    model = SimpleNamespace(**shapes.SHAPES[MODEL])
    num_attended = None if budget is None else SINKS + budget
    glide = GlideCost.of_shape(
        model,
        draft_vocab_size=model.vocab_size,
        is_quantised=True,
        shape=TreeShape(tuple(variant) if isinstance(variant, list) else (1,) * GAMMA),
        num_attended=num_attended,
    )

    def drafting(batch_size: int, num_nodes: int, cache: float) -> float:
        return glide(batch_size, num_nodes, cache if root_reads_all else min(cache, batch_size * glide.most_read))

    step = StepCost.of_shape(model, vocab_size=model.vocab_size, drafting=drafting)
    if isinstance(variant, list):
        most = sum(variant)
        numbers = [most] if max(variant) == 1 else [number for number in (1, 3, 7, 15, 31, most) if number <= most]
        share = {number: typical_acceptance(number) / typical_acceptance(most) for number in numbers}
        return max((1 + share[number] * (emitted - 1)) / step(batch, number, context * batch) for number in numbers)
    # A check is a step of MagicDec's draft with more rows.
    cache = context * batch * step.token
    check = MagicDecCost(step.target, step.token, num_attended or context)(batch, 1, cache)
    check += ROW * batch * (GAMMA + 1) * step.target
    rounds_cost = (variant + 1) * drafting(batch, GAMMA, cache) + variant * check
    num_nodes = variant * (GAMMA + 1) + GAMMA
    return emitted / replace(step, drafting=lambda *_: rounds_cost)(batch, num_nodes, context * batch)


def expected_tokens(num_rounds: int, chain: float, check: float) -> float:
    """Tokens emitted by a verification after rounds, where each drafted token is right with the probability `chain` and
    each that a check draws with `check`, if those before it are."""
    if num_rounds == 0:
        return sum(chain**depth for depth in range(GAMMA + 1))
    total = 0.0
    for drafted in range(GAMMA + 1):
        probability = chain**drafted * (1 - chain if drafted < GAMMA else 1)
        wrong = sum(check**right * (1 - check) * (right + 1) for right in range(drafted + 1))
        goes_on = drafted + 1 + expected_tokens(num_rounds - 1, chain, check)
        total += probability * (wrong + check ** (drafted + 1) * goes_on)
    return total


def speed_up_of_magicdec(budget: int, check: float, context: int, batch: int) -> float:
    """Of the target's own drafts over the part, as many as pay best."""
    model = SimpleNamespace(**shapes.SHAPES[MODEL])
    step = StepCost.of_shape(model, vocab_size=model.vocab_size, drafting=lambda *_: 0.0)
    step = replace(step, drafting=MagicDecCost(step.target, step.token, SINKS + budget))
    return max(
        sum(check**depth for depth in range(number + 1)) / step(batch, number, context * batch)
        for number in range(2 * GAMMA + 1)
    )


def print_model(budgets: list[int]) -> None:
    rows = [["budget", "chain", "check"]]
    for context, batch in LOADS:
        rows[0] += [f"{context // 1024}k, batch {batch}: {way}" for way in ("chain", "rounds", "magicdec")]
    for budget in budgets:
        for chain in (0.7, 0.8):
            for check in (0.75, 0.8, 0.85, 0.9, 0.95):
                rows.append([str(budget), str(chain), str(check)])
                for load in LOADS:
                    speeds = [
                        speed_up(number, budget, expected_tokens(number, chain, check), *load)
                        for number in range(MAX_ROUNDS + 1)
                    ]
                    fastest, best = max((speed, number) for number, speed in enumerate(speeds) if number > 0)
                    alone = speed_up_of_magicdec(budget, check, *load)
                    rows[-1] += [f"{speeds[0]:.2f}x", f"{best}: {fastest:.2f}x", f"{alone:.2f}x"]
    print(markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cross", "deeper", "rounds", "model"])
    parser.add_argument("--models", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=numbers, default=[3584], help="ends of the longest prompts")
    parser.add_argument("--budgets", type=numbers, default=[512, 1024, 2048])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompts-at-once", type=int, default=4, help="bounds memory")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument(
        "--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 1.0]
    )
    args = parser.parse_args()
    if args.what == "model":
        print_model(args.budgets)
        return
    target, glide = load_pair(args.models, args.device)
    by_length = load_prompts(
        args.models / "prompts.jsonl", args.models / "target" / "tokenizer.json", args.prompts, args.device
    )
    prompts = by_length[max(by_length)]
    budgets = [None, *args.budgets]
    variants: list[tuple[list[int] | int, int | None]]
    if args.what in ("cross", "deeper"):
        variants = [(shape, budget) for shape in SHAPES for budget in budgets]
    else:
        variants = [(number, budget) for number in range(MAX_ROUNDS + 1) for budget in budgets]
    rows = [["context", "temperature", "rounds" if args.what == "rounds" else "tree shape", "budget", "steps"]]
    rows[0] += ["tokens a verification", *(f"{context // 1024}k, batch {batch}" for context, batch in LOADS)]
    for context in args.contexts:
        if context > prompts.shape[1]:
            parser.error(f"--contexts: the longest prompts have {prompts.shape[1]} tokens")
        for temperature in args.temperatures:
            emitted: list[list[int]] = [[] for _ in variants]
            for some in prompts[:, -context:].split(args.prompts_at_once):
                with torch.inference_mode():
                    passages = make_passages(target, some, args.tokens, temperature)
                for (variant, budget), found in zip(variants, emitted, strict=True):
                    found += measure(target, glide, passages, variant, budget, int(args.what == "deeper"))
            for (variant, budget), found in zip(variants, emitted, strict=True):
                name = " ".join(map(str, variant)) if isinstance(variant, list) else str(variant)
                rows.append([str(context), f"{temperature:g}", name, str(budget or "all"), str(len(found))])
                if found:
                    mean = sum(found) / len(found)
                    speeds = [speed_up(variant, budget, mean, *load, args.what == "deeper") for load in LOADS]
                    rows[-1] += [f"{mean:.2f}", *(f"{speed:.2f}x" for speed in speeds)]
            print(markdown([rows[0], *rows[-len(variants) :]]), flush=True)


def measure(
    target: Target,
    glide: GlideLayer,
    passages: Passages,
    variant: list[int] | int,
    budget: int | None,
    first_depth: int = 0,
) -> list[int]:
    """Of a tree's shape, or of a number of rounds."""
    if isinstance(variant, list):
        return cross(target, glide, passages, variant, budget, first_depth)
    return rounds(target, glide, passages, variant, budget)


if __name__ == "__main__":
    main()
