# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics, made by its own scheduler and loggers' code, for a tree: by depth, and with the names that it has."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingProm, SpecDecodingStats

from vllm_longspec import plugin
from vllm_longspec.options import LongSpecOptions, attach_options
from vllm_longspec.scheduling.adaptive import AdaptiveVerification
from vllm_longspec.scheduling.metrics import TreeDecodingStats
from vllm_longspec.scheduling.scheduler import TreeScheduler
from vllm_longspec.tree.shape import TreeShape

GRAMMAR: dict[str, Any] = {"structured_outputs": StructuredOutputsParams(json_object=True)}
# (nodes verified, tokens accepted) of three requests: a whole tree, one cut by the token budget, one all rejected.
STEPS = [(68, 5), (24, 2), (68, 0)]


def config(levels, num_speculative_tokens):
    """What the metrics read of vLLM's configuration; no levels for a draft of another kind."""
    found: Any = SimpleNamespace(num_speculative_tokens=num_speculative_tokens)
    if levels:
        attach_options(found, LongSpecOptions("glide", TreeShape(tuple(levels))))
    return found


TREE, ANOTHER_DRAFT = config([4, 16, 16, 16, 16], 68), config(None, 68)


@pytest.fixture(autouse=True)
def registered():
    plugin.register()


def request(sampling_params=None):
    return SimpleNamespace(sampling_params=sampling_params or SamplingParams())


def scheduler_of(speculative_config, requests, log_stats=True, chosen=None):
    """What the statistics read of a scheduler; vLLM's own for a draft of another kind."""
    scheduler = object.__new__(TreeScheduler if speculative_config is TREE else Scheduler)
    vars(scheduler).update(
        max_depth=5,
        chosen=chosen,
        unchecked=set(),
        log_stats=log_stats,
        num_spec_tokens=68,
        requests=requests,
    )
    return scheduler


def stats_of(speculative_config, steps, num_invalid=None, **sampling):
    requests = {"0": request(sampling_params=SamplingParams(**sampling))}
    scheduler = scheduler_of(speculative_config, requests)
    stats = None
    for verified, accepted in steps:
        stats = scheduler.make_spec_decoding_stats(
            stats,
            num_draft_tokens=verified,
            num_accepted_tokens=accepted,
            num_invalid_spec_tokens=num_invalid,
            request_id="0",
        )
    return stats


def test_a_step_is_counted_by_depth():
    stats = stats_of(TREE, STEPS)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 160, 7)
    assert stats.num_accepted_tokens_per_pos == [2, 2, 1, 1, 1]


def test_every_node_that_a_grammar_allows_counts_whatever_the_sampling():
    everything: dict[str, Any] = {"presence_penalty": 0.5, "bad_words": ["a"], "thinking_token_budget": 3, **GRAMMAR}
    assert stats_of(TREE, [(68, 1)], **everything).num_draft_tokens == 68
    # vLLM takes off those that the grammar does not allow.
    assert stats_of(TREE, [(68, 1)], {"0": 66}, **everything).num_draft_tokens == 2
    assert stats_of(TREE, [(68, 1)], {"another": 66}).num_draft_tokens == 68


def test_statistics_reach_the_frontend_of_another_process():
    sent = SchedulerStats(spec_decoding_stats=stats_of(TREE, STEPS))
    received = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(sent)).spec_decoding_stats
    assert type(received) is SpecDecodingStats
    assert vars(received) == vars(sent.spec_decoding_stats)


def test_another_draft_is_counted_as_ever():
    stats = stats_of(ANOTHER_DRAFT, STEPS)
    assert type(stats) is SpecDecodingStats
    assert len(stats.num_accepted_tokens_per_pos) == 68
    assert stats.num_draft_tokens_per_pos == [3] * 24 + [2] * 44


def test_nothing_is_counted_where_nobody_asked_for_statistics():
    """But the number of nodes follows what is accepted all the same, whatever the sampling."""
    choices = [[], [24, 8, 0], [8, 0]]
    budget = AdaptiveVerification(choices, lambda *_: 1.0, num_cached_tokens=lambda: 0, shape=TreeShape((4,) * 5))
    requests = {
        "plain": request(),
        "penalty": request(sampling_params=SamplingParams(presence_penalty=1.0)),
        "grammar": request(),
        "unchecked grammar": request(),
    }
    scheduler = scheduler_of(TREE, requests, log_stats=False, chosen=budget)
    # The tree may have been checked in a step before it had a grammar to check.
    scheduler.unchecked = {"unchecked grammar"}
    steps = [(24, 3, "plain"), (24, 2, "penalty"), (8, 1, "plain"), (5, 5, "plain"), (24, 4, "grammar")]
    steps += [(8, 0, "unchecked grammar")]
    for verified, accepted, request_id in steps:
        assert scheduler.make_spec_decoding_stats(None, verified, accepted, None, request_id) is None
    # One with a number that is not the schedule's was cut, and says nothing about any.
    assert budget.steps == {8: 1, 24: 3}
    assert budget.accepted == {8: 1, 24: 9}


@pytest.mark.parametrize(("speculative_config", "num_positions"), [(TREE, 5), (ANOTHER_DRAFT, 68)])
def test_prometheus_has_a_position_for_every_depth(speculative_config, num_positions):
    unregister_vllm_metrics()
    try:
        counters = SpecDecodingProm(speculative_config, ["model_name", "engine"], {0: ["target", "0"]})
        counters.observe(stats_of(speculative_config, STEPS))
        found = {
            metric.name: getattr(metric, "value", None) or getattr(metric, "values", None)
            for metric in get_metrics_snapshot()
            if metric.name.startswith("vllm:spec_decode")
        }
    finally:
        unregister_vllm_metrics()
    # vLLM's names, all of them and no other.
    assert found == {
        "vllm:spec_decode_num_drafts": 3,
        "vllm:spec_decode_num_draft_tokens": 160,
        "vllm:spec_decode_num_accepted_tokens": 7,
        "vllm:spec_decode_num_accepted_tokens_per_pos": [2, 2, 1, 1, 1] + [0] * (num_positions - 5),
    }
    assert not [metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:spec_decode")]
    # The configuration itself is left as it was.
    assert speculative_config.num_speculative_tokens == 68


def test_the_log_has_a_rate_for_every_depth():
    logging = SpecDecodingLogging()
    for step in STEPS:
        logging.observe(stats_of(TREE, [step]))
    lines = []
    logging.log(lambda form, *arguments: lines.append(form % arguments))
    (line,) = lines
    assert "Mean acceptance length: 3.33," in line
    assert "Accepted: 7 tokens, Drafted: 160 tokens," in line
    assert "Per-position acceptance rate: 0.667, 0.667, 0.333, 0.333, 0.333, Avg" in line


@pytest.mark.parametrize(
    ("speculative_config", "sampling", "level", "length", "verified"),
    [
        (TREE, {}, "detailed", 6, 68 + 24 + 68),
        (TREE, {"presence_penalty": 0.5}, "summary", 6, 68 + 24 + 68),
        (TREE, GRAMMAR, "summary", 6, 68 + 24 + 68),
        (ANOTHER_DRAFT, GRAMMAR, "summary", 69, 68 + 24 + 68),
        (TREE, {}, "none", None, None),
    ],
)
def test_metrics_of_a_request_end_at_the_deepest_node(speculative_config, sampling, level, length, verified):
    scheduler = scheduler_of(speculative_config, {})
    added = request(sampling_params=SamplingParams(**sampling))
    vars(added).update(request_id="0", spec_decode_metrics=None, resumable=False)
    vars(scheduler).update(spec_decode_metrics_level=level, connector=None, log_stats=False)
    scheduler._enqueue_waiting_request = lambda request: None
    scheduler.add_request(added)
    metrics = added.spec_decode_metrics
    if length is None:
        assert metrics is None
        return
    for num_rows, accepted in STEPS:
        metrics.observe(num_rows, accepted, detailed=level == "detailed")
    sent = MsgpackEncoder().encode(metrics)
    metrics = MsgpackDecoder(RequestSpecDecodeMetrics).decode(sent)
    assert type(metrics) is RequestSpecDecodeMetrics
    said = metrics.to_dict()
    assert len(said["acceptance_histogram"]) == said["num_spec_tokens"] + 1 == length
    assert said["acceptance_histogram"][:6] == [1, 0, 1, 0, 0, 1]
    assert said["mean_acceptance_length"] == pytest.approx(1 + 7 / 3)
    assert said["draft_acceptance_rate"] == pytest.approx(7 / verified)
    assert (said["num_spec_steps"], said["num_draft_tokens"]) == (3, verified)
    assert ("per_step_accepted" in said) == (level == "detailed")


def test_more_than_the_deepest_node_cannot_be_accepted():
    stats = TreeDecodingStats(num_spec_tokens=2, num_accepted_tokens_per_pos=[0, 0])
    with pytest.raises(IndexError):
        stats.observe_draft(6, 3)
