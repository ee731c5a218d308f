# SPDX-License-Identifier: Apache-2.0
"""Drafts of one target by several recipes, at equal time, or an equal number of steps or tokens.

    python -m benchmarks.training.recipes --pair FOLDER --data FOLDER --seconds 120 \\
        --recipes longspec longspec@8192 default@8192
    python -m benchmarks.training.recipes --pair FOLDER --data FOLDER --steps 400 --recipes default cross-entropy lk
    # on a CPU, for the target that ships
    python -m benchmarks.training.recipes --pair benchmarks/pair --data FOLDER --out FOLDER --device cpu --threads 1 \\
        --tokens 200000 --windows 512 --learning-rate 16e-3 --recipes default@8192 default@2048

A recipe is NAME or NAME@TOKENS, the tokens of a step of the optimiser, all supervised. Recipes of as many tokens a step
see the same windows in the same order; of `own-answers` the target has written all but the beginnings, while the clock
runs. Weights are float32. A draft is written to OUT/draft-NAME, and a line on it to OUT/recipes.jsonl;
`benchmarks.training.served` measures drafts in engines, `benchmarks.training.acceptance` without.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.acceptance import generate
from benchmarks.training.draft import train_draft
from benchmarks.training.realsize import FULL, SMOKE, name_of
from benchmarks.training.target import Target, load_target
from benchmarks.training.text import Windows, load_ids
from vllm_longspec.training.losses import LossWeights
from vllm_longspec.training.optimizer import ADAMW, MUON, OPTIMIZERS, RATES

_ALL_DEPTHS: dict[str, Any] = {"depths_per_batch": None, "depth_weights": "expected", "optimizer": MUON}
_ONE_DEPTH: dict[str, Any] = {"depths_per_batch": 1, "depth_weights": "equal", "optimizer": MUON}


def _loss(**weights: float) -> LossWeights:
    return LossWeights(**{"next_token": 0.0, "kl": 0.0} | weights)


# Changes of the settings of `train_draft`. `default` has the tool's own but for learning rates and tokens of a step;
# those behind it change one thing: the depths, the loss, the first weights, the optimizer or the text. In files of
# results from before Muon was the default, `default` and what changes it are AdamW's unless the name has `muon`.
RECIPES: dict[str, dict[str, Any]] = {
    # LongSpec's: cross-entropy on the data, one number of withheld keys a batch.
    "longspec": _ONE_DEPTH | {"loss": _loss(next_token=1.0), "optimizer": ADAMW},
    "default": _ALL_DEPTHS,
    "one-depth": _ONE_DEPTH,
    "one-depth-expected": _ONE_DEPTH | {"depth_weights": "expected"},
    "equal-depths": _ALL_DEPTHS | {"depth_weights": "equal"},
    "two-depths": _ALL_DEPTHS | {"depths_per_batch": 2},
    "cross-entropy": _ALL_DEPTHS | {"loss": _loss(next_token=1.0)},
    "kl": _ALL_DEPTHS | {"loss": _loss(kl=1.0)},
    "tv": _ALL_DEPTHS | {"loss": _loss(tv=1.0)},
    "lk": _ALL_DEPTHS | {"loss": _loss(lk=1.0)},
    "lk-hybrid": _ALL_DEPTHS | {"loss": _loss(lk_hybrid=1.0)},
    "last-layer": _ALL_DEPTHS | {"init": "last_layer"},
    "adamw": _ALL_DEPTHS | {"optimizer": ADAMW},
    "own-answers": _ALL_DEPTHS,
}
# Of a window of `own-answers`, so much is the text that the target goes on with.
_BEGINNING = 1 / 8


@dataclass
class OwnAnswers(Windows):
    """Beginnings of the windows that others get, which the target has gone on with at temperature 1."""

    target: Target
    noise: torch.Generator  # on the CPU; apart from the generator of the windows, so that those stay the same

    @torch.no_grad()
    def draw(self, count: int, length: int) -> Tensor:
        beginnings = super().draw(count, length)[:, : max(1, int(_BEGINNING * length))]
        device = self.target.model.norm.weight.device
        return generate(
            self.target, beginnings.to(device), length + 1 - beginnings.shape[1], temperature=1.0, generator=self.noise
        )


def parse_recipe(text: str) -> tuple[str, int | None]:
    """Name, and tokens of a step where they are given. Raises argparse.ArgumentTypeError for what is no recipe."""
    name, is_given, tokens = text.partition("@")
    if name not in RECIPES or (is_given and not (tokens.isdecimal() and int(tokens) > 0)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no recipe: give NAME or NAME@TOKENS, with one of {', '.join(RECIPES)} as the name"
        )
    return name, int(tokens) if is_given else None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, of benchmarks.training.realsize")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--out", type=Path, help="folder for drafts and recipes.jsonl (default: that of --pair)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=parse_recipe,
        default=[("longspec", None), ("default", None)],
        metavar="NAME[@TOKENS]",
        help=f"of {', '.join(RECIPES)}; without TOKENS a step has {FULL.batch_tokens}",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help=f"of training of each (default {FULL.draft_seconds:.0f})")
    budget.add_argument("--steps", type=int, help="of each, instead of a time")
    budget.add_argument("--tokens", type=int, help="of each, instead of a time")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"of all recipes (default {FULL.draft_lr} with AdamW, {RATES[MUON] * FULL.draft_lr} with Muon)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="of all recipes, instead of their own")
    parser.add_argument("--windows", type=int, help="tokens of all windows, also held-out ones, where they are short")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="", help="of the drafts' names")
    parser.add_argument("--smoke", action="store_true", help="for a target of realsize --smoke")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = SMOKE if args.smoke else FULL
    plan = replace(
        plan,
        draft_seconds=args.seconds or plan.draft_seconds,
        window=args.windows or plan.window,
        draft_windows=(args.windows,) if args.windows else plan.draft_windows,
    )
    length: dict[str, Any] | None = None
    if args.steps or args.tokens:
        length = {"steps": args.steps} if args.steps else {"tokens": args.tokens}
    out = args.out or args.pair
    out.mkdir(parents=True, exist_ok=True)
    held_out = Windows(load_ids(args.data / "held_out.npy.xz", "cpu"), torch.Generator())
    evaluation = held_out.spread(plan.evaluation_windows, plan.window)
    ids = load_ids(args.data / "train.npy.xz", "cpu")
    for recipe, batch_tokens in args.recipes:
        train = Windows(ids, torch.Generator().manual_seed(args.seed))
        if recipe == "own-answers":
            target = load_target(args.pair / "target").to(args.device)
            train = OwnAnswers(train.ids, train.generator, target, torch.Generator().manual_seed(args.seed))
        batch_tokens = batch_tokens or plan.batch_tokens
        own = "" if batch_tokens == plan.batch_tokens else f"-{batch_tokens}"
        name = f"draft-{recipe}{own}{args.suffix}"
        optimizer = args.optimizer or RECIPES[recipe]["optimizer"]
        rate = args.learning_rate or RATES[optimizer] * plan.draft_lr
        changes = RECIPES[recipe] | {"optimizer": optimizer, "tokens_per_batch": batch_tokens}
        result, seconds, tokens = train_draft(
            replace(plan, draft_lr=rate),
            args.pair,
            train,
            evaluation,
            args.device,
            args.seed,
            length,
            name,
            changes,
            out,
        )
        record = {
            "draft": name,
            "recipe": recipe,
            "batch_tokens": batch_tokens,
            "steps": result.steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "optimizer": optimizer,
            "learning_rate": rate,
            "seed": args.seed,
            "device": name_of(args.device),
            **result.held_out,
        }
        with (out / "recipes.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
