# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.grammars` measures the masks of trees as the scheduler fills them; how fast is the CPU's affair."""

import random

import pytest
import torch
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from benchmarks import grammars
from tests.unit.test_grammar import tokenizer


@pytest.mark.parametrize("name", grammars.BACKENDS)
def test_masks_of_every_backend_are_timed(name):
    backend = grammars.make_backend(name, tokenizer(), len(tokenizer()), 6)
    rows = [grammars.measure(backend, each, tokenizer(), len(tokenizer()), 6) for each in grammars.GRAMMARS]
    assert [row["grammar"] for row in rows] == list(grammars.GRAMMARS)
    assert all(0 < row["row, us"] < row["tree, us"] <= row["longest tree, us"] for row in rows)
    head, _, *lines = grammars.table(rows).splitlines()
    assert head.startswith("| grammar | tokens | nodes | fill, us |") and len(lines) == len(grammars.GRAMMARS)


def test_a_tree_is_the_text_and_nodes_beside_it():
    backend = grammars.make_backend("xgrammar", tokenizer(), len(tokenizer()), 20)
    grammar = backend.compile_grammar(StructuredOutputOptions.REGEX, "[a-z]*", stop_token_ids={0})
    text = tokenizer().encode("abc", add_special_tokens=False)
    bitmask = backend.allocate_token_bitmask(21)
    nodes = grammars.tree_at(grammar, text, 20, bitmask, len(tokenizer()), random.Random(0))
    assert len(nodes) == 20 and nodes[: len(text)] == list(zip(text, range(len(text)), strict=True))
    masks = grammars.mask_tree("", grammar, nodes, torch.zeros_like(bitmask), lambda path: (0, 0))
    # The text, most of the others, and not all.
    assert 14 < len(masks.allowed_rows) < 20


def test_a_text_must_be_allowed(monkeypatch):
    monkeypatch.setattr(grammars, "GRAMMARS", {"regex": (StructuredOutputOptions.REGEX, "[a-z]*", "abc 1")})
    backend = grammars.make_backend("outlines", tokenizer(), len(tokenizer()), 6)
    with pytest.raises(ValueError, match="the grammar regex does not allow its text from token"):
        grammars.measure(backend, "regex", tokenizer(), len(tokenizer()), 6)
