# SPDX-License-Identifier: Apache-2.0
"""Sends a workload to a server by the machinery of `vllm bench serve`, and keeps what that throws away.

Warm-up, concurrency, request rate, progress and latencies are vLLM's own. Its request function reads the text of a
stream and its number of tokens only; here the bytes that it reads are kept, and its stream's token ids and the
request's own metrics are read from them when all requests are done.
"""

import asyncio
import contextlib
import io
import json
import math
import os
import random
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    RequestFuncInput,
    RequestFuncOutput,
    StreamedResponseHandler,
    async_request_openai_completions,
)
from vllm.benchmarks.serve import TaskType, benchmark

from vllm_longspec.bench.cells import Answer
from vllm_longspec.bench.prompts import Prompt
from vllm_longspec.bench.server import ServerError

_ENDPOINT_TYPE = "vllm-longspec"
_SEED_BITS = 31
_NUMPY_SEED_BITS = 32
_NO_PROXY = ("no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Load:
    """How requests come."""

    output_len: int
    temperature: float
    seed: int
    batch: int | None  # requests at a time
    rate: float | None  # requests a second
    warmups: int
    ignore_eos: bool


class _Kept:
    """A response's content that remembers what was read from it."""

    def __init__(self, content: aiohttp.StreamReader, chunks: list[bytes]):
        self._content = content
        self._chunks = chunks

    async def iter_any(self) -> AsyncIterator[bytes]:
        async for chunk in self._content.iter_any():
            self._chunks.append(chunk)
            yield chunk


class _Response:
    """What vLLM's request function asks a response for."""

    def __init__(self, response: aiohttp.ClientResponse, chunks: list[bytes]):
        self.status = response.status
        self.reason = response.reason
        self.content = _Kept(response.content, chunks)


class _Session:
    """What vLLM's request function asks a session for."""

    def __init__(self, session: aiohttp.ClientSession):
        self._session = session
        self.chunks: list[bytes] = []

    @contextlib.asynccontextmanager
    async def post(self, **arguments: Any) -> AsyncIterator[_Response]:
        async with self._session.post(**arguments) as response:
            kept = _Response(response, self.chunks)
            if response.status != 200:
                # The reason is no more than "Bad Request".
                kept.reason = f"{response.status} {response.reason}: {_message(await response.text())}"
            yield kept


class Recorder:
    """A request function for `vllm bench`, with what came by request id."""

    def __init__(self) -> None:
        self.streams: dict[str, list[bytes]] = {}

    async def __call__(
        self, request_func_input: RequestFuncInput, session: aiohttp.ClientSession, pbar: Any = None
    ) -> RequestFuncOutput:
        kept = _Session(session)
        if request_func_input.request_id is None:
            # A warm-up. It is the first prompt that is timed, and must not leave it in the server's prefix cache.
            body = {**(request_func_input.extra_body or {}), "cache_salt": uuid.uuid4().hex}
            request_func_input = replace(request_func_input, extra_body=body)
        # It asks the session for no more than `post`.
        output = await async_request_openai_completions(request_func_input, kept, pbar)  # type: ignore[arg-type]
        # Warm-ups have no id.
        if request_func_input.request_id is not None:
            self.streams[request_func_input.request_id] = kept.chunks
        return output


@contextlib.contextmanager
def _without_proxy(url: str) -> Iterator[None]:
    """Has requests to the host of a URL bypass proxies, which vLLM's session takes from the environment."""
    before = {name: os.environ.get(name) for name in _NO_PROXY}
    hosts = [value for value in dict.fromkeys(before.values()) if value]
    hosts.append(urlsplit(url).hostname or "")
    try:
        for name in _NO_PROXY:
            # `*` is understood only where it stands alone.
            os.environ[name] = "*" if "*" in hosts else ",".join(hosts)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(
    url: str, model: str, tokenizer: Any, prompts: Sequence[Prompt], load: Load
) -> tuple[dict[str, Any], list[Answer]]:
    """Sends all prompts to a server, not through a proxy, at times that follow from the seed.

    Args:
        url: of the server, without a path.
        model: the name under which it serves the model.
        tokenizer: vLLM counts the tokens of text with it, should a server not say how many they are.

    Returns:
        What `vllm bench serve` reports, and the answers in the order of the prompts.

    Raises:
        ServerError: a request failed; says how.
    """
    recorder = Recorder()
    # Prompts may share prefixes with each other, but not with what the server was asked before.
    salt = uuid.uuid4().hex
    body: dict[str, Any] = {"temperature": load.temperature, "return_token_ids": True, "cache_salt": salt}
    requests = [
        SampleRequest(
            prompt=prompt.token_ids,
            prompt_len=len(prompt.token_ids),
            expected_output_len=load.output_len,
            request_id=f"bench-{number}",
            request_overrides={"seed": (load.seed + number) % (1 << _SEED_BITS)},
        )
        for number, prompt in enumerate(prompts)
    ]
    # vLLM prints a table of each run; the report has its figures.
    with contextlib.redirect_stdout(io.StringIO()), _without_proxy(url):
        # vLLM draws the arrivals from the global generators, and seeds them in the main function of its command only.
        random.seed(load.seed)
        np.random.seed(load.seed % (1 << _NUMPY_SEED_BITS))
        ASYNC_REQUEST_FUNCS[_ENDPOINT_TYPE] = recorder
        try:
            result = asyncio.run(
                benchmark(
                    task_type=TaskType.GENERATION,
                    endpoint_type=_ENDPOINT_TYPE,
                    api_url=f"{url}/v1/completions",
                    base_url=url,
                    model_id=model,
                    model_name=model,
                    tokenizer=tokenizer,
                    input_requests=requests,
                    logprobs=None,
                    request_rate=math.inf if load.rate is None else load.rate,
                    burstiness=1.0,
                    disable_tqdm=False,
                    num_warmups=load.warmups,
                    profile=False,
                    selected_percentile_metrics=["ttft", "tpot", "itl", "e2el"],
                    selected_percentiles=[50.0, 99.0],
                    ignore_eos=load.ignore_eos,
                    goodput_config_dict={},
                    max_concurrency=load.batch,
                    lora_modules=None,
                    extra_headers=None,
                    extra_body=body,
                    # It repeats a request that fails, for minutes, without saying why.
                    ready_check_timeout_sec=0,
                )
            )
        finally:
            del ASYNC_REQUEST_FUNCS[_ENDPOINT_TYPE]
    for number, error in enumerate(result["errors"]):
        if error:
            raise ServerError(f"request {number + 1} of {len(prompts)} failed: {error.strip().splitlines()[-1]}")
    return result, [read_stream(recorder.streams[f"bench-{number}"]) for number in range(len(prompts))]


def read_stream(chunks: Iterable[bytes]) -> Answer:
    """An answer of the bytes of its stream.

    Raises:
        ServerError: the server says in the stream that it failed, or does not send token ids.
    """
    answer = Answer()
    handler = StreamedResponseHandler()
    for chunk in chunks:
        for message in handler.add_chunk(chunk):
            data = message.removeprefix("data: ")
            if message.startswith(":") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ServerError(f"the server failed while it generated: {_message(data)}")
            for choice in event.get("choices", ()):
                token_ids = choice.get("token_ids")
                if token_ids is None:
                    raise ServerError("the server sends no token ids: is it vLLM 0.32 or newer?")
                if token_ids:
                    answer.token_ids += token_ids
                    answer.chunks.append(len(token_ids))
            steps = (event.get("metrics") or {}).get("speculative_decoding") or {}
            # A request of which nothing was drafted has the totals only, or there are no details.
            if "per_step_drafted" in steps or steps.get("num_spec_steps") == 0:
                answer.drafted = steps.get("per_step_drafted", [])
                answer.accepted = steps.get("per_step_accepted", [])
    return answer


def _message(text: str) -> str:
    """What an error of a server says, in one line."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:500]
