# SPDX-License-Identifier: Apache-2.0
"""Stored answers as token ids, read into memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def read_texts(data: Path, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """The texts of a JSONL file of {"input_ids", "loss_mask"}, or of all such files in a folder.

    Returns:
        of each int64 [num_tokens] ids and bool [num_tokens], true where a token is supervised

    Raises:
        ValueError: there is no such file or no text in it; or with the number of the line that is no such object.
    """
    texts = list(_read(data, vocab_size))
    if not texts:
        raise ValueError(f"--data {data} has no text: give what vllm-longspec generate has written")
    return texts


def _read(data: Path, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    files = sorted(data.glob("[!.]*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise ValueError(f"--data {data} has no *.jsonl: give what vllm-longspec generate has written, or a file")
    for file in files:
        with file.open() as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{file}, line {number}", vocab_size)


def _parse(line: str, place: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    try:
        record = json.loads(line)
        ids, mask = record["input_ids"], record["loss_mask"]
        sound = len(ids) == len(mask) > 0 and all(type(token) is int and token >= 0 for token in ids)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{place}: not a JSON object with input_ids and loss_mask, two lists of one length")
    if (most := max(ids)) >= vocab_size:
        raise ValueError(
            f"{place}: token {most} is not in the target's vocabulary of {vocab_size}: give data of this target"
        )
    return torch.tensor(ids), torch.tensor(mask).bool()
