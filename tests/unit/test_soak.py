# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.soak draws for its servers and counts of them; tests/e2e/test_soak.py runs it."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import soak
from tests.process import run_alone


@pytest.mark.parametrize("clients", [1, 2, 8, 100])
def test_servers_take_what_is_drawn(clients):
    for settings in soak.draw_settings(50, clients, seed=clients):
        assert 1 <= settings.max_num_seqs <= clients
        # vLLM refuses less.
        assert settings.max_num_batched_tokens >= settings.max_num_seqs
        assert settings.long_prefill_token_threshold <= soak.MAX_MODEL_LEN
        # vLLM keeps one block for itself.
        assert settings.num_gpu_blocks_override > soak.MAX_MODEL_LEN // soak.BLOCK_SIZE
        schedule = settings.num_speculative_tokens_per_batch_size
        assert schedule is None or covers_all_batches(schedule)


def covers_all_batches(schedule):
    starts = [first for first, _, _ in schedule]
    return starts == [1, *(last + 1 for _, last, _ in schedule[:-1])] and all(nodes >= 0 for _, _, nodes in schedule)


def test_few_rounds_have_every_kind_of_setting():
    for seed in range(20):
        drawn = soak.draw_settings(5, 8, seed)
        assert {each.async_scheduling for each in drawn} == {False, True}
        assert {bool(each.long_prefill_token_threshold) for each in drawn} == {False, True}
        assert {len(each.num_speculative_tokens_per_batch_size or []) for each in drawn} == {0, 1, 3}
        assert sorted(each.method for each in drawn) == ["glide"] * 4 + ["magicdec"]
        assert {tuple(each.tree_shape) for each in drawn if each.method == "glide"} < set(map(tuple, soak.TREE_SHAPES))
        assert {each.copy_length for each in drawn} == {0, 4, 16}
        assert {each.couple_noise for each in drawn} == {False, True}
        budgets = [each.max_num_batched_tokens for each in drawn]
        assert any(each.max_num_batched_tokens == each.max_num_seqs for each in drawn)
        assert min(budgets) < soak.TREE_ROWS < max(budgets)
    assert soak.draw_settings(5, 8, 0) == soak.draw_settings(5, 8, 0) != soak.draw_settings(5, 8, 1)


def test_a_given_tree_shape_or_method_is_that_of_all_rounds():
    drawn = soak.draw_settings(10, 8, 0, [2, 2])
    assert {(each.method, *each.tree_shape) for each in drawn} == {("glide", 2, 2)}
    assert {each.cross_attention_budget for each in drawn} == set(soak.CROSS_ATTENTION_BUDGETS)
    for method in soak.METHODS:
        assert {each.method for each in soak.draw_settings(10, 8, 0, method=method)} == {method}


def test_what_magicdec_is_asked_for():
    drawn = soak.draw_settings(12, 8, 0, method="magicdec")
    assert {(each.selection, each.budget) for each in drawn} == set(soak.PARTS)
    for settings in drawn:
        name, text = settings.draft_options()
        options = json.loads(text)
        assert name == "--speculative-config" and options["method"] == "magicdec"
        assert options["gamma"] in soak.GAMMAS and "tree_shape" not in options
        assert "cross_attention_budget" not in options and options["sinks"] in soak.SINKS
        for _, _, num_nodes in options.get("num_speculative_tokens_per_batch_size", []):
            assert num_nodes <= max(options["gamma"], soak.TREE_ROWS - 1)


class Stuck:
    """A server that begins to answer its second request and no more."""

    process = SimpleNamespace(pid=0)

    def __init__(self):
        self.num_requests = 0

    def stream(self, body, timeout):
        self.num_requests += 1
        choice = {"token_ids": [1], "text": "a", "logprobs": None, "finish_reason": None}
        yield {"choices": [choice]}
        if self.num_requests == 2:
            raise TimeoutError
        yield {"choices": [{**choice, "finish_reason": "length"}]}

    def metric(self, name):
        return 0.0


def test_a_request_that_never_finishes_is_a_failure_and_ends_the_round():
    server: Any = Stuck()
    outcomes, _ = soak.run(server, [soak.Job({}, None)] * 4, clients=1)
    assert server.num_requests == 2
    assert [outcome.error is None for outcome in outcomes] == [True, False, False, False]
    assert outcomes[0].finish_reason == "length" and outcomes[0].token_ids == [1, 1]
    assert outcomes[1].error is not None and "after 1 tokens" in outcomes[1].error


def test_rounds_are_summed_up():
    one = {
        **dict.fromkeys(("seconds", "preemptions", "leaked_requests", "leaked_blocks", "accepted_tokens"), 2),
        **dict.fromkeys(("requests", "finished", "hung_up", "failures", "mismatches"), 1),
        "memory_growth": 0.1,
        "drafts": 3,
    }
    other = {**one, "memory_growth": 0.2, "mismatches": 4}
    total = soak.summarise([one, other])
    assert total["memory_growth"] == 0.2 and total["mismatches"] == 5 and total["leaked_blocks"] == 4
    assert total["drafts"] == 6
    assert total["acceptance_length"] == 1.67


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs do what they are asked for")
def test_a_cpu_schedules_as_it_is_asked():
    assert run_alone(_scheduler_classes)[0] == ["TreeScheduler", "AsyncTreeScheduler"]


def _scheduler_classes():
    from vllm.engine.arg_utils import EngineArgs

    import benchmarks.cpu_async  # noqa: F401
    from benchmarks import ROOT
    from benchmarks.server import DRAFT, TARGET

    names = []
    for async_scheduling in (False, True):
        arguments = EngineArgs(
            model=str(ROOT / TARGET),
            speculative_config={"model": str(ROOT / DRAFT)},
            async_scheduling=async_scheduling,
        )
        names.append(arguments.create_engine_config().scheduler_config.get_scheduler_cls().__name__)
    return names
