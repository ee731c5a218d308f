# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of a trained pair in real engines, by speculative options and sampling; every output must be equal.

    python -m benchmarks.acceptance [--options '{}' '{"couple_noise": false}'] [--sampling '{"temperature": 0}' ...]

The prompts are those of the pair's prompts.jsonl. Plain decoding continues each of them first. Every set of options
then gets the same requests, once as they are and once cut to where their text starts to repeat itself (small models do
under greedy decoding, and repetition is easy to draft). In float32, which is the default, exits with 1 if a token
differs from plain decoding's. On a CPU the engine runs in Triton's interpreter, as the README says.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import PAIR, RESULTS
from benchmarks.repetition import loop_start
from benchmarks.reporting import environment
from vllm_longspec.options import DEFAULT_LEVELS

SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.0}]
OPTIONS: list[dict[str, Any]] = [{"couple_noise": False}, {}]


def read_prompts(pair: Path, per_length: int, lengths: list[int]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pair / "target" / "tokenizer.json"))
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for line in (pair / "prompts.jsonl").read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"]).ids
        by_length[len(ids)].append(ids)
    missing = set(lengths) - by_length.keys()
    if missing:
        raise SystemExit(f"no prompts of {sorted(missing)} tokens: give --lengths out of {sorted(by_length)}")
    return [ids for length in lengths or sorted(by_length) for ids in by_length[length][:per_length]]


class Engine:
    """One engine; its counters are read before and after each run."""

    def __init__(self, pair: Path, options: dict[str, Any] | None, arguments: argparse.Namespace):
        from vllm import LLM

        settings: dict[str, Any] = {
            "model": str(pair / "target"),
            "dtype": arguments.dtype,
            "max_num_seqs": arguments.batch,
            "disable_log_stats": False,
            "block_size": 32,
            **arguments.engine,
        }
        if options is not None:
            settings["speculative_config"] = {
                "model": str(pair / "draft"),
                **all_nodes(options, arguments.batch),
                **options,
            }
        self.llm = LLM(**settings)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: dict[str, Any],
        max_tokens: list[int],
        each: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[list[list[int]], float | None]:
        """Tokens of all requests, and tokens per verified step; None if there was no such step.

        Args:
            each: further sampling parameters of each request.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        before = self._counters()
        parameters = [
            SamplingParams(**{"seed": seed, **sampling, **further}, max_tokens=number, detokenize=False)
            for seed, (number, further) in enumerate(zip(max_tokens, each or [{}] * len(prompts), strict=True))
        ]
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
        drafts, accepted = (after - old for after, old in zip(self._counters(), before, strict=True))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return tokens, round(1 + accepted / drafts, 3) if drafts else None

    def _counters(self) -> tuple[float, float]:
        values: dict[str, float] = defaultdict(float)
        for metric in self.llm.get_metrics():
            values[metric.name] += getattr(metric, "value", 0.0)
        prefix = "vllm:spec_decode_num_"
        return values[f"{prefix}drafts"], values[f"{prefix}accepted_tokens"]


def all_nodes(options: dict[str, Any], batch: int) -> dict[str, Any]:
    """Options with which all nodes of every tree are verified: acceptance does not depend on the machine's speed.

    None if these options ask for nodes that follow what is accepted.
    """
    shape = options.get("tree_shape", DEFAULT_LEVELS)
    if options.get("adaptive_verification") or shape == "auto":
        return {}
    return {"num_speculative_tokens_per_batch_size": [[1, batch, options.get("gamma") or sum(shape)]]}


def main() -> None:
    arguments = parse_arguments()
    prompts = read_prompts(arguments.pair, arguments.prompts_per_length, arguments.lengths)
    whole = [arguments.tokens] * len(prompts)
    plain: list[list[list[int]]] = []
    records: list[dict[str, Any]] = []
    num_different = 0
    for options in [None, *arguments.options]:
        engine = Engine(arguments.pair, options, arguments)
        for index, sampling in enumerate(arguments.sampling):
            started = time.perf_counter()
            tokens, acceptance = engine.generate(prompts, sampling, whole)
            if options is None:
                plain.append(tokens)
                continue
            different = sum(one != other for one, other in zip(tokens, plain[index], strict=True))
            num_different += different
            ends = [loop_start(each) for each in plain[index]]
            looping = sum(map(len, plain[index])) - sum(ends)
            before_loops = acceptance
            if looping:
                before_loops = engine.generate(prompts, sampling, [max(1, end) for end in ends])[1]
            record = {
                "options": options,
                "sampling": sampling,
                "tokens_per_step": acceptance,
                "tokens_per_step_before_loops": before_loops,
                "requests_that_differ": different,
                "tokens_in_loops": looping,
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(json.dumps(record), flush=True)
            records.append(record)
        del engine
        gc.collect()
    result = {
        "pair": arguments.pair.name,
        "prompts": len(prompts),
        "prompt_lengths": sorted(set(map(len, prompts))),
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "environment": environment(arguments.commit),
        "records": records,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if num_different and arguments.dtype == "float32":
        sys.exit(f"{num_different} requests differ from plain decoding")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    add("--options", type=json.loads, nargs="+", default=OPTIONS, help="speculative options, JSON, one set or more")
    add("--sampling", type=json.loads, nargs="+", default=SAMPLINGS, help="sampling parameters, JSON, one set or more")
    add("--prompts-per-length", type=int, default=16)
    add("--lengths", type=int, nargs="*", default=[], help="prompt lengths (default: all)")
    add("--tokens", type=int, default=192, help="generated tokens")
    add("--batch", type=int, default=16)
    add("--dtype", default="float32")
    add("--engine", type=json.loads, default={}, help="further arguments of the engine, JSON")
    add("--commit", help="the plugin's, where there is no git to ask")
    add("--out", type=Path, default=RESULTS / "acceptance.json")
    arguments = parser.parse_args()
    # Several engines in one process, one after the other.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return arguments


if __name__ == "__main__":
    main()
