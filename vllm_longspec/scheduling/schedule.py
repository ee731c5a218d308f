# SPDX-License-Identifier: Apache-2.0
"""Number of verified nodes by batch size: the default of vLLM's `num_speculative_tokens_per_batch_size`.

docs/tuning.md#number-of-nodes has the reasons for the default, docs/tuning.md#tree-shape those for the levels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_longspec.options import options_of
from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

# Rows of a FlashAttention tile, one for each query token and head of a KV head's group. Every further tile of a request
# reads the whole prefix again.
PREFIX_TILE = 128
# Rows of a batch that are verified at little cost, measured on an H200 (benchmarks/README.md), for schedules that are
# kept to whatever a step costs.
BATCH_ROWS = 128
# The most rows of a batch where the number is chosen by what a step costs: those of vLLM's largest CUDA graphs. With
# short contexts so many cost two steps of plain decoding on an H200, with long ones, whose K and V are most of a step,
# far less.
MOST_ROWS = 4 * BATCH_ROWS
# Rows of a request are halved from one range of batch sizes to the next. From 8 to 4 there is a step in between, the
# root and a path of five levels: with large batches a row costs most, and a draft that is often accepted is worth such
# a path.
PATH_ROWS = 6
# Numbers of levels to choose from where the levels are not given, in the order in which they get their nodes.
LEVEL_CHOICES = (8, 5, 12, 3)


def default_schedule(
    num_nodes: int, queries_per_kv_head: int, batch_rows: int = BATCH_ROWS
) -> list[tuple[int, int, int]]:
    """Ranges of batch sizes with their number of nodes, at most `num_nodes`, as vLLM takes them: (first, last, nodes).

    A batch has at most `batch_rows` rows, a power of two. One larger than the last range takes the last range's number.
    """
    per_request = min(num_nodes, max(1, PREFIX_TILE // queries_per_kv_head - 1))
    # All sizes of a range have the number of the last one, so that few CUDA graphs are captured.
    rows = sorted({PATH_ROWS, *(batch_rows >> power for power in range(batch_rows.bit_length() - 1))}, reverse=True)
    schedule: list[tuple[int, int, int]] = []
    first = 1
    for rows_of_request in rows:
        last, nodes = batch_rows // rows_of_request, min(per_request, rows_of_request - 1)
        if schedule and schedule[-1][2] == nodes:
            first = schedule.pop()[0]
        schedule.append((first, last, nodes))
        first = last + 1
    return [*schedule, (first, 2 * last, 0)]


def numbers_of(schedule: Sequence[Sequence[int]], num_nodes: int) -> list[int]:
    """0 and all numbers of a schedule, at most `num_nodes`, the largest first."""
    return sorted({0, *(min(nodes, num_nodes) for _, _, nodes in schedule)}, reverse=True)


def plan_levels(numbers: Sequence[int], shape: TreeShape) -> dict[int, int]:
    """Numbers of verified nodes with the levels that are drafted for each, to choose from together.

    Only the number of nodes reaches the workers, so each of `numbers` is split into a few that differ by one. Numbers
    of levels that fewer nodes could not reach, or whose trees are smaller, are left out.
    """
    plans: dict[int, int] = {}
    for number in sorted(set(numbers) - {0}, reverse=True):
        choices = dict.fromkeys(min(levels, number, shape.max_depth) for levels in LEVEL_CHOICES)
        for levels in choices:
            num_nodes = next(nodes for nodes in range(number, -1, -1) if nodes not in plans)
            if levels <= num_nodes <= sum(min(level, num_nodes) for level in shape.levels[:levels]):
                plans[num_nodes] = levels
    return plans


def within_rows(num_nodes: int, batch_rows: int, max_batch_size: int) -> list[int]:
    """Number of nodes by batch size of the default schedule with at most `num_nodes`; entry 0 is not used."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    # The tile of a single request has already limited `num_nodes`.
    schedule = default_schedule(num_nodes, 1, batch_rows)
    return build_dynamic_sd_schedule_lookup(schedule, max_batch_size, schedule[0][2])


def nodes_by_batch_size(config: "SpeculativeConfig", max_batch_size: int, choose: bool) -> list[list[int]]:
    """Numbers of nodes to choose from by batch size, the largest first; entry 0 is not used.

    With `choose` these are all `numbers_of_nodes` up to the batch's own number, else that number alone.
    """
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    assert config.num_speculative_tokens is not None
    if config.num_speculative_tokens_per_batch_size is None:
        return [[config.num_speculative_tokens]] * (max_batch_size + 1)
    limits = build_dynamic_sd_schedule_lookup(
        config.num_speculative_tokens_per_batch_size, max_batch_size, config.num_speculative_tokens
    )
    if not choose:
        return [[limit] for limit in limits]
    numbers = numbers_of_nodes(config)
    return [[number for number in numbers if number <= limit] for limit in limits]


def numbers_of_nodes(config: "SpeculativeConfig") -> list[int]:
    """0 and all numbers of the schedule, or all that say how many levels are drafted, the largest first."""
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    options = options_of(config)
    if options is not None and options.tree_shape.plans:
        return sorted({0, *dict(options.tree_shape.plans)}, reverse=True)
    schedule = validate_and_normalize_dynamic_sd_schedule(config.num_speculative_tokens_per_batch_size)
    assert config.num_speculative_tokens is not None
    return numbers_of(schedule, config.num_speculative_tokens)
