# SPDX-License-Identifier: Apache-2.0
"""The draft's self-attention against whole K and V, and the ring that it reads."""

import pytest
import torch

from tests.oracles import window as oracle
from vllm_longspec.proposers.glide.window_attention import window_attention, write_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 has 8 bits of precision, and Triton's interpreter cuts the rest off instead of rounding.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


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

    def check_level(self, depth):
        first_row, width = self.levels[depth]
        num_reqs = len(self.histories)
        query = torch.randn(num_reqs, width, self.num_heads, self.head_size, device=DEVICE, dtype=self.dtype)
        scale = self.head_size**-0.5
        # Rows of deeper levels are not there yet.
        node_kv = self.nodes.clone()
        node_kv[:, first_row + width :] = torch.nan
        output = window_attention(
            query,
            self.window_kv,
            torch.tensor(self.slots, device=DEVICE),
            self.root_positions,
            node_kv,
            self.node_masks,
            first_row,
            depth,
            scale,
        )
        assert output.dtype == self.dtype
        assert output.shape == query.shape
        for request in range(num_reqs):
            paths = self.paths[request][first_row : first_row + width]
            expected = oracle.attend_level(
                query[request], self.histories[request], self.nodes[request], paths, depth, self.window, scale
            )
            tolerance = TOLERANCE[self.dtype]
            torch.testing.assert_close(output[request].double().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [[2, 4, 4], [4, 16, 16, 16, 16], [1, 1, 1]])
def test_every_level_of_a_tree(shape):
    # No history, some, exactly a window, one more, and a ring that has turned over more than once.
    draft = Draft(shape, [0, 5, 32, 33, 77], 32, num_heads=4, num_kv_heads=2, head_size=32, dtype=torch.float32)
    for depth in range(len(shape) + 1):
        draft.check_level(depth)


@pytest.mark.parametrize("root_position", [511, 512, 513, 1300])
def test_window_of_512(root_position):
    draft = Draft([4, 16], [root_position], 512, num_heads=2, num_kv_heads=1, head_size=32, dtype=torch.float32)
    for depth in range(3):
        draft.check_level(depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(head_size, dtype):
    draft = Draft([2, 4, 4], [3, 70], 64, num_heads=6, num_kv_heads=2, head_size=head_size, dtype=dtype)
    draft.check_level(0)
    draft.check_level(3)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (5, 1), (14, 2), (8, 1)])
def test_head_groups(num_heads, num_kv_heads):
    draft = Draft([3, 6], [40], 24, num_heads, num_kv_heads, head_size=32, dtype=torch.float32)
    for depth in range(3):
        draft.check_level(depth)


def test_a_key_leaves_the_window_with_each_level():
    # One history key, values that tell whether it was seen.
    window_kv = torch.zeros(1, 4, 2, 1, 16, device=DEVICE)
    window_kv[0, 0, 1] = 1.0
    node_kv = torch.zeros(1, 3, 2, 1, 16, device=DEVICE)
    node_masks = torch.tensor([[[1], [3], [7]]], dtype=torch.int32, device=DEVICE)
    idx_mapping = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    # Position 4 is in entry 0 and is the oldest that a root at 8 sees.
    root_positions = torch.tensor([8], device=DEVICE)
    query = torch.zeros(1, 1, 1, 16, device=DEVICE)
    seen = [
        float(window_attention(query, window_kv, idx_mapping, root_positions, node_kv, node_masks, row, row, 1.0).max())
        for row in range(3)
    ]
    assert seen[0] == pytest.approx(1 / 5)
    assert seen[1:] == [0.0, 0.0]


def test_inputs_that_are_slices():
    # Queries cut out of a joint projection, node rows of a larger buffer.
    torch.manual_seed(0)
    draft = Draft([2, 4], [9, 20], 16, num_heads=4, num_kv_heads=2, head_size=32, dtype=torch.float32)
    joint = torch.randn(2, 4, 8, 32, device=DEVICE)
    query = joint[:, :, 2:6]
    nodes = torch.randn(4, 9, 2, 2, 32, device=DEVICE)[1:3, 1:8]
    nodes.copy_(draft.nodes)
    arguments = (draft.window_kv, torch.tensor(draft.slots, device=DEVICE), draft.root_positions)
    output = window_attention(query, *arguments, nodes, draft.node_masks, 3, 2, 0.2)
    expected = window_attention(query.contiguous(), *arguments, draft.nodes, draft.node_masks, 3, 2, 0.2)
    assert torch.equal(output, expected)


def test_requests_that_pad_the_batch():
    draft = Draft([2], [9, 7], 16, num_heads=2, num_kv_heads=1, head_size=32, dtype=torch.float32)
    query = torch.randn(2, 2, 2, 32, device=DEVICE)
    slots = torch.tensor([draft.slots[0], -1], device=DEVICE)
    draft.node_masks[1] = 0
    output = window_attention(
        query, draft.window_kv, slots, draft.root_positions, draft.nodes, draft.node_masks, 1, 1, 1.0
    )
    assert output[0].isfinite().all()
    assert (output[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_size"), [(1, 2, 32), (7, 3, 80), (16, 8, 64)])
def test_write_window(num_tokens, num_kv_heads, head_size, dtype):
    torch.manual_seed(0)
    window = 16
    window_kv = torch.randn(3, window, 2, num_kv_heads, head_size, device=DEVICE).to(dtype)
    # K and V cut out of a joint projection.
    joint = torch.randn(num_tokens, 4 * num_kv_heads, head_size, device=DEVICE).to(dtype)
    keys, values = joint[:, num_kv_heads : 2 * num_kv_heads], joint[:, 3 * num_kv_heads :]
    # Two requests in turn, each at consecutive positions; every fifth token is to be skipped.
    slots = [-1 if token % 5 == 4 else 2 * (token % 2) for token in range(num_tokens)]
    positions = [1000 + 37 * (token % 2) + token // 2 for token in range(num_tokens)]

    expected = window_kv.clone()
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0:
            expected[slot, position % window, 0] = keys[token]
            expected[slot, position % window, 1] = values[token]
    write_window(window_kv, keys, values, torch.tensor(slots, device=DEVICE), torch.tensor(positions, device=DEVICE))
    assert torch.equal(window_kv, expected)
