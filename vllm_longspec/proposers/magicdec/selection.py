# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request a draft attends in each layer, chosen by what the request's verifications attended.

The settings are measured with `benchmarks/training/sparse.py`; docs/performance.md has the figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from vllm.utils.math_utils import cdiv

from vllm_longspec.attention.backend import PrefixAttention, TreeRequests
from vllm_longspec.proposers.magicdec.block_scores import Refresh, block_scores
from vllm_longspec.proposers.magicdec.choose_blocks import blocks_per_unit, choose_blocks, shortened_tables

# Last tokens that a choice leaves out, since they are attended whatever the scores say.
RECENT = 64
# Tokens from one choice of a layer to the next: eight verifications of four drafted tokens. Not fewer verifications of
# shorter drafts, in which choosing would take more of a step.
INTERVAL = 32


class Choice(NamedTuple):
    unit_blocks: int  # blocks that are chosen as one
    max_age: int  # tokens after which a choice is too old
    num_chosen: int  # blocks


def plan_choice(budget: int, num_steps: int, max_model_len: int, block_size: int) -> Choice:
    """How many blocks are chosen of a budget of tokens besides the first, for drafts of `num_steps` tokens.

    Raises:
        ValueError: the budget leaves no block to choose.
    """
    unit_blocks = blocks_per_unit(max_model_len, block_size)
    # What a layer may have emitted when it has its turn again, and the draft after it.
    max_age = INTERVAL + 2 * (1 + num_steps)
    # The last blocks slide on while a choice is kept. They reach back to what it was made from: to the last tokens that
    # it left out, and the unit that these cut.
    num_last = cdiv(RECENT + unit_blocks * block_size + max_age, block_size)
    num_chosen = (budget // block_size - num_last) // unit_blocks * unit_blocks
    if num_chosen <= 0:
        least = (unit_blocks + num_last) * block_size
        raise ValueError(
            f'budget must be at least {least} tokens with selection "scores" and blocks of {block_size} tokens, got '
            f'{budget}: give more, or "selection": "recent"'
        )
    return Choice(unit_blocks, max_age, num_chosen)


@dataclass(frozen=True)
class BlockSelection:
    """The choices of all requests. Allocated once for the engine, because CUDA graphs keep the addresses.

    The lists are num_layers * max_num_reqs * (num_chosen + 2) * 4 bytes. The scores, max_num_reqs * max_num_units * 4
    bytes, are read right after they were written, in the same stream, so all layers use the same tensor.
    """

    num_sinks: int  # first blocks
    budget: int  # tokens besides
    num_recent: int  # of them, last tokens that are not chosen from
    max_age: int  # tokens after which a choice is too old
    block_size: int
    unit_blocks: int
    interval: int  # tokens
    blocks: torch.Tensor  # int32 [num_layers, max_num_reqs, num_chosen] ascending, by req_state_idx
    num_blocks: torch.Tensor  # int32 [num_layers, max_num_reqs]
    chosen_at: torch.Tensor  # int32 [num_layers, max_num_reqs] lengths of the prefixes that were chosen from
    verified_len: torch.Tensor  # int32 [max_num_reqs] lengths of the prefixes of the last verification; 0 if none
    scores: torch.Tensor  # float32 [max_num_reqs, max_num_units] of the current layer, by batch position

    @classmethod
    def allocate(
        cls,
        sinks: int,
        budget: int,
        num_steps: int,
        num_layers: int,
        max_num_reqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> "BlockSelection":
        """For `sinks` first tokens, a budget of tokens besides, and drafts of `num_steps` tokens.

        Raises ValueError as `plan_choice` does.
        """
        unit_blocks, max_age, num_chosen = plan_choice(budget, num_steps, max_model_len, block_size)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        max_num_units = cdiv(max_model_len, unit_blocks * block_size)
        return cls(
            num_sinks=cdiv(sinks, block_size),
            budget=budget,
            num_recent=RECENT,
            max_age=max_age,
            block_size=block_size,
            unit_blocks=unit_blocks,
            interval=INTERVAL,
            blocks=zeros(num_layers, max_num_reqs, num_chosen),
            num_blocks=zeros(num_layers, max_num_reqs),
            chosen_at=zeros(num_layers, max_num_reqs),
            verified_len=zeros(max_num_reqs),
            scores=torch.zeros(max_num_reqs, max_num_units, device=device),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (self.blocks, self.num_blocks, self.chosen_at, self.verified_len, self.scores)
        return sum(tensor.nbytes for tensor in tensors)

    def start(self, req_state_indices: torch.Tensor) -> None:
        """Forgets what was chosen in these places, int64 [num_started]; their first verification chooses anew."""
        self.num_blocks.index_fill_(1, req_state_indices, 0)
        self.chosen_at.index_fill_(1, req_state_indices, 0)
        self.verified_len.index_fill_(0, req_state_indices, 0)

    def observer(self, layer: int) -> Callable[[PrefixAttention], None]:
        """What chooses the blocks of the layer with this index after its attention to the prefix."""

        def observe(attention: PrefixAttention) -> None:
            self.score(layer, attention)
            self.choose(layer, attention.trees)

        return observe

    def score(self, layer: int, attention: PrefixAttention) -> None:
        """Writes `scores` of the requests whose choice is due in this layer."""
        trees = attention.trees
        block_scores(
            attention.query,
            attention.kv_cache,
            trees.block_table,
            trees.prefix_lens,
            trees.query_start_loc,
            trees.max_query_len,
            attention.scale,
            attention.lse,
            self._refresh(layer, trees),
            self.unit_blocks * self.block_size,
            self.scores[: trees.num_reqs],
            attention.scales,
        )

    def choose(self, layer: int, trees: TreeRequests) -> None:
        """Renews what is due in this layer, by `scores`. The last layer keeps the lengths that were verified."""
        choose_blocks(
            self.scores[: trees.num_reqs],
            trees.prefix_lens,
            self._refresh(layer, trees),
            self.num_sinks,
            self.num_recent,
            self.block_size,
            self.unit_blocks,
            self.blocks[layer],
            self.num_blocks[layer],
            is_last_layer=layer == len(self.blocks) - 1,
        )

    def _refresh(self, layer: int, trees: TreeRequests) -> Refresh:
        # Shorter prefixes are attended as a whole.
        min_prefix_len = self.num_sinks * self.block_size + self.budget
        return Refresh(
            trees.idx_mapping,
            self.verified_len,
            self.chosen_at[layer],
            self.interval,
            layer,
            min_prefix_len,
            self.max_age,
        )

    def write_tables(
        self,
        block_table: torch.Tensor,  # int32 [num_reqs, max_num_blocks]
        idx_mapping: torch.Tensor,  # int64 [num_reqs] req_state_idx; -1 for padding
        positions: torch.Tensor,  # int64 [num_reqs] of the rows of a draft step
        tables: torch.Tensor,  # int32 [num_layers, num_reqs, width], written
    ) -> None:
        """See `shortened_tables`."""
        shortened_tables(
            block_table,
            idx_mapping,
            positions,
            self.num_sinks,
            self.budget,
            self.block_size,
            self.blocks,
            self.num_blocks,
            self.chosen_at,
            self.max_age,
            tables,
        )
