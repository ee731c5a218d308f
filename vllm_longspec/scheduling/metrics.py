# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics of speculative decoding for trees, under vLLM's names; docs/support.md#output lists what each means.

vLLM counts acceptance by a draft token's index in its request's list, which says nothing in a tree. Here it is counted
by depth, since the i-th token of the accepted path is a node of depth i. A request that takes a chain has as many rows
as one that takes a tree, but counts as many draft tokens as a path is long at most.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_longspec.options import options_of
from vllm_longspec.tree.chain import needs_chain

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm


# Attribute of vLLM's SpecDecodingProm that holds the `KindCounters`.
_COUNTERS = "longspec_kind_counters"


class Kind(IntEnum):
    TREE = 0
    CHAIN = 1


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """A step's statistics by depth and by kind.

    Other processes decode it as a `SpecDecodingStats`, so it has no fields of its own. vLLM does not export
    `num_draft_tokens_per_pos`: here it holds the drafts of each kind, then the new requests of each kind.
    """

    @classmethod
    def of(cls, max_depth: int) -> "TreeDecodingStats":
        return cls(
            num_spec_tokens=max_depth,
            num_accepted_tokens_per_pos=[0] * max_depth,
            num_draft_tokens_per_pos=[0] * (2 * len(Kind)),
        )

    def observe_kinds(self, draft: Kind, new_requests: Mapping[Kind, int]) -> None:
        """Counts a request's draft, and the requests added since the last draft."""
        self.num_draft_tokens_per_pos[draft] += 1
        for kind, num_requests in new_requests.items():
            self.num_draft_tokens_per_pos[len(Kind) + kind] += num_requests

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for depth in range(1, num_accepted_tokens + 1):
            self.num_accepted_tokens_per_pos[depth - 1] += 1


@dataclass
class ChainDecodeMetrics(RequestSpecDecodeMetrics):
    """Metrics of a request that takes a chain; other processes decode them as `RequestSpecDecodeMetrics`."""

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        super().observe(min(num_draft_tokens, self.num_spec_tokens), num_accepted, detailed)


def request_metrics(max_depth: int, params: "SamplingParams | None") -> RequestSpecDecodeMetrics:
    """Empty metrics of a request. Their histogram ends at the deepest node's depth, the most that a step accepts."""
    cls = ChainDecodeMetrics if params is not None and needs_chain(params) else RequestSpecDecodeMetrics
    return cls.new(max_depth)


def by_depth(speculative_config: "SpeculativeConfig | None") -> "SpeculativeConfig | None":
    """The configuration for vLLM's Prometheus counters: one draft token for each depth of a tree."""
    options = options_of(speculative_config)
    if speculative_config is None or options is None:
        return speculative_config
    seen = copy.copy(speculative_config)
    seen.num_speculative_tokens = options.max_depth
    return seen


class KindCounters:
    """Prometheus counters of drafts and requests by kind, with the arguments of vLLM's `SpecDecodingProm`."""

    def __init__(
        self, counter_cls: Any, labelnames: list[str], per_engine_labelvalues: Mapping[int, list[object]], **_: Any
    ):
        counters = [
            counter_cls(name=name, documentation=documentation, labelnames=[*labelnames, "kind"])
            for name, documentation in (
                ("vllm:spec_decode_num_drafts_by_kind", "Number of spec decoding drafts, trees and chains."),
                ("vllm:spec_decode_num_requests_by_kind", "Number of requests that take a tree or a chain."),
            )
        ]
        # In the order of `num_draft_tokens_per_pos` of `TreeDecodingStats`.
        self.counters = {
            engine: [counter.labels(*values, kind.name.lower()) for counter in counters for kind in Kind]
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, stats: SpecDecodingStats, engine_idx: int) -> None:
        for counter, number in zip(self.counters[engine_idx], stats.num_draft_tokens_per_pos, strict=True):
            counter.inc(number)


def init_prometheus_counters(
    original: Callable[..., None],
    self: "SpecDecodingProm",
    speculative_config: "SpeculativeConfig | None",
    *args: Any,
    **kwargs: Any,
) -> None:
    original(self, by_depth(speculative_config), *args, **kwargs)
    if options_of(speculative_config) is not None:
        setattr(self, _COUNTERS, KindCounters(self._counter_cls, *args, **kwargs))


def observe_prometheus_counters(
    original: Callable[..., None], self: "SpecDecodingProm", spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0
) -> None:
    original(self, spec_decoding_stats, engine_idx)
    if (counters := getattr(self, _COUNTERS, None)) is not None:
        counters.observe(spec_decoding_stats, engine_idx)
