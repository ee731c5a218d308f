# SPDX-License-Identifier: Apache-2.0
"""The scheduler of trees, without a model: vLLM's own scheduler with random requests, budgets and acceptance.

Hypothesis draws the same examples in every run. Whole engines with the same settings are in
tests/integration/test_scheduling.py.
"""

import copy
import functools
import json
import pickle
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.config import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from tests.unit.test_grammar import Words, pack
from vllm_longspec import plugin
from vllm_longspec.compat.versions import IS_0_32
from vllm_longspec.options import options_of
from vllm_longspec.scheduling.grammar import ALL_ALLOWED
from vllm_longspec.scheduling.schedule import MOST_ROWS, default_schedule
from vllm_longspec.scheduling.scheduler import AsyncTreeScheduler, TreeScheduler, most_nodes
from vllm_longspec.scheduling.step_times import StepTimes, attach_times

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 512
NUM_NODES = 68


GLIDE = f'{{"model": "{PAIR / "draft"}"}}'
MAGICDEC = '{"method": "magicdec", "gamma": 6}'
# Of whatever number of nodes; others cost what the constants say.
TIMES = StepTimes("GPU", {0: [(1, 5.0)], 7: [(1, 5.2)]}, {7: [(1, 1.0)]}, {0: [(1, 1e-4)], 7: [(1, 1e-4)]})


@functools.cache
def engine_config(speculative_config: str) -> Any:
    plugin.register()
    return EngineArgs(
        model=str(PAIR / "target"),
        speculative_config=json.loads(speculative_config),
        dtype="float32",
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
    ).create_engine_config()


def make_scheduler(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    long_prefill_token_threshold: int = 0,
    num_blocks: int = 1000,
    is_async: bool = False,
    schedule: list[tuple[int, int, int]] | None = None,
    speculative_config: str = GLIDE,
    largest_graph: int | None = None,
    quantization: str | None = None,
) -> Any:
    config = copy.deepcopy(engine_config(speculative_config))
    config.model_config.quantization = quantization
    if largest_graph is not None:
        config.compilation_config.max_cudagraph_capture_size = largest_graph
        attach_times(config.speculative_config, TIMES)
    scheduler_config = config.scheduler_config
    scheduler_config.max_num_seqs = max_num_seqs
    scheduler_config.max_num_batched_tokens = max_num_batched_tokens
    scheduler_config.max_num_scheduled_tokens = max_num_batched_tokens
    scheduler_config.long_prefill_token_threshold = long_prefill_token_threshold
    scheduler_config.async_scheduling = is_async
    config.cache_config.num_gpu_blocks = num_blocks
    config.speculative_config.num_speculative_tokens_per_batch_size = schedule
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    init_none_hash(sha256)
    cls = AsyncTreeScheduler if is_async else TreeScheduler
    return cls(config, kv_cache_config, StructuredOutputManager(config), block_size=BLOCK_SIZE, log_stats=True)


@pytest.mark.parametrize(("given", "numbers"), [(GLIDE, [63, 63, 31]), (MAGICDEC, [0, 0, 0])])
def test_a_quantised_target_whose_steps_are_not_timed(monkeypatch, given, numbers):
    """No cost is known: of a draft as many nodes as fit few rows, and none where only the cost says when to draft."""
    monkeypatch.setattr("vllm_longspec.scheduling.scheduler.cost_of_steps", lambda config: None)
    given = json.dumps(json.loads(given) | {"adaptive_verification": True})
    lookup = make_scheduler(max_num_seqs=3, speculative_config=given).dynamic_sd_lookup
    assert lookup[1:] == numbers


def make_request(name: str, num_prompt_tokens: int, max_tokens: int, first_token: int = 0, **options: Any) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(first_token, first_token + num_prompt_tokens)),
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        **options,
    )


@dataclass
class Step:
    output: SchedulerOutput
    # Of the requests that were running before: the tokens that each could compute, without nodes.
    tokens_left: dict[str, int]
    # Blocks that plain decoding of these requests would need, and those that were free.
    num_blocks_needed: int
    num_free_blocks: int
    # Requests that have all tokens they may have, once the steps in flight come back.
    done: set[str]
    # Of the scheduled requests: tokens computed with this step, and blocks.
    computed: dict[str, int]
    held: dict[str, int]


@dataclass
class Run:
    """An engine around a scheduler whose model accepts nodes at random."""

    scheduler: Any
    seed: int = 0
    steps: list[Step] = field(default_factory=list)
    num_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.in_flight: deque[tuple[SchedulerOutput, dict[str, bool]]] = deque()
        self.is_async = isinstance(self.scheduler, AsyncTreeScheduler)

    def step(self) -> None:
        scheduler = self.scheduler
        tokens_left, num_blocks_needed, done = {}, 0, set()
        for request in scheduler.running:
            left = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            tokens_left[request.request_id] = left
            held = len(scheduler.kv_cache_manager.get_blocks(request.request_id).blocks[0])
            num_blocks_needed += max(0, -(-(request.num_computed_tokens + left) // BLOCK_SIZE) - held)
            # As in vLLM's `schedule`: nothing more can come of the request, whatever the steps in flight accept.
            last = request.num_prompt_tokens + request.max_tokens
            if (
                request.num_output_placeholders
                and request.num_computed_tokens + 2 - request.num_output_placeholders >= last
            ):
                done.add(request.request_id)
            if request.num_computed_tokens + 1 >= MAX_MODEL_LEN:
                done.add(request.request_id)
        num_free_blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        output = scheduler.schedule()
        computed = {name: scheduler.requests[name].num_computed_tokens for name in output.num_scheduled_tokens}
        blocks = {name: len(scheduler.kv_cache_manager.get_blocks(name).blocks[0]) for name in computed}
        self.steps.append(Step(output, tokens_left, num_blocks_needed, num_free_blocks, done, computed, blocks))
        samples = {
            name: scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens
            for name in output.num_scheduled_tokens
        }
        self.in_flight.append((output, samples))
        if not self.is_async or len(self.in_flight) == 2:
            self._finish_a_step()

    def _finish_a_step(self) -> None:
        output, samples = self.in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            num_nodes = len(output.scheduled_spec_decode_tokens.get(name, ()))
            accepted = self.random.randint(0, min(5, num_nodes))
            sampled.append([7] * (1 + accepted) if samples[name] else [])
        runner_output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        for outputs in self.scheduler.update_from_output(output, runner_output).values():
            for each in outputs.outputs:
                self.num_tokens[each.request_id] = self.num_tokens.get(each.request_id, 0) + len(each.new_token_ids)
        if not self.is_async:
            drafts = [list(range(output.num_spec_tokens_to_schedule)) for _ in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def finish(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("requests wait for ever")


def assert_nobody_is_held_back(run: Run) -> None:
    for step in run.steps:
        scheduled = step.output.num_scheduled_tokens
        assert sum(scheduled.values()) <= run.scheduler.scheduler_config.max_num_batched_tokens
        preempted = step.output.preempted_req_ids or set()
        if step.num_blocks_needed <= step.num_free_blocks:
            assert not preempted
        for name, left in step.tokens_left.items():
            if name not in preempted and name not in step.done and left > 0:
                assert scheduled.get(name, 0) > 0, f"{name} went a step without a token"


schedules = st.sampled_from(
    [None, [(1, 256, NUM_NODES)], [(1, 1, 31), (2, 4, 7), (5, 256, 0)], [(1, 3, 24), (4, 256, 3)]]
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    max_num_seqs=st.integers(1, 8),
    more_tokens=st.integers(0, 300),
    threshold=st.sampled_from([0, 0, 1, 16, 64]),
    num_blocks=st.sampled_from([1000, 60, 35]),
    schedule=schedules,
    is_async=st.booleans(),
    requests=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60), st.integers(0, 6)), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
# The reports: a prompt that is cached but for one token, with a budget below a tree's rows; two requests in one budget.
@example(4, 60, 0, 1000, None, False, [(33, 8, 0), (33, 8, 6)], 0)
@example(4, 508, 64, 1000, None, False, [(33, 1, 0), (40, 60, 0), (33, 8, 3)], 0)
@example(4, 66, 0, 1000, None, False, [(24, 32, 0), (24, 32, 0)], 0)
@example(4, 66, 0, 1000, [(1, 256, NUM_NODES)], True, [(24, 32, 0), (24, 32, 0)], 0)
@example(8, 248, 0, 1000, None, False, [(24, 32, 0)] * 6, 0)
@example(4, 508, 0, 31, None, False, [(64, 64, 0)] * 4, 0)
# A long prompt that is served before requests with trees.
@example(4, 66, 64, 1000, None, False, [(300, 8, 0), (3, 40, 0), (3, 40, 0), (3, 40, 0)], 0)
@example(4, 66, 64, 1000, None, True, [(300, 8, 0), (3, 40, 0), (3, 40, 0), (3, 40, 0)], 0)
def test_no_request_is_held_back_by_a_tree(
    max_num_seqs, more_tokens, threshold, num_blocks, schedule, is_async, requests, seed
):
    scheduler = make_scheduler(
        max_num_seqs=max_num_seqs,
        # vLLM asks for a token for each request.
        max_num_batched_tokens=max_num_seqs + more_tokens,
        long_prefill_token_threshold=threshold,
        num_blocks=num_blocks,
        is_async=is_async,
        schedule=schedule,
    )
    run = Run(scheduler, seed)
    for number, (length, max_tokens, steps_before) in enumerate(requests):
        for _ in range(steps_before):
            run.step()
        # Prompts with the same beginning: some are found in the cache but for their last token.
        scheduler.add_request(make_request(str(number), length, max_tokens))
    run.finish()
    assert run.num_tokens == {str(number): max_tokens for number, (_, max_tokens, _) in enumerate(requests)}
    assert_nobody_is_held_back(run)


def num_nodes_by_step(run: Run) -> list[list[int]]:
    return [
        [len(step.output.scheduled_spec_decode_tokens.get(name, ())) for name in step.output.num_scheduled_tokens]
        for step in run.steps
    ]


def run_decoding(num_requests: int, **options: Any) -> Run:
    run = Run(make_scheduler(**options))
    for number in range(num_requests):
        run.scheduler.add_request(make_request(str(number), 24, 32, first_token=100 * number))
    run.step()
    assert all(run.scheduler.requests[str(number)].num_computed_tokens == 24 for number in range(num_requests))
    run.step()
    return run


@pytest.mark.parametrize("is_async", [False, True])
def test_a_budget_is_shared_evenly(is_async):
    """Of 70 rows two requests have 35 each, a root and 34 nodes; of 256 six have 42."""
    run = run_decoding(2, max_num_batched_tokens=70, is_async=is_async)
    assert num_nodes_by_step(run)[1] == [34, 34]
    run = run_decoding(6, max_num_batched_tokens=256, is_async=is_async)
    assert num_nodes_by_step(run)[1] == [41] * 6
    # Where there is room for all of them, none is cut.
    run = run_decoding(6, max_num_batched_tokens=6 * (1 + NUM_NODES), is_async=is_async)
    assert num_nodes_by_step(run)[1] == [NUM_NODES] * 6


def test_prompts_come_before_trees():
    run = run_decoding(2, max_num_batched_tokens=130)
    # Of 128 rows besides the roots a prompt gets all that it can use.
    run.scheduler.add_request(make_request("short", 80, 8, first_token=1000))
    run.step()
    assert run.steps[-1].output.num_scheduled_tokens == {"0": 25, "1": 25, "short": 80}
    # A long one leaves trees a quarter of them.
    run.scheduler.add_request(make_request("long", 400, 8, first_token=2000))
    run.step()
    assert run.steps[-1].output.num_scheduled_tokens == {"0": 11, "1": 11, "short": 11, "long": 97}


def test_a_session_with_new_input_is_not_held_back():
    """It waits in a queue of its own, with the blocks of what it has computed."""
    run = run_decoding(2, max_num_batched_tokens=70, max_num_seqs=4)
    run.scheduler.add_request(make_request("session", 20, 1, first_token=1000, resumable=True))
    for _ in range(4):
        run.step()
    assert run.scheduler.num_waiting_for_streaming_input == 1
    # Nothing can be scheduled of a session that waits for its client.
    assert num_nodes_by_step(run)[-1] == [34, 34]
    run.scheduler.add_request(make_request("session", 30, 1, first_token=2000, resumable=True))
    run.step()
    # One token of its last turn, which was not computed, and the new ones.
    assert run.steps[-1].output.num_scheduled_tokens == {"0": 20, "1": 20, "session": 30}


def test_requests_that_cannot_be_admitted_want_no_rows():
    run = run_decoding(2, max_num_batched_tokens=70, max_num_seqs=2)
    run.scheduler.add_request(make_request("waits", 200, 8, first_token=1000))
    run.step()
    assert run.steps[-1].output.num_scheduled_tokens == {"0": 35, "1": 35}


def test_a_tree_preempts_nobody():
    """The last free blocks go to nodes as far as they reach."""
    run = run_decoding(2, num_blocks=1 + 2 * 4)
    # Two blocks hold a prompt of 24 and its root, so each tree has the rest of its second and two more.
    assert num_nodes_by_step(run)[1] == [4 * BLOCK_SIZE - 25] * 2
    run.finish()
    assert run.scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_request_holds_no_more_blocks_than_its_rows_need(is_async):
    """Those of plain decoding, and of the rows in flight: nothing is reserved for a draft, which has no cache."""
    run = run_decoding(2, is_async=is_async)
    scheduler = run.scheduler
    most: dict[str, int] = {}
    while scheduler.has_unfinished_requests():
        run.step()
        for name, computed in run.steps[-1].computed.items():
            # vLLM counts the rows in flight as computed until they come back. It keeps blocks that were once needed.
            most[name] = max(most.get(name, 0), computed)
            assert run.steps[-1].held[name] <= -(-most[name] // BLOCK_SIZE)
    assert scheduler.num_lookahead_tokens == 0
    assert scheduler.vllm_config.speculative_config.max_num_new_slots_for_drafting == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_slots_are_there_for_what_the_next_draft_writes(is_async):
    """Step i of a draft writes i tokens after the root, which is as far as all rows of this step may be accepted."""
    run = run_decoding(2, is_async=is_async, speculative_config=MAGICDEC)
    assert run.scheduler.num_lookahead_tokens == 6
    while run.scheduler.has_unfinished_requests():
        for name, computed in run.steps[-1].computed.items():
            assert run.steps[-1].held[name] * BLOCK_SIZE >= computed + 6
        run.step()


def test_nodes_leave_the_slots_of_the_next_draft():
    """Two blocks hold a prompt of 24, its root and what a draft of six tokens writes: one slot is left for a node."""
    run = run_decoding(2, num_blocks=1 + 2 * 2, speculative_config=MAGICDEC)
    assert num_nodes_by_step(run)[1] == [1, 1]
    assert len(run.scheduler.running) == 2


def test_a_cached_prompt_is_not_padded():
    """One token is left of the second prompt; vLLM would give it a list of draft tokens that nobody has drawn."""
    run = Run(make_scheduler())
    run.scheduler.add_request(make_request("first", 33, 4))
    run.finish()
    run.scheduler.add_request(make_request("second", 33, 4))
    run.step()
    assert run.steps[-1].output.num_scheduled_tokens == {"second": 1}
    assert run.steps[-1].output.scheduled_spec_decode_tokens == {}


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 6, 100])
def test_most_nodes(limit):
    assert most_nodes(6, lambda nodes: nodes <= limit) == min(limit, 6)
    assert most_nodes(1, lambda nodes: nodes <= limit) == min(limit, 1)


def test_other_drafts_keep_what_they_reserve():
    from vllm.config import SpeculativeConfig, VllmConfig

    plugin.register()
    other = SimpleNamespace(draft_model_config=None, num_speculative_tokens=3, parallel_drafting=False)
    other.use_dflash = other.use_dspark = other.use_eagle = lambda: False
    other.uses_draft_model = lambda: True
    assert vars(SpeculativeConfig)["max_num_new_slots_for_drafting"].fget(other) == 1
    config = SimpleNamespace(speculative_config=other, num_speculative_tokens=3)
    assert vars(VllmConfig)["num_lookahead_tokens"].fget(config) == 3


def test_start_up_does_not_advise_to_reserve_more(monkeypatch):
    """vLLM's advice is for drafts that take part of the token budget."""
    config = copy.deepcopy(engine_config(GLIDE))
    said: list[str] = []
    monkeypatch.setattr("vllm.config.vllm.logger.warning_once", lambda message, *_: said.append(message))
    config.scheduler_config.max_num_scheduled_tokens = None
    config._set_max_num_scheduled_tokens()
    assert config.scheduler_config.max_num_scheduled_tokens == config.scheduler_config.max_num_batched_tokens
    assert said == []
    config.speculative_config.longspec = None
    config._set_max_num_scheduled_tokens()
    assert len(said) == 1


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: replace(config, scheduler_config=config.scheduler_config),
        lambda config: config.with_hf_config(config.model_config.hf_config),
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "with_hf_config"],
)
def test_copies_of_a_configuration_have_the_options(copied):
    config = engine_config(GLIDE)
    assert options_of(copied(config).speculative_config) == options_of(config.speculative_config) is not None


def add_structured_request(scheduler: Any, name: str, words: list[list[int]], **options: Any) -> Words:
    """A request whose grammar allows one of a few sequences of tokens, and is compiled."""
    request = make_request(name, 24, 32, **options)
    request.structured_output_request = StructuredOutputRequest(StructuredOutputsParams(json_object=True))
    request.structured_output_request.grammar = grammar = Words(words)
    scheduler.add_request(request)
    # Steps take no time here, which would leave none for masks.
    scheduler.grammars.budget = None
    scheduler.structured_output_manager.backend = SimpleNamespace(
        allocate_token_bitmask=lambda num_rows: torch.zeros(num_rows, 2, dtype=torch.int32)
    )
    return grammar


def answer(scheduler: Any, output: SchedulerOutput, sampled: dict[str, list[int]]) -> Any:
    names = list(output.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    runner_output = ModelRunnerOutput(names, places, [sampled[name] for name in names])
    (outputs,) = scheduler.update_from_output(output, runner_output).values()
    return outputs.scheduler_stats.spec_decoding_stats


def masks_of(scheduler: Any, masks: Any, *num_rows: int) -> list[list[list[int]]]:
    """Of each request the masks of its root and its nodes. From vLLM 0.33 on it has as many rows as the others."""
    stride = scheduler.grammars.mask_stride
    assert (stride is None) == IS_0_32
    found, first = [], 0
    for rows in num_rows:
        found.append(masks.grammar_bitmask[first : first + rows].tolist())
        first += stride or rows
    assert len(masks.grammar_bitmask) == first
    return found


# Of a grammar of 2 3 4 and 2 6: two nodes are forbidden, and one below a forbidden one.
NODES = [(2, 0), (3, 1), (5, 0), (6, 1), (4, 2), (7, 3), (9, 4)]
PACKED = pack(NODES)
FREE = [ALL_ALLOWED] * 2


@pytest.mark.parametrize("is_async", [False, True])
def test_grammars_are_walked_down_the_trees_that_are_verified(is_async):
    """As the engine calls the scheduler. The free request's draft is as long, and needs no masks."""
    scheduler = make_scheduler(is_async=is_async, schedule=[(1, 256, len(NODES))])
    grammar = add_structured_request(scheduler, "grammar", [[1, 2, 3, 4, 8], [1, 2, 6, 8]])
    scheduler.add_request(make_request("free", 24, 32, first_token=100))
    prompts = scheduler.schedule()
    masks = scheduler.get_grammar_bitmask(prompts)
    # Of the last token of a prompt.
    assert masks.structured_output_request_ids == ["grammar"]
    assert masks_of(scheduler, masks, 1) == [[[1 << 1, 0]]]
    drafts = DraftTokenIds(["free", "grammar"], [[7] * len(NODES), list(PACKED)])
    first = {"grammar": [1], "free": [7]}

    if is_async:
        # The next step is on its way before anything of this one is known.
        output = scheduler.schedule()
        assert output.pending_structured_output_tokens
        answer(scheduler, prompts, first)
        scheduler.update_draft_token_ids_in_output(drafts, output)
    else:
        answer(scheduler, prompts, first)
        scheduler.update_draft_token_ids(drafts)
        output = scheduler.schedule()
    assert {name: len(nodes) for name, nodes in output.scheduled_spec_decode_tokens.items()} == {
        "grammar": len(NODES),
        "free": len(NODES),
    }
    masks = scheduler.get_grammar_bitmask(output)
    assert masks.structured_output_request_ids == ["grammar"]
    only = [[1 << 2, 0], [1 << 3 | 1 << 6, 0], [1 << 4, 0], FREE, [1 << 8, 0], [1 << 8, 0], FREE, FREE]
    assert masks_of(scheduler, masks, 1 + len(NODES)) == [only]
    assert masks.num_acceptable_drafts == [len(NODES)]
    assert output.num_invalid_spec_tokens == {"grammar": 3}
    # Only what is emitted moves the grammar, and nodes that are dropped are no draft tokens.
    assert grammar.read == [1]
    stats = answer(scheduler, output, {"grammar": [2, 3, 4], "free": [7, 7]})
    assert grammar.read == [1, 2, 3, 4]
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (2 * len(NODES) - 3, 3)


def test_lists_of_structured_requests_are_cut_like_all_others():
    scheduler = make_scheduler(schedule=[(1, 256, len(NODES))], max_num_batched_tokens=64)
    for name in ("0", "1"):
        add_structured_request(scheduler, name, [[1, 2, 3, 4, 8], [1, 2, 6, 8]])
    answer(scheduler, scheduler.schedule(), {"0": [1], "1": [1]})
    scheduler.update_draft_token_ids(DraftTokenIds(["0", "1"], [list(PACKED), list(PACKED)]))
    scheduler.max_num_scheduled_tokens = 2 + 2 * 4
    output = scheduler.schedule()
    masks = scheduler.get_grammar_bitmask(output)
    only = [[1 << 2, 0], [1 << 3 | 1 << 6, 0], [1 << 4, 0], FREE, [1 << 8, 0]]
    assert masks_of(scheduler, masks, 5, 5) == [only, only]
    assert masks.num_acceptable_drafts == [4, 4]
    assert output.num_invalid_spec_tokens == {"0": 1, "1": 1}


def test_drafts_that_never_came_are_not_accepted():
    """A request that was left out of a step has the drafts of an earlier one, which were not copied again."""
    scheduler = make_scheduler(is_async=True, schedule=[(1, 256, 2)])
    add_structured_request(scheduler, "grammar", [[1, 2, 3]])
    prompts = scheduler.schedule()
    output = scheduler.schedule()
    answer(scheduler, prompts, {"grammar": [1]})
    # Of a request that is gone, and none of the one that is there; no grammar is asked about either.
    scheduler.update_draft_token_ids_in_output(DraftTokenIds(["gone"], [[2, 3]]), output)
    masks = scheduler.get_grammar_bitmask(output)
    assert masks_of(scheduler, masks, 3) == [[[1 << 2, 0], FREE, FREE]]
    assert masks.num_acceptable_drafts == [0]
    assert output.num_invalid_spec_tokens == {"grammar": 2}
    assert scheduler.unchecked == {"grammar"}


def test_prompts_and_requests_that_are_gone_have_no_masks_and_no_nodes():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    for name, first_token in (("long", 0), ("aborted", 100)):
        add_structured_request(scheduler, name, [[1, 2, 3]], first_token=first_token)
    output = scheduler.schedule()
    # The second prompt has a chunk of 8 tokens.
    assert output.num_scheduled_tokens == {"long": 24, "aborted": 8}
    assert scheduler.get_grammar_bitmask(output).structured_output_request_ids == ["long"]
    answer(scheduler, output, {"long": [1], "aborted": []})
    scheduler.update_draft_token_ids(DraftTokenIds(["long", "aborted"], [[2], [2]]))
    assert (scheduler.requests["long"].spec_token_ids, scheduler.requests["aborted"].spec_token_ids) == ([2], [])
    output = scheduler.schedule()
    scheduler.finish_requests(["long", "aborted"], RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_grammar_bitmask(output) is None
    scheduler.update_draft_token_ids(DraftTokenIds(["long"], [[2]]))


def test_ranks_with_schedulers_of_their_own_look_at_no_clock(monkeypatch):
    assert make_scheduler().grammars.budget is not None
    monkeypatch.setattr(engine_config(GLIDE).parallel_config, "distributed_executor_backend", "external_launcher")
    assert make_scheduler().grammars.budget is None


@pytest.mark.parametrize(
    ("budget", "largest_graph"),
    [(100, None), (192, None), (300, None), (448, None), (8192, None), (8192, 256), (192, 512), (8192, 512)],
)
def test_no_number_is_chosen_that_would_be_cut_or_has_no_graph(budget, largest_graph):
    glide = json.dumps(json.loads(GLIDE) | {"adaptive_verification": True})
    schedule = default_schedule(NUM_NODES, 4, MOST_ROWS)
    scheduler = make_scheduler(
        max_num_seqs=100,
        max_num_batched_tokens=budget,
        schedule=schedule,
        speculative_config=glide,
        largest_graph=largest_graph,
    )
    most_rows = min(budget, largest_graph or budget)
    for batch_size, numbers in list(enumerate(scheduler.chosen.choices))[1:]:
        assert numbers[0] == 0 and batch_size * (1 + numbers[-1]) <= max(most_rows, batch_size)
        assert 0 <= scheduler.dynamic_sd_lookup[batch_size] <= numbers[-1]
    most = [number for first, last, number in schedule if first <= 16 <= last]
    assert (scheduler.chosen.choices[16][-1] == most[0]) == (most_rows >= 16 * (1 + most[0]))


def test_with_a_quantised_target_no_number_is_chosen_that_was_not_timed():
    """What others cost is only known of weights of two bytes."""
    given: dict[str, Any] = {
        "max_num_seqs": 8,
        "schedule": default_schedule(NUM_NODES, 4, MOST_ROWS),
        "speculative_config": json.dumps(json.loads(GLIDE) | {"adaptive_verification": True}),
        "largest_graph": 512,
    }
    whole, quantised = (make_scheduler(**given, quantization=name).chosen.choices[1:] for name in (None, "gptq"))
    assert [[number for number in numbers if number in (0, 7)] for numbers in whole] == quantised
    assert quantised[0] == [0, 7] and len(whole[0]) > 2
