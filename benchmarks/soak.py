# SPDX-License-Identifier: Apache-2.0
"""Many requests of all kinds at once, through `vllm serve` with each method; every output must be plain decoding's.

    python -m benchmarks.soak [--requests 300] [--clients 8] [--rounds 5] [--seed 0] [--out FILE]

Each round starts a server whose token budget, threshold of long prompts, number of requests at a time, cache, admission
of prompts, method, number of nodes by batch size, tree shape, part of the cache that drafts see, copied tokens,
coupling of noise and way of scheduling are drawn from the seed: in one of five the target drafts for itself, in the
others a GLIDE draft. Budgets go down to one token a request, below the rows of one tree, and caches down to where
requests preempt each other. Concurrent clients send the round's share of the requests: prompts of random length, some
with shared prefixes, with random sampling settings, penalties, bad words, structured output, log-probabilities, stop
strings and stop tokens, and hang up on some of them in mid-stream. The same requests then go to the same server without
a draft. What is counted, and makes this exit with 1:

- mismatches: a finished output (tokens, text, finish reason, log-probabilities) that differs from plain decoding's;
- failures: requests that did not finish, except where the client hung up. One that gets nothing for `--patience`
  seconds never will, and ends its round;
- leaks: requests or cache blocks in use when a round is over, memory of the server's processes that keeps growing.

In half precision near-ties fall either way, so with `--dtype bfloat16` mismatches are counted but are no failure.

How many tokens a step emitted is counted too, from the server's own metrics.
"""

import argparse
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import ROOT
from benchmarks.reporting import environment
from benchmarks.server import (
    DRAFT,
    EXACT,
    ON_CPU,
    OPTIONS,
    PROMPTS,
    START_TIMEOUT,
    TARGET,
    Server,
    ServerError,
    exit_on_signals,
    serve,
)

T = TypeVar("T")

MAX_MODEL_LEN = 1024
BLOCK_SIZE = 32
# A cache of so many blocks holds one request of the longest kind, and the block that vLLM keeps for itself.
MIN_CACHE_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE + 1
# How much more memory the last quarter of a round may need than the second: caches of the allocator, no leak.
MAX_GROWTH = 0.1
# Programs that add the same numbers up in different orders may be this far apart in a log-probability. Half precision
# has no tolerance that would tell anything.
LOGPROB_TOLERANCES = {"float32": 1e-3}
# On a GPU as it is used there: with torch.compile and CUDA graphs.
DEFAULTS = OPTIONS if ON_CPU else [option for option in OPTIONS if option != "--enforce-eager"]
# vLLM's own command schedules synchronously on a CPU, whatever it is asked for.
COMMAND = "benchmarks.cpu_async" if ON_CPU else "vllm.entrypoints.cli.main"

METHODS = ("glide", "magicdec")
# Their fields in `Settings`: options of the draft, which a server without one does not know.
DRAFT_FIELDS = (
    "tree_shape",
    "copy_length",
    "couple_noise",
    "cross_attention_budget",
    "sinks",
    "budget",
    "selection",
    "num_speculative_tokens_per_batch_size",
)
# The fourth is the sequential method.
TREE_SHAPES = ([4, 16, 16, 16, 16], [4, 8, 8], [2, 4], [1, 1, 1, 1, 1], "auto")
# Last tokens that GLIDE drafts see below the root, None for all of a context this short.
CROSS_ATTENTION_BUDGETS = (None, 1, 64, 200)
# Tokens of MagicDec's chains; which tokens it sees, and how many besides the first. Six blocks are the least of which
# some can be chosen.
GAMMAS = (1, 3, 4, 6)
PARTS = (("recent", 1), ("recent", 64), ("scores", 200), ("scores", 320))
SINKS = (32, 0, 1)
# All nodes of the default tree, and its root.
TREE_NODES = 68
TREE_ROWS = 1 + TREE_NODES

NAME = {"type": "string", "maxLength": 12}
STRUCTURED_OUTPUTS = (
    {"json": {"type": "object", "properties": {"name": NAME}, "required": ["name"], "additionalProperties": False}},
    {"json": {"type": "array", "items": {"enum": ["self", "other", None, 1]}, "minItems": 1, "maxItems": 4}},
    {"json_object": True},
    {"regex": r"def [a-z_]{1,12}\(self(, [a-z]{1,8}){0,3}\):"},
    {"regex": r"(import [a-z]{1,10}\n){1,5}"},
    {"choice": ["return self.name", "return self.value", "raise", "pass"]},
)


@dataclass(frozen=True)
class Settings:
    """Of one round's server; fields of vLLM's names are vLLM's options."""

    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    num_gpu_blocks_override: int
    # Without it prompts begin before their last block is free, and preempt each other.
    scheduler_reserve_full_isl: bool
    async_scheduling: bool
    method: str  # one of METHODS
    # Nodes of each level, or "auto"; those of a chain with MagicDec.
    tree_shape: list[int] | str
    copy_length: int
    couple_noise: bool
    # Of GLIDE drafts; None for the engine's default
    cross_attention_budget: int | None
    # Of MagicDec, None with GLIDE drafts
    sinks: int | None
    budget: int | None
    selection: str | None
    # (first batch size, last, nodes); None for the engine's default
    num_speculative_tokens_per_batch_size: list[list[int]] | None

    def options(self) -> list[str]:
        """Of a server with or without a draft."""
        options = ["--max-model-len", str(MAX_MODEL_LEN), "--block-size", str(BLOCK_SIZE)]
        for name, value in asdict(self).items():
            if name == "method" or name in DRAFT_FIELDS:
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, int):
                options += [f"--{flag}", str(value)]
        return options

    def draft_options(self) -> list[str]:
        draft = {name: value for name in DRAFT_FIELDS if (value := getattr(self, name)) is not None}
        if self.method == "glide":
            return ["--speculative-model", DRAFT, "--speculative-config", json.dumps(draft)]
        gamma = len(draft.pop("tree_shape"))
        # Drafts are verified throughout, though for a target this small they are seldom worth it.
        draft |= {"method": self.method, "gamma": gamma, "adaptive_verification": False}
        return ["--speculative-config", json.dumps(draft)]


def draw_settings(
    rounds: int, clients: int, seed: int, tree_shape: list[int] | str | None = None, method: str | None = None
) -> list[Settings]:
    """Settings of so many rounds; the same for the same arguments.

    Args:
        clients: requests that are sent at a time, of which a server may take fewer.
        tree_shape: of all rounds, which are GLIDE's then; None to draw one for each.
        method: of all rounds; None to draw one for each.
    """
    source = random.Random(f"settings {seed}")

    def draw(choices: Sequence[T], source: random.Random = source) -> list[T]:
        # Every choice has its turn before the first comes again, so few rounds have all of them.
        drawn: list[T] = []
        while len(drawn) < rounds:
            drawn += source.sample(choices, len(choices))
        return drawn[:rounds]

    # Tokens a step: one for each request of a full batch, less than a tree's rows, a tree or two, more.
    budgets = draw([(0, 0), (TREE_ROWS // 4, TREE_ROWS - 1), (TREE_ROWS, 2 * TREE_ROWS), (2 * TREE_ROWS, 400)])
    thresholds = draw([(0, 0), (8, TREE_ROWS), (TREE_ROWS, 256)])
    caches = draw([(0, 4), (0, 16), (16, 64)])
    reserves = draw([False, True])
    ways = draw([False, True])
    shapes = draw([tree_shape] if tree_shape else TREE_SHAPES)
    schedules = draw(["default", "fixed", "falling"])
    copies = draw([16, 4, 0])
    noises = draw([True, True, False])
    of_methods = random.Random(f"methods {seed}")
    one = "glide" if tree_shape else method
    methods = draw([one] if one else ["glide"] * 4 + ["magicdec"], of_methods)
    cross_attention_budgets = draw(CROSS_ATTENTION_BUDGETS, of_methods)
    gammas, parts, sinks = draw(GAMMAS, of_methods), draw(PARTS, of_methods), draw(SINKS, of_methods)
    settings = []
    for i in range(rounds):
        drafts_itself = methods[i] == "magicdec"
        shape: list[int] | str = [1] * gammas[i] if drafts_itself else shapes[i]
        # Where there are fewer than clients, some requests wait. With the lowest budget prompts would take too long.
        max_num_seqs = source.randint(min(2, clients), clients) if budgets[i][1] else clients
        settings.append(
            Settings(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_seqs, source.randint(*budgets[i])),
                long_prefill_token_threshold=source.randint(*thresholds[i]),
                num_gpu_blocks_override=MIN_CACHE_BLOCKS + source.randint(*caches[i]),
                scheduler_reserve_full_isl=reserves[i],
                async_scheduling=ways[i],
                method=methods[i],
                tree_shape=shape,
                copy_length=copies[i],
                couple_noise=noises[i],
                cross_attention_budget=None if drafts_itself else cross_attention_budgets[i],
                sinks=sinks[i] if drafts_itself else None,
                budget=parts[i][1] if drafts_itself else None,
                selection=parts[i][0] if drafts_itself else None,
                num_speculative_tokens_per_batch_size=_draw_schedule(
                    source, schedules[i], TREE_NODES if isinstance(shape, str) else sum(shape)
                ),
            )
        )
    return settings


def _draw_schedule(source: random.Random, kind: str, num_nodes: int) -> list[list[int]] | None:
    if kind == "default":
        return None
    if kind == "fixed":
        # More than a small tree has are all that it has.
        return [[1, 256, TREE_ROWS - 1]]
    first, second = source.randint(1, 2), source.randint(3, 5)
    numbers = sorted((source.randint(0, num_nodes) for _ in range(2)), reverse=True)
    return [[1, first, num_nodes], [first + 1, second, numbers[0]], [second + 1, 256, numbers[1]]]


@dataclass(frozen=True)
class Job:
    body: dict[str, Any]
    # The client hangs up after so many chunks; None: it stays.
    hang_up_after: int | None


@dataclass
class Outcome:
    token_ids: list[int]
    text: str
    finish_reason: str | None
    # Of the tokens, if they were asked for.
    logprobs: list[float] = field(default_factory=list)
    hung_up: bool = False
    error: str | None = None

    def is_same(self, other: "Outcome", logprob_tolerance: float) -> bool:
        return (
            replace(self, logprobs=[]) == replace(other, logprobs=[])
            and len(self.logprobs) == len(other.logprobs)
            # Those of tokens that were drawn, so all of them are finite.
            and all(
                math.isclose(one, another, abs_tol=logprob_tolerance)
                for one, another in zip(self.logprobs, other.logprobs, strict=True)
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="of all rounds together")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="servers with settings of their own")
    parser.add_argument("--max-tokens", type=int, default=48, help="no request generates more")
    parser.add_argument("--seed", type=int, default=0, help="other requests and other settings")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tree-shape", type=int, nargs="+", metavar="N", help="of every round; drawn without it")
    parser.add_argument("--method", choices=METHODS, help="of every round; drawn without it")
    parser.add_argument("--patience", type=float, default=START_TIMEOUT, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="write what was counted, as JSON")
    arguments = parser.parse_args()
    if arguments.clients < 1 or not 1 <= arguments.rounds <= arguments.requests:
        parser.error("there must be a client, and a request for every round")
    if arguments.tree_shape and arguments.method == "magicdec":
        parser.error("MagicDec drafts chains: give no --tree-shape")

    machine = environment(None)
    jobs = make_jobs(arguments.requests, arguments.max_tokens, arguments.seed)
    settings = draw_settings(
        arguments.rounds, arguments.clients, arguments.seed, arguments.tree_shape, arguments.method
    )
    rounds = []
    for i, each in enumerate(settings):
        print(f"Round {i + 1} of {len(settings)}: {json.dumps(asdict(each))}\n")
        share = jobs[i * len(jobs) // len(settings) : (i + 1) * len(jobs) // len(settings)]
        rounds.append(run_round(i + 1, each, share, arguments))
        print(json.dumps(rounds[-1]) + "\n")

    report = summarise(rounds) | {
        "seed": arguments.seed,
        "clients": arguments.clients,
        "dtype": arguments.dtype,
        **machine,
        "rounds": rounds,
    }
    print(json.dumps(report, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")

    wrong = [name for name in ("failures", "leaked_requests", "leaked_blocks") if report[name]]
    if report["mismatches"] and arguments.dtype == "float32":
        wrong.append("mismatches")
    if report["memory_growth"] > MAX_GROWTH:
        wrong.append("memory_growth")
    if wrong:
        raise ServerError(f"Wrong: {', '.join(f'{name} {report[name]}' for name in wrong)}.")


def run_round(number: int, settings: Settings, jobs: list[Job], arguments: argparse.Namespace) -> dict[str, Any]:
    """Sends the jobs to a server with the draft and to one without, and prints what differs.

    Returns the settings and what was counted.
    """
    options = settings.options() + (EXACT if arguments.dtype == "float32" else ["--dtype", arguments.dtype])
    clients, patience = arguments.clients, arguments.patience
    print(f"{len(jobs)} requests from {clients} clients, with {settings.method}\n")
    with serve(f"soak-{number}", *options, *settings.draft_options(), defaults=DEFAULTS, command=COMMAND) as server:
        outcomes, report = run(server, jobs, clients, patience)
        report["leaked_blocks"] = round(report.pop("cache_usage") * settings.num_gpu_blocks_override)
        report |= _drafting(server)

    finished = [i for i, outcome in enumerate(outcomes) if not outcome.hung_up and not outcome.error]
    print(f"The {len(finished)} that finished, without a draft\n")
    with serve(f"soak-{number}-plain", *options, defaults=DEFAULTS, command=COMMAND) as server:
        plain, _ = run(server, [Job(jobs[i].body, None) for i in finished], clients, patience)
    tolerance = LOGPROB_TOLERANCES.get(arguments.dtype, math.inf)
    mismatches = [
        i for i, expected in zip(finished, plain, strict=True) if not expected.is_same(outcomes[i], tolerance)
    ]
    for i in mismatches[:3]:
        expected = plain[finished.index(i)]
        print(json.dumps({"request": jobs[i].body, "plain": asdict(expected), settings.method: asdict(outcomes[i])}))
    for i in [i for i, outcome in enumerate(outcomes) if outcome.error][:3]:
        print(json.dumps({"request": jobs[i].body, "error": outcomes[i].error}))
    return {
        **asdict(settings),
        "requests": len(jobs),
        "finished": len(finished),
        "hung_up": sum(outcome.hung_up for outcome in outcomes),
        "failures": sum(outcome.error is not None for outcome in outcomes),
        "mismatches": len(mismatches),
        **report,
    }


def _drafting(server: Server) -> dict[str, Any]:
    """What vLLM's metrics say of the drafts."""
    return {
        "accepted_tokens": int(server.metric("vllm:spec_decode_num_accepted_tokens_total")),
        "drafts": int(server.metric("vllm:spec_decode_num_drafts_total")),
    }


def summarise(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of all rounds; the largest growth of memory."""

    def total(name: str) -> Any:
        return sum(each[name] for each in rounds)

    num_drafts = total("drafts")
    return {
        "seconds": round(total("seconds"), 1),
        "preemptions": total("preemptions"),
        "leaked_requests": total("leaked_requests"),
        "leaked_blocks": total("leaked_blocks"),
        "memory_growth": max(each["memory_growth"] for each in rounds),
        "acceptance_length": round(1 + total("accepted_tokens") / num_drafts, 2) if num_drafts else None,
        "drafts": num_drafts,
        "requests": total("requests"),
        "finished": total("finished"),
        "hung_up": total("hung_up"),
        "failures": total("failures"),
        "mismatches": total("mismatches"),
    }


def make_jobs(count: int, max_tokens: int, seed: int) -> list[Job]:
    """Requests of all kinds; the same for the same arguments."""
    from transformers import AutoTokenizer

    source = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TARGET)
    texts = [json.loads(line)["text"] for line in (ROOT / PROMPTS).read_text().splitlines()[:16]]
    prompts = [tokenizer.encode(text) for text in texts]
    return [_make_job(source, prompts, max_tokens, number) for number in range(count)]


def _make_job(source: random.Random, prompts: list[list[int]], max_tokens: int, number: int) -> Job:
    prompt = source.choice(prompts)
    # Half of the requests begin where a text begins and so share prefixes; the others begin anywhere.
    start = source.choice((0, source.randrange(len(prompt) // 2)))
    length = source.choice((1, source.randrange(2, 64), source.randrange(64, 800)))
    body: dict[str, Any] = {
        "prompt": prompt[start : start + length],
        "max_tokens": source.randint(1, max_tokens),
        "temperature": source.choice((0.0, 0.0, 0.7, 1.0)),
        "seed": number,
        "ignore_eos": source.random() < 0.5,
    }
    for chance, name, value in (
        (0.3, "top_k", source.randint(2, 50)),
        (0.3, "top_p", source.uniform(0.5, 1.0)),
        (0.3, "min_p", source.uniform(0.0, 0.2)),
        (0.2, "logit_bias", {str(source.randrange(4096)): source.uniform(-5.0, 5.0)}),
        (0.2, "stop", source.sample(["\n\n", "return", "self", "(", "="], 2)),
        (0.2, "logprobs", source.randint(0, 5)),
        (0.1, "presence_penalty", source.uniform(-1.0, 2.0)),
        (0.1, "frequency_penalty", source.uniform(-1.0, 2.0)),
        (0.1, "repetition_penalty", source.uniform(0.8, 1.5)),
        *(
            # A grammar may ask for what the others forbid or end with, and then vLLM has no token left.
            ((1.0, "structured_outputs", source.choice(STRUCTURED_OUTPUTS)),)
            if source.random() < 0.25
            else (
                (0.2, "stop_token_ids", source.sample(range(4096), 40)),
                (0.2, "min_tokens", source.randint(1, body["max_tokens"])),
                (0.15, "bad_words", source.sample(["self", "import", "return", "(", " = "], 2)),
            )
        ),
    ):
        if source.random() < chance:
            body[name] = value
    hang_up_after = source.randint(1, 6) if source.random() < 0.15 else None
    return Job(body, hang_up_after)


def run(
    server: Server, jobs: list[Job], clients: int, patience: float = START_TIMEOUT
) -> tuple[list[Outcome], dict[str, Any]]:
    """Sends the jobs from so many clients at once. Returns their outcomes and what the server is left with.

    Args:
        patience: seconds without a chunk after which a request is given up, and those that were not sent with it.
    """
    start = time.monotonic()
    memory: list[int] = []
    is_stuck = threading.Event()

    def send(job: Job) -> Outcome:
        if is_stuck.is_set():
            return Outcome([], "", None, error="not sent, since a request before it never finished")
        outcome = _send(server, job, patience, is_stuck)
        memory.append(_resident_bytes(server.process.pid))
        return outcome

    with ThreadPoolExecutor(clients) as pool:
        outcomes = list(pool.map(send, jobs))
    seconds = time.monotonic() - start
    running, usage = _wait_until_idle(server)
    quarters = [len(memory) * i // 4 for i in range(5)]
    _, second, _, last = (max(memory[a:b], default=0) for a, b in pairwise(quarters))
    return outcomes, {
        "seconds": round(seconds, 1),
        "preemptions": int(server.metric("vllm:num_preemptions_total")),
        "leaked_requests": running,
        "cache_usage": usage,
        "memory_growth": round(last / second - 1, 3) if second else 0.0,
    }


def _send(server: Server, job: Job, patience: float, is_stuck: threading.Event) -> Outcome:
    outcome = Outcome([], "", None)
    chunks = server.stream(job.body, patience)
    try:
        for number, chunk in enumerate(chunks, start=1):
            for choice in chunk["choices"]:
                outcome.token_ids += choice["token_ids"] or []
                outcome.text += choice["text"]
                if choice["logprobs"] and choice["token_ids"]:
                    outcome.logprobs += choice["logprobs"]["token_logprobs"]
                outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
            if number == job.hang_up_after:
                outcome.hung_up = True
                break
    except TimeoutError:
        is_stuck.set()
        outcome.error = f"nothing came for {patience:.0f} s after {len(outcome.token_ids)} tokens"
    except (ServerError, OSError, HTTPException) as error:
        outcome.error = str(error) or repr(error)
    finally:
        chunks.close()
    return outcome


def _wait_until_idle(server: Server) -> tuple[int, float]:
    """Requests still running or waiting, and the part of the cache in use, once the server has had time to notice."""
    for _ in range(40):
        running = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
        usage = server.metric("vllm:kv_cache_usage_perc")
        if not running and not usage:
            break
        time.sleep(0.5)
    return int(running), usage


def _resident_bytes(process_group: int) -> int:
    """Memory of all processes of a process group; 0 where there is no /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == process_group:
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # The process has ended meanwhile.
    return total


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    exit_on_signals()
    try:
        main()
    except ServerError as error:
        sys.exit(str(error))
