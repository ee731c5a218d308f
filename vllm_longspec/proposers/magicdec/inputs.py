# SPDX-License-Identifier: Apache-2.0
"""What the target gets in a step of drafting: a row for each request, and a block table of a part of its cache.

The part is the first `sinks` tokens and the last `budget` ones, up to the row itself (`attention/partial.py`). Keys
were rotated at their true positions when they were cached, and so is the row's query. Where each layer has a table of
its own (`choose_blocks.py`), it attends as many tokens, and only the table is not written here.
"""

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.block_table import get_block_table_width

from vllm_longspec.attention.partial import most_blocks, num_left_out, write_part
from vllm_longspec.options import PartialAttention
from vllm_longspec.proposers.interface import Roots


@dataclass(frozen=True)
class DraftInputs:
    """Allocated once, so that CUDA graphs can hold on to them. By place in the draft's batch."""

    part: PartialAttention
    block_size: int
    max_position: int  # nothing is written after it
    num_blocks: int  # most blocks of a part
    input_ids: torch.Tensor  # int32 [max_num_reqs]
    positions: torch.Tensor  # int64 [max_num_reqs]
    slot_mapping: torch.Tensor  # int64 [1, max_num_reqs], a row for the only group of layers
    seq_lens: torch.Tensor  # int32 [max_num_reqs] tokens attended, the row's own included
    # int32 [num_layers, max_num_reqs, width]: one for all layers, or one for each, which are written elsewhere
    block_tables: torch.Tensor

    @classmethod
    def allocate(
        cls,
        part: PartialAttention,
        block_size: int,
        max_num_reqs: int,
        max_model_len: int,
        num_layers: int,
        device: torch.device,
    ) -> "DraftInputs":
        num_blocks = most_blocks(part.sinks, part.budget, block_size, max_model_len)
        num_tables = num_layers if part.selection == "scores" else 1
        # As wide as vLLM makes its tables for so many blocks: kernels may load a tile of blocks at once.
        width = get_block_table_width(num_blocks, block_size)
        return cls(
            part,
            block_size,
            max_model_len - 1,
            num_blocks,
            torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
            torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
            torch.full((1, max_num_reqs), PAD_SLOT_ID, dtype=torch.int64, device=device),
            torch.ones(max_num_reqs, dtype=torch.int32, device=device),
            torch.zeros(num_tables, max_num_reqs, width, dtype=torch.int32, device=device),
        )

    @property
    def max_seq_len(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        tensors = (self.input_ids, self.positions, self.slot_mapping, self.seq_lens, self.block_tables)
        return sum(tensor.nbytes for tensor in tensors)

    def write(
        self,
        step: int,
        tokens: torch.Tensor,  # int64 [num_reqs], or [num_reqs, 1]
        idx_mapping: torch.Tensor,  # int64 [num_reqs]; -1 for padding
        roots: Roots,
        block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks] whole ones
    ) -> None:
        """Describes the rows at `step` tokens after the roots.

        Tables of single layers are left to `BlockSelection.write_tables`. A row after `max_position` keeps that
        position and has no slot; what it drafts is never verified. A padding request attends one token of block 0 and
        has no slot.
        """
        num_reqs = idx_mapping.shape[0]
        assert tokens.is_contiguous() and tokens.numel() == num_reqs
        _write_draft_inputs_kernel[(num_reqs,)](
            tokens,
            idx_mapping,
            roots.positions,
            block_table,
            block_table.stride(0),
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.seq_lens,
            self.block_tables,
            self.block_tables.shape[2],
            step,
            self.max_position,
            cdiv(self.part.sinks, self.block_size),
            self.part.budget,
            BLOCK_SIZE=self.block_size,
            PAD_SLOT=PAD_SLOT_ID,
            WIDTH=triton.next_power_of_2(self.block_tables.shape[2]),
            WRITES_TABLE=self.part.selection == "recent",
            num_warps=4,
        )


@triton.jit(do_not_specialize=["step", "max_position", "num_sink_blocks", "budget"])
def _write_draft_inputs_kernel(
    tokens_ptr,  # int64 [num_reqs]
    idx_mapping_ptr,  # int64 [num_reqs]
    root_positions_ptr,  # int64 [num_reqs]
    block_table_ptr,  # int32 [num_reqs, max_num_blocks]
    block_table_stride,
    input_ids_ptr,  # int32 [num_reqs]
    positions_ptr,  # int64 [num_reqs]
    slot_mapping_ptr,  # int64 [num_reqs]
    seq_lens_ptr,  # int32 [num_reqs]
    part_ptr,  # int32 [num_reqs, width], if there is one table for all layers
    width,
    step,
    max_position,
    num_sink_blocks,
    budget,
    BLOCK_SIZE: tl.constexpr,
    PAD_SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITES_TABLE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    is_request = tl.load(idx_mapping_ptr + request) >= 0
    linear = tl.load(root_positions_ptr + request) + step
    position = tl.where(is_request, tl.minimum(linear, max_position), 0)
    token = tl.load(tokens_ptr + request)
    tl.store(input_ids_ptr + request, tl.where(is_request, token, 0).to(tl.int32))
    tl.store(positions_ptr + request, position)

    block_table_ptr += request * block_table_stride
    own = position // BLOCK_SIZE
    block = tl.load(block_table_ptr + own, mask=is_request, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_mapping_ptr + request, tl.where(is_request & (linear <= max_position), slot, PAD_SLOT))

    num_skipped = num_left_out(position + 1, num_sink_blocks, budget, BLOCK_SIZE)
    tl.store(seq_lens_ptr + request, (position + 1 - num_skipped * BLOCK_SIZE).to(tl.int32))
    if WRITES_TABLE:
        num_tokens = tl.where(is_request, position + 1, 0)
        part_ptr += request * width
        write_part(block_table_ptr, num_tokens, num_skipped, num_sink_blocks, part_ptr, width, BLOCK_SIZE, WIDTH)
