# SPDX-License-Identifier: Apache-2.0
"""The options that a GLIDE draft adds to vLLM's speculative configuration, and where every process finds them again.

- `tree_shape`, such as [4, 16, 16, 16, 16]: nodes at each level of the tree;
- `gamma`, such as 5: the sequential method, which is the tree shape [1] * gamma;
- `frequent_tokens`, a file: the tokens that are drafted, if not all (`vllm_longspec/frequent_tokens.py`);
- `adapt_nodes`: whether the number of nodes follows what is accepted (`vllm_longspec/node_budget.py`);
- `num_speculative_tokens`, which is vLLM's own: verify at most so many of the tree's nodes.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

DEFAULT_LEVELS = (4, 16, 16, 16, 16)
# An ancestor mask has one bit a row, the root's included: 256 rows are 8 words of int32.
MAX_NODES = 255

OPTION_NAMES = ("tree_shape", "gamma", "frequent_tokens", "adapt_nodes")

# Every process finds these on the draft's Hugging Face config: it travels with vLLM's configuration as it is.
SHAPE_ATTRIBUTE = "longspec_tree_shape"
FREQUENT_TOKENS_ATTRIBUTE = "longspec_frequent_tokens"
ADAPT_NODES_ATTRIBUTE = "longspec_adapt_nodes"


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


def parse_tree_shape(options: Mapping[str, Any], vocab_size: int) -> TreeShape:
    """Reads `tree_shape` or `gamma` out of the options of a GLIDE draft, which draws from `vocab_size` tokens.

    Raises:
        ValueError: for a shape that cannot be drafted, in one line that says what to give instead.
    """
    tree_shape, gamma = options.get("tree_shape"), _read_int(options.get("gamma"))
    if tree_shape is not None and gamma is not None:
        raise ValueError("tree_shape and gamma are mutually exclusive: gamma N is the tree shape [1] * N")
    if gamma is not None:
        if not _is_positive_int(gamma):
            raise ValueError(f"gamma must be a positive integer, got {gamma!r}: give the number of tokens to draft")
        if gamma > MAX_NODES:
            raise ValueError(f"gamma is {gamma}, but at most {MAX_NODES} nodes are supported: give a smaller one")
        return TreeShape((1,) * gamma)
    if tree_shape is None:
        levels: Any = DEFAULT_LEVELS
    else:
        levels = _checked_levels(tree_shape)
    _check_widths(levels, vocab_size)
    return TreeShape(levels)


def count_verified_nodes(num_speculative_tokens: Any, shape: TreeShape) -> int:
    """How many of the tree's nodes the target verifies: all of them, or as many as `num_speculative_tokens` allows.

    Raises:
        ValueError: when `num_speculative_tokens` is given and is not a positive integer.
    """
    num_speculative_tokens = _read_int(num_speculative_tokens)
    if num_speculative_tokens is None:
        return shape.num_nodes
    if not _is_positive_int(num_speculative_tokens):
        raise ValueError(
            f"num_speculative_tokens must be a positive integer, got {num_speculative_tokens!r}: "
            f"leave it out to verify all {shape.num_nodes} nodes of the tree"
        )
    return min(num_speculative_tokens, shape.num_nodes)


def tree_shape_of(vllm_config: "VllmConfig") -> TreeShape | None:
    """The tree shape of an engine that speculates with a GLIDE draft, in every process; None for any other engine."""
    return shape_of(vllm_config.speculative_config)


def frequent_tokens_of(vllm_config: "VllmConfig") -> str | None:
    """The file of the tokens that the GLIDE draft of this engine draws; None when it draws any."""
    assert vllm_config.speculative_config is not None
    return getattr(vllm_config.speculative_config.draft_model_config.hf_config, FREQUENT_TOKENS_ATTRIBUTE)


def adapts_nodes(vllm_config: "VllmConfig") -> bool:
    """Whether this engine speculates with a GLIDE draft whose number of nodes follows what is accepted."""
    config = vllm_config.speculative_config
    if config is None or config.draft_model_config is None:
        return False
    return getattr(config.draft_model_config.hf_config, ADAPT_NODES_ATTRIBUTE, False)


def is_glide(vllm_config: "VllmConfig") -> bool:
    """Whether this engine speculates with a GLIDE draft."""
    return tree_shape_of(vllm_config) is not None


def speculates_with_glide(speculative_config: "SpeculativeConfig | None") -> bool:
    """The same where only the speculative configuration is at hand."""
    return shape_of(speculative_config) is not None


def shape_of(speculative_config: "SpeculativeConfig | None") -> TreeShape | None:
    """`tree_shape_of` where only the speculative configuration is at hand."""
    if speculative_config is None or speculative_config.draft_model_config is None:
        return None
    levels = getattr(speculative_config.draft_model_config.hf_config, SHAPE_ATTRIBUTE, None)
    return None if levels is None else TreeShape(tuple(levels))


def _read_int(value: Any) -> Any:
    """An integer that is written as a string, as vLLM's `--option.name+ 2,4` gives every entry of a list."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        # Python refuses to read more digits than a number of nodes will ever have.
        with suppress(ValueError):
            return int(value)
    return value


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _checked_levels(tree_shape: Any) -> tuple[int, ...]:
    example = f"for example {list(DEFAULT_LEVELS)}"
    if not isinstance(tree_shape, list | tuple):
        raise ValueError(f"tree_shape must be a list of nodes per level, got {tree_shape!r}: {example}")
    if not tree_shape:
        raise ValueError(f"tree_shape is empty: give at least one level, {example}, or leave it out")
    levels = tuple(map(_read_int, tree_shape))
    for level in levels:
        if not _is_positive_int(level):
            raise ValueError(f"tree_shape must hold positive integers only, got {level!r} in {tree_shape!r}: {example}")
    return levels


def _check_widths(levels: tuple[int, ...], vocab_size: int) -> None:
    num_nodes = sum(levels)
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"tree_shape {list(levels)} has {num_nodes} nodes, but at most {MAX_NODES} are supported: give fewer or "
            "narrower levels"
        )
    width = 1
    for depth, level in enumerate(levels, start=1):
        if level > width * vocab_size:
            raise ValueError(
                f"tree_shape {list(levels)} asks for {level} nodes at level {depth}, but {width} nodes above it with "
                f"{vocab_size} tokens each produce at most {width * vocab_size}: narrow level {depth}"
            )
        width = level
