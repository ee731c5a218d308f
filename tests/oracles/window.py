# SPDX-License-Identifier: Apache-2.0
"""Plain reference for the draft's self-attention, over K and V that are kept whole."""

import torch


def attend_level(
    query: torch.Tensor,  # [width, num_heads, head_size]
    history: torch.Tensor,  # [root_position, 2, num_kv_heads, head_size]
    nodes: torch.Tensor,  # [num_rows, 2, num_kv_heads, head_size]
    visible_rows: list[list[int]],  # for each query, the node rows that it sees
    depth: int,
    window: int,
    scale: float,
) -> torch.Tensor:  # float64 [width, num_heads, head_size]
    """Each query at position root + depth attends history positions from (root + depth - window) and its node rows."""
    group = query.shape[1] // nodes.shape[2]
    position = len(history) + depth
    output = torch.empty(query.shape, dtype=torch.float64)
    for index, rows in enumerate(visible_rows):
        seen = torch.cat([history[max(0, position - window) :], nodes[rows]]).double().cpu()
        for head in range(query.shape[1]):
            keys, values = seen[:, 0, head // group], seen[:, 1, head // group]
            scores = keys @ query[index, head].double().cpu() * scale
            output[index, head] = scores.softmax(0) @ values
    return output
