# SPDX-License-Identifier: Apache-2.0
"""vLLM's metrics of speculative decoding for trees, under vLLM's names; docs/support.md#output lists what each means.

vLLM counts acceptance by a draft token's index in its request's list, which says nothing in a tree. Here it is counted
by depth, since the i-th token of the accepted path is a node of depth i.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_longspec.options import options_of

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """A step's statistics by depth; `num_spec_tokens` is the depth of the deepest node.

    Other processes decode it as a `SpecDecodingStats`, so it has no fields of its own. `num_draft_tokens_per_pos` is
    not counted: vLLM does not export it.
    """

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for depth in range(1, num_accepted_tokens + 1):
            self.num_accepted_tokens_per_pos[depth - 1] += 1


def by_depth(speculative_config: "SpeculativeConfig | None") -> "SpeculativeConfig | None":
    """The configuration for vLLM's Prometheus counters: one draft token for each depth of a tree."""
    options = options_of(speculative_config)
    if speculative_config is None or options is None:
        return speculative_config
    seen = copy.copy(speculative_config)
    seen.num_speculative_tokens = options.max_depth
    return seen


def init_prometheus_counters(
    original: Callable[..., None],
    self: "SpecDecodingProm",
    speculative_config: "SpeculativeConfig | None",
    *args: Any,
    **kwargs: Any,
) -> None:
    original(self, by_depth(speculative_config), *args, **kwargs)
