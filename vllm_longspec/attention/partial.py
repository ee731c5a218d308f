# SPDX-License-Identifier: Apache-2.0
"""Block tables of a part of a request's cache: its first tokens and its last ones, in whole blocks.

The table has the blocks of the first tokens, then those from the one with the first of the last `budget` tokens on.
Only the last block may be partly filled, so any kernel for paged caches attends the part as if it were a shorter
request.
"""

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv
from vllm.v1.worker.block_table import get_block_table_width


def most_blocks(sinks: int, budget: int, block_size: int, max_model_len: int) -> int:
    """Blocks that a part of `sinks` first and `budget` last tokens has at most."""
    # The last tokens may begin anywhere in a block.
    return min(cdiv(sinks, block_size) + cdiv(budget - 1, block_size) + 1, cdiv(max_model_len, block_size))


@triton.jit
def num_left_out(num_tokens, num_sink_blocks, budget, BLOCK_SIZE: tl.constexpr):
    """Blocks between those of the first tokens and the one with the first of the last `budget` of `num_tokens`."""
    return tl.maximum(tl.maximum(num_tokens - budget, 0) // BLOCK_SIZE - num_sink_blocks, 0)


@triton.jit
def write_part(
    block_table_ptr,  # [max_num_blocks] of the request
    num_tokens,
    num_skipped,  # of `num_left_out`
    num_sink_blocks,
    part_ptr,  # [width], written; zeros after the part
    width,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place = tl.arange(0, WIDTH)
    source = tl.where(place < num_sink_blocks, place, place + num_skipped)
    blocks = tl.load(block_table_ptr + source, mask=source < tl.cdiv(num_tokens, BLOCK_SIZE), other=0)
    tl.store(part_ptr + place, blocks, mask=place < width)


@dataclass(frozen=True)
class PartialTables:
    """The parts of a batch's prefixes. Allocated once, so that CUDA graphs can hold on to them."""

    sinks: int  # first tokens
    budget: int  # last tokens
    block_size: int
    max_len: int  # most tokens of a part
    block_table: torch.Tensor  # int32 [max_num_reqs, width]
    lens: torch.Tensor  # int32 [max_num_reqs] tokens of a part

    @classmethod
    def allocate(
        cls, sinks: int, budget: int, block_size: int, max_num_reqs: int, max_model_len: int, device: torch.device
    ) -> "PartialTables":
        num_blocks = most_blocks(sinks, budget, block_size, max_model_len)
        # As wide as vLLM makes its tables for so many blocks: kernels may load a tile of blocks at once.
        width = get_block_table_width(num_blocks, block_size)
        return cls(
            sinks,
            budget,
            block_size,
            num_blocks * block_size,
            torch.zeros(max_num_reqs, width, dtype=torch.int32, device=device),
            torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.block_table.nbytes + self.lens.nbytes

    def write(
        self,
        block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks] whole ones, contiguous in the last dimension
        prefix_lens: torch.Tensor,  # int32 [num_reqs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tables of the parts, int32 [num_reqs, width], and how many tokens they have, int32 [num_reqs].

        A prefix of no more than `sinks` + `budget` tokens is its own part.
        """
        num_reqs = prefix_lens.shape[0]
        part, lens = self.block_table[:num_reqs], self.lens[:num_reqs]
        _partial_tables_kernel[(num_reqs,)](
            block_table,
            block_table.stride(0),
            prefix_lens,
            part,
            part.stride(0),
            lens,
            cdiv(self.sinks, self.block_size),
            self.budget,
            BLOCK_SIZE=self.block_size,
            WIDTH=triton.next_power_of_2(part.shape[1]),
            num_warps=4,
        )
        return part, lens


@triton.jit(do_not_specialize=["num_sink_blocks", "budget"])
def _partial_tables_kernel(
    block_table_ptr,  # int32 [num_reqs, max_num_blocks]
    block_table_stride,
    prefix_lens_ptr,  # int32 [num_reqs]
    part_ptr,  # int32 [num_reqs, width]
    width,
    lens_ptr,  # int32 [num_reqs]
    num_sink_blocks,
    budget,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    num_tokens = tl.load(prefix_lens_ptr + request)
    num_skipped = num_left_out(num_tokens, num_sink_blocks, budget, BLOCK_SIZE)
    tl.store(lens_ptr + request, num_tokens - num_skipped * BLOCK_SIZE)
    write_part(
        block_table_ptr + request * block_table_stride,
        num_tokens,
        num_skipped,
        num_sink_blocks,
        part_ptr + request * width,
        width,
        BLOCK_SIZE,
        WIDTH,
    )
