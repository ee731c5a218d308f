# SPDX-License-Identifier: Apache-2.0
"""Train the small pair that ships: a Qwen2 target, then its GLIDE draft; check the files and measure acceptance.

    python -m benchmarks.training.pair --data FOLDER --out FOLDER [--smoke]

Writes target/, draft/, prompts.jsonl, PROMPT_LICENCES.txt and metrics.json into the output folder. Needs the folder
that prepare_data.py wrote and no network. Schedules follow the clock, so that a run takes the time it is given on any
machine; --target-steps and --draft-steps repeat a run with the number of steps that its metrics.json names.
"""

import argparse
import json
import platform
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.training.acceptance import load_pair, load_prompts, measure
from benchmarks.training.checks import check_files, check_tokenizer, held_out_loss
from benchmarks.training.draft import train_draft
from benchmarks.training.loop import Plan, train_target
from benchmarks.training.prepare_data import end_of_text_id
from benchmarks.training.target import TINY, target_config
from benchmarks.training.text import Windows, load_ids

FULL = Plan({}, 4096, (2048, 4096), 131072, 2e-3, 2e-3, 200.0, 120.0, 64, 16, 192)
SMOKE = Plan(TINY, 1024, (512, 1024), 2048, 4e-3, 4e-3, 15.0, 15.0, 2, 1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-seconds", type=float, help=f"training time (default {FULL.target_seconds:.0f})")
    parser.add_argument("--draft-seconds", type=float, help=f"training time (default {FULL.draft_seconds:.0f})")
    parser.add_argument("--target-steps", type=int, help="this many steps instead of a time")
    parser.add_argument("--draft-steps", type=int, help="this many steps instead of a time")
    parser.add_argument("--smoke", action="store_true", help="a toy pair in a minute on a CPU, to try the pipeline")
    args = parser.parse_args()
    plan, device = SMOKE if args.smoke else FULL, args.device
    plan = replace(
        plan,
        target_seconds=args.target_seconds or plan.target_seconds,
        draft_seconds=args.draft_seconds or plan.draft_seconds,
    )
    started = time.perf_counter()

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    config = target_config(tokenizer.get_vocab_size(), end_of_text_id(tokenizer), **plan.sizes)
    train = Windows(load_ids(args.data / "train.npy.xz", device), torch.Generator().manual_seed(args.seed))
    held_out = Windows(load_ids(args.data / "held_out.npy.xz", device), torch.Generator())
    evaluation = held_out.spread(plan.evaluation_windows, plan.window)
    print(f"{len(train.ids)} training tokens after {time.perf_counter() - started:.0f} s", flush=True)

    target, target_budget = train_target(plan, config, train, args.out / "target", device, args.seed, args.target_steps)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.data / name, args.out / "target" / name)
    loss = held_out_loss(target, evaluation, device)
    print(f"target: held-out loss {loss:.4f}", flush=True)
    # The draft learns from the target as it was saved.
    length = None if args.draft_steps is None else {"steps": args.draft_steps}
    draft = train_draft(plan, args.out, train, evaluation, device, args.seed, length).result
    trained_seconds = time.perf_counter() - started

    for name in ("prompts.jsonl", "PROMPT_LICENCES.txt"):
        shutil.copyfile(args.data / name, args.out / name)
    check_tokenizer(args.out / "target", args.out / "prompts.jsonl")
    checked_loss = check_files(args.out / "target", evaluation[:2, :1025])
    print(f"files: transformers computes the same logits, loss {checked_loss:.4f}", flush=True)
    saved_target, saved_glide = load_pair(args.out, device)
    prompts = load_prompts(
        args.out / "prompts.jsonl", args.out / "target" / "tokenizer.json", plan.prompts_per_length, device
    )
    metrics = {
        "plan": asdict(plan),
        "seed": args.seed,
        "target_parameters": sum(parameter.numel() for parameter in target.parameters()),
        "draft_parameters": sum(parameter.numel() for parameter in draft.glide.parameters()),
        "target_steps": target_budget.steps,
        "draft_steps": draft.steps,
        "tokens_per_training_step": plan.batch_tokens,
        "held_out_loss": round(loss, 4),
        "draft_agreement_by_withheld_keys": dict(enumerate(draft.held_out["greedy"], start=1)),
        "acceptance": [
            measure(saved_target, saved_glide, prompts, plan.new_tokens, temperature, args.seed)
            for temperature in (0.0, 1.0)
        ],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "torch": torch.__version__,
        "training_seconds": round(trained_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
