# SPDX-License-Identifier: Apache-2.0
"""The shape of a drafted tree."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

# An ancestor mask has one bit per row, including the root: 256 rows are 8 int32 words.
MAX_NODES = 255


@dataclass(frozen=True)
class TreeShape:
    """Number of nodes at each depth, from depth 1 on; depth 0 is the root.

    Where the levels are chosen together with the nodes, this bounds all trees, and `plans` says how many levels are
    drafted for a number of verified nodes. vLLM tells the workers nothing but that number.
    """

    levels: tuple[int, ...]
    plans: tuple[tuple[int, int], ...] = ()  # (verified nodes, levels), different numbers of nodes

    def __str__(self) -> str:
        levels = str(list(self.levels))
        if not self.plans:
            return levels
        return f"{levels} at most, levels by verified nodes {dict(self.plans)}"

    @property
    def num_nodes(self) -> int:
        """Drafted nodes, without the root."""
        return sum(self.levels)

    @property
    def num_rows(self) -> int:
        """Nodes and the root."""
        return 1 + self.num_nodes

    @property
    def max_depth(self) -> int:
        return len(self.levels)

    @property
    def max_width(self) -> int:
        """Nodes of the widest level."""
        return max(self.levels)

    def num_levels(self, num_nodes: int) -> int:
        """Levels that are drafted for the most probable `num_nodes` nodes.

        An ancestor is at least as probable as its node, so these nodes are no deeper than `num_nodes`.
        """
        return min(self._levels_by_nodes.get(num_nodes, self.max_depth), num_nodes)

    @cached_property
    def _levels_by_nodes(self) -> dict[int, int]:
        return dict(self.plans)

    def for_best(self, num_nodes: int) -> "TreeShape":
        """A narrower shape whose tree has the same `num_nodes` most probable nodes of these levels.

        A node of depth d that is one of them has d - 1 ancestors that are, too. So at most num_nodes - (d - 1) of them
        have depth d, the best of their level, and children of others are not among them.
        """
        levels = enumerate(self.levels[: self.num_levels(num_nodes)])
        return TreeShape(tuple(min(level, num_nodes - num_ancestors) for num_ancestors, level in levels))

    def with_plans(self, plans: Mapping[int, int]) -> "TreeShape":
        """This shape with a number of levels for each number of nodes."""
        return replace(self, plans=tuple(sorted(plans.items())))

    def width(self, depth: int) -> int:
        """Nodes at `depth`; the root is the only one at depth 0."""
        return self.levels[depth - 1] if depth else 1
