# SPDX-License-Identifier: Apache-2.0
"""The draft's self-attention against whole K and V, and the ring that it reads."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from tests.oracles import window as oracle
from vllm_longspec.proposers.glide import attention_splits
from vllm_longspec.proposers.glide.attention_splits import AttentionSplits, choose_num_splits, merge_splits
from vllm_longspec.proposers.glide.rotation import RotaryTable
from vllm_longspec.proposers.glide.window_attention import window_attention, write_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 has 8 bits of precision, and Triton's interpreter cuts the rest off instead of rounding.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NUM_SPLITS = (1, 2, 4, 8)
# Where the number of splits is not what is tested.
WHOLE_OR_SPLIT = (1, 4)
UNQUANTISED: Any = SimpleNamespace()


def attend(query, *arguments, num_splits):
    """Attention, merged."""
    attended = window_attention(query, *arguments, num_splits=num_splits)
    if num_splits == 1:
        assert isinstance(attended, torch.Tensor) and attended.shape == query.shape
    else:
        assert isinstance(attended, AttentionSplits)
        assert attended.values.shape == (num_splits, query.shape[:2].numel(), *query.shape[2:])
        assert attended.values.dtype == query.dtype and attended.lse.shape == attended.values.shape[:-1]
        assert attended.values.isfinite().all() and not attended.lse.isnan().any()
        assert (attended.values[attended.lse == float("-inf")] == 0).all()
    merged = merge_splits(UNQUANTISED, attended)
    assert isinstance(merged, torch.Tensor)
    return merged.view(query.shape)


def positions_of(root_positions, depth, width):
    return (root_positions.long() + depth)[:, None].expand(-1, width).contiguous()


def random_table(rotary_dim, is_neox_style, dtype, num_positions=1500):
    """Any factors will do: not of one angle, so that none stands in for another."""
    return RotaryTable(torch.randn(num_positions, rotary_dim, device=DEVICE).to(dtype), is_neox_style)


def rotated(rows, positions, table):
    """vLLM's own rotation of rows [..., heads, head_size] at positions [...]."""
    flat = rows.flatten(0, -3).contiguous()
    turned, _ = RotaryEmbedding.forward_static(
        positions.flatten(),
        flat.flatten(1),
        None,
        rows.shape[-1],
        table.cos_sin.shape[1],
        table.cos_sin,
        table.is_neox_style,
    )
    return turned.view(rows.shape)


class Draft:
    """A batch in the middle of drafting: whole histories, the ring written from them, and nodes' K, V and masks."""

    def __init__(self, shape, root_positions, window, num_heads, num_kv_heads, head_size, dtype, seed=0):
        torch.manual_seed(seed)
        num_reqs = len(root_positions)
        num_rows = 1 + sum(shape)
        self.window, self.num_rows = window, num_rows
        self.num_heads, self.head_size, self.dtype = num_heads, head_size, dtype
        self.levels = [(0, 1)]
        for width in shape:
            first, previous = self.levels[-1]
            self.levels.append((first + previous, width))

        # The paths of node rows, root first, and the same as bits.
        self.paths = []
        self.node_masks = torch.zeros(num_reqs, num_rows, -(-num_rows // 32), dtype=torch.int64)
        for request in range(num_reqs):
            paths = [[0]]
            for (above, above_width), (_, width) in zip(self.levels, self.levels[1:], strict=False):
                parents = torch.randint(above, above + above_width, (width,)).tolist()
                paths += [[*paths[parent], len(paths) + index] for index, parent in enumerate(parents)]
            for row, path in enumerate(paths):
                for seen in path:
                    self.node_masks[request, row, seen // 32] |= 1 << (seen % 32)
            self.paths.append(paths)
        self.node_masks = self.node_masks.to(DEVICE, torch.int32)

        kv_shape = (2, num_kv_heads, head_size)
        self.histories = [torch.randn(position, *kv_shape, device=DEVICE, dtype=dtype) for position in root_positions]
        self.nodes = torch.randn(num_reqs, num_rows, *kv_shape, device=DEVICE, dtype=dtype)
        self.root_positions = torch.tensor(root_positions, device=DEVICE, dtype=torch.int32)
        self.slots = [2 * request + 1 for request in reversed(range(num_reqs))]
        # Entries that nobody wrote must not be read.
        self.window_kv = torch.full((2 * num_reqs, window, *kv_shape), torch.nan, device=DEVICE, dtype=dtype)
        for slot, history in zip(self.slots, self.histories, strict=True):
            for position in range(max(0, len(history) - window), len(history)):
                self.window_kv[slot, position % window] = history[position]

    def check_level(self, depth, table=None, num_splits=1):
        first_row, width = self.levels[depth]
        level = slice(first_row, first_row + width)
        num_reqs = len(self.histories)
        query = torch.randn(num_reqs, width, self.num_heads, self.head_size, device=DEVICE, dtype=self.dtype)
        scale = self.head_size**-0.5
        key, value = self.nodes[:, level, 0], self.nodes[:, level, 1]
        nodes, positions = self.nodes, positions_of(self.root_positions, depth, width)
        # Rows of this level and of deeper ones are not there yet.
        node_kv = self.nodes.clone()
        node_kv[:, first_row:] = torch.nan
        output = attend(
            query,
            key,
            value,
            self.window_kv,
            torch.tensor(self.slots, device=DEVICE),
            self.root_positions,
            positions,
            table,
            node_kv,
            self.node_masks,
            first_row,
            depth,
            scale,
            num_splits=num_splits,
        )
        assert output.dtype == self.dtype
        if table is not None:
            query, nodes = rotated(query, positions, table), self.nodes.clone()
            nodes[:, level, 0] = rotated(key, positions, table)
        kept = torch.cat([self.nodes[:, :first_row], nodes[:, level]], dim=1)
        tolerance = 0.0 if table is None else torch.finfo(self.dtype).eps * 4
        torch.testing.assert_close(node_kv[:, : first_row + width], kept, rtol=tolerance, atol=tolerance)
        assert node_kv[:, first_row + width :].isnan().all()
        for request in range(num_reqs):
            paths = self.paths[request][first_row : first_row + width]
            expected = oracle.attend_level(
                query[request], self.histories[request], nodes[request], paths, depth, self.window, scale
            )
            tolerance = TOLERANCE[self.dtype]
            torch.testing.assert_close(output[request].double().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_splits", NUM_SPLITS)
@pytest.mark.parametrize("shape", [[2, 4, 4], [4, 16, 16, 16, 16], [1, 1, 1]])
def test_every_level_of_a_tree(shape, num_splits):
    # No history, some, exactly a window, one more, and a ring that has turned over more than once.
    draft = Draft(shape, [0, 5, 32, 33, 77], 32, num_heads=4, num_kv_heads=2, head_size=32, dtype=torch.float32)
    for depth in range(len(shape) + 1):
        draft.check_level(depth, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", NUM_SPLITS)
@pytest.mark.parametrize("root_position", [0, 3, 65, 130, 511, 512, 513, 1300])
def test_window_of_512(root_position, num_splits):
    draft = Draft([4, 16], [root_position], 512, num_heads=2, num_kv_heads=1, head_size=32, dtype=torch.float32)
    for depth in range(3):
        draft.check_level(depth, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(head_size, dtype, num_splits):
    draft = Draft([2, 4, 4], [3, 70], 64, num_heads=6, num_kv_heads=2, head_size=head_size, dtype=dtype)
    draft.check_level(0, num_splits=num_splits)
    draft.check_level(3, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize(
    ("head_size", "rotary_dim", "shape"), [(32, 32, [2, 4]), (80, 80, [3]), (64, 16, [4, 16, 16]), (128, 96, [20, 40])]
)
def test_queries_and_keys_are_rotated(head_size, rotary_dim, shape, is_neox_style, dtype, num_splits):
    draft = Draft(shape, [3, 70], 64, num_heads=4, num_kv_heads=2, head_size=head_size, dtype=dtype)
    table = random_table(rotary_dim, is_neox_style, dtype)
    for depth in range(len(shape) + 1):
        draft.check_level(depth, table, num_splits)


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (5, 1), (14, 2), (8, 1)])
def test_head_groups(num_heads, num_kv_heads, num_splits):
    draft = Draft([3, 6], [40], 24, num_heads, num_kv_heads, head_size=32, dtype=torch.float32)
    for depth in range(3):
        draft.check_level(depth, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
def test_a_key_leaves_the_window_with_each_level(num_splits):
    # One history key, values that tell whether it was seen.
    window_kv = torch.zeros(1, 4, 2, 1, 16, device=DEVICE)
    window_kv[0, 0, 1] = 1.0
    node_kv = torch.zeros(1, 3, 2, 1, 16, device=DEVICE)
    node_masks = torch.tensor([[[1], [3], [7]]], dtype=torch.int32, device=DEVICE)
    idx_mapping = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    # Position 4 is in entry 0 and is the oldest that a root at 8 sees.
    root_positions = torch.tensor([8], device=DEVICE)
    zeros = torch.zeros(1, 1, 1, 16, device=DEVICE)
    positions = root_positions[:, None]
    seen = [
        float(
            attend(
                zeros,
                zeros,
                zeros,
                window_kv,
                idx_mapping,
                root_positions,
                positions,
                None,
                node_kv,
                node_masks,
                row,
                row,
                1.0,
                num_splits=num_splits,
            ).max()
        )
        for row in range(3)
    ]
    assert seen[0] == pytest.approx(1 / 5)
    assert seen[1:] == [0.0, 0.0]


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
def test_inputs_that_are_slices(num_splits):
    # Queries, keys and values cut out of a joint projection, node rows of a larger buffer.
    torch.manual_seed(0)
    draft = Draft([2, 4], [9, 20], 16, num_heads=4, num_kv_heads=2, head_size=32, dtype=torch.float32)
    joint = torch.randn(2, 4, 8, 32, device=DEVICE)
    query, key, value = joint.split([4, 2, 2], dim=2)
    slots, positions = torch.tensor(draft.slots, device=DEVICE), positions_of(draft.root_positions, 2, 4)
    table = random_table(32, True, torch.float32)
    nodes = torch.randn(4, 9, 2, 2, 32, device=DEVICE)[1:3, 1:8]
    nodes.copy_(draft.nodes)

    def run(query, key, value, nodes):
        requests = draft.window_kv, slots, draft.root_positions
        tree = positions, table, nodes, draft.node_masks, 3, 2
        return attend(query, key, value, *requests, *tree, 0.2, num_splits=num_splits)

    output = run(query, key, value, nodes)
    expected = run(query.contiguous(), key.contiguous(), value.contiguous(), draft.nodes)
    assert torch.equal(output, expected) and torch.equal(nodes, draft.nodes)


@pytest.mark.parametrize("num_splits", WHOLE_OR_SPLIT)
def test_requests_that_pad_the_batch(num_splits):
    draft = Draft([2], [9, 7], 16, num_heads=2, num_kv_heads=1, head_size=32, dtype=torch.float32)
    query, (key, value) = torch.randn(2, 2, 2, 32, device=DEVICE), torch.randn(2, 2, 2, 1, 32, device=DEVICE)
    slots = torch.tensor([draft.slots[0], -1], device=DEVICE)
    draft.node_masks[1] = 0
    positions = positions_of(draft.root_positions, 1, 2)
    output = attend(
        query,
        key,
        value,
        draft.window_kv,
        slots,
        draft.root_positions,
        positions,
        None,
        draft.nodes,
        draft.node_masks,
        1,
        1,
        1.0,
        num_splits=num_splits,
    )
    assert output[0].isfinite().all()
    assert (output[1] == 0).all()


@pytest.mark.parametrize(
    ("num_programs", "num_tiles", "expected"),
    [
        # A root of one request with 4 KV heads, of four requests, and of eight.
        (4, 8, 8),
        (16, 8, 8),
        (32, 8, 4),
        (17, 8, 4),
        (33, 8, 4),
        (34, 8, 2),
        (65, 8, 2),
        # Half of the multiprocessors, and more programs than there are.
        (66, 8, 1),
        (133, 8, 1),
        # Fewer tiles, and more than splits.
        (4, 1, 1),
        (4, 3, 2),
        (4, 32, 8),
    ],
)
def test_a_window_is_split_where_programs_are_few(num_programs, num_tiles, expected, monkeypatch):
    monkeypatch.setattr(attention_splits, "num_multiprocessors", lambda device: 132)
    assert choose_num_splits(num_programs, num_tiles, torch.device("cuda")) == expected


def test_a_window_is_whole_without_a_gpu():
    assert choose_num_splits(1, 8, torch.device("cpu")) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_size"), [(1, 2, 32), (7, 3, 80), (16, 8, 64)])
@pytest.mark.parametrize("rotary_dim", [None, 16])
def test_write_window(num_tokens, num_kv_heads, head_size, dtype, rotary_dim):
    torch.manual_seed(0)
    window = 16
    window_kv = torch.randn(3, window, 2, num_kv_heads, head_size, device=DEVICE).to(dtype)
    # K and V cut out of a joint projection.
    joint = torch.randn(num_tokens, 4 * num_kv_heads, head_size, device=DEVICE).to(dtype)
    keys, values = joint[:, num_kv_heads : 2 * num_kv_heads], joint[:, 3 * num_kv_heads :]
    # Two requests in turn, each at consecutive positions; every fifth token is to be skipped.
    slots = [-1 if token % 5 == 4 else 2 * (token % 2) for token in range(num_tokens)]
    positions = [1000 + 37 * (token % 2) + token // 2 for token in range(num_tokens)]

    table = None if rotary_dim is None else random_table(rotary_dim, True, dtype)
    position_tensor = torch.tensor(positions, device=DEVICE)
    expected, expected_keys = window_kv.clone(), keys if table is None else rotated(keys, position_tensor, table)
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0:
            expected[slot, position % window, 0] = expected_keys[token]
            expected[slot, position % window, 1] = values[token]
    write_window(window_kv, keys, values, torch.tensor(slots, device=DEVICE), position_tensor, table)
    # Rotated in float32 and rounded once, where vLLM rounds each product of halves. A GPU fuses products and sums.
    fused = 1e-5 if DEVICE == "cuda" else 0.0
    tolerance = 0.0 if table is None else fused if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(window_kv, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(window_kv[:, :, 1], expected[:, :, 1])
