# SPDX-License-Identifier: Apache-2.0
"""Every CUDA-graph mode, with torch.compile and asynchronous scheduling: the draft emits what plain decoding emits.

Only a GPU has such graphs; `benchmarks/check_gpu.py` runs these tests there.
"""

import json
from collections import Counter

import pytest
import torch

from tests.engine import generate, request, run_batches, running
from tests.integration.test_lossless import DEFAULT_SHAPE, LENGTHS, PAIR, assert_lossless, source_code, speculative
from tests.integration.test_magicdec import magicdec
from tests.models import write_draft
from tests.process import run_alone
from vllm_longspec.scheduling.step_times import StepTimes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no CUDA graphs without a GPU")

WAYS = [{"temperature": 0.0}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "seed": 2, "top_k": 20}]
# Requests end one after the other, so that graphs of several sizes run; the second batch mixes prompts with trees.
REQUESTS = [
    [
        request(prompt, **WAYS[i % 3], max_tokens=limit - 6 * i, ignore_eos=True)
        for i, prompt in enumerate(source_code(LENGTHS))
    ]
    for limit in (64, 40)
]


def settings_of(mode: str) -> dict:
    return {"enforce_eager": False, "compilation_config": {"cudagraph_mode": mode}, "async_scheduling": True}


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_graph_mode(mode):
    plain = generate(PAIR / "target", REQUESTS, **settings_of(mode))
    result = generate(PAIR / "target", REQUESTS, **settings_of(mode), **speculative(PAIR / "draft", DEFAULT_SHAPE))
    assert_lossless(plain, result)
    assert result.acceptance_length > 2
    # Each step of drafting is a step of the target, in the draft's graph.
    drafted_by_itself = generate(PAIR / "target", REQUESTS, **settings_of(mode), **magicdec(sinks=32, budget=64))
    assert_lossless(plain, drafted_by_itself)
    assert drafted_by_itself.acceptance_length > 2


def test_a_draft_that_sees_a_part_of_the_cache():
    """Its table is written in the draft's graph."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    result = generate(
        PAIR / "target", REQUESTS, **mode, **speculative(PAIR / "draft", DEFAULT_SHAPE, cross_attention_budget=64)
    )
    assert_lossless(plain, result)
    assert result.acceptance_length > 2


def test_tokens_that_are_learned(monkeypatch):
    """The draft's graphs read rows that are replaced between two replays, and nothing waits for the GPU."""
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    drafting = speculative(PAIR / "draft", DEFAULT_SHAPE, frequent_tokens="auto:512", copy_length=0)
    result = generate(PAIR / "target", REQUESTS, **mode, **drafting)
    assert_lossless(plain, result)
    # The 512 tokens that it begins with would accept next to nothing.
    assert result.acceptance_length > 1.8


def test_blocks_by_scores():
    """Observers run in the graphs of the target, and every layer's table is made in that of the draft."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    drafting = magicdec(sinks=32, budget=192, selection="scores")
    assert_lossless(plain, generate(PAIR / "target", REQUESTS, **mode, **drafting))


def test_nodes_follow_what_is_accepted(tmp_path):
    """A draft that nobody follows: from one step to the next batches of the same size have other numbers of nodes."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    draft = write_draft(tmp_path / "draft", PAIR / "target")
    result = generate(PAIR / "target", REQUESTS, **mode, **speculative(draft, DEFAULT_SHAPE, adapt_nodes=True))
    assert_lossless(plain, result)
    # Fewer than half of the tokens came from steps with drafts.
    drafted = result.num_drafts + result.num_accepted_tokens
    assert drafted < sum(len(tokens) for batch in plain.tokens for tokens in batch) / 2


@pytest.mark.parametrize(
    "drafting", [speculative(PAIR / "draft", DEFAULT_SHAPE), magicdec()], ids=["glide", "magicdec"]
)
def test_steps_are_replayed(drafting):
    """Of the target and of the draft, whatever the size of the batch; what no graph was found for would run eagerly."""
    options = {**settings_of("FULL_AND_PIECEWISE"), **drafting}
    replayed, _ = run_alone(_count_replays, {"model": str(PAIR / "target"), **options})
    decoding = replayed.pop("steps")
    assert decoding > 10
    # A step or two have a prompt beside the others' trees, and the first ones come before there is a draft.
    assert set(replayed) == {"ModelCudaGraphManager", "DraftGraphs"}
    assert all(count >= decoding - 5 for count in replayed.values()), replayed


def test_steps_are_timed_once(tmp_path):
    """At the first start; the next one has the same times. What is chosen by them is what plain decoding emits."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    drafting = {"speculative_config": {"model": str(PAIR / "draft")}}
    settings = {"model": str(PAIR / "target"), **mode, **drafting}
    environment = {"VLLM_CACHE_ROOT": str(tmp_path)}
    first, log = run_alone(run_batches, settings, REQUESTS, environment=environment)
    assert "Timing the steps took" in log and "plain decoding" in log and "Nodes by batch size" in log
    (file,) = (tmp_path / "longspec").iterdir()
    written = file.read_text()
    second, log = run_alone(run_batches, settings, REQUESTS, environment=environment)
    assert "of an earlier start" in log and "Timing the steps took" not in log and file.read_text() == written
    assert first["tokens"] == second["tokens"] == plain.tokens
    times = StepTimes.from_json(json.dumps(json.loads(written)["times"]))
    assert times.device == torch.cuda.get_device_name()
    # Whatever the GPU: graphs take time, and a larger batch is not much faster.
    for table in (times.verify, times.draft):
        for points in table.values():
            assert all(time > 0 for _, time in points)
            assert points[-1][1] > 0.5 * points[0][1]


def test_batches_run_in_much_larger_graphs(tmp_path):
    """Each in the largest that was timed, whatever its clock said: the rest is padding, whose rows nothing writes."""
    mode = settings_of("FULL_AND_PIECEWISE")
    plain = generate(PAIR / "target", REQUESTS, **mode)
    settings = {"model": str(PAIR / "target"), **mode, "speculative_config": {"model": str(PAIR / "draft")}}
    found, _ = run_alone(_run_in_largest_graphs, settings, environment={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert found["tokens"] == plain.tokens
    graphs = set(map(tuple, found["graphs"]))
    assert graphs and graphs <= set(map(tuple, found["largest"])), found
    # With room for more requests than there are.
    assert max(num_reqs for _, num_reqs in graphs) > len(REQUESTS[0]), graphs


def _run_in_largest_graphs(settings: dict) -> dict:
    """Tokens; rows of a request and requests of the graphs in which the batches ran, and of the largest graphs."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from vllm_longspec.runner import timing

    run_fullgraph, run_in_larger_graphs = ModelCudaGraphManager.run_fullgraph, timing.run_in_larger_graphs
    replayed: list[list[int | None]] = []
    largest_graphs: list[list[int]] = []

    def largest(self, number, points, of_graph):
        sizes = {self._num_reqs(size, number) for size in range(1, points[-1][0] + 1)}
        return {size: max(of_graph) for size in sizes if size < max(of_graph)}

    def recording(self, desc):
        replayed.append([desc.uniform_token_count, desc.num_reqs])
        return run_fullgraph(self, desc)

    def after_timing(manager, larger):
        run_in_larger_graphs(manager, larger)
        largest_graphs[:] = [[1 + number, other] for number, pairs in larger.items() for _, other in pairs]
        replayed.clear()

    timing.StepTimer._faster_graphs = largest  # type: ignore[method-assign]
    timing.run_in_larger_graphs = after_timing
    ModelCudaGraphManager.run_fullgraph = recording  # type: ignore[method-assign]
    tokens = run_batches(settings, REQUESTS)["tokens"]
    return {"tokens": tokens, "graphs": replayed, "largest": largest_graphs}


def _count_replays(settings: dict) -> dict[str, int]:
    """Full graphs that were replayed, by the manager that has them, and steps of three requests that decode."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    replayed: Counter[str] = Counter()
    run_fullgraph = CudaGraphManager.run_fullgraph

    def counting(self, desc):
        replayed[type(self).__name__] += 1
        return run_fullgraph(self, desc)

    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    with running(settings) as llm:
        CudaGraphManager.run_fullgraph = counting  # type: ignore[method-assign]
        engine = llm.llm_engine
        # Three requests: a size of the batch between two that are captured.
        for number, prompt in enumerate(source_code((100, 120, 140))):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            replayed["steps"] += bool(engine.step())
    return dict(replayed)


@pytest.mark.parametrize(
    "drafting",
    [speculative(PAIR / "draft", DEFAULT_SHAPE), magicdec(), magicdec(sinks=32, budget=192, selection="scores")],
    ids=["glide", "magicdec", "scores"],
)
def test_nothing_waits_for_the_gpu(monkeypatch, drafting):
    """vLLM raises where a step makes the host wait for the GPU."""
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    # Another batch than in the tests above: its result must not be answered from memory.
    requests = [
        [request(prompt, temperature=0.0, max_tokens=32, ignore_eos=True) for prompt in source_code((100, 300))]
    ]
    result = generate(PAIR / "target", requests, **settings_of("FULL_AND_PIECEWISE"), **drafting)
    assert result.acceptance_length > 2
