# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of tree drafting with the pair, in plain PyTorch and without an engine.

The target's continuation of every prompt is generated first, one token at a time. Then the walk over it
(`vllm_longspec/training/walk.py`).

    python -m benchmarks.training.acceptance [--pair FOLDER] [--device cpu] [--prompts-per-length 2] [--tokens 128]
        [--frequent-tokens FILE]
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import PAIR
from benchmarks.repetition import loop_start
from benchmarks.training.target import Target, load_target, load_weights
from vllm_longspec.training import walk
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.walk import Passage, Rescore

# Nodes per level. The second is the sequential method with gamma = 4.
SHAPES = ([1], [1, 1, 1, 1], [2, 4, 4], [4, 16, 16, 16, 16])


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
    """Ranks a draft's tokens with the noise of the target's draws.

    Args:
        noises: of `generate`
        change: makes of the draft's logits what the noise is added to
    """

    def of_positions(positions: Tensor) -> Tensor:
        # The first noise is that at the prompt's last position.
        return torch.stack([noises[at + 1 - prompt_length][row] for row, at in enumerate(positions.tolist())])

    return walk.coupled(of_positions, change)


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
            steps = walk.walk(target, glide, passage, shape, drafted)
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
