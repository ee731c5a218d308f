# SPDX-License-Identifier: Apache-2.0
"""The draft's self-attention: over a window of the last tokens and the nodes drafted so far.

K and V of the last `window` tokens of each request are in a ring buffer, position p at entry p % window. Those of nodes
are in a buffer of their own and never enter the ring; K and V of accepted tokens are computed again.
"""

import torch
from vllm.triton_utils import tl, triton

from vllm_longspec.interpreter import interpreting


def window_attention(
    query: torch.Tensor,  # [num_reqs, width, num_heads, head_size]
    window_kv: torch.Tensor,  # [max_num_reqs, window, 2, num_kv_heads, head_size]
    idx_mapping: torch.Tensor,  # int64 [num_reqs]
    root_positions: torch.Tensor,  # int32 or int64 [num_reqs]
    node_kv: torch.Tensor,  # [num_reqs, max_rows, 2, num_kv_heads, head_size]
    node_masks: torch.Tensor,  # int32 [num_reqs, max_rows, num_words]
    first_row: int,
    depth: int,
    scale: float,
) -> torch.Tensor:  # [num_reqs, width, num_heads, head_size]
    """Attention of one level's nodes over the window and their own ancestors.

    A node of depth d, at most `window`, is at position q = root + d. It attends positions p of the window with
    q - window <= p < root, and the node rows in its ancestor mask. Softmax and sums are in float32. The last dimension
    of every tensor must be contiguous.

    Args:
        query: rotated queries of rows first_row to first_row + width - 1.
        window_kv: ring of rotated keys (index 0) and values (index 1); positions max(root - window, 0) to root - 1 must
            have been written.
        idx_mapping: req_state_idx; -1 for padding, which attends no history.
        node_kv: rotated keys and values, in draft order: row 0 is the root, row i + 1 node i. Rows past this level may
            hold anything, including NaN.
        node_masks: ancestor masks over node rows; bit (r % 32) of word (r // 32) is row r.
        first_row: first row of the level, 0 for the root.
        depth: of the level, 0 for the root.
    """
    num_reqs, width, num_heads, head_size = query.shape
    window, _, num_kv_heads, _ = window_kv.shape[1:]
    group = num_heads // num_kv_heads
    output = torch.empty_like(query, memory_format=torch.contiguous_format)

    head_block = triton.next_power_of_2(max(head_size, 16))
    if interpreting():
        # Each operation is a NumPy call, so tiles are as large as possible. NumPy has no bfloat16 product.
        query_tile = triton.next_power_of_2(max(width * group, 16))
        history_tile = triton.next_power_of_2(max(window, 16))
        node_tile = triton.next_power_of_2(max(first_row + width, 16))
        dot_dtype = tl.float32
    else:
        # Few rows and a short history: latency-bound. The smallest query tiles use the most multiprocessors, and shared
        # memory holds three stages of key tiles of at most 16 KiB.
        query_tile = 16
        history_tile = node_tile = max(16, min(64, 16384 // (head_block * query.element_size())))
        dot_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[query.dtype]
    _window_attention_kernel[(num_reqs, num_kv_heads, triton.cdiv(width * group, query_tile))](
        query,
        *query.stride()[:3],
        window_kv,
        *window_kv.stride()[:4],
        idx_mapping,
        root_positions,
        node_kv,
        *node_kv.stride()[:4],
        node_masks,
        *node_masks.stride()[:2],
        output,
        *output.stride()[:3],
        window,
        width,
        first_row,
        depth,
        scale * 1.4426950408889634,  # log2(e), for exp2
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_BLOCK=head_block,
        QUERY_TILE=query_tile,
        HISTORY_TILE=history_tile,
        NODE_TILE=node_tile,
        DOT_DTYPE=dot_dtype,
        num_warps=4,
        num_stages=3,
    )
    return output


def write_window(
    window_kv: torch.Tensor,  # [max_num_reqs, window, 2, num_kv_heads, head_size], written
    keys: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    values: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    expanded_idx_mapping: torch.Tensor,  # int64 [num_tokens] req_state_idx, -1 for a token to skip
    positions: torch.Tensor,  # int64 [num_tokens]
) -> None:
    """Writes K (rotated) and V of tokens into the ring, position p at entry p % window.

    No two tokens of a call may share an entry: pass at most the last `window` tokens of a request. The last dimension
    of every tensor must be contiguous.
    """
    _write(window_kv, keys, values, expanded_idx_mapping, positions)


def write_nodes(
    node_kv: torch.Tensor,  # [num_reqs, width, 2, num_kv_heads, head_size], written
    keys: torch.Tensor,  # [num_reqs * width, num_kv_heads, head_size]
    values: torch.Tensor,  # [num_reqs * width, num_kv_heads, head_size]
) -> None:
    """Writes K and V of a level's nodes into that level's rows."""
    _write(node_kv, keys, values, None, None)


def _write(
    target_kv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    expanded_idx_mapping: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    num_tokens, num_kv_heads, head_size = keys.shape
    element_block = triton.next_power_of_2(num_kv_heads * head_size)
    # All tokens in the interpreter, on a GPU as many as fit a program's registers.
    token_block = triton.next_power_of_2(num_tokens) if interpreting() else max(1, 2048 // element_block)
    _write_kernel[(triton.cdiv(num_tokens, token_block),)](
        target_kv,
        *target_kv.stride()[:4],
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        expanded_idx_mapping,
        positions,
        num_tokens,
        target_kv.shape[1],
        HEAD_SIZE=head_size,
        NUM_ELEMENTS=num_kv_heads * head_size,
        ELEMENT_BLOCK=element_block,
        TOKEN_BLOCK=token_block,
    )


# They differ between levels and must not trigger recompilation.
@triton.jit(do_not_specialize=["width", "first_row", "depth"])
def _window_attention_kernel(
    query_ptr,
    query_request_stride,
    query_node_stride,
    query_head_stride,
    window_ptr,
    window_req_stride,
    window_entry_stride,
    window_kv_stride,
    window_head_stride,
    idx_mapping_ptr,
    root_positions_ptr,
    node_ptr,
    node_request_stride,
    node_row_stride,
    node_kv_stride,
    node_head_stride,
    masks_ptr,
    masks_request_stride,
    masks_row_stride,
    output_ptr,
    output_request_stride,
    output_node_stride,
    output_head_stride,
    window,
    width,
    first_row,
    depth,
    log2_scale,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    HISTORY_TILE: tl.constexpr,
    NODE_TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + request)
    root_position = tl.load(root_positions_ptr + request).to(tl.int32)

    # Queries of all heads that share this KV head are packed into one tile.
    packed = tl.program_id(2) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    node = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    is_query = node < width
    channel = tl.arange(0, HEAD_BLOCK)
    is_channel = channel < HEAD_SIZE
    query_offset = request * query_request_stride + node * query_node_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :], mask=is_query[:, None] & is_channel[None, :], other=0.0
    ).to(DOT_DTYPE)

    weighted = tl.zeros([QUERY_TILE, HEAD_BLOCK], tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    highest = tl.full([QUERY_TILE], float("-inf"), tl.float32)

    # Window, in memory order. Entries before root % window hold positions of the current turn of the ring, the others
    # those of the turn before. All queries have the same depth and see the same positions.
    num_entries = tl.where(req_state_idx >= 0, tl.minimum(root_position, window), 0)
    turn = root_position % window
    window_ptr += req_state_idx * window_req_stride + kv_head * window_head_stride
    for start in range(0, num_entries, HISTORY_TILE):
        entry = start + tl.arange(0, HISTORY_TILE)
        position = root_position - turn + entry - tl.where(entry < turn, 0, window)
        is_visible = (entry < num_entries) & (position >= root_position + depth - window)
        weighted, total, highest = _attend_tile(
            query,
            window_ptr + entry * window_entry_stride,
            window_kv_stride,
            is_visible,
            is_visible[None, :],
            weighted,
            total,
            highest,
            log2_scale,
            HEAD_SIZE,
            HEAD_BLOCK,
            DOT_DTYPE,
        )

    # Nodes.
    num_rows = first_row + width
    node_ptr += request * node_request_stride + kv_head * node_head_stride
    mask_ptr = masks_ptr + request * masks_request_stride + (first_row + node) * masks_row_stride
    for start in range(0, num_rows, NODE_TILE):
        row = start + tl.arange(0, NODE_TILE)
        is_row = row < num_rows
        word = tl.load(mask_ptr[:, None] + (row // 32)[None, :], mask=is_query[:, None] & is_row[None, :], other=0)
        weighted, total, highest = _attend_tile(
            query,
            node_ptr + row * node_row_stride,
            node_kv_stride,
            is_row,
            ((word >> (row % 32)[None, :]) & 1) != 0,
            weighted,
            total,
            highest,
            log2_scale,
            HEAD_SIZE,
            HEAD_BLOCK,
            DOT_DTYPE,
        )

    output_offset = request * output_request_stride + node * output_node_stride + head * output_head_stride
    tl.store(
        output_ptr + output_offset[:, None] + channel[None, :],
        # Padding may see no key.
        weighted / tl.where(total > 0.0, total, 1.0)[:, None],
        mask=is_query[:, None] & is_channel[None, :],
    )


@triton.jit
def _attend_tile(
    query,  # DOT_DTYPE [m, HEAD_BLOCK]
    key_ptr,  # pointers [n]
    value_offset,  # elements from a key to its value
    is_key,  # bool [n]: keys that may be read
    is_visible,  # bool [m or 1, n]
    weighted,  # float32 [m, HEAD_BLOCK]
    total,  # float32 [m]
    highest,  # float32 [m]
    log2_scale,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Online softmax over one more tile of keys and values."""
    channel = tl.arange(0, HEAD_BLOCK)[None, :]
    # NaN in unwritten rows would survive a weight of zero.
    mask = is_key[:, None] & (channel < HEAD_SIZE)
    key = tl.load(key_ptr[:, None] + channel, mask=mask, other=0.0).to(DOT_DTYPE)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
    scores = tl.where(is_visible, scores, float("-inf"))

    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # Avoids -inf - -inf while nothing is visible.
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weight = tl.exp2(scores - reference[:, None])
    fading = tl.exp2(highest - reference)
    value = tl.load(key_ptr[:, None] + value_offset + channel, mask=mask, other=0.0).to(DOT_DTYPE)
    weighted = weighted * fading[:, None] + tl.dot(weight.to(DOT_DTYPE), value, input_precision="ieee")
    return weighted, total * fading + tl.sum(weight, axis=1), new_highest


# Numbers of tokens and entries must not trigger recompilation.
@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def _write_kernel(
    target_ptr,
    target_req_stride,
    target_entry_stride,
    target_kv_stride,
    target_head_stride,
    keys_ptr,
    keys_token_stride,
    keys_head_stride,
    values_ptr,
    values_token_stride,
    values_head_stride,
    expanded_idx_mapping_ptr,  # None to fill all entries of all requests in order
    positions_ptr,
    num_tokens,
    num_entries,  # of a request
    HEAD_SIZE: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    if expanded_idx_mapping_ptr is None:
        is_token = token < num_tokens
        req_state_idx = token // num_entries
        entry = token % num_entries
    else:
        req_state_idx = tl.load(expanded_idx_mapping_ptr + token, mask=token < num_tokens, other=-1)
        is_token = req_state_idx >= 0
        entry = tl.load(positions_ptr + token, mask=is_token, other=0) % num_entries

    element = tl.arange(0, ELEMENT_BLOCK)[None, :]
    head = element // HEAD_SIZE
    channel = element % HEAD_SIZE
    mask = is_token[:, None] & (element < NUM_ELEMENTS)
    target = target_ptr + (req_state_idx * target_req_stride + entry * target_entry_stride)[:, None]
    target += head * target_head_stride + channel
    key = tl.load(keys_ptr + token[:, None] * keys_token_stride + head * keys_head_stride + channel, mask=mask)
    value = tl.load(values_ptr + token[:, None] * values_token_stride + head * values_head_stride + channel, mask=mask)
    tl.store(target, key, mask=mask)
    tl.store(target + target_kv_stride, value, mask=mask)
