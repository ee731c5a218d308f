# SPDX-License-Identifier: Apache-2.0
"""Drafts of one target by several recipes, at equal GPU time or at an equal number of steps.

    python -m benchmarks.training.recipes --pair FOLDER --data FOLDER --seconds 120 --recipes longspec default
    python -m benchmarks.training.recipes --pair FOLDER --data FOLDER --steps 400 --recipes default cross-entropy lk

Each recipe sees the same windows in the same order, in float32 master weights, with the same learning rates. A draft
is written to FOLDER/NAME, and a line on it to FOLDER/recipes.jsonl; `benchmarks.training.served` measures them in
engines.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.draft import train_draft
from benchmarks.training.realsize import FULL, SMOKE, name_of
from benchmarks.training.text import Windows, load_ids
from vllm_longspec.training.losses import LossWeights

_ALL_DEPTHS: dict[str, Any] = {"depths_per_batch": None, "depth_weights": "expected"}


def _loss(**weights: float) -> LossWeights:
    return LossWeights(**{"next_token": 0.0, "kl": 0.0} | weights)


# Changes of the settings of `train_draft`. All but the first change one thing of `default`, the tool's own settings.
RECIPES: dict[str, dict[str, Any]] = {
    # LongSpec's: cross-entropy on the data, one number of withheld keys a batch.
    "longspec": {"depths_per_batch": 1, "depth_weights": "equal", "loss": _loss(next_token=1.0)},
    "default": _ALL_DEPTHS,
    "one-depth": {"depths_per_batch": 1, "depth_weights": "equal"},
    "equal-depths": _ALL_DEPTHS | {"depth_weights": "equal"},
    "two-depths": _ALL_DEPTHS | {"depths_per_batch": 2},
    "cross-entropy": _ALL_DEPTHS | {"loss": _loss(next_token=1.0)},
    "kl": _ALL_DEPTHS | {"loss": _loss(kl=1.0)},
    "tv": _ALL_DEPTHS | {"loss": _loss(tv=1.0)},
    "lk": _ALL_DEPTHS | {"loss": _loss(lk=1.0)},
    "lk-hybrid": _ALL_DEPTHS | {"loss": _loss(lk_hybrid=1.0)},
    "last-layer": _ALL_DEPTHS | {"init": "last_layer"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/, of benchmarks.training.realsize")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), default=["longspec", "default"])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help=f"of training of each (default {FULL.draft_seconds:.0f})")
    budget.add_argument("--steps", type=int, help="of each, instead of a time")
    parser.add_argument("--learning-rate", type=float, help=f"default {FULL.draft_lr}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="", help="of the drafts' names")
    parser.add_argument("--smoke", action="store_true", help="for a target of realsize --smoke")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else FULL
    plan = replace(
        plan,
        draft_seconds=args.seconds or plan.draft_seconds,
        draft_lr=args.learning_rate or plan.draft_lr,
    )
    held_out = Windows(load_ids(args.data / "held_out.npy.xz", "cpu"), torch.Generator())
    evaluation = held_out.spread(plan.evaluation_windows, plan.window)
    ids = load_ids(args.data / "train.npy.xz", "cpu")
    for recipe in args.recipes:
        train = Windows(ids, torch.Generator().manual_seed(args.seed))
        name = f"draft-{recipe}{args.suffix}"
        result, seconds = train_draft(
            plan, args.pair, train, evaluation, args.device, args.seed, args.steps, name, RECIPES[recipe]
        )
        record = {
            "draft": name,
            "recipe": recipe,
            "steps": result.steps,
            "tokens": result.steps * plan.batch_tokens,
            "seconds": round(seconds, 1),
            "learning_rate": plan.draft_lr,
            "device": name_of(args.device),
            **result.held_out,
        }
        with (args.pair / "recipes.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
