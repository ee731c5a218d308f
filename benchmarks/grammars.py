# SPDX-License-Identifier: Apache-2.0
"""Time that the host takes for the grammar masks of a tree, on one CPU core and without a GPU:

    python -m benchmarks.grammars --tokenizer Qwen/QwQ-32B-Preview [--vocab-size 152064] [--nodes 68]

A text that the grammar allows is read token by token. Before each token the matcher is walked down a tree, as for a
step of a request: one path is the text itself; the other nodes hang anywhere below it, most of them with tokens that
the grammar allows. Only visited rows count, which are the root and the nodes that the grammar allows. A backend is
measured twice, and the second time is reported: guidance builds parts of a grammar when a text first gets there. Times
are the CPU's, so that a busy machine does not matter.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar, StructuredOutputOptions

from benchmarks.reporting import environment, markdown
from vllm_longspec.scheduling.grammar import mask_tree

BACKENDS = ("xgrammar", "guidance", "outlines")
DEPTH = 5
# Of the nodes beside the text, those that the grammar allows.
ALLOWED = 0.8

PERSON = {
    "name": "Ada Lovelace, Countess of Lovelace",
    "age": 36,
    "tags": ["mathematics", "first programmer", "analytical engine"],
    "address": {"street": "12 St James's Square", "city": "London", "zip": "12345"},
}
TEXT: dict[str, Any] = {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


PERSON_SCHEMA = _object(
    name=TEXT,
    age={"type": "integer"},
    tags={"type": "array", "items": TEXT},
    address=_object(street=TEXT, city=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
)
# Name -> kind, specification and a text that it allows.
GRAMMARS: dict[str, tuple[StructuredOutputOptions, str, str]] = {
    "JSON schema": (StructuredOutputOptions.JSON, json.dumps(PERSON_SCHEMA), json.dumps(PERSON)),
    "regex": (
        StructuredOutputOptions.REGEX,
        r"([A-Z][a-z]+ ){1,3}<[a-z.]+@[a-z]+\.(com|org)>, (tel: [0-9]{3}-[0-9]{4}|no telephone)\.",
        "Augusta Ada King <ada.lovelace@analytical.org>, tel: 555-1843.",
    ),
}

Row = dict[str, Any]


def make_backend(name: str, tokenizer: Any, vocab_size: int, num_nodes: int) -> Any:
    """One of vLLM's backends without an engine."""
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config: Any = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=False, disable_additional_properties=False),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="qwen2")),
        speculative_config=SimpleNamespace(num_speculative_tokens=num_nodes),
    )
    classes: dict[str, Any] = {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend, "outlines": OutlinesBackend}
    return classes[name](config, tokenizer, vocab_size)


def tree_at(
    grammar: StructuredOutputGrammar,
    text: Sequence[int],
    num_nodes: int,
    bitmask: torch.Tensor,  # int32 [num_rows, num_words], written
    vocab_size: int,
    source: random.Random,
) -> list[tuple[int, int]]:
    """Token and parent's row of every node; `text` is what comes next, and nodes are no deeper than `DEPTH`."""
    nodes = [(token, depth) for depth, token in enumerate(text[: min(DEPTH, num_nodes)])]
    mask_tree("", grammar, nodes, bitmask, lambda path: (0, 0))
    # Beside the text, so that all their parents' masks are known.
    while len(nodes) < num_nodes:
        depth = source.randrange(min(DEPTH, len(text)))
        bits = (bitmask[depth, :, None] >> torch.arange(32)) & 1
        allowed = bits.flatten()[:vocab_size].nonzero()[:, 0].tolist()
        new = [
            (source.choice(allowed) if allowed and source.random() < ALLOWED else source.randrange(vocab_size), depth)
            for _ in range(8)
        ]
        nodes += new[: num_nodes - len(nodes)]
    return nodes


def measure(backend: Any, name: str, tokenizer: Any, vocab_size: int, num_nodes: int) -> Row:
    kind, specification, text = GRAMMARS[name]
    text_ids = tokenizer.encode(text, add_special_tokens=False)
    bitmask = backend.allocate_token_bitmask(1 + num_nodes)
    for _ in range(2):
        grammar = backend.compile_grammar(kind, specification, stop_token_ids={tokenizer.eos_token_id})
        source = random.Random(0)
        trees, rows, fills = [], [], []
        for place, token in enumerate(text_ids):
            nodes = tree_at(grammar, text_ids[place:], num_nodes, bitmask, vocab_size, source)
            start = time.thread_time()
            masks = mask_tree("", grammar, nodes, bitmask, lambda path: (0, 0))
            trees.append(time.thread_time() - start)
            rows.append(trees[-1] / masks.num_visited)
            start = time.thread_time()
            grammar.fill_bitmask(bitmask, 0)
            fills.append(time.thread_time() - start)
            if not grammar.accept_tokens("", [token]):
                raise ValueError(f"the grammar {name} does not allow its text from token {place} on")
    return {
        "grammar": name,
        "tokens": len(text_ids),
        "nodes": num_nodes,
        "fill, us": statistics.mean(fills) * 1e6,
        "row, us": statistics.mean(rows) * 1e6,
        "tree, us": statistics.mean(trees) * 1e6,
        "longest tree, us": max(trees) * 1e6,
    }


def table(rows: Sequence[Row]) -> str:
    head = list(rows[0])
    return markdown([head, *([_cell(row[column]) for column in head] for row in rows)])


def _cell(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or name of the tokenizer")
    parser.add_argument("--vocab-size", type=int, help="the model's, where it is more than the tokenizer has")
    parser.add_argument("--nodes", type=int, default=68, help="nodes of a tree (default: %(default)s)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git repository")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    vocab_size = arguments.vocab_size or len(tokenizer)
    rows: list[Row] = []
    for name in arguments.backends:
        backend = make_backend(name, tokenizer, vocab_size, arguments.nodes)
        rows += [
            {
                "backend": name,
                "vocabulary": vocab_size,
                **measure(backend, each, tokenizer, vocab_size, arguments.nodes),
            }
            for each in GRAMMARS
        ]
    print(table(rows))
    if arguments.out:
        record = {"environment": environment(arguments.commit), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
