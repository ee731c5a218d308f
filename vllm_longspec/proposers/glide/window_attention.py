# SPDX-License-Identifier: Apache-2.0
"""The draft's self-attention: over a window of the last tokens and the nodes drafted so far.

K and V of the last `window` tokens of each request are in a ring buffer, position p at entry p % window. Those of nodes
are in a buffer of their own and never enter the ring; K and V of accepted tokens are computed again.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting
from vllm_longspec.proposers.glide.attention_splits import AttentionSplits, choose_num_splits
from vllm_longspec.proposers.glide.rotation import RotaryTable, load_rotated, table_arguments


def window_attention(
    query: torch.Tensor,  # [num_reqs, width, num_heads, head_size]
    key: torch.Tensor,  # [num_reqs, width, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_reqs, width, num_kv_heads, head_size]
    window_kv: torch.Tensor,  # [max_num_reqs, window, 2, num_kv_heads, head_size]
    idx_mapping: torch.Tensor,  # int64 [num_reqs]
    root_positions: torch.Tensor,  # int32 or int64 [num_reqs]
    positions: torch.Tensor,  # int64 [num_reqs, width] by which to rotate
    table: RotaryTable | None,
    node_kv: torch.Tensor,  # [num_reqs, max_rows, 2, num_kv_heads, head_size], written
    node_masks: torch.Tensor,  # int32 [num_reqs, max_rows, num_words]
    first_row: int,
    depth: int,
    scale: float,
    *,
    num_splits: int | None = None,
) -> torch.Tensor | AttentionSplits:  # [num_reqs, width, num_heads, head_size]
    """Attention of one level's nodes over the window and their own ancestors; keeps the level's K and V.

    A node of depth d, at most `window`, is at position q = root + d. It attends positions p of the window with
    q - window <= p < root, and the node rows in its ancestor mask. Softmax and sums are in float32. The last dimension
    of every tensor must be contiguous.

    Args:
        query, key, value: of rows first_row to first_row + width - 1.
        window_kv: ring of rotated keys (index 0) and values (index 1); positions max(root - window, 0) to root - 1 must
            have been written.
        idx_mapping: req_state_idx; -1 for padding, which attends no history.
        positions: the same for all nodes of a request's level.
        table: rotates queries and keys; None if they are rotated.
        node_kv: rotated keys and values, in draft order: row 0 is the root, row i + 1 node i. Those of the level are
            written, those of the levels above read.
        node_masks: ancestor masks over node rows; bit (r % 32) of word (r // 32) is row r.
        first_row: first row of the level, 0 for the root.
        depth: of the level, 0 for the root.
        num_splits: programs that share the window, a power of two up to MAX_SPLITS; by default what suits the shapes
            and the device. The result of more than one is not merged, and its tokens are the requests' nodes in turn.
    """
    num_reqs, width, num_heads, head_size = query.shape
    window, _, num_kv_heads, _ = window_kv.shape[1:]
    group = num_heads // num_kv_heads

    head_block = triton.next_power_of_2(max(head_size, 16))
    if interpreting():
        # Each operation is a NumPy call, so tiles are as large as possible. NumPy has no bfloat16 product.
        query_tile = triton.next_power_of_2(max(width * group, 16))
        history_tile = triton.next_power_of_2(max(triton.cdiv(window, num_splits or 1), 16))
        node_tile = triton.next_power_of_2(max(first_row, width, 16))
        dot_dtype = tl.float32
    else:
        # Few rows and a short history: latency-bound. The smallest query tiles use the most multiprocessors, and shared
        # memory holds three stages of key tiles of at most 16 KiB.
        query_tile = 16
        history_tile = node_tile = max(16, min(64, 16384 // (head_block * query.element_size())))
        dot_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[query.dtype]
    num_query_tiles = triton.cdiv(width * group, query_tile)
    if num_splits is None:
        num_programs = num_reqs * num_kv_heads * num_query_tiles
        num_splits = choose_num_splits(num_programs, triton.cdiv(window, history_tile), query.device)
    output = torch.empty((num_splits, *query.shape), dtype=query.dtype, device=query.device)
    lse = None
    if num_splits > 1:
        lse = torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
    _window_attention_kernel[(num_reqs, num_kv_heads, num_query_tiles * num_splits)](
        query,
        *query.stride()[:3],
        key,
        *key.stride()[:3],
        value,
        *value.stride()[:3],
        window_kv,
        *window_kv.stride()[:4],
        idx_mapping,
        root_positions,
        positions,
        node_kv,
        *node_kv.stride()[:4],
        node_masks,
        *node_masks.stride()[:2],
        output,
        *output.stride()[:4],
        lse,
        window,
        width,
        first_row,
        depth,
        scale * 1.4426950408889634,  # log2(e), for exp2
        num_splits,
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_BLOCK=head_block,
        QUERY_TILE=query_tile,
        HISTORY_TILE=history_tile,
        NODE_TILE=node_tile,
        DOT_DTYPE=dot_dtype,
        **table_arguments(table),
        num_warps=4,
        num_stages=3,
    )
    return output[0] if lse is None else AttentionSplits(output.flatten(1, 2), lse.flatten(1, 2))


def write_window(
    window_kv: torch.Tensor,  # [max_num_reqs, window, 2, num_kv_heads, head_size], written
    keys: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    values: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    expanded_idx_mapping: torch.Tensor,  # int64 [num_tokens] req_state_idx, -1 for a token to skip
    positions: torch.Tensor,  # int64 [num_tokens]
    table: RotaryTable | None,  # rotates the keys; None if they are rotated
) -> None:
    """Writes K and V of tokens into the ring, position p at entry p % window.

    No two tokens of a call may share an entry: pass at most the last `window` tokens of a request. The last dimension
    of every tensor must be contiguous.
    """
    num_tokens, num_kv_heads, head_size = keys.shape
    head_block = triton.next_power_of_2(head_size)
    # All tokens in the interpreter, on a GPU as many as fit a program's registers.
    token_block = triton.next_power_of_2(num_tokens) if interpreting() else max(1, 512 // head_block)
    _write_window_kernel[(triton.cdiv(num_tokens, token_block), num_kv_heads)](
        window_kv,
        *window_kv.stride()[:4],
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        expanded_idx_mapping,
        positions,
        num_tokens,
        window_kv.shape[1],
        HEAD_SIZE=head_size,
        HEAD_BLOCK=head_block,
        TOKEN_BLOCK=token_block,
        **table_arguments(table),
    )


# They differ between levels and trees and must not trigger recompilation.
@triton.jit(do_not_specialize=["masks_request_stride", "masks_row_stride", "width", "first_row", "depth"])
def _window_attention_kernel(
    query_ptr,
    query_request_stride,
    query_node_stride,
    query_head_stride,
    key_ptr,
    key_request_stride,
    key_node_stride,
    key_head_stride,
    value_ptr,
    value_request_stride,
    value_node_stride,
    value_head_stride,
    window_ptr,
    window_req_stride,
    window_entry_stride,
    window_kv_stride,
    window_head_stride,
    idx_mapping_ptr,
    root_positions_ptr,
    positions_ptr,
    node_ptr,
    node_request_stride,
    node_row_stride,
    node_kv_stride,
    node_head_stride,
    masks_ptr,
    masks_request_stride,
    masks_row_stride,
    output_ptr,
    output_split_stride,
    output_request_stride,
    output_node_stride,
    output_head_stride,
    lse_ptr,  # float32 [num_splits, num_reqs, width, num_heads], or None: there is one split
    window,
    width,
    first_row,
    depth,
    log2_scale,
    # Triton compiles for 1, with which all that is about splits goes, and for all other numbers at once.
    num_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    HISTORY_TILE: tl.constexpr,
    NODE_TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    cos_sin_ptr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX_STYLE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    root_position = tl.load(root_positions_ptr + request).to(tl.int32)
    query_tile = tl.program_id(2) // num_splits
    split = tl.program_id(2) % num_splits

    # Queries of all heads that share this KV head are packed into one tile.
    packed = query_tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    node = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    is_query = node < width
    # One for all nodes of the level.
    position = tl.load(positions_ptr + request * width + tl.zeros([1], tl.int64))
    query = load_rotated(
        query_ptr + request * query_request_stride + node * query_node_stride + head * query_head_stride,
        is_query,
        position,
        cos_sin_ptr,
        ROTARY_DIM,
        IS_NEOX_STYLE,
        HEAD_SIZE,
        HEAD_BLOCK,
    ).to(DOT_DTYPE)

    weighted = tl.zeros([QUERY_TILE, HEAD_BLOCK], tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    highest = tl.full([QUERY_TILE], float("-inf"), tl.float32)

    # Window, in memory order. Entries before root % window hold positions of the current turn of the ring, the others
    # those of the turn before. All queries have the same depth and see the same positions. Tiles are dealt to the
    # splits in turn, so that they share a short history too.
    num_entries = tl.where(req_state_idx >= 0, tl.minimum(root_position, window), 0)
    turn = root_position % window
    window_ptr += req_state_idx * window_req_stride + kv_head * window_head_stride
    for start in range(split * HISTORY_TILE, num_entries, num_splits * HISTORY_TILE):
        entry = start + tl.arange(0, HISTORY_TILE)
        entry_position = root_position - turn + entry - tl.where(entry < turn, 0, window)
        is_visible = (entry < num_entries) & (entry_position >= root_position + depth - window)
        keys, values = _load_tile(
            window_ptr + entry * window_entry_stride, window_kv_stride, is_visible, HEAD_SIZE, HEAD_BLOCK
        )
        weighted, total, highest = _attend_tile(
            query, keys, values, is_visible[None, :], weighted, total, highest, log2_scale, DOT_DTYPE
        )

    # The last split, whose share of the window is the smallest, also has the nodes. First those of the levels above.
    has_nodes = split == num_splits - 1
    node_ptr += request * node_request_stride + kv_head * node_head_stride
    mask_ptr = masks_ptr + request * masks_request_stride + (first_row + node) * masks_row_stride
    for start in range(0, tl.where(has_nodes, first_row, 0), NODE_TILE):
        row = start + tl.arange(0, NODE_TILE)
        is_row = row < first_row
        is_visible = _is_ancestor(mask_ptr, row, is_query[:, None] & is_row[None, :])
        keys, values = _load_tile(node_ptr + row * node_row_stride, node_kv_stride, is_row, HEAD_SIZE, HEAD_BLOCK)
        weighted, total, highest = _attend_tile(
            query, keys, values, is_visible, weighted, total, highest, log2_scale, DOT_DTYPE
        )

    # Nodes of this level. The program of each query tile rotates their keys, and the first of a KV head keeps them.
    key_ptr += request * key_request_stride + kv_head * key_head_stride
    value_ptr += request * value_request_stride + kv_head * value_head_stride
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    # Mostly one tile: stages of loads would only take shared memory.
    for start in tl.range(0, tl.where(has_nodes, width, 0), NODE_TILE, num_stages=1):
        index = start + tl.arange(0, NODE_TILE)
        is_index = index < width
        row = first_row + index
        keys = load_rotated(
            key_ptr + index * key_node_stride,
            is_index,
            position,
            cos_sin_ptr,
            ROTARY_DIM,
            IS_NEOX_STYLE,
            HEAD_SIZE,
            HEAD_BLOCK,
        )
        mask = is_index[:, None] & (channel < HEAD_SIZE)
        values = tl.load(value_ptr + (index * value_node_stride)[:, None] + channel, mask=mask, other=0.0)
        if query_tile == 0:
            kept_ptr = node_ptr + (row * node_row_stride)[:, None] + channel
            tl.store(kept_ptr, keys, mask=mask)
            tl.store(kept_ptr + node_kv_stride, values, mask=mask)
        is_visible = _is_ancestor(mask_ptr, row, is_query[:, None] & is_index[None, :])
        weighted, total, highest = _attend_tile(
            query, keys, values, is_visible, weighted, total, highest, log2_scale, DOT_DTYPE
        )

    output_offset = request * output_request_stride + node * output_node_stride + head * output_head_stride
    output_offset += split.to(tl.int64) * output_split_stride
    # Padding may see no key, nor a split.
    has_seen = total > 0.0
    divisor = tl.where(has_seen, total, 1.0)
    tl.store(
        output_ptr + output_offset[:, None] + channel,
        weighted / divisor[:, None],
        mask=is_query[:, None] & (channel < HEAD_SIZE),
    )
    if lse_ptr is not None:
        num_heads = tl.num_programs(1) * GROUP
        lse_offset = ((split * tl.num_programs(0) + request) * width + node) * num_heads + head
        lse = tl.where(has_seen, highest + tl.log2(divisor), float("-inf"))
        tl.store(lse_ptr + lse_offset, lse, mask=is_query)


@triton.jit
def _is_ancestor(
    mask_ptr,  # pointers [m] to the ancestor masks of nodes
    row,  # [n]
    mask,  # bool [m, n]: False is returned elsewhere
):
    word = tl.load(mask_ptr[:, None] + (row // 32)[None, :], mask=mask, other=0)
    return ((word >> (row % 32)[None, :]) & 1) != 0


@triton.jit
def _load_tile(
    key_ptr,  # pointers [n]
    value_offset,  # elements from a key to its value
    is_key,  # bool [n]: the others are not read; NaN in unwritten rows would survive a weight of zero
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Keys and values, [n, HEAD_BLOCK] each, zero where masked."""
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    mask = is_key[:, None] & (channel < HEAD_SIZE)
    keys = tl.load(key_ptr[:, None] + channel, mask=mask, other=0.0)
    values = tl.load(key_ptr[:, None] + value_offset + channel, mask=mask, other=0.0)
    return keys, values


@triton.jit
def _attend_tile(
    query,  # DOT_DTYPE [m, HEAD_BLOCK]
    keys,  # [n, HEAD_BLOCK]
    values,  # [n, HEAD_BLOCK]
    is_visible,  # bool [m or 1, n]
    weighted,  # float32 [m, HEAD_BLOCK]
    total,  # float32 [m]
    highest,  # float32 [m]
    log2_scale,
    DOT_DTYPE: tl.constexpr,
):
    """Online softmax over one more tile of keys and values."""
    scores = tl.dot(query, tl.trans(keys.to(DOT_DTYPE)), input_precision="ieee") * log2_scale
    scores = tl.where(is_visible, scores, float("-inf"))

    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # Avoids -inf - -inf while nothing is visible.
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weight = tl.exp2(scores - reference[:, None])
    fading = tl.exp2(highest - reference)
    added = tl.dot(weight.to(DOT_DTYPE), values.to(DOT_DTYPE), input_precision="ieee")
    return weighted * fading[:, None] + added, total * fading + tl.sum(weight, axis=1), new_highest


# Numbers of tokens and entries must not trigger recompilation.
@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def _write_window_kernel(
    window_ptr,
    window_req_stride,
    window_entry_stride,
    window_kv_stride,
    window_head_stride,
    keys_ptr,
    keys_token_stride,
    keys_head_stride,
    values_ptr,
    values_token_stride,
    values_head_stride,
    expanded_idx_mapping_ptr,
    positions_ptr,
    num_tokens,
    num_entries,  # of a request
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    cos_sin_ptr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX_STYLE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    head = tl.program_id(1).to(tl.int64)
    req_state_idx = tl.load(expanded_idx_mapping_ptr + token, mask=token < num_tokens, other=-1)
    is_token = req_state_idx >= 0
    position = tl.load(positions_ptr + token, mask=is_token, other=0)
    keys = load_rotated(
        keys_ptr + token * keys_token_stride + head * keys_head_stride,
        is_token,
        position,
        cos_sin_ptr,
        ROTARY_DIM,
        IS_NEOX_STYLE,
        HEAD_SIZE,
        HEAD_BLOCK,
    )
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    mask = is_token[:, None] & (channel < HEAD_SIZE)
    value_ptr = values_ptr + token * values_token_stride + head * values_head_stride
    values = tl.load(value_ptr[:, None] + channel, mask=mask, other=0.0)
    entry = position % num_entries
    target = window_ptr + req_state_idx * window_req_stride + entry * window_entry_stride + head * window_head_stride
    tl.store(target[:, None] + channel, keys, mask=mask)
    tl.store(target[:, None] + window_kv_stride + channel, values, mask=mask)
