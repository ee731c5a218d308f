# SPDX-License-Identifier: Apache-2.0
"""The target's per-step hooks (vLLM's `ModelState`): layout before its forward pass, compaction after the walk."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.utils import AttentionGroup

from vllm_longspec.attention.backend import Observer, TreesToAttend
from vllm_longspec.options import options_of
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.compact import KVCacheTable, compact_kv_caches
from vllm_longspec.tree.coupling import log_cutoff
from vllm_longspec.tree.history import read_history_along_paths
from vllm_longspec.tree.layout import lay_out_trees
from vllm_longspec.tree.sample import TreeSampler
from vllm_longspec.tree.state import TreeState


class TreeModelState(DefaultModelState):
    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
        *,
        tree_state: TreeState,
        tree_batch: TreeBatch,
        observers: Mapping[str, Observer],
        add_request: Callable[[int, SamplingParams], None],  # the proposer's
        synthetic_rates: torch.Tensor | None,  # float32 [max_depth]
    ):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.tree_state = tree_state
        self.tree_batch = tree_batch
        self.observers = observers
        self.add_request_to_proposer = add_request
        options = options_of(vllm_config.speculative_config)
        assert options is not None
        self.couple_noise = options.couple_noise
        self.max_depth = options.max_depth
        self.synthetic_rates = synthetic_rates
        self.added_log_cutoffs: dict[int, float] = {}  # by req_state_idx of the requests that are added
        # Of the current step.
        self.num_tree_reqs = 0
        self.block_table: torch.Tensor | None = None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        # All layers of a supported target have full attention and share one block table.
        if (num_groups := len(kv_cache_config.kv_cache_groups)) != 1:
            raise ValueError(
                f"a target with KV caches of {num_groups} kinds is not supported with trees: serve without speculative "
                "decoding"
            )
        layers = self.vllm_config.compilation_config.static_forward_context
        layer_names = kv_cache_config.kv_cache_groups[0].layer_names
        self.kv_caches = KVCacheTable([layers[name].kv_cache for name in layer_names])

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        assert new_req_data.sampling_params is not None
        self.added_log_cutoffs[req_index] = log_cutoff(new_req_data.sampling_params)
        self.add_request_to_proposer(req_index, new_req_data.sampling_params)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        if self.added_log_cutoffs:
            self.tree_state.add_requests(
                async_tensor_h2d(list(self.added_log_cutoffs), device=self.device, dtype=torch.int64),
                async_tensor_h2d(list(self.added_log_cutoffs.values()), device=self.device, dtype=torch.float32),
            )
            self.added_log_cutoffs.clear()

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeSampler]:
        if self.couple_noise:
            # It draws with noise of its own.
            sampler.use_flashinfer = False
        # Both sample requests with penalties: the first in steps in which no request has a tree.
        read_history_along_paths(sampler, self.tree_state, self.max_depth)
        return sampler, TreeSampler(sampler, self.tree_state, self.tree_batch, self.max_depth, self.synthetic_rates)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: ModelSpecificAttnMetadata | None = None,
    ) -> dict[str, Any]:
        # vLLM sorts requests with draft tokens to the front of the batch.
        num_drafts = input_batch.num_draft_tokens_per_req
        self.num_tree_reqs = 0 if num_drafts is None else int((num_drafts > 0).sum())
        if for_capture and input_batch.num_tokens > input_batch.num_reqs:
            # Only trees are captured with several tokens per request; they have no draft tokens yet.
            self.num_tree_reqs = input_batch.num_reqs
        self.block_table = block_tables[0]
        if self.num_tree_reqs > 0:
            lay_out_trees(
                self.tree_state,
                self.tree_batch,
                self.num_tree_reqs,
                input_batch.idx_mapping,
                input_batch.query_start_loc,
                input_batch.seq_lens,
                input_batch.input_ids,
                input_batch.positions,
            )
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        to_attend = TreesToAttend(
            # All requests in a graph have a tree; padding requests have no rows.
            input_batch.num_reqs_after_padding if in_graph and self.num_tree_reqs else self.num_tree_reqs,
            self.tree_batch.ancestor_masks,
            self.tree_batch.prefix_lens,
            max_prefix_len=self.max_model_len if in_graph else int(input_batch.seq_lens_cpu_upper_bound.max()),
            in_graph=in_graph,
            idx_mapping=self.tree_batch.idx_mapping,
            observers=self.observers,
        )
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            # For a capture vLLM would not pass `to_attend`, which has all that a capture needs.
            for_capture and self.num_tree_reqs == 0,
            ubatch_idx,
            to_attend,
        )

    def postprocess_state(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_computed_tokens: torch.Tensor | None = None
    ) -> None:
        num_reqs = self.num_tree_reqs
        if num_reqs == 0:
            return
        assert num_computed_tokens is not None and self.block_table is not None
        num_sampled = num_sampled[:num_reqs]
        # vLLM has already counted the accepted rows as computed; the root's slot is the first of them.
        first_positions = num_computed_tokens[idx_mapping[:num_reqs]] - num_sampled
        compact_kv_caches(
            self.kv_caches,
            self.block_table[:num_reqs],
            first_positions,
            self.tree_batch.path_rows[:num_reqs],
            num_sampled,
            self.max_depth,
        )
