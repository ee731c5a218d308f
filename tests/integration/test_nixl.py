# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill through NIXL: one engine computes prompts, another fetches their blocks and decodes.

Both have the draft, and the one that decodes makes of the transferred cache what plain decoding alone makes of its own.
"""

import os
import random
import socket
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch

from tests.engine import running
from tests.integration.test_kv_connectors import HITS, LENGTHS, SAMPLED, needs
from tests.integration.test_lossless import PAIR, generate, request, source_code, speculative
from tests.process import run_alone

NUM_TOKENS = 40
# An engine's listener is for the engines that fetch from it, so each needs a port of its own.
PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"

pytestmark = needs("nixl")


def free_ports(count: int) -> list[int]:
    """Free ones below those that Linux gives to whoever asks for any: an engine binds its own only seconds later."""
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 1000):
        with socket.socket() as each, suppress(OSError):
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"of 1,000 ports only {len(found)} are free")


def transfer(settings: dict[str, Any], prompts: list[list[int]], ports: list[int]) -> dict[str, Any]:
    from vllm import SamplingParams

    with ExitStack() as stack:
        engines = []
        for port in ports:
            os.environ[PORT] = str(port)
            engines.append(stack.enter_context(running(settings)))
        prefill, decode = engines

        def answer(llm: Any, max_tokens: int, params: list[dict[str, Any]]) -> list[Any]:
            samplings = [
                SamplingParams(
                    **sampling,
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"kv_transfer_params": each},
                )
                for sampling, each in zip(SAMPLED, params, strict=True)
            ]
            return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], samplings, use_tqdm=False)

        computed = answer(prefill, 1, [{"do_remote_decode": True, "do_remote_prefill": False} for _ in prompts])
        decoded = answer(decode, NUM_TOKENS, [output.kv_transfer_params for output in computed])
        metrics = {metric.name: metric.value for metric in decode.get_metrics() if hasattr(metric, "value")}
    return {"tokens": [list(output.outputs[0].token_ids) for output in decoded], "metrics": metrics}


@pytest.mark.parametrize("connector", ["NixlPullConnector", "NixlPushConnector"])
def test_a_prompt_that_another_engine_computed(connector):
    prompts = source_code(LENGTHS)
    plain = generate(
        PAIR / "target",
        [[request(prompt, **each, max_tokens=NUM_TOKENS) for prompt, each in zip(prompts, SAMPLED, strict=True)]],
    )
    settings = {
        "model": str(PAIR / "target"),
        "async_scheduling": True,
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_role": "kv_both",
            "kv_buffer_device": "cuda" if torch.cuda.is_available() else "cpu",
        },
        **speculative(PAIR / "draft", [4, 8, 8]),
    }
    # An engine that runs in its caller's process shares what it tears down with the other.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    found, _ = run_alone(transfer, settings, prompts, free_ports(2), environment=environment)
    assert found["tokens"] == plain.tokens[0]
    # Both engines count in one place, and only prompts are fetched.
    assert found["metrics"][HITS] == sum(LENGTHS)
    assert found["metrics"]["vllm:nixl_num_failed_transfers"] == 0
    steps = found["metrics"]["vllm:spec_decode_num_drafts"]
    assert found["metrics"]["vllm:spec_decode_num_accepted_tokens"] > steps > 1
