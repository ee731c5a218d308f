# SPDX-License-Identifier: Apache-2.0
"""A shorter vocabulary for the draft: the tokens that texts consist of most, and the command that counts them.

Most of what a draft reads in a step is the head, one row for every token of the vocabulary, and most of those tokens
hardly ever come up. A draft that only ever proposes the frequent ones reads as many rows as there are of them (Zhao et
al., "FR-Spec", arXiv:2502.14856). The target still scores its whole vocabulary, so the output does not change; a token
that is not on the list is just never drafted.

    vllm-longspec frequent-tokens --model Qwen/QwQ-32B-Preview --size 32768 --out frequent_tokens.json TEXT...

The file is a JSON list of token ids. It is given to vLLM as `--speculative-frequent-tokens FILE`, or saved beside the
draft's weights under the name `frequent_tokens.json`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

FILE_NAME = "frequent_tokens.json"


def read_frequent_tokens(path: str | Path, vocab_size: int) -> list[int]:
    """Reads a file of token ids, most frequent first.

    Raises:
        ValueError: the file cannot be read, or is not a list of distinct token ids below `vocab_size`.
    """
    remedy = "make it with vllm-longspec frequent-tokens"
    try:
        token_ids: Any = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"frequent_tokens {path} cannot be read ({type(error).__name__}): {remedy}") from error
    if not isinstance(token_ids, list) or not token_ids:
        raise ValueError(f"frequent_tokens {path} must be a JSON list of token ids: {remedy}")
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"frequent_tokens {path} holds {token_id!r}, which is no token id of a vocabulary of {vocab_size}: "
                f"{remedy} for this target"
            )
    if len(set(token_ids)) < len(token_ids):
        raise ValueError(f"frequent_tokens {path} names a token twice: {remedy}")
    return token_ids


def most_frequent(counts: Counter[int], size: int) -> list[int]:
    """The `size` most frequent token ids, or fewer, most frequent first; ties in the order of their ids."""
    return sorted(counts, key=lambda token_id: (-counts[token_id], token_id))[:size]


def _tokens_of(tokenizer: Any, paths: Iterable[Path]) -> Iterator[int]:
    for path in paths:
        with path.open(errors="replace") as lines:
            # Tokens may span lines, and files may be too large to be encoded at once.
            while chunk := "".join(islice(lines, 1000)):
                yield from tokenizer.encode(chunk, add_special_tokens=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the target, or a folder with its tokenizer")
    parser.add_argument("--size", type=int, default=32768, help="tokens to keep")
    parser.add_argument("--out", type=Path, default=Path(FILE_NAME))
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="files of what the target usually writes")


def run(arguments: argparse.Namespace) -> None:
    if arguments.size < 1:
        raise ValueError(f"--size must be positive, got {arguments.size}")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    counts = Counter(_tokens_of(tokenizer, arguments.texts))
    kept = most_frequent(counts, arguments.size)
    # Without the end-of-sequence token no tree could contain the end of a text.
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in kept:
        kept = [*kept[: arguments.size - 1], tokenizer.eos_token_id]
    arguments.out.write_text(json.dumps(kept) + "\n")
    share = sum(counts[token_id] for token_id in kept) / max(1, counts.total())
    print(f"{arguments.out}: {len(kept)} of {len(tokenizer)} tokens, {share:.2%} of {counts.total()} in the texts")


if __name__ == "__main__":
    # The command's name of version 0.1.0.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())
