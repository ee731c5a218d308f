# SPDX-License-Identifier: Apache-2.0
"""Timing of steps in an engine: what it prepares is what the target and the draft run with, and requests do not notice.

Nor do they notice that their batch runs in a larger graph than it needs. Without a GPU stand-ins for the graphs run the
same forward pass, padded like them, and the same draft eagerly.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import PAIR
from tests.engine import running
from tests.integration.test_lossless import source_code, speculative
from tests.process import run_alone

SHAPE = [4, 8, 8]
TABLES = ("verify", "draft")
SETTINGS = {"max_num_seqs": 4, "max_model_len": 512, "block_size": 32}
NODES = {"adapt_nodes": True, "num_speculative_tokens_per_batch_size": [[1, 2, 20], [3, 4, 7]]}


def test_requests_do_not_notice_that_steps_were_timed(tmp_path):
    settings = {"model": str(PAIR / "target"), **SETTINGS, **speculative(PAIR / "draft", SHAPE, **NODES)}
    found, log = run_alone(_time_between_requests, settings, environment={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert found["after"] == found["before"] and len(set(map(tuple, found["before"]))) > 1
    sizes = {
        name: {int(number): [size for size, _ in points] for number, points in found[name].items()} for name in TABLES
    }
    assert sizes == {"verify": {0: [1, 2, 3, 4], 7: [1, 2, 3, 4], 20: [1, 2]}, "draft": {7: [1, 2, 4], 20: [1, 2]}}
    # The clock counts replays, and each of the timed times is one of them: three requests run in the graph of four.
    assert {time for name in TABLES for points in found[name].values() for _, time in points} == {1.0}
    assert found["larger"] == {"7": [[3, 4]]}
    assert found["max_prefix"] > 256
    # Then they ran padded to that graph.
    assert found["padded"] == found["before"]
    assert [8, 3, 4] in found["graphs"] and not any(graph[:2] == [8, 3] and graph[2] != 4 for graph in found["graphs"])
    assert {rows for rows, _, _ in found["graphs"]} == {8, 21}
    # It is kept, and read by the next one.
    (file,) = (tmp_path / "longspec").iterdir()
    assert "the times are kept in" in log and str(file) in log and "of an earlier start" in log


def _time_between_requests(settings: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.config.compilation import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from vllm_longspec.runner.graphs import DraftGraphs
    from vllm_longspec.runner.timing import time_steps
    from vllm_longspec.scheduling.schedule import nodes_by_batch_size

    # A pool of graphs, which a platform without graphs lacks.
    type(current_platform)._global_graph_pool = 0
    capture_sizes = [1, 2, 4, *range(8, 65, 8)]

    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in source_code((60, 100, 140))]
    replays = Clock()
    prefixes: list[int] = []
    managers: list[Any] = []
    graphs: list[list[int]] = []  # rows a request, requests, requests of the graph

    def stand_in(runner: Any, manager: Any, observe: Callable[[Any, Any, torch.Tensor], None]) -> None:
        """Runs the forward pass in the place of the graphs; `observe` gets each graph, its batch and its slots."""
        prepare_attn = runner.model_state.prepare_attn
        prepared: dict[str, Any] = {}

        def recording(batch: Any, mode: Any, block_tables: Any, slot_mappings: Any, *arguments: Any, **options: Any):
            metadata = prepare_attn(batch, mode, block_tables, slot_mappings, *arguments, **options)
            prepared.update(batch=batch, metadata=metadata, slot_mappings=slot_mappings)
            return metadata

        def run_target(desc: Any) -> torch.Tensor:
            batch = prepared["batch"]
            assert (batch.num_reqs_after_padding, batch.num_tokens_after_padding) == (desc.num_reqs, desc.num_tokens)
            observe(desc, batch, prepared["slot_mappings"])
            with set_forward_context(
                prepared["metadata"],
                runner.vllm_config,
                num_tokens=desc.num_tokens,
                slot_mapping=build_slot_mappings_by_layer(prepared["slot_mappings"], runner.kv_cache_config),
            ):
                return runner.model(input_ids=batch.input_ids, positions=batch.positions)

        manager._graphs_captured, manager.run_fullgraph = True, run_target
        runner.model_state.prepare_attn, runner.cudagraph_manager = recording, manager

    def time_in_worker(worker: Any) -> Any:
        runner = worker.model_runner
        speculator = runner.speculator
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = capture_sizes, capture_sizes[-1]
        manager: Any = CudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode.FULL_AND_PIECEWISE, runner.decode_query_len
        )

        def observe(desc: Any, batch: Any, slot_mappings: torch.Tensor) -> None:
            # Three requests with seven nodes take longer than four.
            replays.now += 2 if desc.num_tokens == 24 else 1
            assert (batch.num_reqs, batch.num_tokens) == (desc.num_reqs, desc.num_tokens)
            # Nothing is written to the cache.
            assert (slot_mappings == -1).all()
            prefixes.append(int(batch.seq_lens.max()))

        def run_draft(desc: Any) -> None:
            replays.now += 1
            speculator._draft(desc.num_reqs, desc.num_speculative_tokens, runner.max_model_len)

        given = runner.cudagraph_manager, speculator.graphs, torch.cuda.Event
        drafts: Any = DraftGraphs(
            runner.vllm_config,
            runner.device,
            CUDAGraphMode.FULL_DECODE_ONLY,
            nodes_by_batch_size(runner.vllm_config.speculative_config, runner.max_num_reqs, choose=True),
        )
        drafts.graphs = dict.fromkeys(drafts._capture_descs[CUDAGraphMode.FULL])
        drafts._graphs_captured, drafts.run_fullgraph = True, run_draft
        stand_in(runner, manager, observe)
        speculator.graphs, torch.cuda.Event = drafts, replays.event
        try:
            first, second = time_steps(worker), time_steps(worker)
        finally:
            del runner.model_state.prepare_attn
            runner.cudagraph_manager, speculator.graphs, torch.cuda.Event = given
        assert first == second
        managers.append(manager)
        return first

    def run_in_graphs(worker: Any) -> None:
        """From now on batches run as in the graphs of the timed manager, padded."""
        (manager,) = managers
        stand_in(
            worker.model_runner,
            manager,
            lambda desc, batch, _: graphs.append([desc.uniform_token_count, batch.num_reqs, desc.num_reqs]),
        )

    with running(settings) as llm:

        def tokens() -> list[list[int]]:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            llm.reset_prefix_cache()
            return [list(output.outputs[0].token_ids) for output in outputs]

        executor = llm.llm_engine.engine_core.engine_core.model_executor
        before = tokens()
        (times,) = executor.collective_rpc(time_in_worker)
        after = tokens()
        executor.collective_rpc(run_in_graphs)
        padded = tokens()
    return {
        "before": before,
        "after": after,
        "padded": padded,
        "graphs": graphs,
        "verify": dict(times.verify),
        "draft": dict(times.draft),
        "larger": dict(times.larger),
        "max_prefix": max(prefixes),
    }


class Clock:
    """Counts replays, in the place of CUDA events."""

    now = 0.0

    def event(self, enable_timing: bool) -> Any:
        return _Event(self)


class _Event:
    def __init__(self, clock: Clock):
        self.clock = clock

    def record(self) -> None:
        self.time = self.clock.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "_Event") -> float:
        return later.time - self.time
