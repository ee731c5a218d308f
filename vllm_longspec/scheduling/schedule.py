# SPDX-License-Identifier: Apache-2.0
"""How many nodes the target verifies, by batch size: vLLM's `num_speculative_tokens_per_batch_size`, and its default.

A step reads the target's weights once however many rows it verifies, so rows are nearly free until arithmetic takes as
long as reading. Two bounds follow, and the default keeps to both:

- of a request: FlashAttention works on tiles of `PREFIX_TILE` rows, a row for each query token and head of a KV head's
  group, and every further tile reads the whole prefix again;
- of a batch: `BATCH_ROWS` rows in all, measured on an H200 (benchmarks/README.md).

Where both leave nothing, K is 0, which is plain decoding.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

PREFIX_TILE = 128
BATCH_ROWS = 128


def default_schedule(num_nodes: int, queries_per_kv_head: int) -> list[tuple[int, int, int]]:
    """Ranges of batch sizes and nodes for each, as vLLM takes them: (first, last, nodes).

    Larger batches than the last range's are treated as the last range.

    Args:
        num_nodes: no request verifies more.
        queries_per_kv_head: query heads that share a KV head.
    """
    per_request = min(num_nodes, max(1, PREFIX_TILE // queries_per_kv_head - 1))
    schedule: list[tuple[int, int, int]] = []
    first, last, nodes = 1, 1, per_request
    while nodes > 0:
        # All sizes of a range share the number of the last one, so that few CUDA graphs serve them.
        nodes = min(per_request, BATCH_ROWS // last - 1)
        if schedule and schedule[-1][2] == nodes:
            first = schedule.pop()[0]
        schedule.append((first, last, nodes))
        first, last = last + 1, 2 * last
    return schedule


def nodes_by_batch_size(config: "SpeculativeConfig", max_batch_size: int, adapt: bool) -> list[list[int]]:
    """Numbers of nodes that a batch of so many requests may verify, the largest first; entry 0 is not used.

    Args:
        adapt: those of `numbers_of_nodes` that are not above the batch's own number, not that one alone.
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
    """0 and every number of the schedule, for batches of any size, the largest first."""
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    schedule = validate_and_normalize_dynamic_sd_schedule(config.num_speculative_tokens_per_batch_size)
    assert config.num_speculative_tokens is not None
    return sorted({0, *(min(nodes, config.num_speculative_tokens) for _, _, nodes in schedule)}, reverse=True)
