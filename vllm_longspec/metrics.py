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
- a request's own metrics: its histogram ends at the deepest node, the most that a step can accept.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_longspec.config.options import TreeShape, shape_of
from vllm_longspec.config.sampling import needs_chain

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import SpeculativeConfig


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """A step's statistics by depth. It reaches other processes as the dataclass that it extends."""

    @classmethod
    def of(cls, shape: TreeShape) -> "TreeDecodingStats":
        # How many nodes of each depth a cut list still has, the scheduler does not know, and nobody reads.
        return cls(num_spec_tokens=shape.max_depth, num_accepted_tokens_per_pos=[0] * shape.max_depth)

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
    shape = shape_of(speculative_config)
    if speculative_config is None or shape is None:
        return speculative_config
    seen = copy.copy(speculative_config)
    seen.num_speculative_tokens = shape.max_depth
    return seen
