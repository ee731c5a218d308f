# SPDX-License-Identifier: Apache-2.0
"""The shape of a drafted tree: how many nodes it has at each depth."""

from dataclasses import dataclass

# An ancestor mask has one bit a row, the root's included: 256 rows are 8 words of int32.
MAX_NODES = 255


@dataclass(frozen=True)
class TreeShape:
    """How many nodes a drafted tree has at each depth, from depth 1 on; depth 0 is the root."""

    levels: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Drafted nodes in all, without the root."""
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
        """A narrower shape whose tree has the same `num_nodes` likeliest nodes.

        With a node come all its ancestors, which are as likely or likelier. So none of these nodes is deeper than there
        are nodes, and each is one of the `num_nodes` likeliest children of a level that has its parent. Deep levels
        could do with fewer still, but every width is one more shape to compile kernels for.
        """
        return TreeShape(tuple(min(level, num_nodes) for level in self.levels[:num_nodes]))

    def width(self, depth: int) -> int:
        """Nodes at `depth`; the root is the only one at depth 0."""
        return self.levels[depth - 1] if depth else 1
