# SPDX-License-Identifier: Apache-2.0
"""Grammars walked down trees, against every path walked from the start; with vLLM's own matchers too."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar, StructuredOutputOptions

from vllm_longspec.compat.differences import grammar_mask_stride
from vllm_longspec.compat.versions import IS_0_32
from vllm_longspec.scheduling.grammar import ALL_ALLOWED, FIRST_NODES, FillBudget, TreeGrammars, mask_tree

TARGET = Path(__file__).parents[2] / "benchmarks" / "pair" / "target"
END_OF_REASONING = 1

Node = tuple[int, int]


class Words(StructuredOutputGrammar):
    """Allows one of a few sequences of tokens. Fails on what vLLM's matchers do not take."""

    def __init__(self, words: list[list[int]], num_tokens: int = 40):
        self.words = words
        self.num_tokens = num_tokens
        self.read: list[int] = []

    def _follow(self, read: list[int]) -> set[int]:
        return {word[len(read)] for word in self.words if word[: len(read)] == read and len(word) > len(read)}

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            assert token in self._follow(self.read), "a matcher is broken by a token that it forbids"
            self.read.append(token)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return [token for i, token in enumerate(tokens) if token in self._follow(self.read + tokens[:i])]

    def rollback(self, num_tokens: int) -> None:
        assert 0 < num_tokens <= len(self.read)
        del self.read[-num_tokens:]

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        bits = [0] * 64
        for token in self._follow(self.read):
            bits[token] = 1
        words = [sum(bit << i for i, bit in enumerate(bits[start : start + 32])) for start in (0, 32)]
        bitmask[batch_index] = torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32)

    def is_terminated(self) -> bool:
        return self.read in self.words

    def reset(self) -> None:
        self.read.clear()


class FickleWords(Words):
    """Its mask allows a token that it does not accept, as a matcher with dead ends does."""

    def __init__(self, words: list[list[int]], refused: int):
        super().__init__(words)
        self.refused = refused

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return self.refused not in tokens and super().accept_tokens(request_id, tokens)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return [] if self.refused in tokens else super().validate_tokens(tokens)


def always(path: list[int]) -> tuple[int, int]:
    """As vLLM's bounds without a reasoning parser."""
    return 0, 0


def path_to(nodes: list[Node], row: int) -> list[int]:
    path: list[int] = []
    while row > 0:
        token, row = nodes[row - 1]
        path.insert(0, token)
    return path


def allows(mask: torch.Tensor, token: int) -> bool:
    return bool(int(mask[token // 32]) >> (token % 32) & 1)


def tokens_of(mask: torch.Tensor) -> list[int]:
    """Those of the pair's tokens that a mask allows."""
    bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")
    return bits[: len(tokenizer())].nonzero()[0].tolist()


def walked_from_the_start(
    new_grammar: Callable[[], StructuredOutputGrammar], path: list[int], num_words: int
) -> torch.Tensor | None:
    """The mask after a path of tokens, None if the grammar forbids one of them."""
    grammar = new_grammar()
    mask = torch.full((1, num_words), ALL_ALLOWED, dtype=torch.int32)
    for token in [*path, None]:
        mask.fill_(ALL_ALLOWED)
        if not grammar.is_terminated():
            grammar.fill_bitmask(mask, 0)
            if token is not None:
                if not allows(mask[0], token):
                    return None
                assert grammar.accept_tokens("", [token])
    return mask[0]


def check_tree(
    new_grammar: Callable[[], StructuredOutputGrammar],
    nodes: list[Node],
    num_words: int,
    grammar: StructuredOutputGrammar | None = None,
) -> int:
    """Compares all rows with the oracle; returns the number of nodes that are allowed."""
    bitmask = torch.zeros(1 + len(nodes), num_words, dtype=torch.int32)
    masks = mask_tree("", grammar or new_grammar(), nodes, bitmask, always)
    expected = {row: walked_from_the_start(new_grammar, path_to(nodes, row), num_words) for row in range(len(bitmask))}
    allowed = [row for row, mask in expected.items() if mask is not None]
    assert masks.num_checked == len(nodes)
    assert sorted([0, *masks.allowed_rows]) == allowed
    assert masks.num_visited == len(allowed)
    for row in range(len(bitmask)):
        mask = expected[row]
        assert torch.equal(bitmask[row], torch.full_like(bitmask[row], ALL_ALLOWED) if mask is None else mask)
    return len(allowed) - 1


def random_tree(source: random.Random, num_nodes: int, tokens: list[int]) -> list[Node]:
    """In list order, with different tokens below a node."""
    nodes: list[Node] = []
    while len(nodes) < num_nodes:
        node = source.choice(tokens), source.randrange(1 + len(nodes))
        if node not in nodes:
            nodes.append(node)
    return nodes


@pytest.mark.parametrize("num_nodes", [0, 1, 8, 68])
@pytest.mark.parametrize("seed", range(4))
def test_every_node_has_the_mask_of_its_own_path(num_nodes, seed):
    source = random.Random(seed)
    # Tokens of both words of the mask, the one with the sign too. None is the beginning of another.
    words = [[source.choice([2, 31, 32, 39]) for _ in range(4)] for _ in range(150)]
    grammar = Words(words)
    grammar.accept_tokens("", words[0][:1])
    beginning = list(grammar.read)

    def new_grammar() -> Words:
        fresh = Words(words)
        fresh.accept_tokens("", beginning)
        return fresh

    num_allowed = check_tree(new_grammar, random_tree(source, num_nodes, [2, 31, 32, 39, 3]), 2, grammar)
    assert grammar.read == beginning
    assert num_nodes < 60 or num_nodes > num_allowed > 10


def test_any_prefix_of_the_list_has_the_same_masks():
    source = random.Random(1)
    words = [[source.choice([2, 3, 4]) for _ in range(5)] for _ in range(20)]
    nodes = random_tree(source, 40, [2, 3, 4, 5])
    whole = torch.zeros(41, 2, dtype=torch.int32)
    mask_tree("", Words(words), nodes, whole, always)
    for length in (0, 1, 7, 39):
        part = torch.zeros(1 + length, 2, dtype=torch.int32)
        mask_tree("", Words(words), nodes[:length], part, always)
        assert torch.equal(part, whole[: 1 + length])


def test_after_its_end_a_grammar_says_no_more():
    """As in vLLM: the engine stops there, or was told to go on without it."""
    nodes = [(2, 0), (3, 1), (9, 2), (8, 3), (9, 1)]
    bitmask = torch.zeros(6, 2, dtype=torch.int32)
    masks = mask_tree("", Words([[2, 3]]), nodes, bitmask, always)
    assert masks.allowed_rows == [1, 2, 3, 4]
    assert (bitmask[2:] == ALL_ALLOWED).all() and not (bitmask[:2] == ALL_ALLOWED).any()


def test_the_list_ends_before_a_node_that_the_grammar_refuses_although_its_mask_does_not():
    """Plain decoding would emit it, and vLLM end the request with an error. Nothing may be accepted past it."""
    words = [[2, 3, 4], [2, 5, 6], [7, 8, 9]]
    nodes = [(2, 0), (7, 0), (5, 1), (3, 1), (6, 3), (8, 2)]
    masks = mask_tree("", FickleWords(words, refused=3), nodes, torch.zeros(7, 2, dtype=torch.int32), always)
    assert masks.num_checked == 3
    assert masks.allowed_rows == [1, 3, 2]


# The pair's tokenizer.


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TARGET)


@functools.cache
def backend(name: str) -> Any:
    """One of vLLM's backends, for the pair."""
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config: Any = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=False, disable_additional_properties=False),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="llama")),
        speculative_config=SimpleNamespace(num_speculative_tokens=68),
    )
    classes: dict[str, Any] = {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend, "outlines": OutlinesBackend}
    return classes[name](config, tokenizer(), len(tokenizer()))


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {"type": "integer"}}},
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
)
SPECIFICATIONS = {
    "json": (StructuredOutputOptions.JSON, SCHEMA),
    "regex": (StructuredOutputOptions.REGEX, r"([a-z]{1,3}[:,]){1,6}"),
    "grammar": (StructuredOutputOptions.GRAMMAR, 'root ::= "self." name ("." name)*\nname ::= [a-z]+ ("_" [a-z]+)*'),
}


@pytest.mark.parametrize("kind", SPECIFICATIONS)
@pytest.mark.parametrize("name", ["xgrammar", "guidance", "outlines"])
def test_matchers_of_vllm_are_walked_and_come_back(name, kind):
    if (name, kind) == ("outlines", "grammar"):
        pytest.skip("outlines has no grammars")
    request_type, specification = SPECIFICATIONS[kind]
    if (name, kind) == ("guidance", "grammar"):
        specification = 'start: "self." NAME ("." NAME)*\nNAME: /[a-z]+(_[a-z]+)*/'
    eos = tokenizer().eos_token_id
    num_words = backend(name).allocate_token_bitmask(1).shape[1]

    def compiled() -> StructuredOutputGrammar:
        return backend(name).compile_grammar(request_type, specification, stop_token_ids={eos})

    source = random.Random(kind)
    grammar = compiled()
    text: list[int] = []

    def at_the_text() -> StructuredOutputGrammar:
        fresh = compiled()
        for token in text:
            assert fresh.accept_tokens("", [token])
        return fresh

    def mask_after(path: list[int]) -> torch.Tensor | None:
        return walked_from_the_start(at_the_text, path, num_words)

    num_allowed = num_forbidden = num_ends = 0
    for _ in range(8):
        # Likely nodes are allowed; the others are any token.
        nodes: list[Node] = []
        while len(nodes) < 20:
            parent_row = source.randrange(1 + len(nodes))
            mask = mask_after(path_to(nodes, parent_row))
            allowed = [] if mask is None else tokens_of(mask)
            choices = allowed if allowed and source.random() < 0.7 else range(len(tokenizer()))
            token = eos if eos in allowed and source.random() < 0.5 else source.choice(choices)
            if (token, parent_row) not in nodes:
                nodes.append((token, parent_row))
                num_ends += token == eos and token in allowed
        found = check_tree(at_the_text, nodes, num_words, grammar)
        num_allowed += found
        num_forbidden += len(nodes) - found
        # The walked matcher goes on with the text as if nothing had been.
        mask = mask_after([])
        assert mask is not None
        text.append(source.choice([token for token in tokens_of(mask) if token != eos]))
        assert grammar.accept_tokens("", text[-1:])
    assert num_allowed > 30 and num_forbidden > 30, (num_allowed, num_forbidden)
    assert num_ends > 0 or kind == "json"


# Reasoning: with the bounds of vLLM's manager.


class Reasoner:
    """A reasoning parser whose reasoning ends with one token."""

    def __init__(self, tokenizer: Any):
        pass

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        return END_OF_REASONING in input_ids

    def is_reasoning_end_streaming(self, input_ids: list[int], delta_ids: list[int]) -> bool:
        assert list(input_ids[len(input_ids) - len(delta_ids) :]) == delta_ids
        return END_OF_REASONING in delta_ids


def manager(grammars: dict[str, StructuredOutputGrammar], **attributes: Any) -> tuple[Any, dict[str, Any]]:
    """vLLM's manager without its threads and its tokenizer, and a request for every grammar."""
    one = object.__new__(StructuredOutputManager)
    values = {"reasoner_cls": None, "tokenizer": None, "enable_in_reasoning": False, **attributes}
    values["backend"] = SimpleNamespace(
        allocate_token_bitmask=lambda num_rows: torch.zeros(num_rows, 2, dtype=torch.int32)
    )
    for name, value in values.items():
        setattr(one, name, value)
    requests = {
        name: SimpleNamespace(
            request_id=name,
            prompt_token_ids=[20, 21],
            all_token_ids=[20, 21, 22],
            use_structured_output=True,
            structured_output_request=SimpleNamespace(
                grammar=grammar,
                reasoning_ended=None,
                reasoner=None,
                reasoning_parser_kwargs=None,
                masked_reasoning_end_ids=None,
            ),
        )
        for name, grammar in grammars.items()
    }
    return one, requests


def pack(nodes: list[Node]) -> list[int]:
    return [parent_row << 32 | token for token, parent_row in nodes]


@pytest.mark.parametrize("reasoning", ["goes on", "has ended", "knows grammars"])
def test_grammars_begin_where_reasoning_ends(reasoning):
    """Every row has the mask that a chain of its path gives, for which vLLM's own function is asked."""
    source = random.Random(3)
    words = [[source.choice([2, 3, 4]) for _ in range(4)] for _ in range(30)]
    nodes = random_tree(source, 60, [2, 3, 4, END_OF_REASONING])
    vllm, requests = manager({"one": Words(words)}, reasoner_cls=Reasoner)
    vllm.enable_in_reasoning = reasoning == "knows grammars"
    if reasoning == "has ended":
        requests["one"].structured_output_request.reasoning_ended = True
    step = TreeGrammars(vllm, None).masks(requests, ["one"], {"one": pack(nodes)})
    assert step.num_checked == [60]
    is_constrained_at_once = reasoning != "goes on"

    num_masked = num_free = 0
    allowed = 0
    for row in range(61):
        path = path_to(nodes, row)
        start = 0
        if not is_constrained_at_once:
            start = path.index(END_OF_REASONING) + 1 if END_OF_REASONING in path else len(path) + 1
        if start > len(path):
            mask = torch.full((2,), ALL_ALLOWED, dtype=torch.int32)
            num_free += 1
        else:
            mask = walked_from_the_start(lambda: Words(words), path[start:], 2)
            num_masked += mask is not None
        if mask is not None:
            assert torch.equal(torch.from_numpy(step.bitmask[row]), mask)
            allowed += row > 0
    assert step.num_invalid == {"one": 60 - allowed}
    assert num_masked > 3 and (num_free > 10) == (not is_constrained_at_once)
    # Only emitted tokens move a request.
    assert requests["one"].structured_output_request.reasoning_ended == {"goes on": False, "has ended": True}.get(
        reasoning
    )
    assert requests["one"].all_token_ids == [20, 21, 22]


@pytest.mark.parametrize(
    "masked",
    [(), pytest.param((5, 7, 38), marks=pytest.mark.skipif(IS_0_32, reason="vLLM 0.32 masks no end of reasoning"))],
)
def test_a_chain_of_vllm_has_the_same_masks(masked):
    """vLLM's own walk, of lists that are chains."""
    source = random.Random(4)
    words = [[source.choice([2, 3, 4]) for _ in range(5)] for _ in range(60)]
    chains = {"a": [*words[0][:4]], "b": [5, END_OF_REASONING, *words[1][:3]], "c": [6, 7, 8]}
    names = list(chains)
    vllm, requests = manager({name: Words(words) for name in names}, reasoner_cls=Reasoner)
    requests["a"].structured_output_request.reasoning_ended = True
    for each in requests.values():
        each.structured_output_request.masked_reasoning_end_ids = masked
    vllm.vllm_config = SimpleNamespace(
        num_speculative_tokens=5,
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(is_diffusion=False),
    )
    vllm._grammar_bitmask, vllm._full_mask, vllm.fill_bitmask_parallel_threshold = None, torch.tensor(-1), 128
    expected = vllm.grammar_bitmask(requests, names, chains).copy()
    packed = {name: pack(list(zip(chain, range(len(chain)), strict=True))) for name, chain in chains.items()}
    stride = grammar_mask_stride(vllm.vllm_config)
    step = TreeGrammars(vllm, None, stride).masks(requests, names, packed)
    assert step.bitmask.shape == expected.shape
    # Rows of nodes that are dropped do not matter, nor do those that a request does not have.
    num_rows = [5, 1, 2] if masked else [5, 6, 4]
    first = 0
    for name, rows in zip(names, num_rows, strict=True):
        assert step.bitmask[first : first + rows].tolist() == expected[first : first + rows].tolist()
        first += stride or 1 + len(chains[name])
    num_invalid = {"b": 5, "c": 2} if masked else {}
    assert (step.num_checked, step.num_invalid, step.unchecked) == ([4, 5, 3], num_invalid, set())
    if masked:
        assert not any(allows(torch.from_numpy(step.bitmask[stride or 0]), token) for token in masked)


def test_tokens_that_are_masked_while_a_request_reasons():
    def bounds(path: list[int]) -> tuple[int, int]:
        end = path.index(END_OF_REASONING) + 1 if END_OF_REASONING in path else len(path) + 1
        return end, end

    nodes = [(7, 0), (2, 1), (6, 0), (END_OF_REASONING, 3), (7, 4), (33, 3), (6, 5)]
    bitmask = torch.zeros(1 + len(nodes), 2, dtype=torch.int32)
    masks = mask_tree("", Words([[7, 3]]), nodes, bitmask, bounds, lambda: (7, 33))
    assert masks.allowed_rows == [3, 4, 5] and masks.num_checked == len(nodes)
    for row in (0, 3):
        assert [token for token in range(64) if not allows(bitmask[row], token)] == [7, 33]
    assert allows(bitmask[4], 7)


def test_what_reasoning_masks_is_not_asked_for_after_it():
    def never() -> list[int]:
        raise AssertionError("asked")

    bitmask = torch.zeros(2, 2, dtype=torch.int32)
    assert mask_tree("", Words([[2, 3]]), [(2, 0)], bitmask, always, never).allowed_rows == [1]


def test_every_request_has_the_rows_of_the_stride():
    vllm, requests = manager({name: Words([[2, 3]]) for name in ("root", "tree")})
    step = TreeGrammars(vllm, None, 4).masks(requests, ["root", "tree"], {"tree": pack([(2, 0), (3, 1)])})
    assert step.bitmask.shape == (8, 2)
    only_2, only_3 = [1 << 2, 0], [1 << 3, 0]
    assert step.bitmask[0].tolist() == only_2
    assert step.bitmask[4:7].tolist() == [only_2, only_3, [ALL_ALLOWED] * 2]


def test_a_token_that_ends_reasoning_may_be_the_first_of_the_grammar():
    """Reasoning that ends without a token of its own, as at a tool call. vLLM's bounds say so."""

    def bounds(path: list[int]) -> tuple[int, int]:
        return (path.index(7), path.index(7) + 1) if 7 in path else (len(path) + 1, len(path) + 1)

    nodes = [(2, 0), (7, 1), (3, 2), (4, 2), (7, 0)]
    bitmask = torch.zeros(6, 2, dtype=torch.int32)
    grammar = Words([[7, 3, 2]])
    masks = mask_tree("", grammar, nodes, bitmask, bounds)
    assert masks.allowed_rows == [1, 2, 3, 5] and masks.num_checked == 5
    assert [allows(bitmask[2], token) for token in (2, 3, 7)] == [False, True, False]
    assert [allows(bitmask[3], token) for token in (2, 3, 7)] == [True, False, False]
    assert (bitmask[:2] == ALL_ALLOWED).all() and torch.equal(bitmask[5], bitmask[2])
    # A grammar that does not begin so: vLLM ends the request there. No mask stops the target, so the list ends.
    masks = mask_tree("", Words([[3]]), nodes, bitmask, bounds)
    assert masks.num_checked == 1 and masks.allowed_rows == [1]
    # An end that shows only later has no place in a tree, as rows before it have been masked without it.
    masks = mask_tree("", Words([[3]]), [(2, 0), (5, 1)], bitmask, lambda path: (0, 1) if 5 in path else (9, 9))
    assert masks.num_checked == 1 and masks.allowed_rows == [1]


# Several requests and lists of a step.


def test_what_has_not_reached_the_host_is_not_checked():
    vllm, requests = manager({name: Words([[2, 3]]) for name in ("placeholders", "chain", "root", "tree")})
    nodes = [(2, 0), (3, 1)]
    scheduled = {"placeholders": [-1, -1], "chain": [*pack(nodes), -1], "tree": pack([*nodes, (5, 0)])}
    step = TreeGrammars(vllm, None).masks(requests, list(requests), scheduled)
    assert step.bitmask.shape == (3 + 4 + 1 + 4, 2)
    assert step.num_checked == [0, 2, 0, 3]
    assert step.num_invalid == {"placeholders": 2, "chain": 1, "tree": 1}
    assert step.unchecked == {"placeholders", "chain"}
    # Of every request the root's, then that of its nodes.
    only_2, only_3 = [1 << 2, 0], [1 << 3, 0]
    free = [ALL_ALLOWED] * 2
    rows = step.bitmask.tolist()
    assert rows[:3] == [only_2, free, free]
    assert rows[3:8] == [only_2, only_3, free, free, only_2]
    assert rows[8:] == [only_2, only_3, free, free]


def test_a_bitmask_has_the_rows_of_the_largest_step_and_the_width_of_the_backend():
    vllm, requests = manager({"one": Words([[2, 3]])})
    grammars = TreeGrammars(vllm, None)
    for length in (2, 68, 1):
        assert grammars.masks(requests, ["one"], {"one": [-1] * length}).bitmask.shape == (1 + length, 2)
    vllm.backend = SimpleNamespace(allocate_token_bitmask=lambda rows: torch.zeros(rows, 3, dtype=torch.int32))
    requests["one"].structured_output_request.grammar.fill_bitmask = lambda bitmask, row: bitmask[row].zero_()
    assert grammars.masks(requests, ["one"], {"one": [-1]}).bitmask.shape == (2, 3)


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_the_host_fills_no_longer_than_the_rest_of_a_step_takes():
    clock = Clock()
    budget = FillBudget(clock)

    def steps(number: int, row_times: dict[str, float], rest: float = 20.5e-3) -> dict[str, int]:
        found = {}
        for _ in range(number):
            budget.begin(row_times)
            for name, row_time in row_times.items():
                found[name] = budget.num_nodes(name)
                clock.now += 10 * row_time
                budget.end(name, 10)
            clock.now += rest
        return found

    # Little is known of the first steps.
    assert steps(1, {"a": 1e-3}) == {"a": FIRST_NODES}
    # 20 rows, of which one is the root's.
    assert steps(99, {"a": 1e-3}) == {"a": 19}
    # Requests share the time. The masks of one with another grammar, or of one that has just come, take another time.
    assert steps(1, {"a": 1e-3, "b": 1e-3}) == {"a": 9, "b": 9}
    assert steps(99, {"a": 1e-3, "b": 1e-4, "c": 1.0}) == {"a": 5, "b": 67, "c": 1}
    # Slow masks do not make room for themselves.
    assert steps(99, {"a": 10e-3}) == {"a": 1}
    # An engine that had nothing to do has not taken that long for a step.
    assert steps(99, {"a": 1e-3}) == {"a": 19}
    clock.now += 1000.0
    assert steps(2, {"d": 1e-3}) == {"d": 19}


def test_nodes_that_cannot_be_filled_in_time_are_not_checked():
    """The first nodes of each list are, which are a tree."""
    clock = Clock()

    class Slow(Words):
        def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
            clock.now += 1.0
            super().fill_bitmask(bitmask, batch_index)

    nodes = [(2, 0), (3, 1), (2, 2), (3, 3), (4, 0), (3, 5)]
    vllm, requests = manager({name: Slow([[2, 3] * 5, [4, 3, 3]]) for name in ("a", "b")})
    grammars = TreeGrammars(vllm, FillBudget(clock))
    found = []
    for _ in range(30):
        step = grammars.masks(requests, ["a", "b"], {"a": pack(nodes), "b": pack(nodes)})
        found.append(step.num_checked)
        clock.now += 8.0
    # 8 seconds for two requests, each with a root.
    assert found[0] == [6, 6] and found[-1] == [3, 3]
    assert step.num_invalid == {"a": 3, "b": 3} and step.unchecked == {"a", "b"}
    assert (step.bitmask[[4, 5, 6, 11, 12, 13]] == ALL_ALLOWED).all()
