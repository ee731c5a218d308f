# SPDX-License-Identifier: Apache-2.0
"""How drafts that know the target's noise are best ranked, in plain PyTorch: tokens per step by sampling and by rule.

    python -m benchmarks.training.calibration [--prompts 8] [--length 2048] [--tokens 96]

The noise is drawn here, not vLLM's. Rules: not coupled; coupled, which ranks by logits / T + g; the same with the
draft's logits masked by top-k, top-p and min-p as the target's are; and lowered past the cutoff, which is what the
plugin does (`vllm_longspec/tree/coupling.py`). Only steps before a text starts to loop are counted.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import PAIR
from benchmarks.repetition import loop_start
from benchmarks.training.acceptance import coupled, generate, load_pair, load_prompts, make_passage, mean
from benchmarks.training.target import Target
from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.sampling import Sampling, lower, truncate
from vllm_longspec.training.walk import Rescore, walk

SAMPLINGS = [
    Sampling(1.0, 0, 1.0, 0.0),
    Sampling(0.6, 0, 1.0, 0.0),
    Sampling(0.7, 20, 0.8, 0.0),
    Sampling(0.6, 20, 0.95, 0.0),
    Sampling(1.0, 0, 0.8, 0.0),
    Sampling(1.0, 0, 0.9, 0.0),
    Sampling(1.0, 0, 0.95, 0.0),
    Sampling(1.0, 5, 1.0, 0.0),
    Sampling(1.0, 20, 1.0, 0.0),
    Sampling(1.0, 50, 1.0, 0.0),
    Sampling(1.0, 0, 1.0, 0.1),
    Sampling(0.8, 0, 0.95, 0.05),
]


@torch.inference_mode()
def measure(
    target: Target, glide: GlideLayer, prompts: Tensor, num_tokens: int, sampling: Sampling
) -> dict[str, float | None]:
    """Tokens per step of the default tree by rule."""
    length = prompts.shape[1]
    noises: list[Tensor] = []
    ids = generate(
        target,
        prompts,
        num_tokens,
        sampling.temperature,
        torch.Generator().manual_seed(0),
        lambda scaled: truncate(scaled, sampling),
        noises,
    )
    passage = make_passage(target, glide, ids, length, target.config["eos_token_id"])
    loops = [loop_start(row[length : end + 1]) for row, end in zip(ids.tolist(), passage.ends.tolist(), strict=True)]

    def with_noise(change: Callable[[Tensor], Tensor]) -> Rescore:
        return coupled(noises, length, lambda logits: change(logits / sampling.temperature))

    rules: dict[str, Rescore | None] = {
        "not coupled": None,
        "coupled": with_noise(lambda scaled: scaled),
        "coupled, masked": with_noise(lambda scaled: truncate(scaled, sampling)),
        "coupled, lowered past the cutoff": with_noise(lambda scaled: lower(scaled, sampling)),
    }
    found = {}
    for name, rescore in rules.items():
        steps = walk(target, glide, passage, list(DEFAULT_LEVELS), rescore=rescore)
        found[name] = mean([count for request, root, count in steps if root < loops[request]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="of the prompts, one of prompts.jsonl's")
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    target, glide = load_pair(PAIR, "cpu")
    by_length = load_prompts(PAIR / "prompts.jsonl", PAIR / "target" / "tokenizer.json", arguments.prompts, "cpu")
    for sampling in SAMPLINGS:
        result = measure(target, glide, by_length[arguments.length], arguments.tokens, sampling)
        print(json.dumps(sampling._asdict() | result), flush=True)


if __name__ == "__main__":
    main()
