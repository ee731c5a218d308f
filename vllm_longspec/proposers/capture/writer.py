# SPDX-License-Identifier: Apache-2.0
"""Writes what steps capture while the next steps run: a copy to the host beside them, then a thread."""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_longspec.proposers.capture.spool import Part, write_failure, write_part

# Steps that may wait to be written. A step that finds as many waiting waits too.
MAX_WAITING_STEPS = 4


class Slice(NamedTuple):
    """Where a request's part is in what a step captured."""

    name: str
    start: int  # in the request
    end: int
    first_row: int  # in `kv`
    first_hidden_row: int
    num_hidden_rows: int


class Captured(NamedTuple):
    """What a step captured of all requests, on the device."""

    slices: Sequence[Slice]
    kv: torch.Tensor  # [num_rows, num_heads, 2 * head_size]
    hidden: torch.Tensor | None  # [num_hidden_rows, hidden_size]


class _OnTheHost(NamedTuple):
    captured: Captured
    copied: "torch.cuda.Event | None"  # None: it was on the host already


class SpoolWriter:
    """Writes to a spool from a thread.

    Args:
        spool: the folder.
        first_head: of the heads that are written, among all of the model.
    """

    def __init__(self, spool: Path, first_head: int, device: torch.device):
        self.spool = spool
        self.first_head = first_head
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.failure: OSError | None = None
        self._waiting: queue.Queue[_OnTheHost] = queue.Queue(MAX_WAITING_STEPS)
        # A daemon, since nothing tells a worker that it ends; files that are not complete keep their other name.
        threading.Thread(target=self._write, name="longspec-capture", daemon=True).start()

    def put(self, captured: Captured) -> None:
        """Takes tensors that nobody else writes to.

        Raises:
            OSError: an earlier step could not be written.
        """
        if self.failure is not None:
            raise self.failure
        if self.stream is None:
            self._waiting.put(_OnTheHost(captured, None))
            return
        self.stream.wait_stream(torch.cuda.current_stream(captured.kv.device))
        with torch.cuda.stream(self.stream):
            on_host = Captured(
                captured.slices,
                self._to_host(captured.kv),
                None if captured.hidden is None else self._to_host(captured.hidden),
            )
            copied = torch.cuda.Event(blocking=True)
            copied.record(self.stream)
        self._waiting.put(_OnTheHost(on_host, copied))

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        assert self.stream is not None
        values.record_stream(self.stream)
        return copy

    def _write(self) -> None:
        while True:
            captured, copied = self._waiting.get()
            if copied is not None:
                copied.synchronize()
            try:
                if self.failure is None:
                    self._write_parts(captured)
            except OSError as error:
                self.failure = OSError(f"{self.spool}: {error}")
                write_failure(self.spool, str(self.failure))

    def _write_parts(self, captured: Captured) -> None:
        for each in captured.slices:
            kv = captured.kv[each.first_row : each.first_row + each.end - each.start]
            hidden = None
            if captured.hidden is not None:
                hidden = captured.hidden[each.first_hidden_row : each.first_hidden_row + each.num_hidden_rows]
            write_part(self.spool / each.name, Part(each.start, each.end, self.first_head, kv, hidden))
