# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the whole draft, and the choice of the target's.

A draft is about a hundred small kernels without a decision on the host between them. It depends on the number of
requests and on the number of nodes that are kept, so every batch size is captured with each number of nodes that it
can have (`vllm_longspec/scheduling/schedule.py`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorBatchDescriptor

from vllm_longspec.options import options_of
from vllm_longspec.scheduling.schedule import nodes_by_batch_size, numbers_of_nodes


class DraftGraphs(CudaGraphManager):
    """Graphs by batch size and number of nodes."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        choices: Sequence[Sequence[int]],  # numbers of nodes that may be kept, by batch size; entry 0 is not used
    ):
        # A request is one "token" of the draft's batch.
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len=1)
        graphs: dict[SpeculatorBatchDescriptor, None] = {}
        for batch_size in range(self.max_num_reqs, 0, -1):
            for desc in self._candidates.get((batch_size, 0), [])[:1]:
                for num_nodes in choices[batch_size]:
                    if num_nodes > 0:
                        graphs[SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=num_nodes)] = None
        # Largest first, so that smaller graphs reuse their memory.
        self._capture_descs = {CUDAGraphMode.FULL: list(graphs)} if graphs else {}

    def capture_drafts(self, draft: Callable[[int, int], None]) -> None:
        """Captures `draft(num_reqs, num_nodes)` for every graph."""

        def create_forward_fn(desc: SpeculatorBatchDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            num_reqs = desc.num_reqs
            assert num_reqs is not None
            return lambda cudagraph_mode: draft(num_reqs, desc.num_speculative_tokens)

        self.capture(create_forward_fn, "Capturing CUDA graphs of the draft")

    def find(self, batch_size: int, num_nodes: int) -> SpeculatorBatchDescriptor | None:
        """The graph for at least `batch_size` requests, if there is one."""
        desc = self.dispatch(batch_size, batch_size, uniform_token_count=1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        found = SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=num_nodes)
        return found if found in self.graphs else None


def init_verification_graphs(original: Callable[..., None], self: CudaGraphManager) -> None:
    """Lists the graphs of the target's forward pass for every number of nodes that a step may verify.

    vLLM lists each number of nodes with every batch size, but a large batch never verifies many.
    """
    config = self.vllm_config.speculative_config
    options = options_of(config)
    if config is None or options is None or not config.uses_dynamic_speculative_decoding():
        original(self)
        return
    build_lookup = cudagraph_utils.build_dynamic_sd_schedule_lookup
    if options.chooses_nodes:
        numbers = numbers_of_nodes(config)
        # vLLM reads only which numbers are in the table, from entry 1 on.
        cudagraph_utils.build_dynamic_sd_schedule_lookup = lambda *_, **__: [0, *numbers]
    try:
        original(self)
    finally:
        cudagraph_utils.build_dynamic_sd_schedule_lookup = build_lookup

    if self.decode_query_len > 1:
        # Not the draft's graphs, in which a request is one row.
        _drop_unused(self, nodes_by_batch_size(config, self.max_num_reqs, options.chooses_nodes))
    uniform = [desc for descs in self._capture_descs.values() for desc in descs if desc.uniform_token_count is not None]
    uniform.sort(key=lambda desc: desc.num_tokens)
    for (num_tokens, num_active_loras), candidates in self._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in uniform:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_active_loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        # vLLM takes the first that fits a batch, so uniform graphs come before those of any query length.
        candidates[:0] = [desc for desc in smallest.values() if desc not in candidates]


def _drop_unused(manager: CudaGraphManager, choices: Sequence[Sequence[int]]) -> None:
    """Removes the graphs of numbers of nodes that no batch of their size verifies; `choices` are by batch size.

    Of the others so many are left that less than an eighth of a graph is padding.
    """
    # A batch may be smaller than when it drafted, and seldom is larger: then it runs without such a graph.
    largest = {1 + number: size for size, numbers in enumerate(choices) if size > 0 for number in numbers}
    uniform = [desc for descs in manager._capture_descs.values() for desc in descs if desc.uniform_token_count]
    unused: set[BatchExecutionDescriptor] = set()
    next_smaller: dict[tuple[int, int], int] = {}
    for desc in sorted(uniform, key=lambda desc: desc.num_tokens):
        assert desc.uniform_token_count is not None and desc.num_reqs is not None
        kind = desc.uniform_token_count, desc.num_active_loras
        # The largest batch is padded to the next size, unless there is one of its own.
        if next_smaller.get(kind, 0) >= largest.get(desc.uniform_token_count, 0):
            unused.add(desc)
        next_smaller[kind] = desc.num_reqs
    kinds: dict[tuple[int, int], list[BatchExecutionDescriptor]] = {}
    for desc in sorted(set(uniform) - unused, key=lambda desc: desc.num_tokens, reverse=True):
        if desc.uniform_token_count is not None and desc.uniform_token_count > 1:
            kinds.setdefault((desc.uniform_token_count, desc.num_active_loras), []).append(desc)
    for descs in kinds.values():
        sizes = [desc.num_reqs or 0 for desc in descs]
        larger = sizes[0]
        for desc, size, smaller in zip(descs[1:], sizes[1:], [*sizes, 0][2:], strict=True):
            # Without it a batch of one more request than the next size has would be padded to the larger one.
            if larger - (smaller + 1) < larger / 8:
                unused.add(desc)
            else:
                larger = size
    for listed in (*manager._capture_descs.values(), *manager._candidates.values()):
        listed[:] = [desc for desc in listed if desc not in unused]


def has_graphs(manager: CudaGraphManager | None, larger: Mapping[int, Sequence[tuple[int, int]]]) -> bool:
    """Whether the graphs are there that `run_in_larger_graphs` is given."""
    graphs = {} if manager is None else _graphs_by_size(manager)
    return all((1 + number, size) in graphs for number, pairs in larger.items() for pair in pairs for size in pair)


def run_in_larger_graphs(manager: CudaGraphManager, larger: Mapping[int, Sequence[tuple[int, int]]]) -> None:
    """Makes batches run in larger graphs than the smallest that have room for them.

    Args:
        manager: of the target's graphs.
        larger: (requests of a graph, requests of the one that is taken instead), by number of nodes.
    """
    graphs = _graphs_by_size(manager)
    instead = {
        graphs[1 + number, size]: graphs[1 + number, other] for number, pairs in larger.items() for size, other in pairs
    }
    # vLLM takes the first that fits a batch, and lists the smallest of each kind.
    for candidates in manager._candidates.values():
        candidates[:] = [instead.get(desc, desc) for desc in candidates]


def _graphs_by_size(manager: CudaGraphManager) -> dict[tuple[int | None, int | None], BatchExecutionDescriptor]:
    """(rows of a request, requests) -> the graph without adapters."""
    return {
        (desc.uniform_token_count, desc.num_reqs): desc
        for descs in manager._capture_descs.values()
        for desc in descs
        if desc.num_active_loras == 0
    }
