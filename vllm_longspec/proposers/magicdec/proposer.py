# SPDX-License-Identifier: Apache-2.0
"""MagicDec's `Proposer`: every drafted token is a step of the target over a part of its own cache.

A step writes K and V of its row where the target will write those of the same position when it verifies, and layer by
layer before anything attends them. So nothing of a draft is left in the cache below the next root.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend

from vllm_longspec.attention.backend import Observer
from vllm_longspec.interpreter import interpreting
from vllm_longspec.options import options_of
from vllm_longspec.proposers.interface import Candidates, Proposer, Requests, Roots
from vllm_longspec.proposers.magicdec.inputs import DraftInputs
from vllm_longspec.proposers.magicdec.selection import BlockSelection
from vllm_longspec.tree.best_children import best_children, best_children_in_pytorch
from vllm_longspec.tree.coupling import LevelNoise
from vllm_longspec.tree.shape import TreeShape

# Below vLLM's logger, whose handlers it uses.
logger = init_logger(f"vllm.{__name__}")


class MagicDecProposer(Proposer):
    target: nn.Module
    inputs: DraftInputs
    selection: BlockSelection | None = None  # None: every layer attends the last tokens
    layer_names: Sequence[str] = ()  # in the order in which they attend, once the cache is laid out

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
        self._allocate(self.vllm_config.cache_config.block_size, len(target_attn_layer_names))
        return nn.Module()

    def _allocate(self, block_size: int, num_layers: int) -> None:
        part, max_model_len = self.part, self.vllm_config.model_config.max_model_len
        self.inputs = DraftInputs.allocate(part, block_size, self.max_num_reqs, max_model_len, num_layers, self.device)
        if part.selection == "scores":
            self.selection = BlockSelection.allocate(
                part.sinks,
                part.budget,
                self.shape.max_depth,
                num_layers,
                self.max_num_reqs,
                max_model_len,
                block_size,
                self.device,
            )

    def set_cache(self, kv_cache_config: KVCacheConfig) -> None:
        # Builders of metadata of its own, whose buffers no graph of verification reads.
        self.attn_groups, _, _ = init_attn_backend(kv_cache_config, self.vllm_config, self.device)
        self.kv_cache_config = kv_cache_config
        self.layer_names = kv_cache_config.kv_cache_groups[0].layer_names
        # Blocks, and the longest request, may be other ones than when weights were loaded.
        self._allocate(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size, len(self.layer_names))
        # Known only here, since `load` is before the sizes of blocks and of the longest request are settled.
        logger.info_once(
            "MagicDec: a draft attends at most %d blocks of %d tokens; its inputs, tables and attention metadata take "
            "%d bytes in all",
            self.inputs.num_blocks,
            self.inputs.block_size,
            self.num_bytes,
            scope="global",
        )
        self.seq_lens_bound = torch.full((self.max_num_reqs,), self.inputs.max_seq_len, dtype=torch.int32)

    def observers(self) -> Mapping[str, Observer]:
        if self.selection is None:
            return {}
        return {name: self.selection.observer(layer) for layer, name in enumerate(self.layer_names)}

    def start(self, idx_mapping: torch.Tensor, roots: Roots, token_ids: torch.Tensor, max_root_position: int) -> None:
        if self.selection is not None:
            self.selection.start(idx_mapping)

    def describe(self) -> str:
        kind = "last" if self.selection is None else "chosen or last"
        return f"drafts attend {self.part.sinks} first and {self.part.budget} {kind} tokens"

    @property
    def _builders(self) -> list[Any]:
        return [builder for groups in self.attn_groups for group in groups for builder in group.metadata_builders]

    @property
    def num_bytes(self) -> int:
        """Of all that is allocated on the device beside the CUDA graphs, once the cache is laid out."""
        values = [value for builder in self._builders for value in vars(builder).values()]
        kept = [self.query_start_loc, *(value for value in values if isinstance(value, torch.Tensor))]
        num_bytes = sum(tensor.nbytes for tensor in kept if tensor.device.type == self.device.type)
        return num_bytes + self.inputs.num_bytes + (0 if self.selection is None else self.selection.num_bytes)

    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        choose = best_children_in_pytorch if interpreting() else best_children
        num_reqs, num_steps = requests.idx_mapping.shape[0], self.shape.num_levels(num_nodes)
        tokens = requests.roots.tokens
        log_probs = torch.zeros(num_reqs, 1, dtype=torch.float32, device=self.device)
        drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(num_steps):
            self.inputs.write(step, tokens, requests.idx_mapping, requests.roots, requests.block_table)
            if self.selection is not None:
                self.selection.write_tables(
                    requests.block_table,
                    requests.idx_mapping,
                    self.inputs.positions[:num_reqs],
                    self.inputs.block_tables[:, :num_reqs],
                )
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
        """By layer. Each has a table of its own where there is a selection; lengths are the same in all.

        Built in every step, in CUDA graphs too: what a backend computes from lengths is then computed anew.
        """
        inputs = self.inputs
        for builder in self._builders:
            builder.expect_equal_lengths(num_reqs, inputs.max_seq_len)
        metadata = build_attn_metadata(
            self.attn_groups,
            num_reqs,
            num_reqs,
            self.query_start_loc[: num_reqs + 1],
            self.query_start_loc_cpu[: num_reqs + 1],
            max_query_len=1,
            seq_lens=inputs.seq_lens,
            max_seq_len=inputs.max_seq_len,
            block_tables=(inputs.block_tables[0, :num_reqs],),
            slot_mappings=inputs.slot_mapping[:, :num_reqs],
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=self.seq_lens_bound,
            positions=inputs.positions[:num_reqs],
        )
        if self.selection is not None:
            for layer, name in enumerate(self.layer_names):
                metadata[name] = metadata[name].with_block_table(inputs.block_tables[layer, :num_reqs])
        return metadata
