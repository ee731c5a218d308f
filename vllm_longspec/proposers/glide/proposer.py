# SPDX-License-Identifier: Apache-2.0
"""GLIDE's `Proposer`: drafts a tree by beam search, and keeps the window of the last tokens up to date."""

from copy import copy

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace, set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import get_draft_load_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.mem_utils import format_gib
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_longspec.attention.cache_scales import cache_scales, quantise_query
from vllm_longspec.attention.partial import PartialTables
from vllm_longspec.frequent_tokens import first_tokens, read_frequent_tokens, special_tokens, token_texts
from vllm_longspec.options import options_of
from vllm_longspec.proposers.glide.beam import CrossAttention, grow_trees
from vllm_longspec.proposers.glide.head import can_be_quantised, has_rows
from vllm_longspec.proposers.glide.learned_head import HeadLearner
from vllm_longspec.proposers.glide.model import GlideForCausalLM
from vllm_longspec.proposers.glide.resemblance import Resemblance
from vllm_longspec.proposers.glide.window import DraftWindow, TokenRows, list_settled
from vllm_longspec.proposers.interface import Candidates, ComputedStep, Proposer, Requests, Roots
from vllm_longspec.tree.shape import TreeShape


class GlideProposer(Proposer):
    model: GlideForCausalLM
    part: PartialTables | None = None  # what the cross-attention below the root sees of the cache; None for all
    learner: HeadLearner | None = None  # of a head that learns its tokens

    def __init__(self, vllm_config: VllmConfig, shape: TreeShape, device: torch.device):
        super().__init__(vllm_config, shape, device)
        assert vllm_config.speculative_config is not None
        self.speculative_config = vllm_config.speculative_config
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # Rotary embeddings end there.
        self.max_position = vllm_config.model_config.max_model_len - 1
        # int32 [max_width + 1, max_num_reqs + 1], where the queries of each request begin, by width of the level.
        widths = torch.arange(shape.max_width + 1, dtype=torch.int32, device=device)
        self.query_starts = widths[:, None] * torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)

    def load(self, target: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        self.draft_vllm_config = draft_vllm_config = replace(
            self.vllm_config,
            model_config=self.speculative_config.draft_model_config,
            load_config=get_draft_load_config(self.vllm_config),
            # The target's does not apply to the draft.
            quant_config=None,
            parallel_config=replace(
                self.speculative_config.draft_parallel_config, rank=self.vllm_config.parallel_config.rank
            ),
        )
        # CUDA graphs run the draft without vLLM's compiler, so it needs vLLM's fused kernels, whatever the target uses.
        draft_vllm_config.compilation_config = compilation_config = copy(self.vllm_config.compilation_config)
        compilation_config.mode = CompilationMode.NONE
        compilation_config.custom_ops = ["all"]
        with set_model_tag("glide_draft"):
            model = get_model(vllm_config=draft_vllm_config, prefix="glide")
        model.share_with(target)
        self.vocab_size = self.vllm_config.model_config.get_vocab_size()
        options = options_of(self.speculative_config)
        assert options is not None
        with set_current_vllm_config(draft_vllm_config):
            if isinstance(options.frequent_tokens, str):
                token_ids = read_frequent_tokens(options.frequent_tokens, self.vocab_size)
                model.take_own_head(torch.tensor(token_ids, device=self.device))
            elif options.frequent_tokens is not None and has_rows(model.lm_head):
                always = special_tokens(self.vllm_config.model_config)
                token_ids, num_pinned = first_tokens(options.frequent_tokens, self.vocab_size, always)
                model.take_own_head(torch.tensor(token_ids, device=self.device), learns=True)
                if (texts := token_texts(self.vllm_config.model_config)) is not None:
                    model.resemblance = Resemblance(texts, self.device)
                self.learner = HeadLearner(model, num_pinned)
            elif model.quant_config is not None and can_be_quantised(model.lm_head):
                model.take_own_head(None)
        self.model = model
        self.target_layer_name = max(target_attn_layer_names, key=extract_layer_index)
        self.window = DraftWindow(self.max_num_reqs, model, self.vllm_config.model_config.dtype, self.device)
        return model

    def set_cache(self, kv_cache_config: KVCacheConfig) -> None:
        options = options_of(self.speculative_config)
        assert options is not None
        if (part := options.partial_attention) is not None:
            self.part = PartialTables.allocate(
                part.sinks,
                part.budget,
                kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                self.max_num_reqs,
                self.vllm_config.model_config.max_model_len,
                self.device,
            )

    def describe(self) -> str:
        num_bytes = self.window.bytes_per_request
        options = options_of(self.speculative_config)
        assert options is not None
        part = options.partial_attention
        attended = (
            f", cross-attention below the root to {part.sinks} first and {part.budget} last tokens" if part else ""
        )
        learned = " (learned from what is served)" if self.learner is not None else ""
        if self.learner is None and isinstance(options.frequent_tokens, int):
            learned = " (the target's head is quantised)"
        return (
            f"{self.model.draft_vocab_size} of {self.vocab_size} tokens drafted{learned}, quantization "
            f"{self.speculative_config.quantization}, draft state {num_bytes} bytes per request "
            f"({format_gib(num_bytes * self.max_num_reqs)} GiB in all){attended}"
        )

    def renew(self) -> None:
        with set_current_vllm_config(self.draft_vllm_config):
            self.model.renew_head()

    def observe_step(self, step: ComputedStep) -> None:
        if self.learner is not None:
            self.learner.start_step(step.hidden_states[: step.query_start_loc[-1]])

    def start(self, idx_mapping: torch.Tensor, roots: Roots, token_ids: torch.Tensor, max_root_position: int) -> None:
        self.window.rebuild(token_ids, idx_mapping, roots.positions, max_root_position)
        if self.learner is not None:
            self.learner.add_prompts(idx_mapping, roots, token_ids, max_root_position)

    def skip(self, requests: Requests) -> None:
        if self.learner is not None:
            self.learner.count_emitted(requests)
        # A window that was just rebuilt gets the same values again.
        self.window.append(
            requests.token_ids,
            requests.idx_mapping,
            requests.roots.positions,
            requests.num_new_tokens,
            max_new=requests.max_new_tokens,
        )

    def propose(self, requests: Requests, num_nodes: int) -> Candidates:
        if self.learner is not None:
            self.learner.count_emitted(requests)
        shape = self.shape.for_best(num_nodes)
        rows = list_settled(
            requests.token_ids,
            requests.idx_mapping,
            requests.roots.positions,
            requests.num_new_tokens,
            requests.max_new_tokens,
            requests.roots.tokens,
            self.max_position,
        )
        drafted = grow_trees(
            self.model,
            shape,
            rows,
            requests.roots.positions,
            requests.idx_mapping,
            self.window.kv,
            self._cross_attention(requests),
            self.max_position,
            requests.noise,
        )
        return Candidates(drafted.tokens, drafted.parents, drafted.log_probs, shape)

    def _cross_attention(self, requests: Requests) -> CrossAttention:
        """Attention to the target's prefix in its last layer: of roots to all of it, of nodes perhaps to a part."""
        layer = self.vllm_config.compilation_config.static_forward_context[self.target_layer_name]
        scales = cache_scales(layer)
        num_reqs = requests.block_table.shape[0]
        whole = part = requests.block_table, requests.roots.prefix_lens, requests.max_prefix_len
        if self.part is not None:
            # The same for all levels, which do not attend nodes here.
            part = *self.part.write(*whole[:2]), min(requests.max_prefix_len, self.part.max_len)

        def attend(query: torch.Tensor, width: int, depth: int) -> torch.Tensor:
            output = torch.empty_like(query)
            layer.impl.prefix_attention(
                quantise_query(layer, query),
                layer.kv_cache,
                *(part if depth > 0 else whole),
                self.query_starts[width, : num_reqs + 1],
                width,
                output,
                scales,
            )
            return output

        return attend

    def profile(self, num_reqs: int) -> None:
        idx_mapping = torch.arange(num_reqs, device=self.device)
        zeros = torch.zeros_like(idx_mapping)
        options = options_of(self.speculative_config)
        assert options is not None
        # Each request's root, and as many settled tokens as a step emits at most; no window keeps them.
        tokens = zeros.repeat(2 + options.max_depth)
        grow_trees(
            self.model,
            self.shape,
            TokenRows(tokens, tokens, tokens - 1),
            zeros,
            idx_mapping,
            self.window.kv,
            lambda query, width, depth: torch.zeros_like(query),
            self.max_position,
        )
