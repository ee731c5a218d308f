# SPDX-License-Identifier: Apache-2.0
"""Whole engines under token budgets, thresholds, caches and schedules that are small for trees.

Every request gets plain decoding's tokens, and none waits for another's tree. tests/unit/test_scheduler.py has the same
scheduler without a model, for many more settings.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine import running, sampling_of
from tests.process import run_alone

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
SETTINGS = {"model": str(PAIR / "target"), "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
GREEDY = {"temperature": 0.0, "ignore_eos": True}
P33 = list(range(100, 133))


def prompt(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


# (step in which it comes, prompt, max_tokens)
Arrival = tuple[int, list[int], int]


def serve(settings: dict[str, Any], rounds: list[list[Arrival]]) -> dict[str, Any]:
    """Serves the requests of each round with an engine whose steps are made here.

    Returns "tokens" of every request, round by round; "waits", the most steps that a request which had begun to decode
    went without a token, while others ran; "preemptions"; "accepted" tokens of drafts.
    """
    result, _ = run_alone(_serve, settings, rounds)
    return result


def _serve(settings: dict[str, Any], rounds: list[list[Arrival]]) -> dict[str, Any]:
    from vllm import SamplingParams

    with running(settings) as llm:
        engine = llm.llm_engine
        tokens: list[list[list[int]]] = []
        longest_wait = 0
        for number, arrivals in enumerate(rounds):
            found: dict[str, list[int]] = {f"{number}-{i}": [] for i in range(len(arrivals))}
            waits: dict[str, int] = {}
            coming = {f"{number}-{i}": each for i, each in enumerate(arrivals)}
            step = 0
            while coming or engine.has_unfinished_requests():
                for name, (at, prompt_ids, max_tokens) in list(coming.items()):
                    if at <= step:
                        params = SamplingParams(**sampling_of([*GREEDY.items(), ("max_tokens", max_tokens)]))
                        engine.add_request(name, {"prompt_token_ids": prompt_ids}, params)
                        del coming[name]
                step += 1
                assert step < 2000, "requests wait for ever"
                said = {output.request_id: output for output in engine.step()}
                for name, output in said.items():
                    new = list(output.outputs[0].token_ids)
                    waits[name] = 0 if len(new) > len(found[name]) else waits.get(name, 0) + 1
                    found[name] = new
                    if output.finished:
                        del waits[name]
                for name in waits.keys() - said.keys():
                    waits[name] += 1
                longest_wait = max([longest_wait, *waits.values()])
            tokens.append(list(found.values()))
        counted = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return {
        "tokens": tokens,
        "waits": longest_wait,
        "preemptions": counted["vllm:num_preemptions"],
        "accepted": counted.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


def with_draft(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    # However poor its acceptance on prompts like these, a tree is verified.
    return {**settings, "speculative_config": {"model": str(PAIR / "draft"), "adapt_nodes": False, **options}}


def assert_like_plain_decoding(settings: dict[str, Any], rounds: list[list[Arrival]], **options: Any) -> None:
    settings = {**SETTINGS, **settings}
    plain, result = serve(settings, rounds), serve(with_draft(settings, **options), rounds)
    assert result["tokens"] == plain["tokens"]
    assert result["accepted"] > 0
    # A step in flight comes back a step later; a preempted request waits for its place in either engine.
    assert result["waits"] <= max(plain["waits"], settings.get("async_scheduling", False))
    assert result["preemptions"] <= plain["preemptions"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_cached_prompt_and_a_budget_below_a_trees_rows(is_async):
    rounds = [[(0, P33, 8)], [(0, P33, 8)]]
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "async_scheduling": is_async}
    assert_like_plain_decoding(settings, rounds)


def test_a_cached_prompt_and_a_threshold_below_a_trees_rows():
    rounds = [[(0, P33, 1)], [(0, prompt(40, 300), 32), (6, P33, 8)]]
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "long_prefill_token_threshold": 64}
    assert_like_plain_decoding(settings, rounds)


def test_requests_that_share_a_small_budget():
    rounds = [[(0, prompt(24), 32), (0, prompt(24, 200), 32)]]
    assert_like_plain_decoding({"max_num_seqs": 4, "max_num_batched_tokens": 70}, rounds)


def test_trees_preempt_nobody():
    rounds = [[(0, prompt(64, first), 40) for first in (100, 200, 300, 400)]]
    settings = {"max_num_seqs": 4, "num_gpu_blocks_override": 31, "enable_prefix_caching": False}
    assert_like_plain_decoding(settings, rounds)


@pytest.mark.parametrize("seed", range(2))
def test_random_budgets_thresholds_and_schedules(seed):
    source = random.Random(seed)
    max_num_seqs = source.randint(1, 5)
    settings = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + source.randint(8, 150),
        "long_prefill_token_threshold": source.choice([0, 16, 64]),
        "num_gpu_blocks_override": source.choice([1000, 31]),
        "async_scheduling": seed % 2 == 1,
    }
    schedule = source.choice([None, [[1, 256, 68]], [[1, 2, 24], [3, 256, 5]]])
    options = {} if schedule is None else {"num_speculative_tokens_per_batch_size": schedule}
    rounds = [
        [
            (source.randint(0, 6), prompt(source.choice([5, 33, 33, 64, 150]), source.choice([100, 600])), tokens)
            for tokens in (4, 12, 24, 24, 8, 16)
        ]
    ]
    assert_like_plain_decoding(settings, rounds, **options)
