# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the whole draft, and the choice of the target's.

A draft is about a hundred small kernels without a decision on the host between them. It depends on the number of
requests and on the number of nodes that are kept, so every batch size is captured with each number of nodes that it
can have (`vllm_longspec/scheduling/schedule.py`).
"""

from collections.abc import Callable, Sequence

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorBatchDescriptor

from vllm_longspec.options import options_of
from vllm_longspec.scheduling.schedule import numbers_of_nodes


class DraftGraphs(CudaGraphManager):
    """Graphs by batch size and number of nodes."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        nodes_by_batch_size: Sequence[Sequence[int]],  # numbers that may be kept for n requests; entry 0 is not used
    ):
        # A request is one "token" of the draft's batch.
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len=1)
        graphs: dict[SpeculatorBatchDescriptor, None] = {}
        for batch_size in range(self.max_num_reqs, 0, -1):
            for desc in self._candidates.get((batch_size, 0), [])[:1]:
                for num_nodes in nodes_by_batch_size[batch_size]:
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
    """Lists the graphs of the target's forward pass for every number of nodes that a step may verify."""
    config = self.vllm_config.speculative_config
    options = options_of(config)
    if config is None or options is None or not config.uses_dynamic_speculative_decoding():
        original(self)
        return
    build_lookup = cudagraph_utils.build_dynamic_sd_schedule_lookup
    if options.adaptive_verification:
        numbers = numbers_of_nodes(config)
        # vLLM reads only which numbers are in the table, from entry 1 on.
        cudagraph_utils.build_dynamic_sd_schedule_lookup = lambda *_, **__: [0, *numbers]
    try:
        original(self)
    finally:
        cudagraph_utils.build_dynamic_sd_schedule_lookup = build_lookup

    uniform = [desc for descs in self._capture_descs.values() for desc in descs if desc.uniform_token_count is not None]
    uniform.sort(key=lambda desc: desc.num_tokens)
    for (num_tokens, num_active_loras), candidates in self._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in uniform:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_active_loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        # vLLM takes the first that fits a batch, so uniform graphs come before those of any query length.
        candidates[:0] = [desc for desc in smallest.values() if desc not in candidates]
