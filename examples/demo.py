# SPDX-License-Identifier: Apache-2.0
"""One long prompt through `vllm serve`, without and then with a LongSpec GLIDE draft: same tokens, fewer steps.

    python -m examples.demo [--max-tokens N]

Run by `make demo`. Exits with 1, and says why, when a server fails, drafts nothing, or the two outputs differ.
"""

import argparse
import io
import json
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from benchmarks import ROOT
from benchmarks.server import DRAFT, EXACT, ON_CPU, PROMPTS, Server, ServerError, exit_on_signals, serve

PROMPT_NUMBER = 1  # its continuation does not repeat itself, which would be easy to draft
COUNTERS = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
DEFAULT_MAX_TOKENS = 64 if ON_CPU else 256


@dataclass
class Completion:
    prompt_tokens: int
    token_ids: list[int]
    tokens_per_second: float  # while decoding: the time before the first token is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="tokens to generate, twice")
    max_tokens = parser.parse_args().max_tokens

    print("The same model continues the same text twice, greedily: first alone, then with a LongSpec draft.\n")
    example = json.loads((ROOT / PROMPTS).read_text().splitlines()[PROMPT_NUMBER])
    prompt = example["text"]
    print(f"The prompt is {example['num_tokens']:,} tokens of {example['path']} ({PROMPTS}). Its last lines:\n")
    print("".join(f"    {line}\n" for line in prompt.splitlines()[-6:]))

    print("1. Without speculation\n")
    with serve("plain", *EXACT) as server:
        warm_up(server, prompt)
        plain = complete(server, prompt, max_tokens, sys.stdout)

    print("2. With speculation\n")
    with serve("speculative", *EXACT, "--speculative-model", DRAFT) as server:
        warm_up(server, prompt)
        before = [server.metric(name) for name in COUNTERS]
        speculative = complete(server, prompt, max_tokens, sys.stdout)
        steps, accepted = (int(server.metric(name) - start) for name, start in zip(COUNTERS, before, strict=True))
    if not steps:
        raise ServerError("The server with --speculative-model drafted nothing.")

    # A step is one forward pass of the target after the prompt's. Alone it yields one token a step.
    print_row("", "without", "with speculation")
    print_row("prompt tokens", f"{plain.prompt_tokens:,}", f"{speculative.prompt_tokens:,}")
    print_row("generated tokens", f"{len(plain.token_ids)}", f"{len(speculative.token_ids)}")
    print_row("steps", f"{len(plain.token_ids) - 1}", f"{steps}")
    print_row("acceptance length (tokens a step)", "1.00", f"{1 + accepted / steps:.2f}")
    print_row("tokens per second", f"{plain.tokens_per_second:.1f}", f"{speculative.tokens_per_second:.1f}")
    if ON_CPU:
        print("Without a GPU, Triton's interpreter runs the kernels, slowly: compare the steps, not the speeds.")

    for index, (one, other) in enumerate(zip(plain.token_ids, speculative.token_ids, strict=False)):
        if one != other:
            raise ServerError(f"\nThe two outputs DIFFER from token {index + 1} on.")
    if len(plain.token_ids) != len(speculative.token_ids):
        raise ServerError("\nThe two outputs DIFFER: one ends before the other.")
    print("\nThe two outputs are identical, token for token.")
    print("\nThe same for a model and prompts of yours (docs/benchmarking.md):")
    print("  vllm-longspec bench --target TARGET --draft DRAFT --workload my-prompts.jsonl --out results/")


def print_row(name: str, without: str, with_speculation: str) -> None:
    print(f"  {name:34}{without:>9}{with_speculation:>18}")


def warm_up(server: Server, prompt: str) -> None:
    """Lets Triton compile its kernels before they are timed. Its interpreter compiles nothing."""
    if not ON_CPU:
        complete(server, prompt, 16, io.StringIO())


def complete(server: Server, prompt: str, max_tokens: int, out: TextIO) -> Completion:
    """Asks for a greedy completion of the prompt and writes it to `out` as it streams in."""
    prompt_tokens = 0
    token_ids: list[int] = []
    arrivals: list[tuple[float, int]] = []  # a time, and how many tokens had arrived by then
    for chunk in server.stream({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}):
        if chunk.get("usage"):
            prompt_tokens = chunk["usage"]["prompt_tokens"]
        for choice in chunk["choices"]:
            token_ids += choice["token_ids"] or []
            arrivals.append((time.monotonic(), len(token_ids)))
            print(choice["text"], end="", file=out, flush=True)
    print("\n", file=out)
    if len(arrivals) < 2:
        raise ServerError("The completion was too short to measure a speed.")
    (first_time, first_count), (last_time, last_count) = arrivals[0], arrivals[-1]
    return Completion(prompt_tokens, token_ids, (last_count - first_count) / (last_time - first_time))


if __name__ == "__main__":
    # Line by line even into a pipe, so that what is printed keeps its order with errors.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    exit_on_signals()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The server was shut down.")
    except ServerError as error:
        sys.exit(str(error))
