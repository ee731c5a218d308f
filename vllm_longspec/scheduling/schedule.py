# SPDX-License-Identifier: Apache-2.0
"""Number of verified nodes by batch size: the default of vLLM's `num_speculative_tokens_per_batch_size`.

docs/tuning.md#number-of-nodes has the reasons for the default.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

# Rows of a FlashAttention tile, one for each query token and head of a KV head's group. Every further tile of a request
# reads the whole prefix again.
PREFIX_TILE = 128
# Rows of a batch that are verified at little cost, measured on an H200 (benchmarks/README.md).
BATCH_ROWS = 128


def default_schedule(num_nodes: int, queries_per_kv_head: int) -> list[tuple[int, int, int]]:
    """Ranges of batch sizes with their number of nodes, at most `num_nodes`, as vLLM takes them: (first, last, nodes).

    A batch larger than the last range takes the last range's number.
    """
    per_request = min(num_nodes, max(1, PREFIX_TILE // queries_per_kv_head - 1))
    schedule: list[tuple[int, int, int]] = []
    first, last, nodes = 1, 1, per_request
    while nodes > 0:
        # All sizes of a range have the number of the last one, so that few CUDA graphs are captured.
        nodes = min(per_request, BATCH_ROWS // last - 1)
        if schedule and schedule[-1][2] == nodes:
            first = schedule.pop()[0]
        schedule.append((first, last, nodes))
        first, last = last + 1, 2 * last
    return schedule


def nodes_by_batch_size(config: "SpeculativeConfig", max_batch_size: int, adapt: bool) -> list[list[int]]:
    """Numbers of nodes to choose from by batch size, the largest first; entry 0 is not used.

    With `adapt` these are all `numbers_of_nodes` up to the batch's own number, else that number alone.
    """
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    assert config.num_speculative_tokens is not None
    if config.num_speculative_tokens_per_batch_size is None:
        return [[config.num_speculative_tokens]] * (max_batch_size + 1)
    limits = build_dynamic_sd_schedule_lookup(
        config.num_speculative_tokens_per_batch_size, max_batch_size, config.num_speculative_tokens
    )
    if not adapt:
        return [[limit] for limit in limits]
    numbers = numbers_of_nodes(config)
    return [[number for number in numbers if number <= limit] for limit in limits]


def numbers_of_nodes(config: "SpeculativeConfig") -> list[int]:
    """0 and all numbers of the schedule, the largest first."""
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    schedule = validate_and_normalize_dynamic_sd_schedule(config.num_speculative_tokens_per_batch_size)
    assert config.num_speculative_tokens is not None
    return sorted({0, *(min(nodes, config.num_speculative_tokens) for _, _, nodes in schedule)}, reverse=True)
