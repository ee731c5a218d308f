# SPDX-License-Identifier: Apache-2.0
"""Structured output over trees: a grammar's bitmask for every node.

A matcher is at the end of a request's text. It is walked down the tree depth first: it accepts a node's token, gives
the mask of what may follow, and is rolled back when all nodes below are done. So it ends where it began; only emitted
tokens advance it for good, which vLLM does after the step.

A node whose token its parent's mask forbids is dropped with all nodes below: the matcher does not go there. The walk
(`vllm_longspec/tree/walk.py`) does not either, because the target cannot sample a token that is masked. Rows keep their
places, and the mask of a dropped row does not matter.

While a request reasons, its grammar is not active: all may follow but what vLLM masks meanwhile, and the matcher does
not move. vLLM's own `StructuredOutputManager` says for every path where that ends.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_longspec.compat.differences import masked_ends_of_reasoning
from vllm_longspec.tree.packing import unpack_node
from vllm_longspec.tree.state import NO_TOKEN

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Weight of the latest step in the averages of `FillBudget`.
LATEST = 0.2
# Nodes of a request before anything was measured.
FIRST_NODES = 8
# A row that allows every token.
ALL_ALLOWED = -1

# The tokens of a path from the root -> where in it the grammar starts to read, and where masks start. Both are past its
# end if it does not end reasoning.
ConstraintBounds = Callable[[list[int]], tuple[int, int]]


@dataclass
class TreeMasks:
    """What a walk of a request's grammar down its tree found; the masks are in the bitmask that it was given."""

    # The rows of the first nodes of the list have the masks that they need. The walk must not accept later ones.
    num_checked: int
    # Rows of the nodes that the grammar allows, of the tree that these are.
    allowed_rows: list[int] = field(default_factory=list)
    # Rows that were visited, the root's too.
    num_visited: int = 0


class _TreeWalk:
    def __init__(
        self,
        request_id: str,
        grammar: StructuredOutputGrammar,
        nodes: Sequence[tuple[int, int]],
        bitmask: torch.Tensor,
        constraint_bounds: ConstraintBounds,
    ):
        self.request_id = request_id
        self.grammar = grammar
        self.tokens = [NO_TOKEN, *(token for token, _ in nodes)]
        self.children: list[list[int]] = [[] for _ in self.tokens]
        for row, (_, parent_row) in enumerate(nodes, start=1):
            self.children[parent_row].append(row)
        self.bitmask = bitmask
        self.words = bitmask.numpy()
        self.constraint_bounds = constraint_bounds
        # Tokens that are masked while the request reasons.
        self.masked_ids: Sequence[int] = ()
        self.masks = TreeMasks(num_checked=len(nodes))
        # Tokens from the root to the row that is visited.
        self.path: list[int] = []

    def visit(self, row: int, is_constrained: bool) -> None:
        """Masks a row and those below it. The grammar has read the path to the row, and has again afterwards."""
        self.masks.num_visited += 1
        # What comes after the end of a grammar is free.
        reads = is_constrained and not self.grammar.is_terminated()
        if reads:
            self.grammar.fill_bitmask(self.bitmask, row)
        elif not is_constrained:
            self._forbid(row, self.masked_ids)
        for child in self.children[row]:
            token = self.tokens[child]
            if reads and not self._allows(row, token):
                continue
            if not is_constrained and token in self.masked_ids:
                continue
            self.path.append(token)
            if is_constrained:
                self._descend(child, [token] if reads else [])
            else:
                self._descend_in_reasoning(child)
            self.path.pop()

    def _allows(self, row: int, token: int) -> bool:
        word = token // 32
        return word < self.words.shape[1] and bool(self.words[row, word] >> (token % 32) & 1)

    def _forbid(self, row: int, tokens: Sequence[int]) -> None:
        words = self.words[row].view(np.uint32)
        for token in tokens:
            words[token // 32] &= ~np.uint32(1 << token % 32)

    def _descend(self, child: int, tokens: list[int]) -> None:
        # Matchers log an error or break when they are given what they do not accept.
        if tokens and not self.grammar.accept_tokens(self.request_id, tokens):
            self._end_before(child)
            return
        self.masks.allowed_rows.append(child)
        self.visit(child, is_constrained=True)
        if tokens:
            self.grammar.rollback(len(tokens))

    def _descend_in_reasoning(self, child: int) -> None:
        grammar_start, constraint_start = self.constraint_bounds(self.path)
        if constraint_start > len(self.path):
            self.masks.allowed_rows.append(child)
            self.visit(child, is_constrained=False)
            return
        # Reasoning ends with the child's token, which may be the first that the grammar reads.
        tokens = self.path[grammar_start:]
        if len(tokens) <= 1 and self.grammar.validate_tokens(tokens) == tokens:
            self._descend(child, tokens)
        else:
            # A node that the masks allow and the grammar does not. vLLM ends the request if it is emitted.
            self._end_before(child)

    def _end_before(self, row: int) -> None:
        self.masks.num_checked = min(self.masks.num_checked, row - 1)


def mask_tree(
    request_id: str,
    grammar: StructuredOutputGrammar,
    nodes: Sequence[tuple[int, int]],
    bitmask: torch.Tensor,  # int32 [1 + len(nodes) or more, num_words], written; a set bit allows a token
    constraint_bounds: ConstraintBounds,
    masked_ids: Callable[[], Sequence[int]] = tuple,
) -> TreeMasks:
    """Writes the masks of the root and of every node that the grammar allows; those of all other rows allow everything.

    Args:
        request_id: names the request in vLLM's messages.
        grammar: at the end of the request's text; it is left there.
        nodes: token and parent's row of each node in list order, parents before children.
        constraint_bounds: called with paths from the root while the request reasons, first with the empty one.
        masked_ids: called if the request reasons at the root; gives the tokens that are masked until that ends.
    """
    bitmask.fill_(ALL_ALLOWED)
    walk = _TreeWalk(request_id, grammar, nodes, bitmask, constraint_bounds)
    _, constraint_start = constraint_bounds([])
    if constraint_start > 0:
        walk.masked_ids = masked_ids()
    walk.visit(0, is_constrained=constraint_start == 0)
    masks = walk.masks
    masks.allowed_rows = [row for row in masks.allowed_rows if row <= masks.num_checked]
    return masks


class FillBudget:
    """For how many nodes of each request the host can fill masks while the GPU works.

    The host fills masks while the GPU verifies the same step. It may fill for as long as all else in a step takes, for
    each request with structured output the same time. Filling that is hidden behind the GPU leaves it that time;
    filling that is not only adds to the step, so that it cannot raise its own bound.

    Times are measured, as moving averages: how long a row takes differs by orders of magnitude between grammars.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        # Of the latest step's requests, None before their first; of all requests.
        self.row_times: dict[str, float | None] = {}
        self.typical_row_time: float | None = None
        self.rest_time: float | None = None
        self.last = 0.0

    def begin(self, request_ids: Iterable[str]) -> None:
        """Begins the masks of a step."""
        now = self.clock()
        row_times = {request_id: self.row_times.get(request_id) for request_id in request_ids}
        # With none of the last step's requests the engine may have had nothing to do in between.
        if row_times.keys() & self.row_times.keys():
            self.rest_time = _average(self.rest_time, now - self.last)
        self.row_times, self.last = row_times, now

    def num_nodes(self, request_id: str) -> int:
        """The most nodes of a request, at least 1."""
        row_time = self.row_times[request_id] or self.typical_row_time
        if row_time is None or self.rest_time is None:
            return FIRST_NODES
        # One of the rows is the root's.
        return max(1, int(self.rest_time / len(self.row_times) / row_time) - 1)

    def end(self, request_id: str, num_rows: int) -> None:
        """Ends the masks of a request, the one whose turn it is."""
        now = self.clock()
        # A clock may not tick for a single row.
        row_time = max((now - self.last) / num_rows, 1e-9)
        self.row_times[request_id] = _average(self.row_times[request_id], row_time)
        self.typical_row_time = _average(self.typical_row_time, row_time)
        self.last = now


def _average(average: float | None, latest: float) -> float:
    return latest if average is None else average + LATEST * (latest - average)


@dataclass
class StepMasks:
    """The bitmask of a step, and by request what of its list of nodes the bitmask covers."""

    # int32 [num_rows, num_words]; for every request a row for its root and each of its nodes, and up to the mask stride
    # rows without meaning
    bitmask: np.ndarray
    num_checked: list[int]
    # Nodes that cannot be accepted, of requests that have any: forbidden, below a forbidden one, or not checked.
    num_invalid: dict[str, int]
    # Requests with nodes that were not checked.
    unchecked: set[str]


class TreeGrammars:
    """Takes the place of `StructuredOutputManager.grammar_bitmask`, which walks draft tokens in list order."""

    def __init__(self, manager: StructuredOutputManager, budget: FillBudget | None, mask_stride: int | None = None):
        self.manager = manager
        self.budget = budget
        # Rows of the bitmask that each request has; None for those of its root and its nodes alone.
        self.mask_stride = mask_stride
        self.backend: Any = None
        self.bitmask: torch.Tensor | None = None

    def masks(
        self,
        requests: Mapping[str, "Request"],
        request_ids: Sequence[str],  # at least one, of requests with structured output whose grammar is compiled
        scheduled_nodes: Mapping[str, Sequence[int]],  # packed (`vllm_longspec/tree/packing.py`)
    ) -> StepMasks:
        """Fills the masks of a step, in the order of `request_ids`."""
        lists = [scheduled_nodes.get(request_id, ()) for request_id in request_ids]
        strides = [self.mask_stride or 1 + len(packed) for packed in lists]
        bitmask = self._rows(sum(strides))
        step = StepMasks(bitmask.numpy(), [], {}, set())
        if self.budget is not None:
            self.budget.begin(request_ids)
        first = 0
        for request_id, packed, stride in zip(request_ids, lists, strides, strict=True):
            rows = bitmask[first : first + 1 + len(packed)]
            first += stride
            most = None if self.budget is None else self.budget.num_nodes(request_id)
            masks = self._mask(requests[request_id], _nodes(packed[:most]), rows)
            if self.budget is not None:
                self.budget.end(request_id, masks.num_visited)
            step.num_checked.append(masks.num_checked)
            if num_invalid := len(packed) - len(masks.allowed_rows):
                step.num_invalid[request_id] = num_invalid
            if masks.num_checked < len(packed):
                step.unchecked.add(request_id)
        return step

    def _mask(self, request: "Request", nodes: list[tuple[int, int]], rows: torch.Tensor) -> TreeMasks:
        structured = request.structured_output_request
        assert structured is not None
        grammar = structured.grammar
        assert isinstance(grammar, StructuredOutputGrammar)
        # All that vLLM reads of the request, without a copy of its token ids for every path.
        seen: Any = SimpleNamespace(
            structured_output_request=structured,
            prompt_token_ids=request.prompt_token_ids,
            all_token_ids=_CopiedOnce(request.all_token_ids),
        )

        def constraint_bounds(path: list[int]) -> tuple[int, int]:
            return self.manager._get_constraint_bounds(seen, path)

        def masked_ids() -> Sequence[int]:
            return masked_ends_of_reasoning(self.manager, request)

        return mask_tree(request.request_id, grammar, nodes, rows, constraint_bounds, masked_ids)

    def _rows(self, num_rows: int) -> torch.Tensor:
        backend = self.manager.backend
        assert backend is not None
        if self.bitmask is None or self.backend is not backend or len(self.bitmask) < num_rows:
            # A power of two: seldom allocated, and no larger than twice what was ever needed.
            bitmask = backend.allocate_token_bitmask(1 << (num_rows - 1).bit_length())
            # A copy is not pinned. vLLM copies pinned memory to the device while the next step may already write to it.
            self.bitmask = bitmask.clone()
            self.backend = backend
        return self.bitmask[:num_rows]


def _nodes(packed: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens and parents up to the first row that holds no node, or whose node has not reached the host."""
    nodes = []
    for node in map(unpack_node, packed):
        if node[0] == NO_TOKEN:
            break
        nodes.append(node)
    return nodes


class _CopiedOnce:
    """Token ids of which every copy is the same list again, without what was appended to it."""

    def __init__(self, token_ids: Sequence[int]):
        self.token_ids = token_ids
        self.copied: list[int] | None = None

    def copy(self) -> list[int]:
        if self.copied is None:
            self.copied = list(self.token_ids)
        del self.copied[len(self.token_ids) :]
        return self.copied
