# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --data-parallel-size 2`: two engines and two API servers behind one port."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.server import DRAFT, EXACT, Server, serve
from benchmarks.soak import COMMAND
from tests.engine import generate, request
from tests.integration.test_lossless import PAIR, source_code

MAX_TOKENS = 16


def complete(server: Server, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    return [
        token for chunk in server.stream(body) for choice in chunk["choices"] for token in choice["token_ids"] or []
    ]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a second GPU, or none")
def test_two_engines():
    prompts = source_code((40, 100, 60, 80))
    options = ["--data-parallel-size", "2", "--speculative-model", DRAFT, "--speculative-tree-shape", "2", "4", "4"]
    # As it is on a GPU.
    options += ["--speculative-config", '{"adapt_nodes": true}']
    with (
        serve("data_parallel", *EXACT, *options, command=COMMAND) as server,
        ThreadPoolExecutor(len(prompts)) as clients,
    ):
        tokens = list(clients.map(lambda prompt: complete(server, prompt), prompts))
        with server.request("GET", "/metrics") as response:
            metrics = response.read().decode()
    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    plain = generate(PAIR / "target", [[request(prompt, **greedy) for prompt in prompts]])
    assert tokens == plain.tokens[0]
    # Both engines served, and drafted well.
    drafts = re.findall(r'^vllm:spec_decode_num_drafts_total\{engine="(\d)".*\} (\S+)$', metrics, re.MULTILINE)
    assert {engine for engine, count in drafts if float(count) > 1} == {"0", "1"}
    assert sum(float(count) for _, count in drafts) < len(prompts) * MAX_TOKENS / 2
