# SPDX-License-Identifier: Apache-2.0
"""Acceptance rates of vLLM's `rejection_sample_method="synthetic"`, by depth.

vLLM has a rate for each draft token, whose depth is its index in the list. In a tree only the depth counts.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_longspec.tree.shape import TreeShape

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig


def rates_by_depth(options: Mapping[str, Any], shape: TreeShape) -> dict[str, Any]:
    """The options that replace the user's synthetic acceptance; empty without it.

    `synthetic_acceptance_length` is in tokens per step, from 1 to one more than the verified depth;
    `synthetic_acceptance_rates` has an entry for each verified depth. `num_speculative_tokens` must be resolved.

    Raises:
        ValueError: vLLM's own, for a length or rates that the tree's depth does not allow.
    """
    from vllm.config import SpeculativeConfig

    if options.get("rejection_sample_method") != "synthetic":
        return {}
    num_nodes = options["num_speculative_tokens"]
    depth = min(shape.max_depth, num_nodes)
    rates = SpeculativeConfig._resolve_synthetic_acceptance_rates(
        depth, options.get("synthetic_acceptance_rates"), options.get("synthetic_acceptance_length")
    )
    # vLLM takes only one of the two, with a rate for every draft token.
    return {"synthetic_acceptance_rates": rates + [0.0] * (num_nodes - depth), "synthetic_acceptance_length": None}


def accepted_by_nodes(
    config: "SpeculativeConfig", shape: TreeShape, numbers: Collection[int]
) -> dict[int, float] | None:
    """Accepted tokens of a step by the number of nodes that it verifies, for each of `numbers`; None if not synthetic.

    The accepted path is listed early (`vllm_longspec/tree/synthetic.py`), so more nodes than hold it accept no more.
    """
    if config.rejection_sample_method != "synthetic":
        return None
    rates = config.synthetic_acceptance_rates
    assert rates is not None

    def accepted(num_nodes: int) -> float:
        levels = shape.for_best(num_nodes).levels
        num_listed = num_nodes - lists_another_node(levels, num_nodes, config.num_speculative_tokens)
        return sum(rates[: min(len(levels), num_listed)])

    return {number: accepted(number) for number in numbers if number > 0}


def lists_another_node(levels: Sequence[int], num_nodes: int, most_nodes: int) -> bool:
    """Whether another node of level 1 is listed before the accepted path, among `num_nodes` of a tree of `levels`.

    Not where the largest number of nodes has no room for both: it accepts what was asked for. Fewer nodes, where they
    are chosen, accept less, as the few most probable nodes of a tree are no path.
    """
    return levels[0] > 1 and not (num_nodes == most_nodes and num_nodes <= len(levels))


def conditional_rates(config: "SpeculativeConfig", max_depth: int) -> list[float] | None:
    """Probability of accepting a node at depth 1, 2, .. `max_depth` whose parent is accepted; None if not synthetic."""
    from vllm.v1.spec_decode.utils import unconditional_to_conditional_rates

    if config.rejection_sample_method != "synthetic":
        return None
    assert config.synthetic_acceptance_rates is not None
    rates = unconditional_to_conditional_rates(config.synthetic_acceptance_rates)[:max_depth]
    return rates + [0.0] * (max_depth - len(rates))
