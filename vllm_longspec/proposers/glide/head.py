# SPDX-License-Identifier: Apache-2.0
"""A copy of the target's head for the draft: of all rows or some, quantised if the draft is.

With a large vocabulary the head is most of what each level reads.
"""

from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

# fp8 kernels need multiples of this. vLLM's own padding fails for a layer with one scale per row (vLLM issue 47005).
TILE_ROWS = 16
# That are copied before the next ones are.
ROWS_AT_ONCE = 8192
# Bytes of the logits of all ranks that are gathered by an all-reduce.
MOST_REDUCED = 2 << 20


class DraftLogits(LogitsProcessor):
    """vLLM's LogitsProcessor with another gather, for the few rows of a level.

    vLLM gathers logits with NCCL and puts the ranks' shards side by side: 10 to 16 us and 4 for 4 to 16 rows of 32,768
    logits a rank on two H200s. Its all-reduce, which reads the other ranks' memory where it can, takes 5 us for the
    hidden states of as many rows. So few logits are added up, each rank's with zeros of the others.
    """

    def _gather_logits(
        self,
        logits: torch.Tensor,  # [num_rows, shard_size]
    ) -> torch.Tensor:  # [num_rows, num_ranks * shard_size]
        num_ranks = get_tensor_model_parallel_world_size()
        if num_ranks * logits.nbytes > MOST_REDUCED:
            return super()._gather_logits(logits)
        shards = logits.new_zeros(logits.shape[0], num_ranks, logits.shape[1])
        shards[:, get_tensor_model_parallel_rank()] = logits
        return tensor_model_parallel_all_reduce(shards.flatten(1))


def has_rows(head: nn.Module) -> bool:
    """Whether a head's weight has a row for each token; a quantised one does not."""
    return isinstance(head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))


def can_be_quantised(head: nn.Module) -> bool:
    """Whether all rows of this rank can be: vLLM pads a vocabulary to whole tiles, but not its shards."""
    return has_rows(head) and head.weight.shape[0] % TILE_ROWS == 0


def copy_head(
    head: nn.Module,  # weight: [num_rows, hidden_size], this rank's shard
    token_ids: torch.Tensor | None,  # int64 [num_tokens], rows to copy; None for all
    quant_config: QuantizationConfig | None,
    writable: bool = False,  # whether `write_rows` will be called; always possible on a GPU
) -> ReplicatedLinear:
    """Returns a head for `DraftLogits` with a weight of its own; needs `has_rows(head)`.

    With all rows each rank copies its shard. With some, each has as many slots, of consecutive tokens: whole tiles,
    which copies of the last token's row fill at the end. `DraftLogits` puts the ranks' logits one after the other and
    removes the padding's.
    """
    weight = head.weight
    if token_ids is not None:
        padding = token_ids[-1:].expand(-len(token_ids) % (TILE_ROWS * head.tp_size))
        shards = torch.cat([token_ids, padding]).chunk(head.tp_size)
        weight = head.weight.new_empty(len(shards[0]), head.weight.shape[1])
        # All ranks make all rows and keep their own. A few at a time, so that this takes little more memory than a
        # shard: weights are reloaded when the KV cache has what is free.
        for rank, shard in enumerate(shards):
            for tokens, kept in zip(shard.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True):
                rows = rows_of_all_ranks(head, tokens)
                if rank == head.tp_rank:
                    kept.copy_(rows)
    with set_default_torch_dtype(weight.dtype), weight.device:
        copied = ReplicatedLinear(
            weight.shape[1], weight.shape[0], bias=False, quant_config=quant_config, prefix="draft_head"
        )
        # vLLM quantises a layer once its loader has received the whole weight.
        parameter: Any = copied.get_parameter("weight")
        parameter.weight_loader(parameter, weight.data)
    if quant_config is None:
        if writable and current_platform.is_cpu():
            # vLLM's switch for weights that are not packed.
            copied._cpu_skip_gemm_dispatch = True
        copied.quant_method.process_weights_after_loading(copied)
    # A head of which every rank has all rows is one of a single rank.
    copied.tp_rank, copied.tp_size = head.tp_rank, head.tp_size
    return copied


def rows_of_all_ranks(
    head: nn.Module,  # weight: [num_rows, hidden_size], this rank's shard
    token_ids: torch.Tensor,  # int64 [num_tokens], the same on all ranks
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """The rows of these tokens; with tensor parallelism all ranks call it together, and never in a CUDA graph."""
    if head.tp_size == 1:
        return head.weight[token_ids]
    shard = head.shard_indices
    rows = token_ids - shard.org_vocab_start_index
    is_here = (rows >= 0) & (rows < shard.num_org_elements)
    # Each row is on one rank, and zeros on the others.
    return tensor_model_parallel_all_reduce(head.weight[rows.where(is_here, 0)].where(is_here.unsqueeze(1), 0))


def write_rows(
    copied: nn.Module,  # of `copy_head`, not quantised or with one scale per row
    slots: torch.Tensor,  # int64 [num_slots] different slots, of any rank
    rows: torch.Tensor,  # [num_slots, hidden_size] what is written there
) -> None:
    """Replaces the rows of this rank's slots in place, quantised as vLLM quantises them.

    Nothing waits for the device, and no shape depends on how many slots are this rank's.
    """
    weight = copied.weight.data
    if weight.dtype == rows.dtype:
        written = [(weight, rows)]
    else:
        # As vLLM's `Fp8PtpcOnlineLinearMethod` stores it: transposed, with a scale for each row.
        bounds = torch.finfo(weight.dtype)
        scales = rows.abs().amax(dim=1, keepdim=True).float().div_(bounds.max).clamp_min_(1 / (bounds.max * 512))
        quantised = (rows / scales).clamp_(bounds.min, bounds.max).to(weight.dtype)
        # As bytes, which every kernel of PyTorch moves.
        written = [
            (weight.t().view(torch.uint8), quantised.view(torch.uint8)),
            (copied.weight_scale.data, scales),
        ]
    if copied.tp_size == 1:
        for stored, values in written:
            stored.index_copy_(0, slots, values)
        return
    shard_size = written[0][0].shape[0]
    slots = slots - copied.tp_rank * shard_size
    is_here = (slots >= 0) & (slots < shard_size)
    # For each slot of another rank one of this rank's is written again, with the same row. If it has none, its first
    # slot is written with what it holds.
    any_here = is_here.any()
    source = torch.arange(len(slots), device=slots.device).where(is_here, is_here.int().argmax())
    slots = slots[source].where(any_here, 0)
    for stored, values in written:
        stored.index_copy_(0, slots, values[source].where(any_here, stored[:1]))
