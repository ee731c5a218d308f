# SPDX-License-Identifier: Apache-2.0
"""KV connectors: blocks that were saved elsewhere come back as plain decoding would have written them.

Each engine answers prompts, and then some of them again and goes on from its answers to others, whose blocks trees have
filled. In between the prefix cache is reset, so that every block has to come from the connector.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.engine import running
from tests.integration.test_lossless import GREEDY, PAIR, SAMPLINGS, source_code, speculative
from tests.integration.test_magicdec import magicdec
from tests.process import run_alone

LENGTHS = (64, 40, 30, 131)
SAMPLED = [GREEDY, SAMPLINGS[0], GREEDY, SAMPLINGS[4]]
HITS = "vllm:external_prefix_cache_hits"
EXTRA_CONFIGS: dict[str, dict[str, Any]] = {
    "OffloadingConnector": {"offload_prompt_only": False, "cpu_bytes_to_use": 64 << 20},
    "SimpleCPUOffloadConnector": {"cpu_bytes_to_use": 64 << 20},
    "LMCacheConnectorV1": {},
}
# Chunks of a block, of answers too.
LMCACHE = {
    "LMCACHE_CHUNK_SIZE": "32",
    "LMCACHE_LOCAL_CPU": "True",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1",
    "LMCACHE_SAVE_DECODE_CACHE": "True",
    "LMCACHE_TRACK_USAGE": "false",
}
ON_A_CPU = {"spec_module_path": "tests.host_offloading", "spec_name": "HostOffloadingSpec"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PIECEWISE = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}}


def needs(package: str) -> pytest.MarkDecorator:
    """Leaves tests out where an optional package is not installed, unless LONGSPEC_REQUIRE_PACKAGE is set, as in CI."""
    is_required = bool(os.environ.get(f"LONGSPEC_REQUIRE_{package.upper()}"))
    return pytest.mark.skipif(find_spec(package) is None and not is_required, reason=f"needs {package}")


def with_connector(name: str) -> dict[str, Any]:
    extra_config = EXTRA_CONFIGS[name] | ({} if torch.cuda.is_available() else ON_A_CPU)
    config = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra_config}
    return {"model": str(PAIR / "target"), "kv_transfer_config": config}


def play(settings: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import SamplingParams

    if settings["kv_transfer_config"]["kv_connector"] == "LMCacheConnectorV1":
        from tests import host_lmcache

        host_lmcache.install()
    with running(settings) as llm:

        def generate(each: list[list[int]], max_tokens: int) -> list[list[int]]:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in each],
                [
                    SamplingParams(**sampling, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
                    for sampling in SAMPLED[: len(each)]
                ],
                use_tqdm=False,
            )
            return [list(output.outputs[0].token_ids) for output in outputs]

        def hits() -> float:
            return sum(metric.value for metric in llm.get_metrics() if metric.name == HITS)

        first = generate(prompts, 40)
        # Blocks of requests that ended are saved in later steps.
        generate([[3, 4, 5]], 3)
        # The steps in flight come back, and with them the blocks.
        llm.llm_engine.step()
        assert llm.reset_prefix_cache() and hits() == 0
        onwards = [prompt + tokens for prompt, tokens in zip(prompts, first, strict=True)]
        second = generate(prompts[:2] + onwards[2:], 40)
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {"tokens": [first, second], "metrics": metrics}


@pytest.mark.parametrize(
    ("connector", "execution"),
    [
        ("OffloadingConnector", {}),
        pytest.param("OffloadingConnector", GRAPHS, marks=needs_gpu),
        pytest.param("SimpleCPUOffloadConnector", GRAPHS, marks=needs_gpu),
        pytest.param("LMCacheConnectorV1", PIECEWISE if torch.cuda.is_available() else {}, marks=needs("lmcache")),
        # Here it takes the root's block in the step that verifies the root.
        pytest.param("LMCacheConnectorV1", {"async_scheduling": False}, marks=needs("lmcache")),
    ],
)
def test_blocks_that_were_saved_come_back(connector, execution):
    prompts = source_code(LENGTHS)
    settings = {**with_connector(connector), "async_scheduling": True, **execution}
    plain, _ = run_alone(play, settings, prompts, environment=LMCACHE)
    first, second = plain["tokens"]
    assert second[:2] == first[:2]
    # The last block, with a token that is computed anew, may be missing.
    assert plain["metrics"][HITS] >= sum(length - 32 for length in LENGTHS) + 2 * 32
    drafts = [speculative(PAIR / "draft", [4, 8, 8])]
    if connector == "OffloadingConnector":
        # The others load beside what a target that drafts for itself may still write.
        drafts.append(magicdec(sinks=32, budget=64))
    for draft in drafts:
        drafted, _ = run_alone(play, settings | draft, prompts, environment=LMCACHE)
        assert drafted["tokens"] == plain["tokens"]
        assert drafted["metrics"][HITS] == plain["metrics"][HITS]
        steps = drafted["metrics"]["vllm:spec_decode_num_drafts"]
        assert drafted["metrics"]["vllm:spec_decode_num_accepted_tokens"] > steps > 1
