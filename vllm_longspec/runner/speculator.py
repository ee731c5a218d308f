# SPDX-License-Identifier: Apache-2.0
"""The speculator that vLLM's V2 runner calls after every step, for any proposer: stage, propose, copy, order."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.mem_utils import format_gib
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_longspec import proposers
from vllm_longspec.attention.backend import Observer
from vllm_longspec.copying.lookup import find_copies
from vllm_longspec.copying.trust import CopyTrust
from vllm_longspec.options import options_of
from vllm_longspec.proposers.interface import ComputedStep, Proposer, Requests, Roots
from vllm_longspec.runner.graphs import DraftGraphs
from vllm_longspec.runner.model_state import TreeModelState
from vllm_longspec.runner.roots import read_roots
from vllm_longspec.scheduling.schedule import nodes_by_batch_size
from vllm_longspec.targets.families import language_model_of
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.coupling import TargetNoise
from vllm_longspec.tree.merge import merge_path
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.packing import pack_nodes
from vllm_longspec.tree.state import TreeState
from vllm_longspec.tree.synthetic import list_a_path_early
from vllm_longspec.tree.synthetic_rates import conditional_rates, lists_another_node

# A child of vLLM's logger, so that vLLM's logging configuration applies.
logger = init_logger(f"vllm.{__name__}")


class TreeSpeculator(DraftModelSpeculator):
    # What is allocated here lives outside the memory pools of vLLM's sleep mode (docs/design.md#sleep-mode).
    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState):
        super().__init__(vllm_config, device)
        options = options_of(self.speculative_config)
        assert options is not None
        self.options = options
        self.req_states = req_states
        self.tree_state = TreeState.allocate(self.max_num_reqs, self.num_speculative_steps, device)
        self.tree_batch = TreeBatch.allocate(self.tree_state, options.max_depth)
        self.observers: dict[str, Observer] = {}  # the proposer's, by layer name
        # By position in the draft's batch.
        self.num_sampled = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.noise: TargetNoise | None = None
        if options.couple_noise:
            use_fp64 = vllm_config.model_config.use_fp64_gumbel
            self.noise = TargetNoise(self.temperature, self.seeds, self.tree_state.log_cutoffs, use_fp64)
        self.trust = CopyTrust(self.max_num_reqs, options.copy_length, device) if options.copy_length else None
        if self.trust is not None:
            keep_token_ids_on_device(req_states)
        # Copied paths are not listed with synthetic acceptance, so no path is longer than the drafted tree is deep.
        rates = conditional_rates(self.speculative_config, options.tree_shape.max_depth)
        self.synthetic_rates = None if rates is None else torch.tensor(rates, dtype=torch.float32, device=device)
        cls = resolve_obj_by_qualname(proposers.setup_of(options.proposer).proposer)
        self.proposer: Proposer = cls(vllm_config, options.tree_shape, device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        language_model = language_model_of(target_model)
        if isinstance(getattr(language_model, "logits_processor", None), LogitsProcessorWithLoRA):
            # vLLM gives it the adapter of each request, as if each had one row.
            raise ValueError(
                "LoRA adapters of the head are not supported with trees: give --lora-target-modules without lm_head, "
                "such as q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
            )
        model = self.proposer.load(target_model, target_attn_layer_names)
        # vLLM asks the target for its model state class.
        target_model.get_model_state_cls = lambda: partial(
            TreeModelState,
            tree_state=self.tree_state,
            tree_batch=self.tree_batch,
            observers=self.observers,
            add_request=self.proposer.add_request,
            synthetic_rates=self.synthetic_rates,
        )
        # Called after vLLM has reloaded the target's weights.
        target_model.renew_proposer = self.proposer.renew
        shape = self.options.tree_shape
        description = self.proposer.describe()
        logger.info_once(
            "Proposer %s: tree shape %s, %s%d of %d nodes verified, %s%s",
            self.options.proposer,
            str(shape),
            "up to " if self.options.chooses_nodes else "",
            self.num_speculative_steps,
            shape.num_nodes,
            self._describe_copying(),
            f", {description}" if description else "",
            scope="global",
        )
        return model

    def _describe_copying(self) -> str:
        if self.trust is None:
            return "no tokens copied"
        token_ids = self.req_states.all_token_ids.gpu
        num_bytes = token_ids.shape[1] * token_ids.element_size()
        return (
            f"up to {self.trust.copy_length} tokens copied, text {num_bytes} bytes per request "
            f"({format_gib(num_bytes * self.max_num_reqs)} GiB in all)"
        )

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        self.block_table = torch.zeros_like(block_tables.input_block_tables[0])
        logger.info_once("Block table of drafts: %d bytes", self.block_table.nbytes, scope="global")
        self.proposer.set_cache(kv_cache_config)
        self.observers.clear()
        self.observers.update(self.proposer.observers())

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        use_graphs = cudagraph_mode.has_full_cudagraphs() and not self.speculative_config.enforce_eager
        self.graphs = DraftGraphs(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if use_graphs else CUDAGraphMode.NONE,
            nodes_by_batch_size(self.speculative_config, self.max_num_reqs, self.options.chooses_nodes),
        )

    def capture(self) -> None:
        if self.graphs.needs_capture():
            # All requests are padding, for which nothing is written.
            self.idx_mapping.fill_(-1)
            self.graphs.capture_drafts(lambda num_reqs, num_nodes: self._draft(num_reqs, num_nodes, self.max_model_len))

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [num_reqs]
        num_rejected: torch.Tensor,  # [num_reqs]
        last_sampled: torch.Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,  # [max_num_reqs]
        seeds: torch.Tensor,  # [max_num_reqs]
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:  # int64 [num_reqs, num_nodes] tokens in list order; zeros for requests in their prompt
        """Drafts a tree for every request that decodes next.

        With structured output in the batch tokens are packed with their parents (`vllm_longspec/tree/packing.py`).
        """
        num_reqs = input_batch.num_reqs
        if dummy_run:
            if is_profile:
                self.proposer.profile(num_reqs)
            return self.draft_tokens[:num_reqs]

        assert slot_mappings is not None
        self.proposer.observe_step(
            ComputedStep(
                input_batch.idx_mapping_np,
                input_batch.query_start_loc_np,
                input_batch.num_computed_prefill_tokens_np,
                # All layers have one group.
                next(iter(slot_mappings.values())),
                last_hidden_states,
            )
        )
        prompt_done = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        decodes_next = ~input_batch.is_prefilling_np | (prompt_done >= input_batch.prefill_len_np)
        # Known on the host, so that requests in their prompt are not part of the draft's batch.
        num_drafts = int(decodes_next.sum())
        if num_drafts == 0:
            return self._no_drafts(num_reqs)
        rows = None if num_drafts == num_reqs else self._to_device(np.flatnonzero(decodes_next))
        idx_mapping = self._stage(self.idx_mapping, input_batch.idx_mapping, rows)
        self._stage(self.num_sampled, num_sampled, rows)
        leaves_prompt = input_batch.is_prefilling_np[decodes_next]
        if leaves_prompt.any():
            started = idx_mapping[self._to_device(np.flatnonzero(leaves_prompt))]
            max_root_position = int(input_batch.prefill_len_np[decodes_next][leaves_prompt].max())
            token_ids = self.req_states.all_token_ids.gpu
            if self.trust is not None:
                self.trust.forget(started)
            self.proposer.start(started, self._roots(started), token_ids, max_root_position)
        num_nodes = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        max_prefix_len = int(input_batch.seq_lens_cpu_upper_bound.max())
        if num_nodes == 0:
            # No speculation in this step, but the proposer's state must be valid for the next one. What is read only
            # for drafts is not staged: plain decoding has none of the kernels here.
            self.proposer.skip(self._requests(num_drafts, max_prefix_len))
            return self._no_drafts(num_reqs)
        if self.noise is not None:
            # vLLM's tensors are other ones in the next step.
            self.noise.temperature.copy_(temperature)
            self.noise.seeds.copy_(seeds)
        self._stage(self.block_table, self.block_tables.input_block_tables[0][:num_reqs], rows)
        if (graph := self.graphs.find(num_reqs, num_nodes)) is not None:
            self.idx_mapping[num_drafts : graph.num_reqs] = -1
            self.graphs.run_fullgraph(graph)
        else:
            self._draft(num_drafts, num_nodes, max_prefix_len)
        draft_tokens = self.draft_tokens[:num_reqs]
        if rows is not None:
            draft_tokens = self._no_drafts(num_reqs)
            draft_tokens[rows] = self.draft_tokens[:num_drafts]
        if input_batch.has_structured_output_reqs:
            # vLLM copies them to the scheduler.
            draft_tokens = pack_nodes(draft_tokens, self.tree_state.parent_rows[input_batch.idx_mapping, 1:])
        return draft_tokens

    def _stage(self, staged: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Copies the rows of the requests that are drafted for to the tensor that `_draft` reads."""
        values = values if rows is None else values[rows]
        staged = staged[: values.shape[0]]
        return staged.copy_(values)

    # The methods below run in CUDA graphs: inputs and outputs are allocated once for the engine, and shapes depend only
    # on the numbers of requests and nodes. req_state_idx -1 is padding.

    def _roots(self, idx_mapping: torch.Tensor) -> Roots:
        return read_roots(idx_mapping, self.req_states.num_computed_tokens.gpu, self.req_states.last_sampled_tokens)

    def _requests(self, num_drafts: int, max_prefix_len: int) -> Requests:
        idx_mapping = self.idx_mapping[:num_drafts]
        return Requests(
            idx_mapping,
            self._roots(idx_mapping),
            self.num_sampled[:num_drafts],
            self.options.max_depth + 1,
            self.req_states.all_token_ids.gpu,
            self.block_table[:num_drafts],
            max_prefix_len,
            self.noise,
        )

    def _draft(self, num_drafts: int, num_nodes: int, max_prefix_len: int) -> None:
        """Drafts for the staged requests: the best `num_nodes` go to `draft_tokens` and the tree state."""
        requests = self._requests(num_drafts, max_prefix_len)
        tokens, parents, log_probs, shape = self.proposer.propose(requests, num_nodes)
        max_depth = shape.max_depth
        is_synthetic = self.speculative_config.rejection_sample_method == "synthetic"
        if is_synthetic:
            with_another = lists_another_node(shape.levels, num_nodes, self.num_speculative_steps)
            log_probs = list_a_path_early(log_probs, parents, shape.levels, with_another)
        if self.trust is not None:
            copied, scores = self._copy(requests, self.trust)
            if is_synthetic:
                # Copies cost what they cost; what is accepted is the draft's path of the requested length.
                scores.fill_(float("-inf"))
            # A node at a greater depth than the list is long is never in it.
            length = min(copied.shape[1], num_nodes)
            tokens, log_probs, parents = merge_path(tokens, log_probs, parents, copied[:, :length], scores[:, :length])
            max_depth = max(max_depth, length)
        order_tree(
            tokens,
            log_probs,
            parents,
            requests.idx_mapping,
            self.draft_tokens[:num_drafts, :num_nodes],
            self.tree_state.parent_rows[:, : 1 + num_nodes],
            self.tree_state.depths[:, : 1 + num_nodes],
            self.tree_state.ancestor_masks[:, : 1 + num_nodes],
            max_depth,
        )

    def _copy(self, requests: Requests, trust: CopyTrust) -> tuple[torch.Tensor, torch.Tensor]:
        """A path for each request from its own text, and its log-probabilities, both [num_reqs, copy_length]."""
        idx_mapping, positions = requests.idx_mapping, requests.roots.positions
        copied, match_lens = find_copies(
            requests.token_ids, idx_mapping, positions, requests.max_prefix_len, trust.copy_length
        )
        return copied, trust.score(copied, match_lens, requests.token_ids, idx_mapping, positions)

    def _no_drafts(self, num_reqs: int) -> torch.Tensor:
        return torch.zeros(num_reqs, self.num_speculative_steps, dtype=torch.int64, device=self.device)

    def _to_device(self, indices: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(indices, device=self.device)


def keep_token_ids_on_device(req_states: RequestState) -> None:
    """Puts the text of all requests into the device's memory, as vLLM does for its own lookups.

    By default it is in the host's, which is too slow to be searched in every step. Must be called before anything is
    written to it, and before others take hold of it.
    """
    token_ids = req_states.all_token_ids
    req_states.all_token_ids = StagedWriteTensor(tuple(token_ids.gpu.shape), token_ids.dtype, req_states.device)
