# SPDX-License-Identifier: Apache-2.0
"""The target as vLLM serves it: `--teacher vllm`.

An engine in a process of its own prefills samples and captures what a draft is trained with
(`vllm_longspec/proposers/capture/`). Its ranks, on whichever GPUs, write parts of samples to files of a bounded total
size, in memory by default, and this process puts them together. The same kernels, quantisation, cache and tensor
parallelism as in serving: a draft learns from the keys that it will attend.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_longspec.proposers.capture.spool import Part, read_failure, read_parts
from vllm_longspec.training.teachers import Lesson, Sample, TeacherError

DEFAULT_SPOOL = Path("/dev/shm")
MAX_SPOOL_BYTES = 4 << 30
# Of what the folder's file system has free, if that is less.
_SPOOL_SHARE = 0.8
# Samples that the engine may have at a time, however short they are.
_MAX_SAMPLES_AHEAD = 512
# How long files may take after their request has ended.
_LATE_SECONDS = 120.0
_POLL_SECONDS = 0.002
_END_SECONDS = 60.0
# Of torchrun, for its own process group. An engine forms one too.
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")


class TargetSizes(NamedTuple):
    """Of what the engine captures."""

    num_kv_heads: int
    head_size: int
    hidden_size: int
    dtype: torch.dtype

    def num_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Bytes that are captured of a sample."""
        values = num_tokens * 2 * self.num_kv_heads * self.head_size + num_rows * self.hidden_size
        return values * self.dtype.itemsize


class VllmTeacher:
    """Teaches with an engine of its own, which works ahead as far as the spool has room.

    Lessons are tensors on the CPU, of the engine's dtype. Each process that trains has a teacher of its own.

    Args:
        target: a folder or repository.
        max_length: tokens of the longest sample; None for the target's window.
        revision: of the repository.
        devices: CUDA_VISIBLE_DEVICES of the engine, such as "4,5"; of several processes on a host a list of these, by
            torchrun's LOCAL_RANK. None for the GPU that the process trains on, where `gpu_memory_utilization` must
            leave room for that.
        spool: folder of the files; None for /dev/shm.
        spool_bytes: the most bytes that they take, and the most that one sample may need; None for 4 GiB, or what the
            folder has room for, divided by the training processes of the host.
        engine: arguments of vLLM's engine, such as tensor_parallel_size=2 and gpu_memory_utilization=0.5.

    Raises:
        ValueError: an option is not supported, the spool has no room, or vLLM refuses the target or an argument.
        TeacherError: the engine did not start.
    """

    def __init__(
        self,
        target: str,
        max_length: int | None = None,
        *,
        revision: str | None = None,
        devices: str | Sequence[str] | None = None,
        spool: str | Path | None = None,
        spool_bytes: int | None = None,
        **engine: Any,
    ):
        folder = DEFAULT_SPOOL if spool is None else Path(spool)
        self.spool_bytes = _room(folder, spool_bytes)
        self.spool = Path(tempfile.mkdtemp(prefix="longspec-teacher-", dir=folder))
        self.max_length: int
        self.sizes: TargetSizes
        self.num_taught = 0
        self._process, self._connection = _start(visible_devices(devices))
        # A trainer that fails or is garbage leaves neither process nor files.
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self.spool)
        try:
            # Small enough to be sent to a process that reads nothing.
            self._connection.send(
                {
                    "target": target,
                    "revision": revision,
                    "max_length": max_length,
                    "engine": engine,
                    "spool": str(self.spool),
                }
            )
            self.max_length, self.sizes = self._receive()
        except BaseException:
            self.close()
            raise

    def teach(self, samples: Iterable[Sample]) -> Iterator[Lesson]:
        """Lessons in the order of the samples.

        Raises:
            ValueError: an engine cannot teach a sample.
            TeacherError: the engine or its disk failed.
        """
        waiting = iter(samples)
        ahead: deque[Assembly] = deque()
        num_bytes = 0
        following = self._next(waiting)
        try:
            while following is not None or ahead:
                while following is not None and len(ahead) < _MAX_SAMPLES_AHEAD:
                    if num_bytes + following.num_bytes > self.spool_bytes:
                        break
                    self._submit(following)
                    ahead.append(following)
                    num_bytes += following.num_bytes
                    following = self._next(waiting)
                lesson = self._collect(ahead[0], ahead)
                num_bytes -= ahead.popleft().num_bytes
                yield lesson
        finally:
            if ahead and self._finalizer.alive:
                # Nobody asks for the rest.
                with contextlib.suppress(OSError):
                    self._connection.send(("abort",))
                for assembly in ahead:
                    shutil.rmtree(assembly.folder, ignore_errors=True)

    def teach_batches(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Lesson]:
        """An engine's steps take whatever waits, so batches make no difference to it."""
        return self.teach(itertools.chain.from_iterable(batches))

    def close(self) -> None:
        """Ends the engine and removes its files. May be called again."""
        self._finalizer()

    def _next(self, samples: Iterator[Sample]) -> "Assembly | None":
        sample = next(samples, None)
        if sample is None:
            return None
        name = f"{self.num_taught:09d}"
        self.num_taught += 1
        assembly = Assembly(sample, self.sizes, self.spool / name)
        num_tokens = len(sample.input_ids)
        if not torch.equal(sample.positions.cpu(), torch.arange(num_tokens)):
            raise ValueError(
                "an engine computes every position, so it cannot teach samples with anchor-offset positions: "
                "give --teacher hf for this stage"
            )
        if num_tokens > self.max_length:
            raise ValueError(
                f"a sample has {num_tokens} tokens, but the teacher was started for {self.max_length}: "
                "cut it or give a larger max_length"
            )
        if assembly.num_bytes > self.spool_bytes:
            raise ValueError(
                f"a sample of {num_tokens} tokens takes {assembly.num_bytes} bytes of the teacher's spool, which may "
                f"have {self.spool_bytes}: give a larger spool_bytes, or a spool with more room"
            )
        return assembly

    def _submit(self, assembly: "Assembly") -> None:
        assembly.folder.mkdir()
        input_ids = assembly.sample.input_ids.cpu().numpy()
        try:
            self._connection.send(("sample", assembly.folder.name, input_ids, assembly.rows.numpy()))
        except OSError:
            # The engine has said why, or has no more to say.
            while True:
                self._receive()

    def _collect(self, assembly: "Assembly", ahead: Iterable["Assembly"]) -> Lesson:
        while True:
            # In this order: what ended before it was looked for is complete.
            is_late = assembly.ended is not None and time.monotonic() - assembly.ended > _LATE_SECONDS
            for part in read_parts(assembly.folder):
                assembly.add(part)
            if assembly.is_complete:
                assembly.folder.rmdir()
                return assembly.lesson()
            if (failure := read_failure(self.spool)) is not None:
                raise TeacherError(
                    f"the teacher's engine cannot write what it captured to {self.spool.parent} ({failure}): make "
                    "room, or give another spool in engine"
                )
            if is_late:
                raise TeacherError(
                    f"the teacher's engine ended sample {assembly.folder.name} without all of its files in "
                    f"{self.spool.parent}: give a spool in engine that all of its ranks write at once"
                )
            while self._connection.poll(_POLL_SECONDS):
                name = self._receive()
                for each in ahead:
                    if each.folder.name == name:
                        each.ended = time.monotonic()

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.wait()
            raise TeacherError(
                f"the teacher's engine stopped with {code}: see what it printed above, and change engine by that"
            ) from error
        if kind == "refused":
            raise ValueError(value)
        if kind == "failed":
            raise TeacherError(
                f"the teacher's engine failed ({value}): see what it printed above, and change engine by that"
            )
        return value


class Assembly:
    """A sample with what has come of it."""

    def __init__(self, sample: Sample, sizes: TargetSizes, folder: Path):
        self.sample = sample
        self.folder = folder
        self.rows = sample.rows.cpu()
        self.sizes = sizes
        self.num_bytes = sizes.num_bytes(len(sample.input_ids), len(self.rows))
        self.ended: float | None = None  # when the engine said so
        self.keys: Tensor | None = None  # allocated with the first part: most samples wait for a while
        self.num_missing = len(sample.input_ids) * sizes.num_kv_heads + len(self.rows)

    def _allocate(self) -> None:
        num_tokens, sizes = len(self.sample.input_ids), self.sizes
        self.keys = torch.empty(num_tokens, sizes.num_kv_heads, sizes.head_size, dtype=sizes.dtype)
        self.values = torch.empty_like(self.keys)
        self.hidden = torch.empty(len(self.rows), sizes.hidden_size, dtype=sizes.dtype)
        # A part may come twice.
        self.has_kv = torch.zeros(num_tokens, sizes.num_kv_heads, dtype=torch.bool)
        self.has_hidden = torch.zeros(len(self.rows), dtype=torch.bool)

    def add(self, part: Part) -> None:
        if self.keys is None:
            self._allocate()
        assert self.keys is not None
        rows, heads = slice(part.start, part.end), slice(part.first_head, part.first_head + part.kv.shape[1])
        keys, values = part.kv.chunk(2, dim=-1)
        self.keys[rows, heads] = keys
        self.values[rows, heads] = values
        self.num_missing -= _mark(self.has_kv[rows, heads])
        if part.hidden is not None:
            first, last = torch.searchsorted(self.rows, torch.tensor([part.start, part.end])).tolist()
            self.hidden[first:last] = part.hidden
            self.num_missing -= _mark(self.has_hidden[first:last])

    @property
    def is_complete(self) -> bool:
        return self.num_missing == 0

    def lesson(self) -> Lesson:
        assert self.keys is not None
        return Lesson(self.sample, self.keys, self.values, self.hidden)


def _mark(seen: Tensor) -> int:
    """Sets all of it; returns how many were not set."""
    missing = seen.numel() - int(seen.sum())
    seen.fill_(True)
    return missing


def _room(folder: Path, asked_for: int | None) -> int:
    if not folder.is_dir():
        raise ValueError(f"the teacher's spool {folder} is no folder: give one that exists")
    # Each training process of the host has a spool there.
    num_spools = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(folder).free // num_spools
    if asked_for is None:
        return min(MAX_SPOOL_BYTES, int(_SPOOL_SHARE * free))
    if asked_for < 1:
        raise ValueError(f"spool_bytes must be positive, got {asked_for}: leave it out")
    if asked_for > free:
        raise ValueError(
            f"the teacher's spool may take {asked_for} bytes, but {folder} has {free} left for each of {num_spools} "
            "processes: give a smaller spool_bytes or another folder"
        )
    return asked_for


def visible_devices(given: str | Sequence[str] | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of the engine of this process; None to leave it as it is.

    Raises:
        ValueError: there is none for this process.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if isinstance(given, str | int):
        return str(given)
    if given is not None:
        rank = int(local_rank or 0)
        if rank >= len(given):
            raise ValueError(
                f"devices has {len(given)} entries, but this is process {rank} of the host, counted from 0: give one "
                "for each"
            )
        return str(given[rank])
    if local_rank is None or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return local_rank if not visible else visible.split(",")[int(local_rank)]


def _start(devices: str | None) -> tuple[subprocess.Popen, Connection]:
    """Starts `engine.py` and connects to it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_VARIABLES and not name.startswith(_TORCHRUN_PREFIXES)
    }
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_longspec.training.teachers.engine", str(theirs.fileno())],
            env=environment,
            pass_fds=(theirs.fileno(),),
            # An interrupt is for the trainer, which ends the engine in order.
            start_new_session=True,
        )
    return process, ours


def _end(process: subprocess.Popen, connection: Connection, spool: Path) -> None:
    # It also ends when nobody is at the other end of its connection.
    with contextlib.suppress(OSError):
        connection.send(("close",))
    connection.close()
    try:
        process.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        # With the processes that vLLM has started.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(spool, ignore_errors=True)
