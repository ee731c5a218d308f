# SPDX-License-Identifier: Apache-2.0
"""Sleep mode: an engine goes on after waking up as if it had not slept, and drafts as well as before.

On a CPU vLLM has no sleep mode; there its pools are simulated (tests/memory_pools.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import running
from tests.integration.test_lossless import GREEDY, PAIR, SAMPLINGS, source_code, speculative
from tests.integration.test_magicdec import magicdec
from tests.memory_pools import simulate_sleep_mode
from tests.models import untied
from tests.process import run_alone

ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}


def play(settings: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Answers the prompts, then again after sleep of each level, and again with sleep in between."""
    from vllm import SamplingParams

    pools = None if torch.cuda.is_available() else simulate_sleep_mode()
    samplings = [
        SamplingParams(**sampling, max_tokens=32, ignore_eos=True, detokenize=False)
        for sampling in (GREEDY, SAMPLINGS[0])
    ]
    tokens, accepted = [], []
    with running({"enable_sleep_mode": True, **settings}) as llm:

        def generate() -> None:
            before = counted()
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], samplings, use_tqdm=False)
            tokens.append([list(output.outputs[0].token_ids) for output in outputs])
            accepted.append(counted() - before)

        def counted() -> float:
            return sum(metric.value for metric in llm.get_metrics() if metric.name == ACCEPTED)

        generate()
        llm.sleep(level=1)
        llm.wake_up()
        generate()
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up()
        generate()

        engine = llm.llm_engine
        for name, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            engine.add_request(str(name), {"prompt_token_ids": prompt}, sampling)
        for _ in range(5):
            engine.step()
        assert engine.has_unfinished_requests()
        llm.sleep(level=1, mode="keep")
        llm.wake_up()
        finished: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            finished |= {each.request_id: list(each.outputs[0].token_ids) for each in engine.step() if each.finished}
        tokens.append([finished[str(name)] for name in range(len(prompts))])
    sizes = {} if pools is None else {tag: len(storages) for tag, storages in pools.storages.items()}
    return {"tokens": tokens, "accepted": accepted, "sizes": sizes}


def drafts(frequent_tokens: str, draft: Path) -> dict[str, dict[str, Any]]:
    # Copies are trusted more from one answer to the next.
    return {
        "a head of the draft's own": speculative(draft, [2, 4, 4], frequent_tokens=frequent_tokens, copy_length=0),
        "magicdec": magicdec(sinks=32, budget=64, copy_length=0),
    }


@pytest.mark.parametrize(
    "graphs",
    [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_an_engine_that_slept_goes_on(tmp_path, graphs):
    # Of a tied head vLLM's CPU build reloads only the embedding.
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    frequent_tokens = tmp_path / "frequent_tokens.json"
    frequent_tokens.write_text(json.dumps(list(range(2048))))
    prompts = source_code((100, 200))
    # So that no step is under way when the engine goes to sleep.
    settings = {"model": str(target), "async_scheduling": False, **(GRAPHS if graphs else {})}
    plain, _ = run_alone(play, settings, prompts)
    assert plain["tokens"] == [plain["tokens"][0]] * 4
    for name, speculation in drafts(str(frequent_tokens), draft).items():
        played, _ = run_alone(play, settings | speculation, prompts)
        assert played["tokens"] == plain["tokens"], name
        # The draft is the one that it was.
        assert played["accepted"] == [played["accepted"][0]] * 3 and played["accepted"][0] > 20, name
        if played["sizes"]:
            assert all(played["sizes"][tag] > 0 for tag in ("weights", "runtime", "kv_cache")), name
