# SPDX-License-Identifier: Apache-2.0
"""Capture's `Proposer`: takes K and V from the target's cache as prompts are computed, and drafts nothing."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_longspec.attention.cache_scales import as_stored, cache_scales
from vllm_longspec.options import options_of
from vllm_longspec.proposers.capture.spool import CaptureRequest
from vllm_longspec.proposers.capture.writer import Captured, Slice, SpoolWriter
from vllm_longspec.proposers.interface import Candidates, ComputedStep, Proposer, Requests
from vllm_longspec.tree.shape import TreeShape


def first_head(rank: int, num_ranks: int, num_kv_heads: int) -> int | None:
    """The first KV head of the whole model that this rank has; None if a rank before it has the same."""
    # With more ranks than heads, as many ranks in a row have the same head.
    if rank % max(1, num_ranks // num_kv_heads):
        return None
    return rank * num_kv_heads // num_ranks


class CaptureProposer(Proposer):
    last_layer: nn.Module  # vLLM's attention layer
    writer: SpoolWriter | None  # None: another rank has the same heads

    def __init__(self, vllm_config: VllmConfig, shape: TreeShape, device: torch.device):
        super().__init__(vllm_config, shape, device)
        self.requests: dict[int, CaptureRequest] = {}  # by req_state_idx; what is in it for others is not used
        self.dtype = vllm_config.model_config.dtype

    def load(self, target: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        name = max(target_attn_layer_names, key=extract_layer_index)
        self.last_layer = self.vllm_config.compilation_config.static_forward_context[name]
        options = options_of(self.vllm_config.speculative_config)
        assert options is not None and options.spool is not None
        num_ranks = self.vllm_config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank()
        head = first_head(rank, num_ranks, self.vllm_config.model_config.get_total_num_kv_heads())
        self.writer = None if head is None else SpoolWriter(Path(options.spool), head, self.device)
        # The same on all ranks.
        self.writes_hidden = rank == 0
        return nn.Module()

    def add_request(self, req_state_idx: int, sampling_params: SamplingParams) -> None:
        self.requests.pop(req_state_idx, None)
        request = CaptureRequest.from_extra_args(sampling_params.extra_args)
        if request is not None:
            self.requests[req_state_idx] = request

    def observe_step(self, step: ComputedStep) -> None:
        if self.writer is None:
            return
        slices: list[Slice] = []
        rows: list[np.ndarray] = []  # of this step, whose K and V are captured
        hidden_rows: list[np.ndarray] = []
        num_rows = num_hidden_rows = 0
        for index, req_state_idx in enumerate(step.req_state_indices.tolist()):
            request = self.requests.get(req_state_idx)
            start = int(step.num_computed[index])
            first = int(step.query_start_loc[index])
            if request is None:
                continue
            # A request may go on after what is captured of it.
            end = min(start + int(step.query_start_loc[index + 1]) - first, request.num_tokens)
            if end <= start:
                continue
            wanted = request.rows[np.searchsorted(request.rows, start) : np.searchsorted(request.rows, end)]
            slices.append(Slice(request.name, start, end, num_rows, num_hidden_rows, len(wanted)))
            rows.append(np.arange(first, first + end - start))
            hidden_rows.append(wanted - start + first)
            num_rows += end - start
            num_hidden_rows += len(wanted)
        if not slices:
            return
        slots = step.slot_mapping[self._to_device(rows)]
        hidden = step.hidden_states[self._to_device(hidden_rows)] if self.writes_hidden else None
        self.writer.put(Captured(slices, self._read_cache(slots), hidden))

    def _read_cache(self, slots: torch.Tensor) -> torch.Tensor:  # int64 [num_rows] -> [num_rows, heads, 2 * head_size]
        """K and V of these slots in the last layer, as the target attends them."""
        cache = self.last_layer.kv_cache  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        block_size = cache.shape[2]
        scales = cache_scales(self.last_layer)
        if scales is not None:
            # As bytes, which can be indexed everywhere.
            cache = cache.view(torch.uint8)
        kv = cache[slots // block_size, :, slots % block_size].contiguous()
        if scales is None:
            return kv
        keys, values = as_stored(kv).float().chunk(2, dim=-1)
        return torch.cat([keys * scales.key.view(-1, 1), values * scales.value.view(-1, 1)], dim=-1).to(self.dtype)

    def _to_device(self, rows: list[np.ndarray]) -> torch.Tensor:
        return async_tensor_h2d(np.concatenate(rows), device=self.device)

    def profile(self, num_reqs: int) -> None:
        """What a step captures, and the one before it, if that is not copied yet."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        width = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() + model.get_hidden_size()
        num_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        torch.empty(2, num_tokens, width, dtype=self.dtype, device=self.device)

    def describe(self) -> str:
        return "what requests ask for is captured"

    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        """Chains of token 0: the scheduler gives no batch a node (`CaptureSetup.vllm_options`), vLLM's warm-up does."""
        shape = (requests.idx_mapping.shape[0], num_nodes)
        return Candidates(
            tokens=torch.zeros(shape, dtype=torch.int64, device=self.device),
            parents=torch.arange(-1, num_nodes - 1, dtype=torch.int32, device=self.device).expand(shape).contiguous(),
            log_probs=torch.zeros(shape, dtype=torch.float32, device=self.device),
            shape=TreeShape((1,) * num_nodes),
        )
