# SPDX-License-Identifier: Apache-2.0
"""MagicDec's `Proposer`: every drafted token is a step of the target over a part of its own cache.

A step writes K and V of its row where the target will write those of the same position when it verifies, and layer by
layer before anything attends them. So nothing of a draft is left in the cache below the next root.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_longspec.interpreter import interpreting
from vllm_longspec.options import options_of
from vllm_longspec.proposers.interface import Candidates, Proposer, Requests
from vllm_longspec.proposers.magicdec.inputs import DraftInputs
from vllm_longspec.tree.best_children import best_children, best_children_in_pytorch
from vllm_longspec.tree.coupling import LevelNoise
from vllm_longspec.tree.shape import TreeShape


class MagicDecProposer(Proposer):
    target: nn.Module
    inputs: DraftInputs

    def __init__(self, vllm_config: VllmConfig, shape: TreeShape, device: torch.device):
        super().__init__(vllm_config, shape, device)
        options = options_of(vllm_config.speculative_config)
        assert options is not None and options.partial_attention is not None
        self.part = options.partial_attention
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # One row a request.
        self.query_start_loc_cpu = torch.arange(self.max_num_reqs + 1, dtype=torch.int32)
        self.query_start_loc = self.query_start_loc_cpu.to(device)

    def load(self, target: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        self.target = target
        self.inputs = self._allocate(self.vllm_config.cache_config.block_size)
        return nn.Module()

    def _allocate(self, block_size: int) -> DraftInputs:
        max_model_len = self.vllm_config.model_config.max_model_len
        return DraftInputs.allocate(self.part, block_size, self.max_num_reqs, max_model_len, self.device)

    def set_cache(self, kv_cache_config: KVCacheConfig) -> None:
        # Builders of metadata of its own, whose buffers no graph of verification reads.
        self.attn_groups, _, _ = init_attn_backend(kv_cache_config, self.vllm_config, self.device)
        self.kv_cache_config = kv_cache_config
        # Blocks, and the longest request, may be other ones than when weights were loaded.
        self.inputs = self._allocate(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.seq_lens_bound = torch.full((self.max_num_reqs,), self.inputs.max_seq_len, dtype=torch.int32)

    def describe(self) -> str:
        inputs = self.inputs
        return (
            f"drafts attend {self.part.sinks} first and {self.part.budget} last tokens, at most "
            f"{inputs.num_blocks} blocks of {inputs.block_size}, tables {inputs.num_bytes} bytes in all"
        )

    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        choose = best_children_in_pytorch if interpreting() else best_children
        num_reqs, num_steps = requests.idx_mapping.shape[0], self.shape.num_levels(num_nodes)
        tokens = requests.roots.tokens
        log_probs = torch.zeros(num_reqs, 1, dtype=torch.float32, device=self.device)
        drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(num_steps):
            self.inputs.write(step, tokens, requests.idx_mapping, requests.roots, requests.block_table)
            logits = self.target.compute_logits(self._forward(num_reqs))
            noise = None
            if requests.noise is not None:
                noise = LevelNoise(requests.noise, requests.idx_mapping, requests.roots.positions, step)
                # As the target's sampler sees them, to the last bit.
                logits = logits.float()
            _, tokens, log_probs = choose(logits, log_probs, 1, noise)
            drafted.append((tokens, log_probs))
        parents = torch.arange(-1, num_steps - 1, dtype=torch.int32, device=self.device)
        return Candidates(
            torch.cat([tokens for tokens, _ in drafted], dim=1),
            parents.expand(num_reqs, num_steps).contiguous(),
            torch.cat([log_probs for _, log_probs in drafted], dim=1),
            TreeShape((1,) * num_steps),
        )

    def _forward(self, num_reqs: int) -> torch.Tensor:
        """The target's last hidden states of the rows in `inputs`, [num_reqs, hidden_size]."""
        inputs = self.inputs
        slot_mappings = inputs.slot_mapping[:, :num_reqs]
        # The graph that a draft is captured in is the whole draft's, so the target runs without one of its own.
        with set_forward_context(
            self._attn_metadata(num_reqs),
            self.vllm_config,
            num_tokens=num_reqs,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=BatchDescriptor(num_tokens=num_reqs),
            slot_mapping=build_slot_mappings_by_layer(slot_mappings, self.kv_cache_config),
        ):
            # As the model runner calls it: compiled models have no guards against other arguments.
            return self.target(
                input_ids=inputs.input_ids[:num_reqs],
                positions=inputs.positions[:num_reqs],
                inputs_embeds=None,
                intermediate_tensors=None,
            )

    def _attn_metadata(self, num_reqs: int) -> dict[str, Any]:
        """By layer. Where each layer attends blocks of its own, each gets a table of its own here.

        Built in every step, in CUDA graphs too: what a backend computes from lengths is then computed anew.
        """
        inputs = self.inputs
        return build_attn_metadata(
            self.attn_groups,
            num_reqs,
            num_reqs,
            self.query_start_loc[: num_reqs + 1],
            self.query_start_loc_cpu[: num_reqs + 1],
            max_query_len=1,
            seq_lens=inputs.seq_lens,
            max_seq_len=inputs.max_seq_len,
            block_tables=(inputs.block_table[:num_reqs],),
            slot_mappings=inputs.slot_mapping[:, :num_reqs],
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=self.seq_lens_bound,
            positions=inputs.positions[:num_reqs],
        )
