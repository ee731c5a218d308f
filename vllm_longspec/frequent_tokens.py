# SPDX-License-Identifier: Apache-2.0
"""A shorter vocabulary for the draft: the tokens that texts consist of most, and the command that counts them.

Most of what a draft reads in a step is the head, one row for every token of the vocabulary, and most of those tokens
hardly ever come up. A draft that only ever proposes the frequent ones reads as many rows as there are of them (Zhao et
al., "FR-Spec", arXiv:2502.14856). The target still scores its whole vocabulary, so the output does not change; a token
that is not on the list is just never drafted.

    vllm-longspec frequent-tokens --model Qwen/QwQ-32B-Preview --size 32768 --out frequent_tokens.json TEXT...

The file is a JSON list of token ids. It is given to vLLM as `--speculative-frequent-tokens FILE`, or saved beside the
draft's weights under the name `frequent_tokens.json`.

A head that learns its tokens (`vllm_longspec/proposers/glide/learned_head.py`) needs no file: `first_tokens` are those
that it begins with.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

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


def num_frequent_tokens(frequent_tokens: str | int, vocab_size: int) -> int:
    """How many tokens a file names, or a head has that learns them. Raises as `read_frequent_tokens`."""
    if isinstance(frequent_tokens, int):
        return frequent_tokens
    return len(read_frequent_tokens(frequent_tokens, vocab_size))


def most_frequent(counts: Counter[int], size: int) -> list[int]:
    """The `size` most frequent token ids, or fewer, most frequent first; ties in the order of their ids."""
    return sorted(counts, key=lambda token_id: (-counts[token_id], token_id))[:size]


def first_tokens(size: int, vocab_size: int, always: Iterable[int]) -> tuple[list[int], int]:
    """The `size` tokens of a head that has seen no text yet, and how many of them it must keep; those come first.

    These are `always`, up to a quarter of all, and the tokens of lowest id. Byte pair encoders number tokens in the
    order of their merges, bytes first, and unigram models by probability: both from frequent to rare. (Llama 2's rarest
    characters come last.) A vocabulary in another order begins with tokens that may be rare, and learns from there.
    """
    kept = list(islice(dict.fromkeys(token_id for token_id in always if 0 <= token_id < vocab_size), size // 4))
    is_kept = set(kept)
    others = (token_id for token_id in range(vocab_size) if token_id not in is_kept)
    return kept + list(islice(others, size - len(kept))), len(kept)


def special_tokens(model_config: "ModelConfig") -> list[int]:
    """Ends of texts, then the special and added tokens of the tokenizer, those in its chat template first."""
    from vllm.tokenizers import cached_tokenizer_from_config

    found: list[int] = []
    for end in (model_config.hf_text_config.eos_token_id, model_config.try_get_generation_config().get("eos_token_id")):
        found += end if isinstance(end, list) else [] if end is None else [end]
    # None with `skip_tokenizer_init`.
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is not None:
        added = tokenizer.get_added_vocab()
        template = str(getattr(tokenizer, "chat_template", None) or "")
        found += [token_id for text, token_id in added.items() if text in template]
        found += [*tokenizer.all_special_ids, *sorted(added.values())]
    return list(dict.fromkeys(found))


def token_texts(model_config: "ModelConfig") -> list[str] | None:
    """The text of each token of the model's vocabulary, in the order of ids; None without a tokenizer.

    A token that is no whole character has a replacement character for it, and one that the tokenizer lacks no text.
    """
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        return None
    texts = [""] * model_config.get_vocab_size()
    token_ids = range(min(len(texts), tokenizer.max_token_id + 1))
    # There may be ids without a token between others, which vLLM's function does not expect.
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    known = [token_id for token_id, piece in zip(token_ids, pieces, strict=True) if piece is not None]
    for token_id, text in zip(known, convert_ids_list_to_tokens(tokenizer, known), strict=True):
        texts[token_id] = text
    return texts


def _tokens_of(tokenizer: Any, paths: Iterable[Path]) -> Iterator[int]:
    for path in paths:
        with path.open(errors="replace") as lines:
            # Tokens may span lines, and files may be too large to be encoded at once.
            while chunk := "".join(islice(lines, 1000)):
                # Not verbose: the model that would not take so many tokens at once never sees them.
                yield from tokenizer.encode(chunk, add_special_tokens=False, verbose=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the target, or a folder with its tokenizer")
    parser.add_argument("--size", type=int, default=32768, help="tokens to keep (32768)")
    parser.add_argument("--out", type=Path, default=Path(FILE_NAME), help=f"the file that is written ({FILE_NAME})")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="files of what the target usually writes")


def run(arguments: argparse.Namespace) -> None:
    if arguments.size < 1:
        raise ValueError(f"--size must be positive, got {arguments.size}")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    counts = Counter(_tokens_of(tokenizer, arguments.texts))
    if not counts:
        raise ValueError("the texts have no tokens: give files of what the target usually writes")
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
