# SPDX-License-Identifier: Apache-2.0
"""The options that this plugin adds to vLLM's speculative configuration; docs/options.md describes each."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_longspec.tree.shape import MAX_NODES, TreeShape

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

DEFAULT_LEVELS = (4, 16, 16, 16, 16)
# The value of `tree_shape` with which levels are chosen together with nodes (`vllm_longspec/scheduling/adaptive.py`),
# and the bound of all trees that may be chosen.
AUTO = "auto"
AUTO_LEVELS = (4, *[16] * 11)
DEFAULT_COPY_LENGTH = 16
# Tokens that the target drafts for itself.
DEFAULT_GAMMA = 4

# Last tokens that the cross-attention of nodes below the root sees of a request. With contexts of up to 16k no fewer
# tokens were accepted with a quarter of these (docs/performance.md#a-part-of-the-cache).
DEFAULT_CROSS_ATTENTION_BUDGET = 4096

# Which cached blocks the target attends while it drafts for itself (docs/design.md#the-target-drafts-for-itself).
SELECTIONS = ("recent", "scores")

OPTION_NAMES = (
    "tree_shape",
    "gamma",
    "copy_length",
    "frequent_tokens",
    "couple_noise",
    "adaptive_verification",
    "adapt_nodes",
    "step_costs",
    "sinks",
    "budget",
    "selection",
    "cross_attention_budget",
    "spool",
)

# Where the costs come from by which the number of nodes is chosen (docs/tuning.md#what-a-step-costs).
MEASURE, SHIPPED = "measure", "shipped"

# Attribute of vLLM's SpeculativeConfig, which is pickled to every process.
_ATTRIBUTE = "longspec"


@dataclass(frozen=True)
class PartialAttention:
    """The part of a request's cache that a draft attends, rounded up to whole blocks (`attention/partial.py`)."""

    sinks: int = 32  # first tokens
    budget: int = 1024  # last tokens
    selection: str = "recent"  # one of `SELECTIONS`


@dataclass(frozen=True)
class LongSpecOptions:
    """The plugin's options of an engine with candidate trees."""

    proposer: str  # a name in `vllm_longspec/proposers/__init__.py`
    tree_shape: TreeShape  # as drafted, before it is cut to the nodes that are verified; bounds all that are chosen
    # File of the tokens that may be drafted, or how many with a head that learns them; None for the whole vocabulary.
    frequent_tokens: str | int | None = None
    couple_noise: bool = True  # whether drafts are ranked with the noise of the target's draws
    adaptive_verification: bool = False  # whether the number of verified nodes follows the acceptance length
    copy_length: int = 0  # tokens that are copied from the request's own text beside the drafted tree; 0 for none
    num_lookahead_tokens: int = 0  # cache slots from the root's on that a draft writes at most, which are reserved
    partial_attention: PartialAttention | None = None  # None for a draft that attends all of the cache, or nothing
    spool: str | None = None  # folder to which what is captured goes, for an engine that teaches
    nodes_by_cost: bool = False  # whether it is chosen by cost and typical acceptance, without adaptive verification
    measures_costs: bool = False  # whether the engine times its own steps at start-up

    @property
    def chooses_nodes(self) -> bool:
        """Whether there are several numbers of verified nodes for a batch."""
        return self.adaptive_verification or self.nodes_by_cost

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node that can be verified: a step emits at most one token more."""
        # A node comes after all its ancestors in the list, which has no more nodes than the drafted tree.
        return max(self.tree_shape.max_depth, min(self.copy_length, self.tree_shape.num_nodes))


def attach_options(config: "SpeculativeConfig", options: LongSpecOptions) -> None:
    """Makes `options_of(config)` return the options, in this process and in those that receive `config`."""
    setattr(config, _ATTRIBUTE, options)


def options_of(config: "SpeculativeConfig | None") -> LongSpecOptions | None:
    """The options of an engine that verifies candidate trees; None for any other engine."""
    return getattr(config, _ATTRIBUTE, None)


def parse_tree_shape(
    options: Mapping[str, Any], vocab_size: int, default_levels: tuple[int, ...] = DEFAULT_LEVELS
) -> TreeShape:
    """Reads `tree_shape` or `gamma` for a draft that draws from `vocab_size` tokens; the bound of all trees if "auto".

    Raises:
        ValueError: the shape cannot be drafted.
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
    if tree_shape == AUTO:
        levels: tuple[int, ...] = AUTO_LEVELS
    else:
        levels = default_levels if tree_shape is None else _checked_levels(tree_shape)
    _check_widths(levels, vocab_size)
    return TreeShape(levels)


def parse_copy_length(options: Mapping[str, Any]) -> int:
    """Reads `copy_length`.

    Raises:
        ValueError: it is not an integer from 0 to `MAX_NODES`.
    """
    copy_length = _read_int(options.get("copy_length"))
    if copy_length is None:
        return DEFAULT_COPY_LENGTH
    is_int = isinstance(copy_length, int) and not isinstance(copy_length, bool)
    if not is_int or not 0 <= copy_length <= MAX_NODES:
        raise ValueError(
            f"copy_length must be an integer from 0 to {MAX_NODES}, got {copy_length!r}: give the number of tokens to "
            f"copy, 0 to copy none, or leave it out for {DEFAULT_COPY_LENGTH}"
        )
    return copy_length


def times_steps(options: Mapping[str, Any]) -> bool:
    """Whether an engine with these options times its own steps, as `step_costs` says; only CUDA graphs are timed.

    Raises:
        ValueError: it is neither `MEASURE` nor `SHIPPED`.
    """
    from vllm.platforms import current_platform

    step_costs = options.get("step_costs", MEASURE)
    if step_costs not in (MEASURE, SHIPPED, None):
        raise ValueError(f"step_costs must be {MEASURE!r} or {SHIPPED!r}, got {step_costs!r}: leave it out")
    return step_costs != SHIPPED and current_platform.is_cuda()


def parse_partial_attention(options: Mapping[str, Any], max_model_len: int) -> PartialAttention:
    """Reads `sinks`, `budget` and `selection`; no part is larger than the whole.

    Raises:
        ValueError: one of them has a value that is not supported.
    """
    default = PartialAttention()
    sinks, budget = _read_int(options.get("sinks")), _read_int(options.get("budget"))
    if sinks is None:
        sinks = default.sinks
    if budget is None:
        budget = default.budget
    if not _is_positive_int(sinks) and (sinks != 0 or isinstance(sinks, bool)):
        raise ValueError(
            f"sinks must be an integer of 0 or more, got {sinks!r}: give the number of first tokens to attend, or "
            f"leave it out for {default.sinks}"
        )
    if not _is_positive_int(budget):
        raise ValueError(
            f"budget must be a positive integer, got {budget!r}: give the number of last tokens to attend, or leave it "
            f"out for {default.budget}"
        )
    selection = options.get("selection")
    if selection is None:
        selection = default.selection
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}: leave it out")
    if sinks + budget >= max_model_len:
        # Every request is attended as a whole, which leaves no block to choose.
        selection = default.selection
    return PartialAttention(min(sinks, max_model_len), min(budget, max_model_len), selection)


def parse_cross_attention_budget(options: Mapping[str, Any], max_model_len: int) -> PartialAttention | None:
    """Reads `cross_attention_budget`; None for the whole prefix.

    Raises:
        ValueError: it is neither a positive integer nor false.
    """
    budget = _read_int(options.get("cross_attention_budget"))
    if budget is False:
        return None
    if budget is None:
        budget = DEFAULT_CROSS_ATTENTION_BUDGET
        if PartialAttention.sinks + budget >= max_model_len:
            # Every request is attended as a whole.
            return None
    if not _is_positive_int(budget):
        raise ValueError(
            f"cross_attention_budget must be a positive integer or false, got {budget!r}: give the number of last "
            "tokens that the draft attends, or false to attend all"
        )
    return PartialAttention(min(PartialAttention.sinks, max_model_len), min(budget, max_model_len))


def most_tokens(options: Mapping[str, Any]) -> int | None:
    """The most tokens that vLLM's own options ask for; None if they leave it open, or are refused later.

    A schedule by batch size must have been checked.

    Raises:
        ValueError: they ask for more than can be drafted.
    """
    name = "num_speculative_tokens"
    number = _read_int(options.get(name))
    if number is None:
        name = "num_speculative_tokens_per_batch_size"
        number = max((int(nodes) for _, _, nodes in options.get(name) or ()), default=None)
    if not _is_positive_int(number):
        return None
    if number > MAX_NODES:
        # Not left to `parse_tree_shape`, which would name an option that was not given.
        raise ValueError(
            f"{name} asks for {number} tokens, but at most {MAX_NODES} nodes are supported: give a smaller number"
        )
    return number


def count_verified_nodes(num_speculative_tokens: Any, shape: TreeShape) -> int:
    """The number of nodes that the target verifies at most.

    Raises:
        ValueError: `num_speculative_tokens` is neither None nor a positive integer.
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


def read_flag(options: Mapping[str, Any], name: str, old_name: str | None = None) -> tuple[str, bool | None]:
    """The name under which a boolean option was given, and its value; None if it was not given.

    Raises:
        ValueError: both names are given, or the value is not a boolean.
    """
    taken = name
    if old_name is not None and options.get(old_name) is not None:
        if options.get(name) is not None:
            raise ValueError(f"{name} and {old_name} are the same option: leave one of the two out")
        taken = old_name
    value = options.get(taken)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{taken} must be true or false, got {value!r}")
    return taken, value


def _read_int(value: Any) -> Any:
    """Converts strings of digits, which are what vLLM's `--option.name+ 2,4` passes as entries of a list."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        # Python limits the number of digits that int() converts.
        with suppress(ValueError):
            return int(value)
    return value


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _checked_levels(tree_shape: Any) -> tuple[int, ...]:
    example = f"for example {list(DEFAULT_LEVELS)}"
    if not isinstance(tree_shape, list | tuple):
        raise ValueError(f"tree_shape must be a list of nodes per level or {AUTO!r}, got {tree_shape!r}: {example}")
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
