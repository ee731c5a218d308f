# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics of speculative decoding, right for trees, under the names that users already scrape.

vLLM counts by a draft token's place in its request's list, of which a chain has as many as tokens. In a tree the place
in the list says nothing; what is accepted is a path, and its i-th token is a node of depth i. So:

- `vllm:spec_decode_num_accepted_tokens_per_pos`, `position` d - 1, and the rates in the log: drafts of which a node of
  depth d was accepted, for every depth of the tree;
- `vllm:spec_decode_num_draft_tokens`: nodes that the target verified, of all depths. A request that takes a chain has
  as many rows as one that takes a tree, but no more nodes than the tree is deep;
- `vllm:spec_decode_num_accepted_tokens`, `vllm:spec_decode_num_drafts`, and so the mean acceptance length, mean what
  they mean for a chain;
- `vllm:spec_decode_num_drafts_by_kind` and `vllm:spec_decode_num_requests_by_kind`, `kind` tree or chain: the drafts
  again, and the requests that have come;
- a request's own metrics: its histogram ends at the deepest node, the most that a step can accept.
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
from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm


# Where vLLM's own counters keep those that only trees have.
_COUNTERS = "longspec_kind_counters"


class Kind(IntEnum):
    """What a request's drafts are."""

    TREE = 0
    CHAIN = 1


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """A step's statistics by depth and by kind. It reaches other processes as the dataclass that it extends.

    So it has no field of its own. `num_draft_tokens_per_pos` says nothing of a tree, and vLLM shows it to nobody: it
    holds the drafts of each kind, then the new requests of each kind.
    """

    @classmethod
    def of(cls, shape: TreeShape) -> "TreeDecodingStats":
        return cls(
            num_spec_tokens=shape.max_depth,
            num_accepted_tokens_per_pos=[0] * shape.max_depth,
            num_draft_tokens_per_pos=[0] * (2 * len(Kind)),
        )

    def observe_kinds(self, draft: Kind, new_requests: Mapping[Kind, int]) -> None:
        """Counts a request's draft, and requests that came since the last one."""
        self.num_draft_tokens_per_pos[draft] += 1
        for kind, num_requests in new_requests.items():
            self.num_draft_tokens_per_pos[len(Kind) + kind] += num_requests

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Counts a request's step: nodes verified, and how deep the accepted path goes."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for depth in range(1, num_accepted_tokens + 1):
            self.num_accepted_tokens_per_pos[depth - 1] += 1


@dataclass
class ChainDecodeMetrics(RequestSpecDecodeMetrics):
    """Metrics of a request that takes a chain. They reach other processes as the dataclass that they extend."""

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        super().observe(min(num_draft_tokens, self.num_spec_tokens), num_accepted, detailed)


def request_metrics(shape: TreeShape, params: "SamplingParams | None") -> RequestSpecDecodeMetrics:
    """Empty metrics of a request, in the place of vLLM's own."""
    cls = ChainDecodeMetrics if params is not None and needs_chain(params) else RequestSpecDecodeMetrics
    return cls.new(shape.max_depth)


def by_depth(speculative_config: "SpeculativeConfig | None") -> "SpeculativeConfig | None":
    """The configuration as vLLM's Prometheus counters should see it: with one token for each depth of a tree."""
    options = options_of(speculative_config)
    if speculative_config is None or options is None:
        return speculative_config
    seen = copy.copy(speculative_config)
    seen.num_speculative_tokens = options.tree_shape.max_depth
    return seen


class KindCounters:
    """Prometheus counters of drafts and requests by kind.

    Args:
        counter_cls, labelnames, per_engine_labelvalues: as in vLLM's `SpecDecodingProm`.
    """

    def __init__(
        self,
        counter_cls: Any,
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
        **_: Any,
    ):
        counters = [
            counter_cls(name=name, documentation=documentation, labelnames=[*labelnames, "kind"])
            for name, documentation in (
                ("vllm:spec_decode_num_drafts_by_kind", "Number of spec decoding drafts, trees and chains."),
                ("vllm:spec_decode_num_requests_by_kind", "Number of requests that take a tree or a chain."),
            )
        ]
        # In the order of `TreeDecodingStats`.
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
