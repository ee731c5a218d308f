# SPDX-License-Identifier: Apache-2.0
"""Train a target of 240 million parameters with 16,384 positions and its GLIDE draft, in one sitting on one GPU.

    python -m benchmarks.training.realsize --data FOLDER --out FOLDER [--only target] [--smoke]
    torchrun --nproc-per-node 4 -m benchmarks.training.realsize --only target --target-seconds 120 ...

Writes target/, draft/, prompts.jsonl and metrics.json into the output folder, laid out as `benchmarks/pair`, for
`benchmarks.speed` to measure, and code-1k.jsonl to code-16k.jsonl for `vllm-longspec bench`. Needs the folder that
`prepare_data.py` wrote and no network. What is there already is not trained again, so target and draft may be trained
by two calls; the target on several GPUs.
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.speed.engine import TrainedPrompts
from benchmarks.training.checks import check_files, check_tokenizer, held_out_loss
from benchmarks.training.draft import train_draft
from benchmarks.training.loop import Plan, num_processes, train_target
from benchmarks.training.prepare_data import end_of_text_id
from benchmarks.training.target import TINY, target_config
from benchmarks.training.text import Windows, load_ids

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rope_theta": 500000.0,
}
FULL = Plan(
    sizes=SIZES,
    window=4096,
    draft_windows=(2048, 4096, 16384),
    batch_tokens=32768,
    target_lr=1e-3,
    draft_lr=1e-3,
    target_seconds=480.0,
    draft_seconds=210.0,
    evaluation_windows=32,
    prompts_per_length=16,
    new_tokens=256,
    long_window=16384,
    long_share=0.25,
)
SMOKE = replace(
    FULL,
    sizes=SIZES | TINY | {"max_position_embeddings": 2048},
    window=512,
    draft_windows=(512, 1024),
    batch_tokens=2048,
    target_lr=4e-3,
    draft_lr=4e-3,
    target_seconds=10.0,
    draft_seconds=10.0,
    evaluation_windows=2,
    prompts_per_length=2,
    new_tokens=128,
    long_window=1024,
)
# A prompt ends in a file of which it has at least so many tokens, or an eighth of its own length if that is less.
TOKENS_OF_LAST_FILE = 1024
# Files of prompts for `vllm-longspec bench`, and how many tokens before a prompt's end they have.
BENCH_PROMPTS = {"code-1k": 1024, "code-8k": 8192, "code-16k": 16064}
NUM_BENCH_PROMPTS = 8


def choose_prompts(ids: list[int], tokenizer: Tokenizer, length: int, count: int, after: int) -> Iterator[dict]:
    """Stretches of `length` held-out tokens from all over the text; the last file goes on for `after` tokens more.

    A project's files follow each other, as in the text that the target is trained on. What does not encode to the same
    tokens again, since it begins or ends within a word, is left out.
    """
    end_of_text = end_of_text_id(tokenizer)
    begun = min(TOKENS_OF_LAST_FILE, length // 8)
    # (first token, token behind the last) of every file
    ends = [index for index, token in enumerate(ids) if token == end_of_text]
    files = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    places = [start + begun for start, end in files if end - start >= begun + after and start + begun >= length]
    found = 0
    for number in range(len(places)):
        place = places[_spread(number, len(places))]
        prompt = ids[place - length : place]
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        if tokenizer.encode(text).ids == prompt:
            found += 1
            yield {"path": f"held-out token {place}", "num_tokens": length, "text": text}
        if found == count:
            return
    raise RuntimeError(f"the held-out text has {found} prompts of {length} tokens, {count} are needed")


def _spread(number: int, size: int) -> int:
    """A permutation of range(size) whose first numbers are far apart: steps of the golden section."""
    step = next(step for step in range(int(size * 0.618) or 1, size + 1) if math.gcd(step, size) == 1)
    return number * step % size


def write_bench_prompts(folder: Path) -> None:
    """Some of the prompts that `benchmarks.speed` decodes as token ids, in a file for each length that they have."""
    prompts = TrainedPrompts(folder)
    for name, length in BENCH_PROMPTS.items():
        ends = [prompt for (prompt,) in islice(prompts.batches(length, 1, 1), NUM_BENCH_PROMPTS)]
        if ends:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": end}) + "\n" for end in ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-seconds", type=float, help=f"training time (default {FULL.target_seconds:.0f})")
    parser.add_argument("--draft-seconds", type=float, help=f"training time (default {FULL.draft_seconds:.0f})")
    parser.add_argument("--only", choices=("target", "draft"), help="train one of the two")
    parser.add_argument("--smoke", action="store_true", help="a toy pair in half a minute on a CPU")
    args = parser.parse_args()
    plan, device = SMOKE if args.smoke else FULL, args.device
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        if args.only != "target":
            parser.error("only the target is trained by several processes: give --only target")
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    plan = replace(
        plan,
        target_seconds=args.target_seconds or plan.target_seconds,
        draft_seconds=args.draft_seconds or plan.draft_seconds,
    )

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    config = target_config(tokenizer.get_vocab_size(), end_of_text_id(tokenizer), **plan.sizes)
    held_out = Windows(load_ids(args.data / "held_out.npy.xz", device), torch.Generator())
    evaluation = held_out.spread(plan.evaluation_windows, plan.window)
    train = Windows(load_ids(args.data / "train.npy.xz", device), torch.Generator().manual_seed(args.seed + rank))
    if rank == 0:
        print(f"{len(train.ids)} training tokens, {len(held_out.ids)} held out", flush=True)
        write_metrics(args.out, plan=asdict(plan), seed=args.seed, training_tokens=len(train.ids))

    folder = args.out / "target"
    if args.only != "draft" and not (folder / "model.safetensors").exists():
        started = time.perf_counter()
        target, budget = train_target(plan, config, train, folder, device, args.seed, None)
        count = num_processes()
        if count > 1:
            torch.distributed.destroy_process_group()
        if rank > 0:
            return
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(args.data / name, folder / name)
        prompt_length = config["max_position_embeddings"] - plan.new_tokens
        prompts = choose_prompts(
            held_out.ids.tolist(), tokenizer, prompt_length, plan.prompts_per_length, plan.new_tokens
        )
        (args.out / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        write_bench_prompts(args.out)
        check_tokenizer(folder, args.out / "prompts.jsonl")
        # transformers computes the same from the saved files.
        check_files(folder, evaluation[:2, :513])
        write_metrics(
            args.out,
            target_parameters=sum(parameter.numel() for parameter in target.parameters()),
            target_steps=budget.steps,
            target_processes=count,
            held_out_loss=round(held_out_loss(target, evaluation, device), 4),
            target_device=name_of(device),
            target_seconds=round(time.perf_counter() - started, 1),
        )
    if args.only != "target" and not (args.out / "draft" / "model.safetensors").exists():
        draft, seconds, _ = train_draft(plan, args.out, train, evaluation, device, args.seed)
        write_metrics(
            args.out,
            draft_parameters=sum(parameter.numel() for parameter in draft.glide.parameters()),
            draft_steps=draft.steps,
            draft_agreement_by_withheld_keys=dict(enumerate(draft.held_out["greedy"], start=1)),
            draft_device=name_of(device),
            draft_seconds=round(seconds, 1),
        )


def write_metrics(folder: Path, **metrics: Any) -> None:
    """Adds to metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | metrics, indent=2) + "\n")
    print(json.dumps(metrics), flush=True)


def name_of(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


if __name__ == "__main__":
    main()
