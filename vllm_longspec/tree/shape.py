# SPDX-License-Identifier: Apache-2.0
"""The shape of a drafted tree."""

from dataclasses import dataclass

# An ancestor mask has one bit per row, including the root: 256 rows are 8 int32 words.
MAX_NODES = 255


@dataclass(frozen=True)
class TreeShape:
    """Number of nodes at each depth, from depth 1 on; depth 0 is the root."""

    levels: tuple[int, ...]

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

    def for_best(self, num_nodes: int) -> "TreeShape":
        """A narrower shape whose tree has the same `num_nodes` most probable nodes.

        An ancestor is at least as probable as its node, so these nodes are no deeper than `num_nodes`, and each is one
        of the `num_nodes` most probable of its level. Deep levels need fewer, but kernels compile for every width.
        """
        return TreeShape(tuple(min(level, num_nodes) for level in self.levels[:num_nodes]))

    def width(self, depth: int) -> int:
        """Nodes at `depth`; the root is the only one at depth 0."""
        return self.levels[depth - 1] if depth else 1
