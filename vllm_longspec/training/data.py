# SPDX-License-Identifier: Apache-2.0
"""Samples of JSON lines: checked, tokenized and written once, then read from a memory-mapped file.

A line is a conversation {"messages": [...]}, of which the assistant's turns are supervised, {"input_ids": [...],
"loss_mask": [...]}, or {"text": ...}, which is supervised as a whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_KINDS = ("messages", "input_ids", "text")
_META, _IDS, _MASK, _INDEX = "data.json", "ids.bin", "loss_mask.bin", "samples.npy"
# Changes when the same lines would be written otherwise.
_VERSION = 2


class Dataset(Protocol):
    """Tokenized samples by their number."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""

    @property
    def first_supervised(self) -> Sequence[int]:
        """Index of each sample's first supervised token: one cut shorter than that has none."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """int64 [num_tokens] ids and bool [num_tokens], true where a token is supervised; false at 0."""


@dataclass(frozen=True)
class Counts:
    """Of what was read."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    # Left out, since they had no supervised token.
    unsupervised: int = 0
    # Cut to the most tokens that any stage takes.
    cut: int = 0
    # Turns of an assistant that the chat template renders otherwise when more turns follow, and are not supervised.
    rewritten_turns: int = 0

    def __str__(self) -> str:
        said = f"{self.samples} samples, {self.tokens} tokens, {self.supervised} of them supervised"
        for number, what in (
            (self.unsupervised, "samples without a supervised token left out"),
            (self.cut, "samples cut to the most tokens of any stage"),
            (self.rewritten_turns, "assistant turns not supervised, since the chat template rewrites them"),
        ):
            if number:
                said += f"; {number} {what}"
        return said


class TokenStore:
    """A `Dataset` in a folder that `prepare` wrote, or a part of it."""

    def __init__(self, folder: Path, chosen: slice | np.ndarray = slice(None)) -> None:
        self._folder = folder
        meta = json.loads((folder / _META).read_text())
        self.counts = Counts(**meta["counts"])
        # Of all tokens and masks, also of those that are not chosen.
        self.digest: str = meta["digest"]
        # int64 [num_samples, 4]: first token, tokens, first supervised token, hash of the prompt
        index = np.load(folder / _INDEX)[chosen]
        self._starts, self.lengths, self.first_supervised, self.prompts = index.T
        self._ids = np.memmap(folder / _IDS, dtype=np.uint32, mode="r")
        self._mask = np.memmap(folder / _MASK, dtype=np.bool_, mode="r")

    def part(self, chosen: slice | np.ndarray) -> "TokenStore":
        return TokenStore(self._folder, chosen)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = slice(int(self._starts[index]), int(self._starts[index] + self.lengths[index]))
        return torch.from_numpy(self._ids[place].astype(np.int64)), torch.from_numpy(self._mask[place].copy())


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files, with those of folders in the order of their names. Raises ValueError if there is none."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise ValueError(f"--data {path} has no JSON lines: give a file, or a folder with files named *.jsonl")
        files += found
    return files


def prepare(
    paths: Sequence[str],
    folder: Path,
    load_tokenizer: Callable[[], Any],
    vocab_size: int,
    max_length: int,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> TokenStore:
    """Reads and checks every line, and writes its tokens into a new folder inside `folder`, unless they are there.

    Args:
        load_tokenizer: the target's; called if some line is not `input_ids` already
        max_length: longer samples are cut
        progress: told the bytes read since the last call

    Raises:
        ValueError: a line is no sample, with the file's name and the line's number, or nothing is left to train with.
    """
    files = files_of(paths)
    state = [_VERSION, vocab_size, max_length, [[str(file.resolve()), *_stamp(file)] for file in files]]
    place = folder / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    if not place.exists():
        temporary = folder / f".{place.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            _write(files, temporary, _Encoder(load_tokenizer), vocab_size, max_length, progress)
            temporary.rename(place)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise ValueError(
                f"tokens cannot be written to {folder} ({reason}): make room, or give another --out"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(place)


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _write(
    files: Iterable[Path],
    folder: Path,
    encoder: "_Encoder",
    vocab_size: int,
    max_length: int,
    progress: Callable[[int], None],
) -> None:
    index: list[tuple[int, int, int, int]] = []
    digest = hashlib.sha256()
    numbers = dict.fromkeys(("supervised", "unsupervised", "cut"), 0)
    start = 0
    with (folder / _IDS).open("wb") as ids_file, (folder / _MASK).open("wb") as mask_file:
        for where, line in _lines(files, progress):
            ids, mask = _sample(where, line, encoder)
            outside = (ids < 0) | (ids >= vocab_size)
            if outside.any():
                raise ValueError(
                    f"{where} has token {ids[outside][0]}, but the target's vocabulary has {vocab_size}: encode it "
                    "with the target's own tokenizer"
                )
            numbers["cut"] += len(ids) > max_length
            ids, mask = ids[:max_length], mask[:max_length]
            # The first token has none before it that would predict it.
            mask[:1] = False
            if not mask.any():
                numbers["unsupervised"] += 1
                continue
            ids = ids.astype(np.uint32)
            ids.tofile(ids_file)
            mask.tofile(mask_file)
            for part in (len(ids).to_bytes(8, "little"), ids.tobytes(), mask.tobytes()):
                digest.update(part)
            first = int(mask.argmax())
            index.append((start, len(ids), first, _prompt_hash(ids, first)))
            numbers["supervised"] += int(mask.sum())
            start += len(ids)
    if not index:
        raise ValueError("the data have no sample with a supervised token: check which turns or tokens are supervised")
    np.save(folder / _INDEX, np.array(index, dtype=np.int64))
    counts = Counts(samples=len(index), tokens=start, rewritten_turns=encoder.rewritten_turns, **numbers)
    (folder / _META).write_text(json.dumps({"counts": asdict(counts), "digest": digest.hexdigest()}) + "\n")


def _prompt_hash(ids: np.ndarray, first_supervised: int) -> int:
    """Of what comes before the first supervised token; of a text that is supervised from its beginning, of all."""
    prompt = ids[:first_supervised] if first_supervised > 1 else ids
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "little", signed=True)


def _lines(files: Iterable[Path], progress: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        try:
            lines = file.open("rb")
        except OSError as error:
            raise ValueError(f"--data {file} cannot be read ({error.strerror}): change its permissions") from None
        with lines:
            for number, line in enumerate(lines, start=1):
                progress(len(line))
                if not line.strip():
                    continue
                where = f"line {number} of {file}"
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is not JSON ({error}): mend or remove it") from None
                if not isinstance(content, dict):
                    raise ValueError(f"{where} holds no JSON object: give one of {', '.join(_KINDS)}")
                yield where, content


def _sample(where: str, line: dict[str, Any], encoder: "_Encoder") -> tuple[np.ndarray, np.ndarray]:
    """int64 ids and bool loss mask, each [num_tokens]."""
    kinds = [kind for kind in _KINDS if kind in line]
    if len(kinds) != 1:
        raise ValueError(f"{where} has {' and '.join(kinds) or 'no sample'}: give one of {', '.join(_KINDS)}")
    given: Any
    given_mask: Any
    try:
        if kinds == ["text"]:
            if not isinstance(line["text"], str):
                raise ValueError("its text is no string")
            ids = np.array(encoder.text(line["text"]), dtype=np.int64)
            return ids, np.ones(len(ids), dtype=np.bool_)
        if kinds == ["messages"]:
            _check_messages(line["messages"])
            given, given_mask = encoder.conversation(line["messages"], line.get("tools"))
        else:
            given, given_mask = (line.get(name) for name in ("input_ids", "loss_mask"))
            if not isinstance(given, list) or not all(type(each) is int for each in given):
                raise ValueError("its input_ids are no list of integers")
            is_mask = isinstance(given_mask, list) and all(each in (0, 1) for each in given_mask)
            if not is_mask or len(given_mask) != len(given):
                raise ValueError("its loss_mask is no list of 0 and 1, as long as its input_ids")
        return np.array(given, dtype=np.int64), np.array(given_mask, dtype=np.bool_)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} is no sample ({' '.join(str(error).split())}): mend or remove it") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("its messages are no list, or an empty one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"its message {number} has no role")


class _Encoder:
    """Text and conversations as the target reads them."""

    def __init__(self, load_tokenizer: Callable[[], Any]) -> None:
        self._load, self._tokenizer = load_tokenizer, None
        self.rewritten_turns = 0

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def text(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def conversation(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
        """Ids, and 1 for tokens of the assistant's turns.

        Where the template marks them (`generation` tags) it says which; otherwise a turn is what its rendering adds to
        that of the turns before with a prompt for generation.
        """
        tokenizer = self.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the target's tokenizer has no chat template for messages")
        try:
            if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
                encoded = tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
                return encoded["input_ids"], encoded["assistant_masks"]
            return self._by_difference(messages, tools)
        except ValueError:
            raise
        except Exception as error:
            # Templates raise errors of their own.
            raise ValueError(f"the chat template refuses its messages: {error}") from None

    def _by_difference(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
        def rendered(number: int, prompt: bool) -> str:
            return self.tokenizer.apply_chat_template(
                messages[:number], tools=tools, tokenize=False, add_generation_prompt=prompt
            )

        whole = rendered(len(messages), False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number == 0:
                continue
            before, after = rendered(number, True), rendered(number + 1, False)
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
            elif number + 1 == len(messages):
                raise ValueError("its last turn does not go on where the chat template's generation prompt ends")
            else:
                self.rewritten_turns += 1
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(start < end and first <= start < last for first, last in spans))
            for start, end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], mask
