# SPDX-License-Identifier: Apache-2.0
"""The proposer that vLLM's V2 runner calls after every step: bring the window up to date, draft, order."""

from copy import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace, set_current_vllm_config
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import get_draft_load_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.mem_utils import format_gib
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_longspec.attention.cache_scales import cache_scales, quantise_query
from vllm_longspec.frequent_tokens import read_frequent_tokens
from vllm_longspec.options import adapts_nodes, frequent_tokens_of, tree_shape_of
from vllm_longspec.proposers.glide.beam import CrossAttention, grow_trees
from vllm_longspec.proposers.glide.head import can_be_quantised
from vllm_longspec.proposers.glide.model import GlideForCausalLM
from vllm_longspec.proposers.glide.window import DraftWindow
from vllm_longspec.runner.graphs import DraftGraphs
from vllm_longspec.runner.model_state import TreeModelState
from vllm_longspec.runner.roots import Roots, read_roots
from vllm_longspec.scheduling.schedule import nodes_by_batch_size
from vllm_longspec.tree.chain import CHAIN_PARAMETERS
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.state import TreeState
from vllm_longspec.tree.synthetic import list_a_path_early

# vLLM shows what loggers below its own say.
logger = init_logger(f"vllm.{__name__}")


class GlideSpeculator(DraftModelSpeculator):
    model: GlideForCausalLM

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState):
        super().__init__(vllm_config, device)
        shape = tree_shape_of(vllm_config)
        assert shape is not None
        self.shape = shape
        self.req_states = req_states
        self.tree = TreeState.allocate(self.max_num_reqs, self.num_speculative_steps, shape.max_depth, device)
        # The requests that are drafted for, by their order in the draft's batch.
        self.slots = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.num_sampled = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        speculative_config = self.speculative_config
        self.draft_vllm_config = draft_vllm_config = replace(
            self.vllm_config,
            model_config=self.draft_model_config,
            load_config=get_draft_load_config(self.vllm_config),
            # A quantised target says nothing about its draft.
            quant_config=None,
            parallel_config=replace(
                speculative_config.draft_parallel_config, rank=self.vllm_config.parallel_config.rank
            ),
        )
        # A CUDA graph runs the draft whole, without vLLM's compiler. So its operations are vLLM's own kernels, whatever
        # the target's are.
        draft_vllm_config.compilation_config = compilation_config = copy(self.vllm_config.compilation_config)
        compilation_config.mode = CompilationMode.NONE
        compilation_config.custom_ops = ["all"]
        with set_model_tag("glide_draft"):
            model = get_model(vllm_config=draft_vllm_config, prefix="glide")
        model.share_with(target_model)
        with set_current_vllm_config(draft_vllm_config):
            if path := frequent_tokens_of(self.vllm_config):
                token_ids = read_frequent_tokens(path, self.vocab_size)
                model.take_own_head(torch.tensor(token_ids, device=self.device))
            elif model.quant_config is not None and can_be_quantised(model.lm_head):
                model.take_own_head(None)

        # vLLM asks the target for the state that accompanies its steps.
        target_model.tree_state = self.tree
        target_model.get_model_state_cls = lambda: TreeModelState
        # And where its weights are reloaded, this.
        target_model.renew_draft_head = self.renew_head
        self.target_layer_name = max(target_attn_layer_names, key=extract_layer_index)

        self.window = DraftWindow(self.max_num_reqs, model, self.dtype, self.device)
        logger.info_once(
            "GLIDE draft: tree shape %s, %s%d of %d nodes verified, %d of %d tokens drafted, quantization %s, "
            "draft state %d bytes per request (%s GiB in all), a chain for requests with %s",
            str(list(self.shape.levels)),
            "up to " if adapts_nodes(self.vllm_config) else "",
            self.num_speculative_steps,
            self.shape.num_nodes,
            model.draft_vocab_size,
            self.vocab_size,
            speculative_config.quantization,
            self.window.bytes_per_request,
            format_gib(self.window.bytes_per_request * self.max_num_reqs),
            " or ".join(CHAIN_PARAMETERS),
            scope="global",
        )
        return model

    def renew_head(self) -> None:
        with set_current_vllm_config(self.draft_vllm_config):
            self.model.renew_head()

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

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        use_graphs = cudagraph_mode.has_full_cudagraphs() and not self.speculative_config.enforce_eager
        self.graphs = DraftGraphs(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if use_graphs else CUDAGraphMode.NONE,
            nodes_by_batch_size(self.speculative_config, self.max_num_reqs, adapts_nodes(self.vllm_config)),
        )

    def capture(self) -> None:
        if self.graphs.needs_capture():
            # Requests that only pad the batch: nothing is written for them.
            self.slots.fill_(-1)
            self.graphs.capture_drafts(lambda num_reqs, num_nodes: self._draft(num_reqs, num_nodes, self.max_model_len))

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        # [num_tokens, hidden_size]; a GLIDE draft reads the target's cache instead
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        # [max_num_reqs]; the tree does not depend on how the target samples
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts a tree for every request that decodes next.

        Returns int64 [num_reqs, num_nodes]: tokens in list order; zeros for requests that are still in their prompt.
        """
        num_reqs = input_batch.num_reqs
        if dummy_run:
            if is_profile:
                self._profile(num_reqs)
            return self.draft_tokens[:num_reqs]

        prompt_done = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        decodes_next = ~input_batch.is_prefilling_np | (prompt_done >= input_batch.prefill_len_np)
        # Which requests decode next is known on the host, so a prompt in the batch costs the draft nothing.
        num_drafts = int(decodes_next.sum())
        if num_drafts == 0:
            return self._no_drafts(num_reqs)
        rows = None if num_drafts == num_reqs else self._to_device(np.flatnonzero(decodes_next))
        slots = self._stage(self.slots, input_batch.idx_mapping, rows)
        self._stage(self.num_sampled, num_sampled, rows)
        self._stage(self.block_table, self.block_tables.input_block_tables[0][:num_reqs], rows)

        leaves_prompt = input_batch.is_prefilling_np[decodes_next]
        if leaves_prompt.any():
            self._rebuild_windows(slots, leaves_prompt, input_batch.prefill_len_np[decodes_next])
        num_nodes = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if num_nodes == 0:
            # Speculation does not pay now; the windows are kept for when it does.
            self._extend_windows(slots, self._roots(slots))
            return self._no_drafts(num_reqs)
        if (graph := self.graphs.find(num_reqs, num_nodes)) is not None:
            self.slots[num_drafts : graph.num_reqs] = -1
            self.graphs.run_fullgraph(graph)
        else:
            self._draft(num_drafts, num_nodes, int(input_batch.seq_lens_cpu_upper_bound.max()))
        if rows is None:
            return self.draft_tokens[:num_reqs]
        draft_tokens = self._no_drafts(num_reqs)
        draft_tokens[rows] = self.draft_tokens[:num_drafts]
        return draft_tokens

    def _stage(self, staged: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Copies the rows that are drafted for to where `_draft` reads them."""
        values = values if rows is None else values[rows]
        staged = staged[: values.shape[0]]
        return staged.copy_(values)

    def _rebuild_windows(self, slots: torch.Tensor, leaves_prompt: np.ndarray, prefill_lens: np.ndarray) -> None:
        """Every request that leaves its prompt gets a new window.

        A request enters a slot through its prompt, whether it is new, was preempted or found its prefix cached.
        """
        rebuilt = slots[self._to_device(np.flatnonzero(leaves_prompt))]
        self.window.rebuild(
            self.req_states.all_token_ids.gpu,
            rebuilt,
            self._roots(rebuilt).positions,
            int(prefill_lens[leaves_prompt].max()),
        )

    # What follows reads and writes nothing but tensors that live as long as the engine, and its shapes depend on the
    # numbers of requests and nodes alone, as a CUDA graph needs it. A request with slot -1 only pads the batch.

    def _roots(self, slots: torch.Tensor) -> Roots:
        return read_roots(slots, self.req_states.num_computed_tokens.gpu, self.req_states.last_sampled_tokens)

    def _extend_windows(self, slots: torch.Tensor, roots: Roots) -> None:
        """Adds the tokens that the last step settled to the windows of the staged requests."""
        # For requests whose window was just rebuilt this writes the same values once more.
        self.window.append(
            self.req_states.all_token_ids.gpu,
            slots,
            roots.positions,
            self.num_sampled[: slots.shape[0]],
            max_new=self.shape.max_depth + 1,
        )

    def _draft(self, num_drafts: int, num_nodes: int, max_prefix_len: int) -> None:
        """Brings the staged requests' windows up to date and draws a tree for each.

        The `num_nodes` likeliest nodes go to `draft_tokens` and the tree state.
        """
        slots = self.slots[:num_drafts]
        roots = self._roots(slots)
        self._extend_windows(slots, roots)
        shape = self.shape.for_best(num_nodes)
        drafted = grow_trees(
            self.model,
            shape,
            roots.tokens,
            roots.positions,
            slots,
            self.window.kv,
            self._cross_attention(self.block_table[:num_drafts], roots.prefix_lens, max_prefix_len),
            max_position=self.max_model_len - 1,
        )
        log_probs = drafted.log_probs
        if self.speculative_config.rejection_sample_method == "synthetic":
            log_probs = list_a_path_early(log_probs, drafted.parents, shape.levels)
        order_tree(
            drafted.tokens,
            log_probs,
            drafted.parents,
            slots,
            self.tree.takes_chain,
            self.draft_tokens[:num_drafts, :num_nodes],
            self.tree.parent_rows[:, : 1 + num_nodes],
            self.tree.depths[:, : 1 + num_nodes],
            self.tree.ancestor_masks[:, : 1 + num_nodes],
            shape.max_depth,
        )

    def _cross_attention(
        self, block_table: torch.Tensor, prefix_lens: torch.Tensor, max_prefix_len: int
    ) -> CrossAttention:
        """Attention of the tree's nodes to all that the target has cached, in its last layer."""
        layer = self.vllm_config.compilation_config.static_forward_context[self.target_layer_name]
        scales = cache_scales(layer)
        num_reqs = block_table.shape[0]

        @cache
        def query_starts(width: int) -> torch.Tensor:
            return torch.arange(0, num_reqs * width + 1, width, dtype=torch.int32, device=self.device)

        def attend(query: torch.Tensor, width: int) -> torch.Tensor:
            output = torch.empty_like(query)
            layer.impl.prefix_attention(
                quantise_query(layer, query),
                layer.kv_cache,
                block_table,
                prefix_lens,
                max_prefix_len,
                query_starts(width),
                width,
                output,
                scales,
            )
            return output

        return attend

    def _profile(self, num_reqs: int) -> None:
        """Lets vLLM's memory profiling see what the largest draft allocates; there is no KV cache to attend yet."""
        slots = torch.arange(num_reqs, device=self.device)
        zeros = torch.zeros_like(slots)
        grow_trees(
            self.model,
            self.shape,
            zeros,
            zeros,
            slots,
            self.window.kv,
            cross_attention=lambda query, width: torch.zeros_like(query),
            max_position=self.max_model_len - 1,
        )

    def _no_drafts(self, num_reqs: int) -> torch.Tensor:
        return torch.zeros(num_reqs, self.num_speculative_steps, dtype=torch.int64, device=self.device)

    def _to_device(self, indices: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(indices, device=self.device)
