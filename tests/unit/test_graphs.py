# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs there are: for every number of nodes that a batch may be given, of the target and of the draft.

What graphs a manager captures is decided without a GPU.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.unit.test_schedule import auto_shape
from vllm_longspec import plugin
from vllm_longspec.configure import capture_largest_batch
from vllm_longspec.options import LongSpecOptions, attach_options
from vllm_longspec.runner.graphs import DraftGraphs, run_in_larger_graphs
from vllm_longspec.scheduling.schedule import MOST_ROWS, default_schedule, nodes_by_batch_size
from vllm_longspec.tree.shape import TreeShape

CAPTURE_SIZES = [1, 2, 4, *range(8, 513, 8)]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    plugin.register()
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: rank)
    monkeypatch.setattr(
        "vllm.v1.worker.gpu.cudagraph_utils.current_platform",
        SimpleNamespace(get_global_graph_pool=lambda: None),
    )


FIXED = TreeShape((4, 16, 16, 16, 16))


def config(num_nodes, max_num_seqs, schedule, adapt, shape=FIXED):
    speculative_config: Any = SimpleNamespace(
        num_speculative_tokens=num_nodes,
        num_speculative_tokens_per_batch_size=schedule,
        uses_dynamic_speculative_decoding=lambda: True,
    )
    attach_options(speculative_config, LongSpecOptions("glide", shape, adaptive_verification=adapt))
    return SimpleNamespace(
        speculative_config=speculative_config,
        num_speculative_tokens=num_nodes,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=CAPTURE_SIZES, max_cudagraph_capture_size=CAPTURE_SIZES[-1]
        ),
    )


def query_lens(manager):
    return {desc.uniform_token_count for desc in manager._capture_descs[CUDAGraphMode.FULL]}


@pytest.mark.parametrize(("adapt", "shape"), [(False, FIXED), (True, FIXED), (True, auto_shape(5))])
@pytest.mark.parametrize("max_num_seqs", [1, 4, 64, 256])
@pytest.mark.parametrize("num_nodes", [4, 24])
def test_every_number_that_may_be_verified_has_its_graphs(num_nodes, max_num_seqs, adapt, shape):
    if shape.plans:
        shape = shape.with_plans({number: levels for number, levels in shape.plans if number <= num_nodes})
    vllm_config = config(num_nodes, max_num_seqs, default_schedule(num_nodes, 5), adapt, shape)
    choices = nodes_by_batch_size(vllm_config.speculative_config, max_num_seqs, adapt)
    target = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 1 + num_nodes)
    assert query_lens(target) == {1 + number for numbers in choices[1:] for number in numbers}
    draft = DraftGraphs(vllm_config, "cpu", CUDAGraphMode.FULL_DECODE_ONLY, choices)
    # As if they had been captured.
    draft.graphs = dict.fromkeys(draft._capture_descs[CUDAGraphMode.FULL])
    draft._graphs_captured = target._graphs_captured = True
    for batch_size in range(1, max_num_seqs + 1):
        for number in choices[batch_size]:
            rows = batch_size * (1 + number)
            if rows > CAPTURE_SIZES[-1]:
                continue
            graph: Any = target.dispatch(batch_size, rows, uniform_token_count=1 + number, num_active_loras=0)
            assert graph.cg_mode == CUDAGraphMode.FULL
            assert (graph.num_reqs >= batch_size) and graph.uniform_token_count == 1 + number
            if number:
                found: Any = draft.find(batch_size, number)
                assert found is not None and found.num_reqs >= batch_size and found.num_speculative_tokens == number


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 33, 85, 100, 150, 255, 300, 511, 1024])
def test_the_largest_batch_has_its_graphs(max_num_seqs):
    """Of any size, not of vLLM's only."""
    vllm_config = config(24, max_num_seqs, default_schedule(68, 5, MOST_ROWS), True)
    capture_largest_batch(vllm_config)
    assert max(vllm_config.compilation_config.cudagraph_capture_sizes) == CAPTURE_SIZES[-1]
    choices = nodes_by_batch_size(vllm_config.speculative_config, max_num_seqs, True)
    target = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 25)
    draft = DraftGraphs(vllm_config, "cpu", CUDAGraphMode.FULL_DECODE_ONLY, choices)
    draft.graphs = dict.fromkeys(draft._capture_descs[CUDAGraphMode.FULL])
    draft._graphs_captured = target._graphs_captured = True
    for batch_size in range(1, min(max_num_seqs, CAPTURE_SIZES[-1]) + 1):
        graph: Any = target.dispatch(batch_size, batch_size, uniform_token_count=1, num_active_loras=0)
        assert graph.cg_mode == CUDAGraphMode.FULL and graph.num_reqs >= batch_size
        for number in choices[batch_size]:
            assert number == 0 or draft.find(batch_size, number) is not None


def test_batches_run_in_the_larger_graphs_that_are_given():
    """Of their number of nodes, and without adapters."""
    vllm_config = config(24, 32, default_schedule(24, 5, MOST_ROWS), True)
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    before, target = (CudaGraphManager(vllm_config, "cpu", mode, 25, lora_capture_cases=[0, 2]) for _ in range(2))
    before._graphs_captured = target._graphs_captured = True
    run_in_larger_graphs(target, {0: [(16, 32), (24, 32)], 7: [(2, 4)]})

    def sizes(manager: Any, number: int, num_adapters: int = 0) -> list[int]:
        return [manager.dispatch(size, size * (1 + number), 1 + number, num_adapters).num_reqs for size in range(1, 33)]

    assert sizes(target, 0) == [32 if size in (16, 24) else size for size in sizes(before, 0)] != sizes(before, 0)
    assert (
        sizes(before, 7)[:3] == [1, 2, 3]
        and sizes(target, 7)[:3] == [1, 4, 3]
        and sizes(target, 7)[3:] == sizes(before, 7)[3:]
    )
    assert sizes(target, 3) == sizes(before, 3)
    assert all(sizes(target, number, 2) == sizes(before, number, 2) for number in (0, 3, 7))


@pytest.mark.parametrize("sizes", [None, []])
def test_an_engine_without_graphs_gets_none(sizes):
    vllm_config = config(24, 3, default_schedule(68, 5, MOST_ROWS), True)
    vllm_config.compilation_config.cudagraph_capture_sizes = sizes
    capture_largest_batch(vllm_config)
    assert vllm_config.compilation_config.cudagraph_capture_sizes == sizes


@pytest.mark.parametrize("shape", [FIXED, auto_shape(5)])
def test_no_graph_is_captured_that_no_batch_would_run(shape):
    """vLLM captures every number of nodes for batches of every size."""
    vllm_config = config(24, 256, default_schedule(68, 5), True, shape)
    target = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 25)
    largest = {1: 256, 2: 64, 4: 32, 6: 21, 8: 16, 16: 8, 25: 4}
    sizes: dict[int, list[int]] = {}
    for desc in target._capture_descs[CUDAGraphMode.FULL]:
        assert desc.uniform_token_count is not None and desc.num_reqs is not None
        sizes.setdefault(desc.uniform_token_count, []).append(desc.num_reqs)
    for query_len, found in sizes.items():
        batch_size = largest[min(known for known in largest if known >= query_len)]
        assert sorted(found)[-1] >= batch_size
        assert all(size < batch_size for size in sorted(found)[:-1])
    vllm_config = config(24, 256, default_schedule(68, 5), True)
    del vllm_config.speculative_config.longspec
    vllms = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 25)
    captured = [len(manager._capture_descs[CUDAGraphMode.FULL]) for manager in (target, vllms)]
    assert captured[0] < captured[1]
    # The others are vLLM's.
    assert target._capture_descs[CUDAGraphMode.PIECEWISE] == vllms._capture_descs[CUDAGraphMode.PIECEWISE]


def test_less_than_an_eighth_of_a_graph_is_padding():
    schedule = default_schedule(68, 5, MOST_ROWS)
    vllm_config = config(24, 256, schedule, True)
    # vLLM adds the rows of the largest batch of a range: here 85 with 5 nodes.
    vllm_config.compilation_config.cudagraph_capture_sizes = sorted({*CAPTURE_SIZES, 510})
    target = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 25)
    target._graphs_captured = True
    choices = nodes_by_batch_size(vllm_config.speculative_config, 256, True)
    for batch_size, (number, *_) in list(enumerate(choices))[1:]:
        graph: Any = target.dispatch(batch_size, batch_size * (1 + number), 1 + number, 0)
        # Of few rows a request vLLM itself has a size for every eight rows.
        assert graph.num_reqs - batch_size < max(graph.num_reqs / 8, 8 / (1 + number))
        assert batch_size > 8 or number == 0 or graph.num_reqs == batch_size
    assert len(target._capture_descs[CUDAGraphMode.FULL]) < 168


def test_a_batch_that_became_smaller_has_the_graphs_of_what_it_drafted():
    schedule = [(1, 4, 4), (5, 8, 7), (9, 64, 2)]
    target = CudaGraphManager(config(7, 64, schedule, adapt=False), "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 8)
    target._graphs_captured = True
    for batch_size in range(1, 9):
        graph: Any = target.dispatch(batch_size, 8 * batch_size, uniform_token_count=8, num_active_loras=0)
        assert graph.cg_mode == CUDAGraphMode.FULL
        assert graph.num_reqs == batch_size


def test_another_draft_has_vllms_graphs():
    vllm_config = config(4, 64, [(1, 4, 4), (5, 8, 3)], adapt=False)
    ours = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 5)
    del vllm_config.speculative_config.longspec
    vllms = CudaGraphManager(vllm_config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, 5)
    # Those of larger batches that verify four nodes are missing.
    assert set(ours._capture_descs[CUDAGraphMode.FULL]) < set(vllms._capture_descs[CUDAGraphMode.FULL])
    # Three requests of five tokens: the next captured sizes are 16, which is of four tokens each, and then 20.
    ours._graphs_captured = vllms._graphs_captured = True
    found = [manager.dispatch(3, 15, uniform_token_count=5, num_active_loras=0) for manager in (ours, vllms)]
    assert [(desc.cg_mode, desc.num_tokens) for desc in found] == [
        (CUDAGraphMode.FULL, 20),
        (CUDAGraphMode.PIECEWISE, 16),
    ]
