# SPDX-License-Identifier: Apache-2.0
"""Selection by scores: the scores against attention as its definition says, choices and tables against plain Python."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracles.attention import (
    TOLERANCE,
    PagedBatch,
    attend_slots,
    attention_cases,
    gather,
    make_batch,
    prefix_slots,
    quantise,
    quantised_cases,
)
from vllm_longspec.attention import prefix
from vllm_longspec.attention.backend import PrefixAttention, TreeAttentionMetadata, TreeRequests
from vllm_longspec.attention.cpu import CausalRequests, TreeCpuAttentionImpl
from vllm_longspec.proposers.magicdec import block_scores as module
from vllm_longspec.proposers.magicdec.block_scores import Refresh, block_scores
from vllm_longspec.proposers.magicdec.choose_blocks import MAX_UNITS, blocks_per_unit, choose_blocks, shortened_tables
from vllm_longspec.proposers.magicdec.selection import INTERVAL, RECENT, BlockSelection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOT_A_BLOCK = -77


def refresh(
    indices: list[int],
    verified_len: list[int],
    interval: int = 4,
    phase: int = 0,
    min_prefix_len: int = 0,
    chosen_at: list[int] | None = None,
    max_age: int = 1 << 30,
) -> Refresh:
    return Refresh(
        torch.tensor(indices, device=DEVICE),
        torch.tensor(verified_len, dtype=torch.int32, device=DEVICE),
        torch.tensor(chosen_at or [0] * len(verified_len), dtype=torch.int32, device=DEVICE),
        interval,
        phase,
        min_prefix_len,
        max_age,
    )


def always(num_reqs: int) -> Refresh:
    return refresh(list(range(num_reqs)), [0] * num_reqs)


def run(batch: PagedBatch, lse: torch.Tensor, unit_size: int, when: Refresh, max_query_len: int = 0) -> torch.Tensor:
    num_reqs, max_num_blocks = batch.block_table.shape
    width = -(-max_num_blocks * batch.kv_cache.shape[2] // unit_size)
    scores = torch.full((num_reqs, width), torch.nan, device=DEVICE)
    block_scores(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.prefix_lens,
        batch.query_start_loc,
        max_query_len or batch.max_query_len,
        batch.scale,
        lse.float().to(DEVICE),
        when,
        unit_size,
        scores,
        batch.scales,
    )
    return scores.cpu()


def log_sum_exps(batch: PagedBatch) -> torch.Tensor:
    """Float64 [num_heads, num_tokens]"""
    query_lens = batch.query_start_loc.diff().tolist()
    return attend_slots(batch, [[prefix_slots(batch, request)] * length for request, length in enumerate(query_lens)])[
        1
    ]


def attended(batch: PagedBatch, lse: torch.Tensor, request: int, unit_size: int) -> torch.Tensor:
    """The weights that a request's rows give to each unit of its prefix in all heads, float64 [num_units]."""
    num_heads, num_kv_heads = batch.query.shape[1], batch.kv_cache.shape[1]
    group = num_heads // num_kv_heads
    keys, _ = gather(batch, prefix_slots(batch, request))
    total = torch.zeros(keys.shape[1], dtype=torch.float64)
    start, end = batch.query_start_loc[request : request + 2].tolist()
    for token in range(start, end):
        for head in range(num_heads):
            query = batch.query[token, head].cpu().double()
            if batch.scales is not None and batch.scales.query is not None:
                query = query * batch.scales.query.cpu().expand(num_kv_heads)[head // group]
            total += torch.exp(keys[head // group] @ query * batch.scale - lse[head, token])
    return torch.stack([part.sum() for part in total.split(unit_size)]) if len(total) else total


def check(batch: PagedBatch, unit_blocks: int) -> None:
    unit_size = unit_blocks * batch.kv_cache.shape[2]
    lse = log_sum_exps(batch)
    num_reqs = len(batch.prefix_lens)
    scores = run(batch, lse, unit_size, always(num_reqs))
    query_lens = batch.query_start_loc.diff().tolist()
    tolerance = TOLERANCE[batch.output_dtype or batch.query.dtype]
    for request, query_len in enumerate(query_lens):
        expected = attended(batch, lse, request, unit_size)
        torch.testing.assert_close(scores[request, : len(expected)].double(), expected, rtol=tolerance, atol=tolerance)
        assert scores[request, len(expected) :].isnan().all()
        if len(expected):
            # Every row of every head has a weight of 1 to give.
            total = query_len * batch.query.shape[1]
            assert float(scores[request, : len(expected)].sum()) == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize(
    ("dtype", "head_size", "num_heads", "num_kv_heads", "block_size", "layout"), attention_cases()[::2], ids=str
)
def test_ragged_batch(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    layout: str,
) -> None:
    prefix_lens = [block_size, 0, 1, 330, block_size - 1, 2 * block_size + 1]
    query_lens = [3, 2, 1, 5, 1, 2]
    batch = make_batch(prefix_lens, query_lens, num_heads, num_kv_heads, head_size, block_size, dtype, layout, DEVICE)
    check(batch, 1 if head_size < 96 else 2)


@pytest.mark.parametrize(
    ("dtype", "per_head", "with_query", "num_heads", "num_kv_heads", "block_size", "layout"), quantised_cases(), ids=str
)
def test_quantised_cache(
    dtype: torch.dtype,
    per_head: bool,
    with_query: bool,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    layout: str,
) -> None:
    lens = [block_size, 0, 330], [3, 2, 6]
    batch = make_batch(*lens, num_heads, num_kv_heads, 80, block_size, dtype, layout, DEVICE)
    check(quantise(batch, per_head, with_query), 1)


@pytest.mark.parametrize(("max_rows", "max_keys", "num_programs"), [(16, 32, 1), (16, 64, 3), (2048, 512, 7)])
def test_tiles_and_programs(max_rows: int, max_keys: int, num_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and keys than a tile holds, and more tiles than programs as well as fewer."""
    monkeypatch.setattr(prefix, "INTERPRETER_ROWS", max_rows)
    monkeypatch.setattr(prefix, "INTERPRETER_KEYS", max_keys)
    monkeypatch.setattr(module, "num_programs", lambda device: num_programs)
    check(make_batch([130, 0, 300, 64], [23, 1, 7, 16], 5, 1, 64, 16, torch.float32, "tokens_first", DEVICE), 2)


def test_max_query_len_may_be_a_loose_bound() -> None:
    batch = make_batch([40, 7], [3, 5], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    lse = log_sum_exps(batch)
    exact, loose = (run(batch, lse, 16, always(2), length) for length in (5, 40))
    torch.testing.assert_close(loose, exact, equal_nan=True)


@pytest.mark.parametrize("phase", [0, 3])
def test_only_what_is_due_is_written(phase: int) -> None:
    """Padding never is, whatever its length and blocks say; a request's first verification always, if it is long."""
    prefix_lens, query_lens = [40, 7, 20, 60, 33, 70], [3, 0, 2, 1, 2, 4]
    batch = make_batch(prefix_lens, query_lens, 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    lse = log_sum_exps(batch)
    batch.prefix_lens[1] = 1 << 30
    batch.block_table[1] = 1 << 30
    indices, verified_len, interval = [5, -1, 0, 3, 2, 4], [0, 99, 18, 58, 30, 39], 3
    chosen_at = [0, 0, 30, 55, 28, 39]
    when = refresh(indices, verified_len, interval, phase, 33, chosen_at, max_age=6)
    scores = run(batch, lse, 16, when)
    due = [
        index >= 0
        and length >= 33
        and (
            verified_len[index] == 0
            # A multiple of the interval was passed.
            or any((reached + phase + index) % interval == 0 for reached in range(verified_len[index] + 1, length + 1))
            or length - chosen_at[index] > 6
        )
        for index, length in zip(indices, prefix_lens, strict=True)
    ]
    assert {True, False} == set(due)
    assert [not row.isnan().all() for row in scores] == due


def choose(
    scores: torch.Tensor,  # [num_reqs, max_num_units]
    prefix_lens: list[int],
    when: Refresh,
    num_chosen: int,
    num_sinks: int,
    num_recent: int,
    block_size: int,
    unit_blocks: int,
    is_last_layer: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    max_num_reqs = len(when.verified_len)
    blocks = torch.full((max_num_reqs, num_chosen), NOT_A_BLOCK, dtype=torch.int32, device=DEVICE)
    num_blocks = torch.full((max_num_reqs,), NOT_A_BLOCK, dtype=torch.int32, device=DEVICE)
    choose_blocks(
        scores.to(DEVICE),
        torch.tensor(prefix_lens, dtype=torch.int32, device=DEVICE),
        when,
        num_sinks,
        num_recent,
        block_size,
        unit_blocks,
        blocks,
        num_blocks,
        is_last_layer,
    )
    return blocks.cpu(), num_blocks.cpu()


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "wide"])
@pytest.mark.parametrize(("block_size", "unit_blocks"), [(16, 1), (16, 2), (48, 1), (16, 4)])
def test_choices_are_the_best_units(kind: str, block_size: int, unit_blocks: int) -> None:
    torch.manual_seed(3)
    unit_size, num_sinks, num_recent, num_chosen = block_size * unit_blocks, 2, 40, 12
    prefix_lens = [5, 20 * unit_size, 40, 3 * unit_size + 7, 29 * unit_size + 1, num_recent + unit_size, 0]
    num_reqs, width = len(prefix_lens), 31
    scores = torch.rand(num_reqs, width) * 40
    if kind == "ties":
        scores = scores.round() // 8
    elif kind == "zeros":
        scores *= torch.rand_like(scores) < 0.1
    elif kind == "wide":
        scores = torch.exp(torch.randn_like(scores) * 20)
    indices = random.Random(kind).sample(range(num_reqs + 2), num_reqs)
    when = refresh(indices, [0] * (num_reqs + 2))
    blocks, num_blocks = choose(scores, prefix_lens, when, num_chosen, num_sinks, num_recent, block_size, unit_blocks)
    for request, (index, prefix_len) in enumerate(zip(indices, prefix_lens, strict=True)):
        candidates = [
            unit
            for unit in range(width)
            if unit * unit_blocks >= num_sinks and (unit + 1) * unit_size <= prefix_len - num_recent
        ]
        best = sorted(candidates, key=lambda unit: (float(scores[request, unit]), unit), reverse=True)
        best = sorted(best[: num_chosen // unit_blocks])
        expected = [unit * unit_blocks + block for unit in best for block in range(unit_blocks)]
        assert int(num_blocks[index]) == len(expected)
        assert blocks[index].tolist() == expected + [NOT_A_BLOCK] * (num_chosen - len(expected))
    unused = set(range(num_reqs + 2)) - set(indices)
    assert all(int(num_blocks[index]) == NOT_A_BLOCK for index in unused)


def test_what_is_not_due_keeps_its_choice_and_the_last_layer_keeps_lengths() -> None:
    indices, verified_len = [2, -1, 0, 1, 4], [0, 396, 397, 9, 3]
    prefix_lens, scores = [399, 400, 400, 400, 99], torch.rand(5, 30)
    when = refresh(indices, verified_len, interval=4, phase=2, min_prefix_len=100)
    for is_last_layer in (False, True):
        _, num_blocks = choose(scores, prefix_lens, when, 4, 1, 64, 16, 1, is_last_layer)
        # Requests 2 (401 to 403 have no multiple of 4) and 4 (too short) are not due; 0 is new and 1 has its turn, as
        # 399 to 403 do.
        assert [int(count) for count in num_blocks] == [4, 4, NOT_A_BLOCK, NOT_A_BLOCK, NOT_A_BLOCK]
        assert when.verified_len.tolist() == ([400, 400, 399, 9, 99] if is_last_layer else verified_len)


def shorten(
    block_table: torch.Tensor,
    indices: list[int],
    positions: list[int],
    num_sinks: int,
    budget: int,
    block_size: int,
    blocks: torch.Tensor,
    num_blocks: torch.Tensor,
    width: int,
    chosen_at: torch.Tensor | None = None,
    max_age: int = 1 << 30,
) -> torch.Tensor:
    tables = torch.full((len(blocks), len(indices), width), NOT_A_BLOCK, dtype=torch.int32, device=DEVICE)
    shortened_tables(
        block_table.to(DEVICE),
        torch.tensor(indices, device=DEVICE),
        torch.tensor(positions, device=DEVICE),
        num_sinks,
        budget,
        block_size,
        blocks.to(DEVICE),
        num_blocks.to(DEVICE),
        (torch.zeros_like(num_blocks) if chosen_at is None else chosen_at).to(DEVICE),
        max_age,
        tables,
    )
    return tables.cpu()


@pytest.mark.parametrize("seed", range(12))
def test_tables(seed: int) -> None:
    """Properties that hold for any choice: whatever was chosen when the request was shorter, or nothing."""
    source = random.Random(seed)
    block_size, num_sinks = source.choice([16, 48]), source.choice([0, 1, 3])
    num_recent = source.choice([16, 40])
    room = source.choice([2, 5, 17])
    budget = (room + -(-num_recent // block_size)) * block_size + source.choice([0, 0, 5])
    num_layers, num_reqs, max_num_reqs, max_num_blocks = 3, 6, 8, 60
    width = num_sinks + -(-budget // block_size) + 1
    # A block's number in the table says which one it is.
    block_table = 1000 * torch.arange(1, num_reqs + 1)[:, None] + torch.arange(max_num_blocks)
    indices = [*source.sample(range(max_num_reqs), num_reqs - 1), -1]
    positions = [source.randrange(max_num_blocks * block_size) for _ in indices]
    positions[0] = source.randrange(budget)
    positions[1] = max_num_blocks * block_size - 1
    blocks = torch.full((num_layers, max_num_reqs, room), NOT_A_BLOCK, dtype=torch.int32)
    num_blocks = torch.zeros(num_layers, max_num_reqs, dtype=torch.int32)
    for layer in range(num_layers):
        for index, position in zip(indices[:-1], positions, strict=False):
            candidates = range(num_sinks, max(num_sinks, (position - num_recent) // block_size))
            chosen = sorted(source.sample(candidates, min(len(candidates), source.choice([0, room // 2, room]))))
            blocks[layer, index, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            num_blocks[layer, index] = len(chosen)

    tables = shorten(block_table.int(), indices, positions, num_sinks, budget, block_size, blocks, num_blocks, width)
    assert bool((tables[:, -1] == 0).all())
    for request, (index, position) in enumerate(zip(indices[:-1], positions, strict=False)):
        last = position // block_size
        skipped = max(0, max(0, position + 1 - budget) // block_size - num_sinks)
        for layer in range(num_layers):
            table = tables[layer, request].tolist()
            listed = [block - 1000 * (request + 1) for block in table if block]
            assert table == [1000 * (request + 1) + block for block in listed] + [0] * (width - len(listed))
            assert listed == sorted(set(listed))
            # As many blocks as without a choice, and what `skipped` says.
            assert len(listed) == last + 1 - skipped
            assert set(range(min(num_sinks, last + 1))) <= set(listed)
            assert set(range(max(0, position + 1 - num_recent) // block_size, last + 1)) <= set(listed)
            chosen = blocks[layer, index, : int(num_blocks[layer, index])].tolist()
            assert set(chosen) <= set(listed)
            # The rest are the latest.
            rest = [block for block in range(num_sinks, last + 1) if block not in chosen]
            others = [block for block in listed if block >= num_sinks and block not in chosen]
            assert others == rest[len(rest) - len(others) :]


@pytest.mark.parametrize("budget", [64, 100])
def test_without_a_choice_a_table_is_that_of_the_last_tokens(budget: int) -> None:
    block_table = torch.arange(1, 31, dtype=torch.int32)[None]
    nothing = torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    positions = list(range(400))
    tables = shorten(block_table.repeat(400, 1), [0] * 400, positions, 2, budget, 16, *nothing, 10)[0].tolist()
    for position, table in zip(positions, tables, strict=True):
        first = (position + 1 - budget) // 16
        blocks = [block for block in range(position // 16 + 1) if block < 2 or block >= first]
        assert table == [1 + block for block in blocks] + [0] * (10 - len(blocks))


def test_an_old_choice_counts_as_none() -> None:
    block_table = torch.arange(1, 31, dtype=torch.int32)[None].repeat(3, 1)
    chosen = torch.tensor([[[3, 5]] * 3]).int(), torch.full((1, 3), 2, dtype=torch.int32)
    # 45 tokens old, older, and of the last one.
    chosen_at = torch.tensor([[355, 354, 399]]).int()
    tables = shorten(block_table, [0, 1, 2], [400] * 3, 1, 112, 16, *chosen, 10, chosen_at, 45)[0].tolist()
    nothing = torch.zeros(1, 3, 2, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)
    without = shorten(block_table, [0, 1, 2], [400] * 3, 1, 112, 16, *nothing, 10)[0].tolist()
    assert tables[1] == without[1]
    assert tables[0] == tables[2] != without[0] and {4, 6} <= set(tables[0])


@pytest.mark.parametrize("gamma", [1, 4, 16])
def test_what_the_last_blocks_leave_was_chosen_from(gamma: int) -> None:
    """Between two turns of a layer no token lies after those that it chose from and before the last blocks."""
    block_size, prefix_len, budget = 16, 3000, 1024
    selection = allocate(num_steps=gamma, budget=budget, max_model_len=4096, block_size=block_size)
    unit_size = selection.unit_blocks * block_size
    chosen_from = (prefix_len - selection.num_recent) // unit_size * unit_size
    num_chosen = selection.blocks.shape[2]
    # Rows of the draft after the last verification before the layer's next turn, if all was accepted.
    position = prefix_len + INTERVAL - 1 + (1 + gamma) + gamma
    assert position - prefix_len <= selection.max_age
    first_of_last = (max(position + 1 - budget, 0) // block_size + num_chosen) * block_size
    assert first_of_last <= chosen_from


def test_units_are_larger_where_there_are_many_blocks() -> None:
    assert blocks_per_unit(4096, 16) == blocks_per_unit(MAX_UNITS * 16, 16) == 1
    assert blocks_per_unit(MAX_UNITS * 16 + 1, 16) == 2
    assert blocks_per_unit(1 << 20, 16) == 4


def allocate(**changes: int) -> BlockSelection:
    sizes = {
        "sinks": 20,
        "budget": 208,
        "num_steps": 3,
        "num_layers": 2,
        "max_num_reqs": 3,
        "max_model_len": 1000,
        "block_size": 16,
    }
    return BlockSelection.allocate(**(sizes | changes), device=torch.device(DEVICE))


def test_settings_of_a_selection() -> None:
    selection = allocate()
    assert (selection.num_sinks, selection.unit_blocks, selection.interval) == (2, 1, INTERVAL)
    # Of 13 blocks 8 are the last tokens': 64, a unit, 32 to the next turn, and two steps of four tokens.
    assert selection.max_age == 40
    assert selection.blocks.shape == (2, 3, 5)
    assert selection.scores.shape == (3, 63)
    assert selection.num_bytes == 2 * 3 * (5 + 2) * 4 + 3 * 4 + 3 * 63 * 4
    assert allocate(block_size=128, budget=512).unit_blocks == 1
    with pytest.raises(ValueError, match=r"budget must be at least 144 tokens with selection .*, got 143: give more"):
        allocate(budget=143)


class Attended:
    """Verifications of a batch in which every layer sees the same, through `BlockSelection.observer`."""

    def __init__(self, selection: BlockSelection, prefix_lens: list[int], indices: list[int], seed: int = 0):
        self.selection = selection
        query_lens = [4] * len(prefix_lens)
        self.batch = make_batch(prefix_lens, query_lens, 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE, seed)
        lse = log_sum_exps(self.batch)
        batch, num_reqs = self.batch, len(prefix_lens)
        self.scores = [attended(batch, lse, request, 16) for request in range(num_reqs)]
        masks = torch.zeros(num_reqs, 4, 1, dtype=torch.int32, device=DEVICE)
        trees = TreeRequests(
            num_reqs,
            4 * num_reqs,
            batch.query_start_loc,
            4,
            batch.prefix_lens,
            max(prefix_lens),
            batch.block_table,
            batch.slot_mapping,
            masks,
            in_graph=False,
            idx_mapping=torch.tensor(indices, device=DEVICE),
        )
        lse = lse.float().to(DEVICE)
        self.attention = PrefixAttention(trees, batch.query, batch.kv_cache, batch.scale, lse, None)

    def verify(self) -> list[list[list[int]]]:
        """The choices afterwards, by layer and req_state_idx."""
        layers = range(len(self.selection.blocks))
        for layer in layers:
            self.selection.observer(layer)(self.attention)
        return [
            [
                row[:count].tolist()
                for row, count in zip(self.selection.blocks[layer], self.selection.num_blocks[layer], strict=True)
            ]
            for layer in layers
        ]

    def expected(self, request: int) -> list[int]:
        """The best blocks of a request, as many as are chosen, without those of the sinks."""
        candidates = range(self.selection.num_sinks, (int(self.batch.prefix_lens[request]) - RECENT) // 16)
        best = sorted(candidates, key=lambda block: float(self.scores[request][block]))
        return sorted(best[-self.selection.blocks.shape[2] :])


def test_verifications_choose_in_turn() -> None:
    first = Attended(allocate(), [500, 300, 150], [2, 0, 1])
    chosen = first.verify()
    # The third is attended as a whole.
    assert chosen == [[first.expected(1), [], first.expected(0)]] * 2
    assert first.selection.verified_len.tolist() == [300, 150, 500]

    # The same requests later: other queries, other keys.
    renewed = set()
    for length in range(1, INTERVAL + 1):
        later = Attended(first.selection, [500 + length, 300 + length, 160], [2, 0, 1], seed=length)
        before, chosen = chosen, later.verify()
        for layer in (0, 1):
            for request, index in ((0, 2), (1, 0)):
                if chosen[layer][index] != before[layer][index]:
                    assert chosen[layer][index] == later.expected(request)
                    renewed.add((layer, index, length))
    # Every layer of every request once, and not all in the same step.
    assert len(renewed) == len({pair[:2] for pair in renewed}) == 4
    assert len({length for layer, index, length in renewed if index == 2}) == 2
    assert len({length for layer, index, length in renewed if layer == 0}) == 2

    # What starts in the place of request 2 has no choice, and chooses in its first verification.
    selection = later.selection
    selection.start(torch.tensor([2], device=DEVICE))
    assert [counts.tolist()[2] for counts in selection.num_blocks] == [0, 0]
    assert selection.verified_len.tolist()[2] == 0 and selection.num_blocks[:, 0].tolist() == [5, 5]
    assert [layer[2] for layer in later.verify()] == [later.expected(0)] * 2


def test_a_draft_step_attends_what_was_chosen() -> None:
    verified = Attended(allocate(), [500, 300], [2, 0])
    verified.verify()
    tables = torch.full((2, 3, 16), NOT_A_BLOCK, dtype=torch.int32, device=DEVICE)
    block_table = torch.arange(1, 65, dtype=torch.int32, device=DEVICE).repeat(3, 1)
    verified.selection.write_tables(
        block_table,
        torch.tensor([2, 0, -1], device=DEVICE),
        torch.tensor([501, 301, 0], device=DEVICE),
        tables,
    )
    for request, last in ((0, 501 // 16), (1, 301 // 16)):
        table = [block - 1 for block in tables[0, request].tolist() if block]
        assert set(verified.expected(request)) < set(table)
        assert table[:2] == [0, 1] and table[-4:] == list(range(last - 3, last + 1))
        assert torch.equal(tables[0, request], tables[1, request])
    assert bool((tables[:, 2] == 0).all())


def test_layers_may_attend_different_blocks() -> None:
    table = torch.zeros(2, 5, dtype=torch.int32)
    shared = CausalRequests([0, 1, 2], [70, 3], table)
    own: Any = TreeAttentionMetadata(None, shared).with_block_table(table + 1).causal
    assert (own.query_start_loc, own.seq_lens) == ([0, 1, 2], [70, 3])
    assert torch.equal(own.block_table, table + 1)
    assert shared.block_table is table


def test_an_observer_sees_the_attention_of_its_layer() -> None:
    """The rows of trees alone, with the log-sum-exp of their prefixes; other layers are not observed."""
    batch = make_batch([40, 7, 33], [3, 5, 2], 4, 2, 32, 16, torch.float32, "tokens_first", DEVICE)
    lse = log_sum_exps(batch)
    seen: list[PrefixAttention] = []
    trees = TreeRequests(
        2,
        8,
        batch.query_start_loc[:3],
        5,
        batch.prefix_lens[:2],
        40,
        batch.block_table[:2],
        batch.slot_mapping[:8],
        torch.ones(2, 5, 1, dtype=torch.int32, device=DEVICE),
        in_graph=False,
        idx_mapping=torch.tensor([4, 1], device=DEVICE),
        observers={"layers.1": seen.append},
    )
    implementation = TreeCpuAttentionImpl(4, 32, batch.scale, 2)
    for name in ("layers.0", "layers.1"):
        layer: Any = SimpleNamespace(layer_name=name, kv_cache_dtype="auto")
        output = torch.zeros_like(batch.query)
        key = batch.query[:, :2]
        metadata = TreeAttentionMetadata(trees, causal=None)
        implementation.forward(layer, batch.query, key, key, batch.kv_cache, metadata, output)
    [attention] = seen
    assert attention.trees is trees and attention.scales is None and attention.scale == batch.scale
    assert torch.equal(attention.query, batch.query[:8])
    torch.testing.assert_close(attention.lse.cpu().double(), lse[:, :8], rtol=0, atol=1e-5)
