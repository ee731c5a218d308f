# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of several drafts of one target in engines, by context: GLIDE's as trees and chains, EAGLE-3's as
vLLM drafts with them.

    python -m benchmarks.training.served --pair FOLDER --drafts draft-longspec draft-default eagle3 --out FILE

The prompts are those of FOLDER/prompts.jsonl: a shorter context is the end of the same stretch of text. All requests of
a context run as one batch, and every step verifies all drafted tokens that a single request would get. Each engine has
a process of its own; --parallel of them share the GPU, since nothing is timed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.repetition import loop_start
from benchmarks.reporting import environment, markdown
from vllm_longspec.options import DEFAULT_LEVELS
from vllm_longspec.scheduling.schedule import default_schedule
from vllm_longspec.training.engine import run_engine

CHAIN = len(DEFAULT_LEVELS)
GIB = 1 << 30


def methods_of(draft: Path, target_config: dict[str, Any], batch: int, chosen: Sequence[str]) -> dict[str, Any]:
    """Speculative configurations by name: a chain of as many tokens as the default tree has levels, and trees."""
    config = json.loads((draft / "config.json").read_text())
    if config.get("speculators_model_type") == "eagle3":
        # vLLM's default drafts the most probable tokens at any temperature, the other draws them.
        head = {"model": str(draft), "method": "eagle3", "num_speculative_tokens": CHAIN}
        return {"chain": head, "drawn chain": head | {"draft_sample_method": "probabilistic"}}
    group = target_config["num_attention_heads"] // target_config["num_key_value_heads"]

    def verified(num_nodes: int) -> list[list[int]]:
        return [[1, batch, default_schedule(num_nodes, group)[0][2]]]

    chain = [1] * CHAIN
    tree = {"model": str(draft), "num_speculative_tokens_per_batch_size": verified(sum(DEFAULT_LEVELS))}
    found = {
        "tree": tree,
        "tree without copies": tree | {"copy_length": 0},
        "chain": tree
        | {"tree_shape": chain, "copy_length": 0, "num_speculative_tokens_per_batch_size": [[1, batch, 5]]},
    }
    return {name: method for name, method in found.items() if name in chosen}


def before_loop(accepted: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Steps, and tokens that they emit, of a request up to where its text begins to repeat itself."""
    end, place, steps = loop_start(list(tokens)), 1, 0
    emitted = 0
    for number in accepted:
        if place >= end:
            break
        steps += 1
        emitted += number + 1
        place += number + 1
    return steps, emitted


def records_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = sum(len(each["accepted"]) for each in results)
    emitted = steps + sum(sum(each["accepted"]) for each in results)
    cut = [before_loop(each["accepted"], each["token_ids"]) for each in results]
    cut_steps, cut_emitted = (sum(column) for column in zip(*cut, strict=True))
    by_depth = [
        sum(number >= depth for each in results for number in each["accepted"]) for depth in range(1, CHAIN + 1)
    ]
    return {
        "requests": len(results),
        "steps": steps,
        "tokens_per_step": round(emitted / steps, 3),
        "steps_before_loops": cut_steps,
        "tokens_per_step_before_loops": round(cut_emitted / cut_steps, 3) if cut_steps else None,
        "accepted_at_depth": [round(number / steps, 4) for number in by_depth],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", type=Path, required=True, help="folder with target/, prompts.jsonl and the drafts")
    add("--drafts", nargs="+", required=True, help="folders in it")
    add("--methods", nargs="+", default=["tree", "tree without copies", "chain"], help="of GLIDE drafts")
    # Answers end within 2k, 8k and 16k, the contexts of `vllm-longspec evaluate`.
    add("--contexts", type=int, nargs="+", default=[1792, 7936, 15872])
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    add("--prompts", type=int, default=16, help="of each context")
    add("--tokens", type=int, default=256, help="of each answer")
    add("--parallel", type=int, default=3, help="engines at a time")
    add("--dtype", default="auto")
    add("--engine", type=json.loads, default={}, help="further arguments of the engines, JSON")
    add("--commit", help="of the plugin, where there is no git to ask")
    add("--answers", type=Path, help="folder for the first draft's greedy answers, for `vllm-longspec evaluate`")
    add("--out", type=Path, required=True)
    args = parser.parse_args()

    target = args.pair / "target"
    target_config = json.loads((target / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (args.pair / "prompts.jsonl").read_text().splitlines()]
    prompts = [tokenizer.encode(text).ids for text in texts[: args.prompts]]
    if min(map(len, prompts)) < max(args.contexts):
        parser.error(f"--contexts {max(args.contexts)}: the prompts have {min(map(len, prompts))} tokens")
    runs: list[dict[str, Any]] = [
        {
            "prompts": [ids[-context:] for ids in prompts],
            "max_tokens": [args.tokens] * len(prompts),
            "sampling": {"temperature": temperature},
        }
        for context in args.contexts
        for temperature in args.temperatures
    ]
    settings = {
        "model": str(target),
        "dtype": args.dtype,
        "max_num_seqs": len(prompts),
        "max_model_len": target_config["max_position_embeddings"],
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "per_request_spec_decode_metrics": "detailed",
        "gpu_memory_utilization": 0.9 / args.parallel,
        "kv_cache_memory_bytes": 8 * GIB,
        **args.engine,
    }

    jobs = [
        (name, method, speculative)
        for name in args.drafts
        for method, speculative in methods_of(args.pair / name, target_config, len(prompts), args.methods).items()
    ]

    def serve(job: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
        name, method, speculative = job
        try:
            found = run_engine({**settings, "speculative_config": speculative}, runs)
        except ValueError as error:
            # The others' figures are kept.
            return [{"draft": name, "method": method, "error": str(error)}]
        if args.answers and job is jobs[0]:
            write_answers(args.answers, runs, found)
        return [
            {
                "draft": name,
                "method": method,
                "context": len(run["prompts"][0]),
                "temperature": run["sampling"]["temperature"],
                **records_of(results),
            }
            for run, results in zip(runs, found, strict=True)
        ]

    records: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.parallel) as pool:
        for found in pool.map(serve, jobs):
            records += found
            print("\n".join(map(json.dumps, found)), flush=True)
            result = {"environment": environment(args.commit), "tokens": args.tokens, "records": records}
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(list(table(records))))
    if any("error" in record for record in records):
        raise SystemExit("an engine failed: see above")


def write_answers(folder: Path, runs: Sequence[dict[str, Any]], found: Sequence[Sequence[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "input_ids": [*prompt, *result["token_ids"]],
            "loss_mask": [0] * len(prompt) + [1] * len(result["token_ids"]),
        }
        for run, results in zip(runs, found, strict=True)
        if run["sampling"]["temperature"] == 0
        for prompt, result in zip(run["prompts"], results, strict=True)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(records: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each draft, method and temperature; a column of tokens per step for each context."""
    records = [record for record in records if "error" not in record]
    contexts = sorted({record["context"] for record in records})
    yield ["draft", "method", "temperature", *(f"{context}" for context in contexts)]
    for key in dict.fromkeys((each["draft"], each["method"], each["temperature"]) for each in records):
        cells = {
            each["context"]: f"{each['tokens_per_step']:.2f} ({each['tokens_per_step_before_loops'] or 0:.2f})"
            for each in records
            if (each["draft"], each["method"], each["temperature"]) == key
        }
        yield [key[0], key[1], f"{key[2]:g}", *(cells[context] for context in contexts)]


if __name__ == "__main__":
    main()
