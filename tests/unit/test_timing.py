# SPDX-License-Identifier: Apache-2.0
"""Timing of CUDA graphs at start-up, without a GPU: vLLM's own preparation of inputs, graphs whose time is known."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorBatchDescriptor

from benchmarks import PAIR
from tests.quantised_models import COMPRESSED_TENSORS
from tests.unit.test_graphs import CAPTURE_SIZES, FIXED, config
from vllm_longspec import patches, plugin
from vllm_longspec.options import LongSpecOptions, attach_options
from vllm_longspec.runner import times_file, timing
from vllm_longspec.runner.graphs import DraftGraphs
from vllm_longspec.runner.speculator import TreeSpeculator
from vllm_longspec.runner.times_file import TimesFile, what_times_depend_on
from vllm_longspec.runner.timing import CONTEXT, REPLAYS, WARM_UP, StepTimer, time_of
from vllm_longspec.scheduling.schedule import MOST_ROWS, default_schedule, nodes_by_batch_size
from vllm_longspec.scheduling.step_times import MeasuredCost, StepTimes, Times, times_of

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, VOCAB_SIZE = 16, 4096, 32768, 100
MAX_NUM_SEQS = 32
HIDDEN = 8
POWERS = {1 << power for power in range(10)}
READ = 1e-5  # milliseconds of a cached token
DRAFT = 0.5  # milliseconds of a draft, and of each request


class Clock:
    """The GPU's, which only graphs move."""

    now = 0.0

    @classmethod
    def event(cls, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(time=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "time", cls.now)
        event.elapsed_time = lambda later: later.time - event.time
        return event


@pytest.fixture(autouse=True)
def one_rank(monkeypatch, tmp_path):
    plugin.register()
    rank = SimpleNamespace(
        is_first_rank=True, is_last_rank=True, broadcast_object=lambda obj=None, src=0: obj, world_size=1
    )
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: rank)
    monkeypatch.setattr(
        "vllm.v1.worker.gpu.cudagraph_utils.current_platform", SimpleNamespace(get_global_graph_pool=lambda: None)
    )
    monkeypatch.setattr(timing, "get_tp_group", lambda: rank)
    monkeypatch.setattr(timing, "current_platform", SimpleNamespace(get_device_name=lambda: "GPU"))
    monkeypatch.setattr(torch.cuda, "Event", Clock.event)
    monkeypatch.setattr(times_file, "what_times_depend_on", lambda vllm_config: {"device": "GPU"})
    monkeypatch.setattr(timing, "what_times_depend_on", lambda vllm_config: {"device": "GPU"})
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))


def forward(num_rows: int) -> float:
    return 10 + 0.01 * num_rows


def forward_by_tiles(num_rows: int) -> float:
    """As vLLM's GEMMs of fp8 weights: tiles of 16 rows, then of 64, which take longer with few of their rows."""
    return 10.0 if num_rows <= 16 else 10.8 + 0.045 * (-num_rows % 64) if num_rows <= 128 else 0.08 * num_rows


class BlockTables:
    block_sizes = (BLOCK_SIZE,)

    def __init__(self):
        self.table = torch.full((MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE), 99, dtype=torch.int32)

    def get_dummy_block_tables(self, num_reqs: int):
        return (self.table[:num_reqs].zero_(),)


class Runner:
    """What `StepTimer` uses of vLLM's runner: buffers, tables and managers are those of vLLM, or like them."""

    def __init__(
        self,
        num_nodes: int = 24,
        has_graphs: bool = True,
        draft_has_graphs: bool = True,
        forward: Callable[[int], float] = forward,
        num_engines: int = 1,
        padding: float = 0.0,  # milliseconds of a request without a context beside others that have one
    ):
        schedule = default_schedule(num_nodes, 5, MOST_ROWS)
        self.vllm_config: Any = config(num_nodes, MAX_NUM_SEQS, schedule, adapt=True)
        self.max_num_reqs, self.max_model_len, self.vocab_size = MAX_NUM_SEQS, MAX_MODEL_LEN, VOCAB_SIZE
        self.device = torch.device("cpu")
        self.choices = nodes_by_batch_size(self.vllm_config.speculative_config, MAX_NUM_SEQS, choose=True)
        self.input_buffers = InputBuffers(MAX_NUM_SEQS, CAPTURE_SIZES[-1], self.device)
        self.block_tables = BlockTables()
        self.kv_cache_config = SimpleNamespace(num_blocks=NUM_BLOCKS)
        self.attn_groups: list = []
        self.forward, self.padding = forward, padding
        self.vllm_config.parallel_config.data_parallel_size = num_engines
        mode = CUDAGraphMode.FULL_AND_PIECEWISE if has_graphs else CUDAGraphMode.NONE
        manager: Any = CudaGraphManager(self.vllm_config, "cpu", mode, 1 + num_nodes)
        manager._graphs_captured = True
        manager.run_fullgraph = self._run_target
        self.cudagraph_manager = manager
        self.replayed: list[tuple[str, BatchExecutionDescriptor]] = []
        self.prepared: Any = None
        self.model_state = SimpleNamespace(prepare_attn=self._prepare_attn)
        self.model = SimpleNamespace(compute_logits=self._compute_logits)
        self.num_logits: list[int] = []
        draft_mode = CUDAGraphMode.FULL_DECODE_ONLY if draft_has_graphs else CUDAGraphMode.NONE
        self.speculator: Any = object.__new__(TreeSpeculator)
        graphs: Any = DraftGraphs(self.vllm_config, "cpu", draft_mode, self.choices)
        graphs.graphs = dict.fromkeys(graphs._capture_descs.get(CUDAGraphMode.FULL, ()))
        graphs._graphs_captured = True
        graphs.run_fullgraph = self._run_draft
        self.speculator.graphs = graphs
        self.speculator.idx_mapping = torch.zeros(MAX_NUM_SEQS, dtype=torch.int64)
        tree_batch: Any = SimpleNamespace(idx_mapping=torch.zeros(MAX_NUM_SEQS, dtype=torch.int64))
        self.speculator.tree_batch = tree_batch

    def prepare_dummy_attn(self, batch: Any) -> tuple:
        return self.block_tables.get_dummy_block_tables(batch.num_reqs), torch.full((1, batch.num_tokens), -1)

    def _prepare_attn(self, batch: Any, mode, block_tables, slot_mappings, groups, kv_cache_config, for_capture):
        assert for_capture and mode == CUDAGraphMode.FULL
        assert (slot_mappings == -1).all()
        # A mixture of experts drops padding, and sends the same token to the same experts.
        assert not batch.is_padding.any() and (batch.num_tokens < 8 or batch.input_ids.unique().numel() > 1)
        self.prepared = batch, block_tables
        self.speculator.tree_batch.idx_mapping[:] = torch.arange(MAX_NUM_SEQS)

    def _run_target(self, desc: BatchExecutionDescriptor) -> torch.Tensor:
        assert self.prepared is not None and desc.num_reqs is not None
        # Blocks are chosen by the scores of nobody.
        assert (self.speculator.tree_batch.idx_mapping == -1).all()
        batch, block_tables = self.prepared
        assert (batch.num_reqs, batch.num_tokens) == (desc.num_reqs, desc.num_tokens)
        rows = desc.num_tokens // desc.num_reqs
        contexts = batch.seq_lens - rows
        num_with_context = int((contexts > 0).sum())
        assert (contexts[:num_with_context] == contexts[0]).all() and not contexts[num_with_context:].any()
        if contexts[0]:
            # All blocks that are read exist.
            used = block_tables[0][:, : -(-int(batch.seq_lens[0]) // BLOCK_SIZE)]
            assert used.min() >= 0 and used.max() < NUM_BLOCKS and used.unique().numel() > used.shape[1] // 2
        Clock.now += self.forward(desc.num_tokens) + READ * int(contexts.sum()) * (1 + 0.01 * (rows - 1))
        if num_with_context:
            Clock.now += self.padding * (desc.num_reqs - num_with_context)
        self.replayed.append(("target", desc))
        return torch.zeros(desc.num_tokens, HIDDEN)

    def _compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.num_logits.append(hidden_states.shape[0])
        return hidden_states

    def _run_draft(self, desc: SpeculatorBatchDescriptor) -> None:
        assert desc.num_reqs is not None
        assert (self.speculator.idx_mapping == -1).all()
        Clock.now += DRAFT * (1 + desc.num_reqs)
        self.replayed.append(("draft", desc))


def timer_of(runner: Any) -> StepTimer:
    return StepTimer(runner)


def graph_of(runner: Any, size: int, number: int) -> BatchExecutionDescriptor:
    return runner.cudagraph_manager.dispatch(size, size * (1 + number), 1 + number, 0)


def test_every_number_is_timed_with_the_graphs_that_batches_run():
    runner: Any = Runner()
    times = timer_of(runner).times()
    assert times is not None and times.device == "GPU"
    assert times.numbers() == [1, 3, 5, 7, 15, 24]
    assert times.verify.keys() == times.read.keys() == {0, *times.draft}
    for number, points in times.verify.items():
        largest = max(size for size, numbers in enumerate(runner.choices) if size and number in numbers)
        assert [size for size, _ in points][-1] == largest
        for size, time in points:
            assert time == pytest.approx(forward(graph_of(runner, size, number).num_tokens))
        for size, time in times.draft.get(number, ()):
            padded = runner.speculator.graphs.find(size, number).num_reqs
            assert time == pytest.approx(DRAFT * (1 + padded))
        for _, time in times.read[number]:
            assert time == pytest.approx(READ * (1 + 0.01 * number), rel=1e-6)
    # Only the rows of the batch go through the head.
    assert max(runner.num_logits) <= MOST_ROWS
    assert StepTimes.from_json(times.to_json()) == times
    # Nothing of it is left for the first batch.
    assert not runner.block_tables.table.any()


def test_all_ranks_replay_the_same_graphs_in_the_same_order():
    """Whatever their clocks say: graphs contain collectives."""
    first, second = Runner(), Runner()
    timer_of(first).times()
    Clock.now += 1e6
    timer_of(second).times()
    assert first.replayed == second.replayed
    assert len(first.replayed) % (REPLAYS + WARM_UP) == 0


def test_a_short_cache_limits_the_context():
    runner: Any = Runner()
    runner.kv_cache_config.num_blocks = 8
    times = timer_of(runner).times()
    assert times is not None
    assert times.read[24][0][1] == pytest.approx(READ * 1.24, rel=1e-6)
    assert CONTEXT > 8 * BLOCK_SIZE


def test_without_graphs_nothing_is_timed():
    for runner in (Runner(has_graphs=False), Runner(draft_has_graphs=False)):
        assert timer_of(runner).times() is None
        assert not any(kind == "draft" for kind, _ in runner.replayed)


def test_the_median_of_the_replays_counts():
    durations = iter([50.0, *[2.0, 9.0, 1.0, 3.0, 2.5]])

    def run() -> None:
        Clock.now += next(durations)

    assert time_of(run) == pytest.approx(2.5)
    assert next(durations, None) is None


def worker_of(runner: Any) -> Any:
    return SimpleNamespace(model_runner=runner)


def test_the_next_start_has_the_same_times_and_measures_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO", logger="vllm")
    first = timing.time_steps(worker_of(Runner()))
    assert first is not None and "the times are kept in" in caplog.text
    caplog.clear()
    runner: Any = Runner()
    Clock.now += 5
    assert timing.time_steps(worker_of(runner)) == first
    assert runner.replayed == [] and "of an earlier start" in caplog.text


def test_without_graphs_start_up_says_so_and_keeps_nothing(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO", logger="vllm")
    assert timing.time_steps(worker_of(Runner(has_graphs=False))) is None
    assert "Steps are not timed" in caplog.text
    assert not list(tmp_path.rglob("*.json"))


def test_batches_that_are_not_on_a_line_are_timed_too():
    runner: Any = Runner(forward=forward_by_tiles, num_engines=2)
    times = timer_of(runner).times()
    assert times is not None

    def most_off(verify: Times) -> float:
        """By how much a batch's time, padded to its graph, differs from what is expected."""
        cost, off = MeasuredCost(replace(times, verify=verify), lambda *_: 0.0, 1.0, lambda *_: 0.0), []
        for number, points in verify.items():
            for size in range(1, points[-1][0] + 1):
                time = forward_by_tiles(graph_of(runner, size, number).num_tokens)
                off.append(abs(cost.verify[number](size) / time - 1))
        return max(off)

    powers = {
        number: [(size, time) for size, time in points if size in POWERS] for number, points in times.verify.items()
    }
    assert most_off(times.verify) < 0.12 < 0.2 < most_off(powers)
    num_powers = sum(map(len, powers.values()))
    # Only bends are looked for, so there are not many more than the powers of two.
    assert 2 * num_powers < sum(map(len, times.verify.values())) < 3 * num_powers
    # Engines that run in step all take the smallest graph.
    assert times.larger == {}


def test_batches_run_in_a_larger_graph_that_takes_less_time():
    runner, plain = Runner(forward=forward_by_tiles), Runner(forward=forward_by_tiles)
    times = timing.time_steps(worker_of(runner))
    assert times is not None and StepTimes.from_json(times.to_json()) == times
    cost = MeasuredCost(times, lambda *_: 0.0, 1.0, lambda *_: 0.0)
    saved = []
    for number, points in times.verify.items():
        for size in range(1, points[-1][0] + 1):
            graph, smallest = graph_of(runner, size, number), graph_of(plain, size, number)
            assert graph.cg_mode == CUDAGraphMode.FULL and graph.uniform_token_count == 1 + number
            assert graph.num_reqs is not None and graph.num_reqs >= (smallest.num_reqs or 0) >= size
            time = forward_by_tiles(graph.num_tokens)
            assert time <= forward_by_tiles(smallest.num_tokens)
            assert cost.verify[number](size) == pytest.approx(time, rel=0.12)
            assert graph == smallest or time <= 0.97 * forward_by_tiles(smallest.num_tokens)
            saved.append(1 - time / forward_by_tiles(smallest.num_tokens))
    # 18 rows run as 64; 17 of plain decoding do not, for which there are 32 at most.
    assert graph_of(runner, 9, 1).num_tokens == 64 and graph_of(runner, 3, 7) != graph_of(plain, 3, 7)
    assert graph_of(runner, 17, 0) == graph_of(plain, 17, 0)
    assert max(saved) > 0.15
    # So they do after the next start.
    later: Any = Runner(forward=forward_by_tiles)
    assert timing.time_steps(worker_of(later)) is not None and later.replayed == []
    for size in range(1, MAX_NUM_SEQS + 1):
        assert graph_of(later, size, 0) == graph_of(runner, size, 0)


def test_a_larger_graph_has_to_be_faster_with_a_context_too():
    runner: Any = Runner(forward=forward_by_tiles, padding=5.0)
    times = timing.time_steps(worker_of(runner))
    assert times is not None and times.larger == {}
    assert graph_of(runner, 3, 7).num_tokens == 24


def test_graphs_of_any_query_lengths_stay():
    runner: Any = Runner(forward=forward_by_tiles)
    runner.cudagraph_manager = CudaGraphManager(runner.vllm_config, "cpu", CUDAGraphMode.FULL, 25)
    runner.cudagraph_manager._graphs_captured, runner.cudagraph_manager.run_fullgraph = True, runner._run_target
    timer = timer_of(runner)
    points = [(16, 10.0), (17, 20.0), (32, 10.0)]
    assert timer._graph(9, 0).uniform_token_count is None and timer._faster_graphs(0, points, dict(points)) == {}


def test_noise_is_no_reason_to_run_in_a_larger_graph():
    noise = Random(0)
    runner: Any = Runner(forward=lambda num_rows: 10 + 0.3 * noise.random())
    times = timing.time_steps(worker_of(runner))
    assert times is not None and times.larger == {}


def test_a_graph_is_not_taken_instead_of_itself():
    """However little its second measurement differs from its first: such times would be refused at the next start."""

    def forward_that_warms_up(num_rows: int) -> float:
        return 2 + 0.1 * num_rows - 1e-9 * len(runner.replayed)

    runner: Any = Runner(num_nodes=4, forward=forward_that_warms_up)
    times = timing.time_steps(worker_of(runner))
    assert times is not None and times.larger == {}
    # It takes less than what is expected between others, as it ran a batch that is smaller than it is.
    graphs = {size: graph_of(runner, size, 4).num_reqs for size, _ in times.verify[4]}
    assert graphs[12] == 12 and graphs[14] == 15 and graphs[16] == 18
    later: Any = Runner(num_nodes=4)
    assert timing.time_steps(worker_of(later)) == times and later.replayed == []


def test_all_ranks_time_what_the_first_one_does(monkeypatch):
    """Where there is a bend for its clock, whatever the others find."""
    sent: list[Any] = []

    def send(sent_by_first: Any = None, src: int = 0) -> Any:
        sent.append(sent_by_first)
        return sent_by_first

    monkeypatch.setattr(timing, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True, broadcast_object=send))
    first: Any = Runner(forward=forward_by_tiles)
    found = timing.time_steps(worker_of(first))
    answers = iter(sent)
    group = SimpleNamespace(is_first_rank=False, broadcast_object=lambda obj=None, src=0: next(answers))
    monkeypatch.setattr(timing, "get_tp_group", lambda: group)
    second: Any = Runner()
    assert timing.time_steps(worker_of(second)) == found is not None
    assert second.replayed == first.replayed and next(answers, None) is None


def test_the_first_rank_has_the_file(monkeypatch, tmp_path):
    """Another rank reads and writes none, and runs nothing if the first has the times."""
    theirs = timer_of(Runner()).times()
    group = SimpleNamespace(is_first_rank=False, broadcast_object=lambda obj=None, src=0: theirs)
    monkeypatch.setattr(timing, "get_tp_group", lambda: group)
    runner: Any = Runner()
    assert timing.time_steps(worker_of(runner)) is theirs
    assert runner.replayed == [] and not list(tmp_path.rglob("*.json"))


TIMES = StepTimes("GPU", {0: ((1, 10.0),), 4: ((1, 11.0),)}, {4: ((1, 0.5),)}, {0: ((1, 0.0),), 4: ((1, 0.0),)})


def test_a_file_for_each_key(tmp_path):
    one, other = TimesFile({"device": "A", "levels": (4, 16)}), TimesFile({"device": "B", "levels": (4, 16)})
    assert one.read() is None
    one.write(TIMES)
    read = TimesFile({"levels": [4, 16], "device": "A"}).read()
    assert read is not None and read.to_json() == TIMES.to_json()
    assert other.read() is None
    assert one.path.parent == tmp_path / "longspec" and len(list(one.path.parent.iterdir())) == 1


def schemes(num_bits: int) -> dict[str, Any]:
    """Weights of compressed-tensors, which is one method of vLLM for all of its schemes."""
    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": COMPRESSED_TENSORS | {"format": "pack-quantized", "config_groups": groups}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hf_overrides": schemes(4)}, {"hf_overrides": schemes(8)}),
        ({}, {"linear_backend": "marlin"}),
        ({}, {"couple_noise": False}),
        ({}, {"use_fp64_gumbel": True}),
        ({}, {"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 8}}),
        ({}, {"compilation_config": {"custom_ops": ["+rms_norm"]}}),
        ({}, {"compilation_config": {"pass_config": {"fuse_norm_quant": True}}}),
        ({}, {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}),
        ({"enable_lora": True, "max_lora_rank": 8}, {"enable_lora": True, "max_lora_rank": 64}),
    ],
)
def test_engines_whose_steps_differ_do_not_share_times(one, other, monkeypatch):
    def config_of(**settings: Any) -> VllmConfig:
        given = {name: settings.pop(name) for name in list(settings) if name not in EngineArgs.__dataclass_fields__}
        speculative_config = {"model": str(PAIR / "draft"), "copy_length": 0, **given}
        arguments = EngineArgs(
            str(PAIR / "target"),
            skip_tokenizer_init=True,
            speculative_config=speculative_config,
            # vLLM writes to the overrides.
            **copy.deepcopy(settings),
        )
        return arguments.create_engine_config()

    def path(vllm_config: VllmConfig) -> Path:
        return TimesFile(what_times_depend_on(vllm_config)).path

    found = config_of(**one)
    assert path(found) == path(config_of(**one)) != path(config_of(**other))
    parallel, before = found.parallel_config, path(found)
    # GEMMs with other tiles: a larger graph that took less time may take more.
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert path(found) != before
    # vLLM sets both for a single rank.
    for name in ("disable_custom_all_reduce", "enable_expert_parallel"):
        setattr(parallel, name, not getattr(parallel, name))
        assert path(found) != before
        setattr(parallel, name, not getattr(parallel, name))


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": 1}', "cut", "other"])
def test_a_damaged_file_is_said_and_replaced(damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    file = TimesFile({"device": "A"})
    file.write(TIMES)
    whole = file.path.read_text()
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "other":
        damage = json.dumps(json.loads(whole) | {"key": {"device": "B"}})
    file.path.write_text(damage)
    assert file.read() is None
    assert str(file.path) in caplog.text and "timed anew" in caplog.text
    file.write(TIMES)
    assert file.path.read_text() == whole


@pytest.mark.parametrize("larger", [{"7": [[2, 513]]}, {"7": [[0, 2]]}])
def test_times_of_graphs_that_are_not_there_are_measured_again(larger, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(Clock, "now", 0.0)
    times = timing.time_steps(worker_of(Runner()))
    (path,) = (tmp_path / "longspec").iterdir()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"times": whole["times"] | {"larger": larger}}))
    runner: Any = Runner()
    # The same clock reads the same times to the last bit.
    Clock.now = 0.0
    assert timing.time_steps(worker_of(runner)) == times and runner.replayed != []
    assert str(path) in caplog.text and "timed anew" in caplog.text
    assert json.loads(path.read_text()) == whole


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    (tmp_path / "longspec").write_text("a file")
    file = TimesFile({"device": "A"})
    file.write(TIMES)
    assert "cannot be written" in caplog.text and file.read() is None


@pytest.mark.parametrize("measures", [True, False])
def test_times_reach_the_process_of_the_scheduler(measures):
    """vLLM builds the scheduler from the configuration of the executor, once that has warmed up its workers."""
    calls: list[Any] = []
    speculative_config: Any = SimpleNamespace()
    options = LongSpecOptions("glide", FIXED, adaptive_verification=True, measures_costs=measures)
    attach_options(speculative_config, options)

    def collective_rpc(method: Any) -> list[StepTimes | None]:
        calls.append(method)
        return [TIMES, None]

    vllm_config = SimpleNamespace(speculative_config=speculative_config)
    executor: Any = SimpleNamespace(vllm_config=vllm_config, collective_rpc=collective_rpc)
    patches._compile_or_warm_up_model(lambda self: calls.append("vLLM's"), executor)
    assert calls == ["vLLM's", *([patches._time_steps] if measures else [])]
    assert times_of(speculative_config) is (TIMES if measures else None)


def test_engines_without_trees_are_not_timed():
    for speculative_config in (None, SimpleNamespace()):
        executor: Any = SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=speculative_config))
        calls: list[Any] = []
        patches._compile_or_warm_up_model(calls.append, executor)
        assert calls == [executor]
