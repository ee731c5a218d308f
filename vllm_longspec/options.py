# SPDX-License-Identifier: Apache-2.0
"""The options that this plugin adds to vLLM's speculative configuration, and where every process finds them again.

- `tree_shape`, such as [4, 16, 16, 16, 16]: nodes at each level of the tree;
- `gamma`, such as 5: the sequential method, which is the tree shape [1] * gamma;
- `frequent_tokens`, a file: the tokens that are drafted, if not all (`vllm_longspec/frequent_tokens.py`);
- `adaptive_verification`, or `adapt_nodes`: whether the number of verified nodes follows what is accepted
  (`vllm_longspec/scheduling/adaptive.py`);
- `num_speculative_tokens`, which is vLLM's own: verify at most so many of the tree's nodes.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_longspec.tree.shape import MAX_NODES, TreeShape

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

DEFAULT_LEVELS = (4, 16, 16, 16, 16)

OPTION_NAMES = ("tree_shape", "gamma", "frequent_tokens", "adaptive_verification", "adapt_nodes")

# vLLM's SpeculativeConfig travels to every process as it is, and this attribute with it.
_ATTRIBUTE = "longspec"


@dataclass(frozen=True)
class LongSpecOptions:
    """What an engine with candidate trees was started with; None of these changes while it runs.

    Args:
        proposer: name of what draws the candidates, see `vllm_longspec/proposers`.
        tree_shape: of the drafted tree, before it is cut to the nodes that are verified.
        frequent_tokens: file of the tokens that are drafted; None for all of the vocabulary.
        adaptive_verification: whether the number of verified nodes follows what is accepted.
    """

    proposer: str
    tree_shape: TreeShape
    frequent_tokens: str | None = None
    adaptive_verification: bool = False


def attach_options(config: "SpeculativeConfig", options: LongSpecOptions) -> None:
    """Leaves the options where `options_of` finds them, in this process and in those that get a copy of `config`."""
    setattr(config, _ATTRIBUTE, options)


def options_of(config: "SpeculativeConfig | None") -> LongSpecOptions | None:
    """The options of an engine that verifies candidate trees; None for any other engine."""
    return getattr(config, _ATTRIBUTE, None)


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


def read_flag(options: Mapping[str, Any], name: str, old_name: str) -> tuple[str, bool | None]:
    """An option that is true or false, under either of its names: the name that the user took, and the value or None.

    Raises:
        ValueError: in one line, for another value, or both names at once.
    """
    if options.get(name) is not None and options.get(old_name) is not None:
        raise ValueError(f"{name} and {old_name} are the same option: leave one of the two out")
    taken = old_name if options.get(old_name) is not None else name
    value = options.get(taken)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{taken} must be true or false, got {value!r}")
    return taken, value


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
