# SPDX-License-Identifier: Apache-2.0
"""How often a draft's tree has the target's next token, by how often the token has come up in its request before.

    python -m benchmarks.training.rarity [--device cpu] [--out benchmarks/results/rarity.json]

With the shipped pair, in plain PyTorch and without an engine: the target's continuations are drawn, then each step of
the walk (`vllm_longspec/training/walk.py`) counts the tokens that it accepts as right and the first that it does not as
wrong. `benchmarks/learned_head.py` models drafts by it.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import PAIR, RESULTS
from benchmarks.reporting import environment
from benchmarks.training.acceptance import generate, load_pair, load_prompts, make_passage
from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.training import walk

# Occurrences before: none, 1, from 2, from 4, and so on.
NUM_CLASSES = 8


def class_of(num_before: int) -> int:
    return min(num_before.bit_length(), NUM_CLASSES - 1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 2560], help="of prompts")
    parser.add_argument("--prompts-per-length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "rarity.json")
    arguments = parser.parse_args()
    target, glide = load_pair(arguments.pair, arguments.device)
    prompts = load_prompts(
        arguments.pair / "prompts.jsonl",
        arguments.pair / "target" / "tokenizer.json",
        arguments.prompts_per_length,
        arguments.device,
    )
    right, tokens, emitted, steps = [0] * NUM_CLASSES, [0] * NUM_CLASSES, 0, 0
    generator = torch.Generator().manual_seed(0)
    for length in arguments.lengths:
        full = generate(target, prompts[length], arguments.tokens, arguments.temperature, generator)
        passage = make_passage(target, glide, full, length, target.config["eos_token_id"])
        for request, root, number in walk.walk(target, glide, passage, DEFAULT_LEVELS):
            steps, emitted = steps + 1, emitted + number
            text = full[request].tolist()
            first = length + root + 1
            # The last is what the target emitted after the nodes; the tree had no node there if it has more levels.
            end = min(first + min(number, len(DEFAULT_LEVELS)), int(passage.ends[request]) + 1)
            for position in range(first, end):
                rarity = class_of(text[:first].count(text[position]))
                tokens[rarity] += 1
                right[rarity] += position - first < number - 1
    result = {
        "tree": list(DEFAULT_LEVELS),
        "temperature": arguments.temperature,
        "steps": steps,
        "tokens_per_step": round(emitted / steps, 3),
        "occurrences before, at least": [0, *(1 << power for power in range(NUM_CLASSES - 1))],
        "right": [round(number / of, 4) for number, of in zip(right, tokens, strict=True)],
        "tokens": tokens,
        "environment": environment(arguments.commit),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
