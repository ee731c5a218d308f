# SPDX-License-Identifier: Apache-2.0
"""Plain references for the stages that work on a tree: order, walk and compact."""

import math

import torch


def path_to_root(parents: list[int], node: int) -> list[int]:
    """The node, its parent, its parent's parent and so on, without the root."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


def order_nodes(log_probs: list[float], parents: list[int]) -> list[int]:
    """Indices of all nodes, most probable path first; of two equal ones the earlier comes first."""

    def least_on_path(node: int) -> float:
        values = [log_probs[ancestor] for ancestor in path_to_root(parents, node)]
        return min(-math.inf if math.isnan(value) else value for value in values)

    return sorted(range(len(parents)), key=lambda node: (-least_on_path(node), node))


def describe_tree(order: list[int], parents: list[int]) -> tuple[list[int], list[int], list[set[int]]]:
    """Parent rows, depths and sets of rows at or above each row, for the root and then the nodes of a list."""
    row_of = {node: index + 1 for index, node in enumerate(order)}
    parent_rows, depths, ancestors = [-1], [0], [{0}]
    for node in order:
        path = path_to_root(parents, node)
        parent_rows.append(row_of[parents[node]] if parents[node] >= 0 else 0)
        depths.append(len(path))
        ancestors.append({0} | {row_of[ancestor] for ancestor in path})
    return parent_rows, depths, ancestors


def mask_to_rows(words: list[int]) -> set[int]:
    """The rows whose bit is set in an ancestor mask of int32 words."""
    return {32 * index + bit for index, word in enumerate(words) for bit in range(32) if (word >> bit) & 1}


def walk(sampled: list[int], row_tokens: list[int], parent_rows: list[int]) -> tuple[list[int], list[int]]:
    """Emitted tokens and the rows at which they were sampled."""
    children: dict[tuple[int, int], int] = {}
    for child in reversed(range(1, len(row_tokens))):
        children[parent_rows[child], row_tokens[child]] = child
    row: int | None = 0
    emitted, path = [], []
    while row is not None:
        emitted.append(sampled[row])
        path.append(row)
        row = children.get((row, sampled[row]))
    return emitted, path


def compact(
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_tables: torch.Tensor,  # [num_reqs, max_num_blocks]
    first_positions: list[int],
    paths: list[list[int]],
) -> torch.Tensor:
    """A layer's cache after the rows of each path have moved; every row is read from the untouched cache."""
    block_size = kv_cache.shape[2]
    moved = kv_cache.clone()
    for request, (first, path) in enumerate(zip(first_positions, paths, strict=True)):
        for i, row in enumerate(path):
            source, target = first + row, first + i
            source_block = block_tables[request, source // block_size]
            target_block = block_tables[request, target // block_size]
            moved[target_block, :, target % block_size] = kv_cache[source_block, :, source % block_size]
    return moved


def walk_synthetically(
    num_accepted: int, sampled: list[int], row_tokens: list[int], parent_rows: list[int], depths: list[int]
) -> tuple[list[int], list[int]]:
    """Emitted tokens and rows when chance accepts so many nodes, of the first of the deepest paths."""
    rows = range(len(row_tokens))
    deepest = max(rows, key=lambda row: (depths[row], -row))
    path = [0, *reversed(path_to_root(parent_rows, deepest))] if deepest else [0]
    path = list(dict.fromkeys(path))[: 1 + num_accepted]
    return [row_tokens[row] for row in path[1:]] + [sampled[path[-1]]], path
