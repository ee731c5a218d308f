# SPDX-License-Identifier: Apache-2.0
"""The GLIDE draft: one decoder layer that reads the target's KV cache (LongSpec, arXiv:2502.17421, section 3).

    h = embed(token)
    h = h + self_attn(input_layernorm(h))                    causal, within a sliding window
    h = h + cross_attn(post_self_attention_layernorm(h))     queries only; K and V are the target's last layer's cache
    h = h + mlp(post_cross_attention_layernorm(h))
    logits = lm_head(h)                                      no norm before the head

A family's constant factors (Granite) apply to the embedding, to what each sublayer adds, to the scores of attention and
to logits, as in the target. Embedding, rotary embedding, head and logits processor are the target's own modules; only a
head that is quantised or restricted to some tokens is a copy (`head.py`). One class serves all families of
`vllm_longspec/targets/families.py`.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.platforms import current_platform

from vllm_longspec.proposers.glide.attention_splits import AttentionSplits, merge_splits
from vllm_longspec.proposers.glide.embedding import can_embed, embed_and_normalise
from vllm_longspec.proposers.glide.fp8_inputs import accept_quantised_rows, activate, add, normalise, quantise
from vllm_longspec.proposers.glide.head import DraftLogits, copy_head, has_rows, rows_of_all_ranks, write_rows
from vllm_longspec.proposers.glide.resemblance import Resemblance
from vllm_longspec.proposers.glide.rotation import RotaryTable, Rotate, rotary_table, rotate_by
from vllm_longspec.targets.families import modules_of, multipliers_of

# Position p attends positions [p - WINDOW_SIZE, p].
WINDOW_SIZE = 512


class GlideAttention(Protocol):
    """Attention of the layer. The caller implements it, because the draft's state is not part of the model."""

    def self_attention(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        positions: torch.Tensor,  # int64 [num_tokens]
        table: RotaryTable | None,  # rotates query and key at their positions; None if they are rotated
    ) -> torch.Tensor | AttentionSplits:  # [num_nodes, num_heads, head_size] of the first tokens; the others end here
        ...

    def cross_attention(
        self,
        query: torch.Tensor,  # [num_nodes, num_heads, head_size]
    ) -> torch.Tensor:  # [num_nodes, num_heads, head_size]
        ...


class GlideSelfAttention(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.head_size = head_size
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_size,
            num_heads,
            num_kv_heads,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads

    def project(
        self,
        hidden: torch.Tensor | QuantizedActivation,  # [num_tokens, hidden_size]
        positions: torch.Tensor,  # [num_tokens]
        rotate: Rotate | None,  # None leaves it to the caller
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # query, key, value: [num_tokens, heads, head_size]
        qkv, _ = self.qkv_proj(hidden)
        kv_size = self.num_kv_heads * self.head_size
        query, key, value = qkv.split([self.num_heads * self.head_size, kv_size, kv_size], dim=-1)
        if rotate is not None:
            query, key = rotate(positions, query, key)
        heads = (qkv.shape[0], -1, self.head_size)
        return query.view(heads), key.view(heads), value.view(heads)


class GlideCrossAttention(nn.Module):
    """Queries only: K (already rotated) and V come from the target's cache, so there is no k_proj or v_proj."""

    def __init__(
        self, hidden_size: int, head_size: int, num_heads: int, quant_config: QuantizationConfig | None, prefix: str
    ):
        super().__init__()
        self.head_size = head_size
        self.q_proj = ColumnParallelLinear(
            hidden_size, num_heads * head_size, bias=True, quant_config=quant_config, prefix=f"{prefix}.q_proj"
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

    def project(
        self,
        hidden: torch.Tensor | QuantizedActivation,  # [num_tokens, hidden_size]
        positions: torch.Tensor,  # [num_tokens]
        rotate: Rotate,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        query, _ = self.q_proj(hidden)
        query, _ = rotate(positions, query, None)
        return query.view(query.shape[0], -1, self.head_size)


class GlideForCausalLM(nn.Module):
    """A GLIDE draft built from vLLM's parallel layers; call `share_with` before the first forward pass."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"glide.": "", "model.": ""},
        orig_to_new_substr={
            # In every published checkpoint, but unused.
            "cross_attn.k_proj": None,
            "cross_attn.v_proj": None,
        },
        orig_to_new_stacked={
            "self_attn.q_proj": ("self_attn.qkv_proj", "q"),
            "self_attn.k_proj": ("self_attn.qkv_proj", "k"),
            "self_attn.v_proj": ("self_attn.qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    # Set by `share_with`.
    embed_tokens: nn.Module
    rotary_emb: nn.Module
    lm_head: nn.Module
    target_head: nn.Module
    logits_processor: LogitsProcessor
    target_logits_processor: LogitsProcessor
    # int64 [draft_vocab_size] tokens of a restricted head; None for the whole vocabulary
    token_ids: torch.Tensor | None
    # int64 [vocab_size] of a restricted head that learns (`learned_head.py`), else None
    token_counts: torch.Tensor | None
    # of the tokens of a restricted head that learns, if their texts are known
    resemblance: Resemblance | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        # Buffers, as vLLM keeps buffers when weights are discarded (sleep level 2).
        self.register_buffer("token_ids", None, persistent=False)
        self.register_buffer("token_counts", None, persistent=False)
        self.resemblance = None
        model_config = vllm_config.model_config
        config = model_config.hf_config
        # Online quantization of the draft; the target's does not apply.
        self.quant_config = quant_config = vllm_config.quant_config
        self.multipliers = multipliers_of(config)
        hidden_size = config.hidden_size
        head_size = model_config.get_head_size()
        num_heads = config.num_attention_heads
        num_kv_heads = model_config.get_total_num_kv_heads()
        if num_heads % get_tensor_model_parallel_world_size():
            raise ValueError(
                f"GLIDE draft: {num_heads} attention heads cannot be split over "
                f"tensor_parallel_size={get_tensor_model_parallel_world_size()}"
            )

        def norm() -> RMSNorm:
            return RMSNorm(hidden_size, eps=config.rms_norm_eps)

        self.input_layernorm = norm()
        self.self_attn = GlideSelfAttention(
            hidden_size, head_size, num_heads, num_kv_heads, quant_config, maybe_prefix(prefix, "self_attn")
        )
        self.post_self_attention_layernorm = norm()
        self.cross_attn = GlideCrossAttention(
            hidden_size, head_size, num_heads, quant_config, maybe_prefix(prefix, "cross_attn")
        )
        self.post_cross_attention_layernorm = norm()
        self.mlp = LlamaMLP(
            hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "mlp"),
        )
        for linear in (
            *(self.self_attn.qkv_proj, self.self_attn.o_proj),
            *(self.cross_attn.q_proj, self.cross_attn.o_proj),
            *(self.mlp.gate_up_proj, self.mlp.down_proj),
        ):
            accept_quantised_rows(linear)

    def share_with(self, target: nn.Module) -> None:
        """Shares the target's embedding, rotary embedding, head and logits processor."""
        modules = modules_of(target)
        self.embed_tokens = modules.embed_tokens
        self.embeds_by_row = get_tensor_model_parallel_world_size() == 1 and isinstance(
            self.embed_tokens.quant_method, UnquantizedEmbeddingMethod
        )
        self.rotary_emb = modules.rotary_emb
        self.lm_head = self.target_head = modules.lm_head
        self.logits_processor = self.target_logits_processor = modules.logits_processor
        self.token_ids = self.token_counts = self.resemblance = None

    def take_own_head(
        self,
        token_ids: torch.Tensor | None,  # int64 [num_tokens], the rows to copy; None for all
        learns: bool = False,
    ) -> None:
        """Copies the target's head, quantised if the draft is; `replace_tokens` changes the tokens of one that learns.

        Raises:
            ValueError: the target's head is quantised, so it has no rows.
        """
        if not has_rows(self.lm_head):
            raise ValueError(
                "frequent_tokens is not supported with a quantised head: give false to draft all tokens, or serve a "
                "target that leaves its head as it is"
            )
        targets = self.logits_processor
        self.token_ids = token_ids
        if learns:
            assert token_ids is not None
            self.token_counts = token_ids.new_zeros(targets.org_vocab_size)
        self.lm_head = copy_head(self.lm_head, token_ids, self.quant_config, writable=learns)
        self.logits_processor = DraftLogits(
            targets.org_vocab_size if token_ids is None else len(token_ids),
            scale=targets.scale,
            soft_cap=targets.soft_cap,
        )
        # A `head_dtype` is for heads that are not quantised, and candidates need no higher precision.
        self.logits_processor.head_dtype = None
        accept_quantised_rows(self.lm_head)

    def renew_head(self) -> None:
        """Copies the target's head again, if the draft has a copy, after its weights were reloaded."""
        if self.lm_head is self.target_head:
            return
        writable = self.token_counts is not None
        renewed = copy_head(self.target_head, self.token_ids, self.quant_config, writable)
        if current_platform.is_cpu():
            # CPU kernels read packed weights.
            self.lm_head = renewed
            return
        # In place: CUDA graphs read these tensors.
        for parameter, value in zip(self.lm_head.parameters(), renewed.parameters(), strict=True):
            parameter.data.copy_(value.data)

    def replace_tokens(
        self,
        slots: torch.Tensor,  # int64 [num_slots] different places in `token_ids`
        tokens: torch.Tensor,  # int64 [num_slots] with which all of `token_ids` are different
    ) -> None:
        """Gives slots of a head that learns other tokens, in place: CUDA graphs read these tensors.

        All ranks call it together, between two drafts and never in a CUDA graph.
        """
        assert self.token_ids is not None and self.token_counts is not None
        self.token_ids.index_copy_(0, slots, tokens)
        write_rows(self.lm_head, slots, rows_of_all_ranks(self.target_head, tokens))

    def target_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, hidden_size] of the target, what its head multiplies
    ) -> torch.Tensor:  # [num_rows, vocab_size], the same on all ranks, which call it together
        return self.target_logits_processor(self.target_head, hidden_states)

    @property
    def draft_vocab_size(self) -> int:
        return self.logits_processor.org_vocab_size

    @property
    def rotate(self) -> Rotate:
        return rotate_by(self.rotary_emb, self.self_attn.head_size)

    @property
    def rotary_table(self) -> RotaryTable | None:
        """The table by which attention rotates self-attention queries and keys; None if the module has to."""
        return rotary_table(self.rotary_emb, self.input_layernorm.weight.dtype)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return _times(self.multipliers.embedding, self.embed_tokens(input_ids))

    def embed(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
    ) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:  # [num_tokens, hidden_size] each
        """The input of the self-attention's projection, and the embeddings."""
        norm, linear = self.input_layernorm, self.self_attn.qkv_proj
        if self.embeds_by_row and can_embed(self.embed_tokens.weight, norm):
            return embed_and_normalise(input_ids, self.embed_tokens.weight, self.multipliers.embedding, norm, linear)
        return normalise(norm, linear, self.embed_input_ids(input_ids))

    def window_kv(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
    ) -> tuple[torch.Tensor, torch.Tensor, RotaryTable | None]:
        """Self-attention K and V of emitted tokens. In a single layer they depend on token and position alone.

        Returns key and value, [num_tokens, num_kv_heads, head_size] each, and the table by which keys are still to be
        rotated; None if they are.
        """
        table = self.rotary_table
        hidden, _ = self.embed(input_ids)
        _, key, value = self.self_attn.project(hidden, positions, self.rotate if table is None else None)
        return key, value, table

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        attention: GlideAttention,
    ) -> torch.Tensor | QuantizedActivation:  # [num_nodes, hidden_size], as the head takes it
        table = self.rotary_table
        hidden, residual = self.embed(input_ids)
        query, key, value = self.self_attn.project(hidden, positions, self.rotate if table is None else None)
        attended = attention.self_attention(query, key, value, positions, table)
        # Tokens of which only K and V are needed come last, so that rows which go on are contiguous.
        num_nodes = attended.shape[0]
        positions, residual = positions[:num_nodes], residual[:num_nodes]
        hidden, _ = self.self_attn.o_proj(merge_splits(self.self_attn.o_proj, attended))
        hidden = _times(self.multipliers.residual, hidden)

        hidden, residual = normalise(self.post_self_attention_layernorm, self.cross_attn.q_proj, hidden, residual)
        query = self.cross_attn.project(hidden, positions, self.rotate)
        attended = attention.cross_attention(query)
        hidden, _ = self.cross_attn.o_proj(quantise(self.cross_attn.o_proj, attended.reshape(num_nodes, -1)))
        hidden = _times(self.multipliers.residual, hidden)

        hidden, residual = normalise(self.post_cross_attention_layernorm, self.mlp.gate_up_proj, hidden, residual)
        gate_up, _ = self.mlp.gate_up_proj(hidden)
        hidden, _ = self.mlp.down_proj(activate(self.mlp.act_fn, self.mlp.down_proj, gate_up))
        return add(self.lm_head, hidden, self.multipliers.residual, residual)

    def compute_logits(
        self,
        hidden_states: torch.Tensor | QuantizedActivation,  # [num_tokens, hidden_size]
    ) -> torch.Tensor:  # [num_tokens, draft_vocab_size]
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # Checkpoints may leave biases out.
        biases = {name: parameter for name, parameter in self.named_parameters() if name.endswith(".bias")}
        for bias in biases.values():
            bias.data.zero_()
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded | biases.keys()


def _times(multiplier: float, hidden: torch.Tensor) -> torch.Tensor:
    # A kernel less for families without multipliers.
    return hidden if multiplier == 1.0 else hidden * multiplier
