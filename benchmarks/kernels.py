# SPDX-License-Identifier: Apache-2.0
"""Times of the kernels of a step on one GPU, each beside the floor that the hardware sets:

    python benchmarks/kernels.py [attention draft sample compact hopper] [--out benchmarks/results/kernels.json]

Every time is that of one call within a CUDA graph of many, which use inputs in turn that the L2 cache cannot hold all
of; the median of some replays. The floor is the larger of bytes over bandwidth and operations over rate, with each byte
counted once; both ceilings are measured first, by a copy and by a matrix product. Attention kernels are checked against
attention in float32 before they are timed.

- attention: FlashAttention 3 for one token as vLLM calls it for plain decoding; the prefix of a tree, with
  FlashAttention 3 and with the kernel whose tiles share what they read; the tree itself; and both together;
- draft: the head, the choice of a level's nodes, window and cross attention, the layer's matrix products;
- sample: vLLM's sampler over all rows of a tree, and the walk;
- compact: moving accepted K and V in all layers;
- hopper: the shared prefix once more, with the kernel that is written for Hopper.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
# More than twice the L2 cache of an H200.
COLD_BYTES = 160 << 20
HEAD_SIZE = 128
VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS = 152064, 5120, 27648, 64  # QwQ-32B
FREQUENT_TOKENS = 32768
CHECKED_CONTEXT = 4096


@dataclass(frozen=True)
class Heads:
    name: str
    query: int
    kv: int
    # Query tokens that fill one tile of 128 rows.
    full_tile: int


QWQ = Heads("QwQ-32B 40/8", 40, 8, 25)
LLAMA = Heads("Llama-3-8B 32/8", 32, 8, 32)

Call = Callable[..., Any]


class Report:
    """What was measured, with the floor of each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.bytes_per_us, self.flops_per_us = 1.0, 1.0

    def add(
        self, part: str, what: str, calls: Sequence[Call], num_bytes: float, flops: float = 0.0, **keys: Any
    ) -> None:
        """Measures `calls`, which do the same to different inputs, within a CUDA graph."""
        with self._surviving(part, what, keys):
            self._add(part, what, measure(calls), num_bytes, flops, keys)

    def add_ungraphed(self, part: str, what: str, call: Call, num_bytes: float, **keys: Any) -> None:
        """Sums up the kernels of a call that no CUDA graph can hold."""
        with self._surviving(part, what, keys):
            microseconds, num_kernels = device_time(call)
            self._add(part, what, microseconds, num_bytes, 0.0, keys | {"kernels": num_kernels})

    def _add(
        self, part: str, what: str, microseconds: float, num_bytes: float, flops: float, keys: dict[str, Any]
    ) -> None:
        floor = max(num_bytes / self.bytes_per_us, flops / self.flops_per_us)
        row = {"part": part, "what": what, **keys, "us": round(microseconds, 2), "floor_us": round(floor, 2)}
        self.rows.append(row)
        print(f"{label_of(row):100s} {microseconds:9.1f} us, floor {floor:8.1f}", flush=True)

    @contextmanager
    def _surviving(self, part: str, what: str, keys: dict[str, Any]) -> Iterator[None]:
        """One kernel that does not run must not take the others' figures with it."""
        try:
            yield
        except Exception:
            self.fail(f"{part}: {what} {keys}\n{traceback.format_exc(limit=-3)}")
            torch.cuda.synchronize()

    def fail(self, message: str) -> None:
        self.failures.append(message)
        print("FAILED", message, flush=True)


def label_of(row: dict[str, Any]) -> str:
    keys = " ".join(f"{key}={value}" for key, value in row.items() if key not in ("part", "what", "us", "floor_us"))
    return f"{row['part']}: {row['what']} {keys}"


def measure(calls: Sequence[Call], target_us: float = 2500.0, replays: int = 7) -> float:
    """Microseconds of one call."""
    for call in calls:
        call()  # compiles, on the first
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    estimate = 1000 * start.elapsed_time(end) / len(calls)
    rounds = max(1, min(round(200 / len(calls)), round(target_us / estimate / len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for replay in range(replays + 2):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 2:
            times.append(1000 * start.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(times)


def device_time(call: Call, calls: int = 10) -> tuple[float, int]:
    """Microseconds that the GPU works for one call which no CUDA graph can hold, and its number of kernels."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return sum(event.self_device_time_total for event in events) / calls, sum(e.count for e in events) // calls


def ceilings() -> tuple[float, float]:
    """Bytes and floating-point operations a microsecond."""
    source = torch.randn(1 << 30, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / measure([partial(target.copy_, source)], replays=5)
    left, right = torch.randn(2, 8192, 8192, device=DEVICE, dtype=DTYPE)
    rate = 2 * 8192**3 / measure([partial(torch.mm, left, right)], target_us=20000, replays=5)
    return bandwidth, rate


# Attention


class Pool:
    """Memory full of random keys and values, of which caches of any block size are views."""

    def __init__(self, num_tokens: int, heads: Heads):
        self.heads = heads
        self.num_tokens = num_tokens
        self.memory = torch.empty(num_tokens, heads.kv, 2 * HEAD_SIZE, device=DEVICE, dtype=DTYPE)
        for chunk in self.memory.split(1 << 18):
            chunk.normal_()

    def cache(self, block_size: int) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, 2 * HEAD_SIZE], tokens first in memory, as vLLM has it by default."""
        blocks = self.num_tokens // block_size
        shape = (blocks, block_size, self.heads.kv, 2 * HEAD_SIZE)
        return self.memory[: blocks * block_size].view(shape).transpose(1, 2)


def make_pool(gib: float) -> Pool:
    return Pool(int(gib * 2**30) // (QWQ.kv * 4 * HEAD_SIZE), QWQ)


def sizes(pool: Pool) -> list[tuple[int, int]]:
    """Contexts and batch sizes that fit the pool twice."""
    pairs = [(context, num_reqs) for context in (4096, 16384, 65536, 131072) for num_reqs in (1, 4, 16)]
    return [(context, num_reqs) for context, num_reqs in pairs if 2 * num_reqs * (context + 512) <= pool.num_tokens]


@dataclass
class Batch:
    """Requests of equal context and equally many query tokens."""

    heads: Heads
    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    prefix_lens: torch.Tensor
    query_starts: torch.Tensor
    slots: torch.Tensor
    masks: torch.Tensor
    output: torch.Tensor
    context: int
    width: int

    @property
    def scale(self) -> float:
        return HEAD_SIZE**-0.5

    @property
    def prefix_arguments(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "kv_cache": self.cache,
            "block_table": self.block_table,
            "prefix_lens": self.prefix_lens,
            "query_start_loc": self.query_starts,
            "max_query_len": self.width,
            "scale": self.scale,
        }


def make_batches(pool: Pool, context: int, num_reqs: int, width: int, block_size: int) -> list[Batch]:
    """As many batches as the L2 cache needs to forget one before it comes again, at least 2."""
    heads = pool.heads
    cache = pool.cache(block_size)
    # A length that no tile divides.
    prefix_len = context - 27
    blocks = -(-(context + 128) // block_size)
    kv_bytes = context * num_reqs * heads.kv * 4 * HEAD_SIZE
    count = max(2, min(8, -(-COLD_BYTES // kv_bytes)))
    # The block table is as wide as the longest sequence that the engine admits.
    table_width = 16 * -(-max(context + 128, 32768) // (16 * block_size))
    batches = []
    order = torch.randperm(cache.shape[0], device=DEVICE, dtype=torch.int32)
    for index in range(count):
        first = index * num_reqs * blocks % (cache.shape[0] - num_reqs * blocks + 1)
        table = torch.zeros(num_reqs, table_width, device=DEVICE, dtype=torch.int32)
        table[:, :blocks] = order[first : first + num_reqs * blocks].view(num_reqs, blocks)
        positions = prefix_len + torch.arange(width, device=DEVICE)
        slots = table[:, positions // block_size].long() * block_size + positions % block_size
        words = -(-width // 32)
        masks = torch.randint(-(2**31), 2**31 - 1, (num_reqs, width, words), device=DEVICE, dtype=torch.int32)
        query = torch.randn(num_reqs * width, heads.query, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
        batches.append(
            Batch(
                heads,
                query,
                cache,
                table,
                torch.full((num_reqs,), prefix_len, device=DEVICE, dtype=torch.int32),
                torch.arange(num_reqs + 1, device=DEVICE, dtype=torch.int32) * width,
                slots.flatten(),
                masks,
                torch.empty_like(query),
                context,
                width,
            )
        )
    return batches


def flash_attention(
    batch: Batch, causal: bool, metadata: torch.Tensor | None = None, num_splits: int = 0
) -> torch.Tensor:
    """FlashAttention 3 over a cache in blocks; returns the log-sum-exps."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    keys, values = batch.cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    _, lse = flash_attn_varlen_func(
        q=batch.query,
        k=keys,
        v=values,
        out=batch.output,
        cu_seqlens_q=batch.query_starts,
        max_seqlen_q=batch.width,
        seqused_k=batch.prefix_lens,
        max_seqlen_k=batch.context,
        softmax_scale=batch.scale,
        causal=causal,
        block_table=batch.block_table,
        return_softmax_lse=True,
        scheduler_metadata=metadata,
        num_splits=num_splits,
        fa_version=3,
    )
    return lse


# The bound on splits that vLLM gives FlashAttention within CUDA graphs.
GRAPH_SPLITS = 32


def schedule(batch: Batch, causal: bool) -> torch.Tensor:
    """What FlashAttention 3 would otherwise work out on the GPU before every layer."""
    from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

    return get_scheduler_metadata(
        batch_size=batch.prefix_lens.shape[0],
        max_seqlen_q=batch.width,
        max_seqlen_k=batch.context,
        num_heads_q=batch.heads.query,
        num_heads_kv=batch.heads.kv,
        headdim=HEAD_SIZE,
        cache_seqlens=batch.prefix_lens,
        qkv_dtype=DTYPE,
        cu_seqlens_q=batch.query_starts,
        page_size=batch.cache.shape[2],
        causal=causal,
        num_splits=GRAPH_SPLITS,
    )


def scheduled_flash_attention(batch: Batch, causal: bool) -> Call:
    metadata = schedule(batch, causal)
    return partial(flash_attention, batch, causal, metadata, GRAPH_SPLITS)


def tree(batch: Batch, prefix: Any) -> None:
    from vllm_longspec.step.verify import tree_attention

    tree_attention(
        batch.query,
        batch.cache,
        batch.slots,
        batch.query_starts,
        batch.masks,
        batch.width,
        batch.scale,
        prefix,
        batch.output,
    )


def reference(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix attention in float32, and its log-sum-exps [num_heads, num_tokens]."""
    outputs, sums = [], []
    group = batch.heads.query // batch.heads.kv
    for request in range(batch.prefix_lens.shape[0]):
        prefix_len = int(batch.prefix_lens[request])
        rows = batch.cache[batch.block_table[request].long()].transpose(1, 2).flatten(0, 1)[:prefix_len].float()
        query = batch.query[request * batch.width : (request + 1) * batch.width].float()
        keys = rows[..., :HEAD_SIZE].repeat_interleave(group, dim=1)
        values = rows[..., HEAD_SIZE:].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) * batch.scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values))
        sums.append(scores.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def check(
    report: Report, label: str, output: torch.Tensor, lse: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    error = float((output.float() - expected[0]).norm() / expected[0].norm())
    lse_error = float((lse - expected[1]).abs().max())
    report.rows.append({"part": "check", "what": label, "error": error, "lse_error": lse_error})
    if not (error < 1e-2 and lse_error < 1e-2):
        report.fail(f"{label}: relative error {error}, of the log-sum-exp {lse_error}")


def check_attention(pool: Pool, report: Report, tiles: Sequence[Any]) -> None:
    """Every kernel and every shape of a tile against float32, before it is timed."""
    from vllm_longspec.attention.shared_prefix import shared_prefix_attention, shared_prefix_parts

    for block_size in (16, 128):
        for width in (4, 69):
            batch = make_batches(pool, CHECKED_CONTEXT, 2, width, block_size)[0]
            expected = reference(batch)
            name = f"block {block_size}, {width} queries"
            lse = flash_attention(batch, causal=False)
            check(report, f"FlashAttention 3, {name}", batch.output, lse, expected)
            merged, merged_lse = torch.full_like(batch.output, torch.nan), torch.full_like(expected[1], torch.nan)
            shared_prefix_attention(**batch.prefix_arguments, output=merged, lse=merged_lse)
            check(report, f"shared prefix, {name}", merged, merged_lse, expected)
            # The tree kernel must make the same of both, whatever the masks say.
            tree(batch, lse)
            from_flash_attention = batch.output.float()
            for shape in (None, *tiles):
                tree(batch, shared_prefix_parts(**batch.prefix_arguments, tiles=shape))
                label = f"shared prefix and tree, {name}, {shape}"
                check(report, label, batch.output, expected[1], (from_flash_attention, expected[1]))


def attention(report: Report, pool_gib: float) -> None:
    from vllm_longspec.attention.prefix import prefix_attention
    from vllm_longspec.attention.shared_prefix import PrefixTiles, shared_prefix_attention, shared_prefix_parts

    # Shapes of tiles to choose from: rows, keys, warps, stages, programs on a multiprocessor.
    tiles = [
        PrefixTiles(128, 64, 4, 2, 2),
        PrefixTiles(128, 64, 8, 3, 1),
        PrefixTiles(128, 128, 8, 3, 1),
        PrefixTiles(128, 32, 4, 5, 2),
    ]
    pool = make_pool(pool_gib)
    check_attention(pool, report, tiles)
    for context, num_reqs in ((16384, 1), (16384, 4), (65536, 1)):
        for block_size in (16, 128):
            batches = make_batches(pool, context, num_reqs, 69, block_size)
            keys = prefix_keys(QWQ, context, num_reqs, 69, block_size)
            for shape in tiles:
                calls = [partial(shared_prefix_parts, **batch.prefix_arguments, tiles=shape) for batch in batches]
                report.add("attention", f"shared prefix {tuple(shape)}", calls, **keys)
            for num_parts in (1, 2, 3, 5, 8, 11, 16, 22):
                if num_parts * num_reqs <= 24:
                    calls = [partial(shared_prefix_parts, **b.prefix_arguments, num_parts=num_parts) for b in batches]
                    report.add("attention", f"shared prefix in {num_parts} parts", calls, **keys)
    # The draft's cross-attention.
    batches = make_batches(pool, 16384, 1, 16, 16)
    keys = prefix_keys(QWQ, 16384, 1, 16, 16)
    lse = torch.empty(QWQ.query, 16, device=DEVICE)
    kernels: dict[str, Call] = {"shared prefix, merged": shared_prefix_attention, "Triton prefix": prefix_attention}
    for what, kernel in kernels.items():
        calls = [partial(kernel, **batch.prefix_arguments, output=batch.output, lse=lse) for batch in batches]
        report.add("attention", what, calls, **keys)
    for heads in (QWQ, LLAMA):
        pool.heads = heads
        for context, num_reqs in sizes(pool):
            time_attention(report, pool, context, num_reqs)


def prefix_keys(heads: Heads, context: int, num_reqs: int, width: int, block_size: int) -> dict[str, Any]:
    """What identifies a measurement of the prefix, and what it must do at least."""
    query_bytes = 2 * num_reqs * width * heads.query * 2 * HEAD_SIZE
    return {
        "num_bytes": context * num_reqs * heads.kv * 4 * HEAD_SIZE + query_bytes,
        "flops": 4.0 * context * num_reqs * width * heads.query * HEAD_SIZE,
        "heads": heads.name,
        "context": context,
        "batch": num_reqs,
        "queries": width,
        "block": block_size,
    }


def time_attention(report: Report, pool: Pool, context: int, num_reqs: int) -> None:
    from vllm_longspec.attention.shared_prefix import shared_prefix_parts

    heads = pool.heads
    batches = make_batches(pool, context, num_reqs, 1, 16)
    keys = prefix_keys(heads, context, num_reqs, 1, 16)
    report.add("attention", "FA3 decode", [scheduled_flash_attention(b, causal=True) for b in batches], **keys)

    detailed = context in (16384, 65536) and num_reqs <= 4
    for block_size in (16, 64, 128, 160, 176, 256) if detailed else (16,):
        for width in (1, 16, heads.full_tile, 64, 69) if block_size == 16 else (heads.full_tile, 64, 69):
            batches = make_batches(pool, context, num_reqs, width, block_size)
            keys = prefix_keys(heads, context, num_reqs, width, block_size)
            report.add("attention", "FA3 prefix", [partial(flash_attention, b, False) for b in batches], **keys)
            calls = [scheduled_flash_attention(batch, causal=False) for batch in batches]
            report.add("attention", "FA3 prefix, scheduled", calls, **keys)
    for width in (16, heads.full_tile, 64, 69):
        for block_size in (16, 128):
            batches = make_batches(pool, context, num_reqs, width, block_size)
            keys = prefix_keys(heads, context, num_reqs, width, block_size)
            calls = [partial(shared_prefix_parts, **batch.prefix_arguments) for batch in batches]
            report.add("attention", "shared prefix", calls, **keys)
            if width not in (heads.full_tile, 69):
                continue
            if detailed:
                calls = [partial(shared_prefix_parts, **b.prefix_arguments, part_dtype=DTYPE) for b in batches]
                report.add("attention", "shared prefix, parts in bfloat16", calls, **keys)
            report.add("attention", "shared prefix + tree", [partial(shared_pair, b) for b in batches], **keys)
            if block_size == 16:
                report.add("attention", "FA3 prefix + tree", [partial(flash_pair, b) for b in batches], **keys)
                lse = torch.zeros(heads.query, num_reqs * width, device=DEVICE)
                tree_bytes = num_reqs * width * (heads.kv * 4 + heads.query * 6) * HEAD_SIZE
                keys |= {"num_bytes": tree_bytes, "flops": 0.0}
                report.add("attention", "tree", [partial(tree, batch, lse) for batch in batches], **keys)


def shared_pair(batch: Batch) -> None:
    from vllm_longspec.attention.shared_prefix import shared_prefix_parts

    tree(batch, shared_prefix_parts(**batch.prefix_arguments))


def flash_pair(batch: Batch) -> None:
    tree(batch, flash_attention(batch, causal=False))


def hopper(report: Report, pool_gib: float) -> None:
    from vllm_longspec.attention.hopper_prefix import hopper_prefix_parts

    def pair(batch: Batch) -> None:
        tree(batch, hopper_prefix_parts(**batch.prefix_arguments))

    pool = make_pool(pool_gib)
    for width, block_size in ((4, 64), (69, 128)):
        batch = make_batches(pool, CHECKED_CONTEXT, 2, width, block_size)[0]
        tree(batch, flash_attention(batch, causal=False))
        expected = batch.output.float()
        pair(batch)
        lse = torch.zeros(1)
        check(
            report, f"Hopper prefix and tree, block {block_size}, {width} queries", batch.output, lse, (expected, lse)
        )
    for heads in (QWQ, LLAMA):
        pool.heads = heads
        for context, num_reqs in sizes(pool):
            for width in (16, heads.full_tile, 64, 69):
                batches = make_batches(pool, context, num_reqs, width, 128)
                keys = prefix_keys(heads, context, num_reqs, width, 128)
                calls = [partial(hopper_prefix_parts, **batch.prefix_arguments) for batch in batches]
                report.add("attention", "Hopper prefix", calls, **keys)
                if width in (heads.full_tile, 69):
                    calls = [partial(hopper_prefix_parts, **b.prefix_arguments, part_dtype=DTYPE) for b in batches]
                    report.add("attention", "Hopper prefix, parts in bfloat16", calls, **keys)
                    report.add("attention", "Hopper prefix + tree", [partial(pair, b) for b in batches], **keys)


# Draft


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def rotations(num_bytes: int) -> range:
    """As many inputs of `num_bytes` as the L2 cache needs to forget one before it comes again."""
    return range(max(2, min(32, -(-COLD_BYTES // num_bytes))))


def draft(report: Report) -> None:
    from vllm_longspec.step.best_children import best_children, best_children_in_pytorch

    for rows in (1, 16, 64):
        for vocab_size in (VOCAB_SIZE, FREQUENT_TOKENS):
            time_linear(report, f"head of {vocab_size}", rows, vocab_size, HIDDEN_SIZE)
    time_linear(report, "qkv", 16, 7168, HIDDEN_SIZE)
    time_linear(report, "q or o", 16, HIDDEN_SIZE, HIDDEN_SIZE)
    time_linear(report, "gate and up", 16, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)
    time_linear(report, "down", 16, HIDDEN_SIZE, INTERMEDIATE_SIZE)

    for num_reqs, width, num_children in ((1, 1, 4), (1, 4, 16), (1, 16, 16), (4, 16, 16), (1, 64, 64)):
        for vocab_size in (VOCAB_SIZE, FREQUENT_TOKENS):
            num_bytes = 2 * num_reqs * width * vocab_size
            parents = -torch.rand(num_reqs, width, device=DEVICE)
            logits = [random(num_reqs * width, vocab_size) for _ in rotations(num_bytes)]
            keys: dict[str, Any] = {"batch": num_reqs, "width": width, "children": num_children}
            for what, choose in (("kernels", best_children), ("PyTorch", best_children_in_pytorch)):
                calls = [partial(choose, rows, parents, num_children) for rows in logits]
                report.add("draft", f"best children of {vocab_size}, {what}", calls, num_bytes, **keys)

    for num_reqs, width, first_row, depth in ((1, 1, 0, 0), (1, 16, 37, 4), (4, 16, 37, 4), (16, 16, 37, 4)):
        time_window(report, num_reqs, width, first_row, depth)


def time_linear(report: Report, what: str, rows: int, outputs: int, inputs: int) -> None:
    hidden = random(rows, inputs)
    weights = [random(outputs, inputs) for _ in rotations(2 * outputs * inputs)]
    calls = [partial(torch.nn.functional.linear, hidden, weight) for weight in weights]
    num_bytes = 2.0 * (outputs * inputs + rows * (inputs + outputs))
    report.add("draft", what, calls, num_bytes, flops=2.0 * rows * outputs * inputs, rows=rows)


def time_window(report: Report, num_reqs: int, width: int, first_row: int, depth: int) -> None:
    from vllm_longspec.glide.window_attention import window_attention, write_window

    window, max_rows, shape = 512, 53, (2, QWQ.kv, HEAD_SIZE)
    num_bytes = num_reqs * (window + first_row + width) * QWQ.kv * 4 * HEAD_SIZE
    windows = [random(num_reqs, window, *shape) for _ in rotations(num_bytes)]
    nodes = random(num_reqs, max_rows, *shape)
    slots = torch.arange(num_reqs, device=DEVICE)
    roots = torch.full((num_reqs,), 16384, device=DEVICE)
    masks = torch.randint(-(2**31), 2**31 - 1, (num_reqs, max_rows, 2), device=DEVICE, dtype=torch.int32)
    query = random(num_reqs, width, QWQ.query, HEAD_SIZE)
    arguments = (slots, roots, nodes, masks, first_row, depth, HEAD_SIZE**-0.5)
    calls = [partial(window_attention, query, kv, *arguments) for kv in windows]
    report.add("draft", "window attention", calls, num_bytes, batch=num_reqs, width=width)

    new = random(6 * num_reqs, QWQ.kv, HEAD_SIZE)
    positions = torch.arange(6, device=DEVICE).repeat(num_reqs)
    written_slots = slots.repeat_interleave(6)
    write_calls = [partial(write_window, kv, new, new, written_slots, positions) for kv in windows]
    report.add("draft", "write window", write_calls, 4 * new.nbytes, batch=num_reqs)


# Sample


def sample(report: Report) -> None:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_longspec.step.sample import TreeSampler
    from vllm_longspec.step.walk import walk_tree
    from vllm_longspec.tree import TreeState

    max_depth = 5
    for num_rows in (16, 25, 69):
        for num_reqs in (1, 4):
            state = RequestState(num_reqs, 32768, 4096, num_rows - 1, VOCAB_SIZE, DEVICE)
            trees = TreeState.allocate(num_reqs, num_rows - 1, max_depth, DEVICE)
            trees.parent_rows[:, 1:] = torch.arange(num_rows - 1, device=DEVICE, dtype=torch.int32) // 4
            batch: Any = sampled_batch(num_reqs, num_rows)
            logits = random(num_reqs * num_rows, VOCAB_SIZE)
            for what, params in (
                ("greedy", SamplingParams(temperature=0.0)),
                ("temperature", SamplingParams(temperature=0.7, seed=1)),
                ("top-k and top-p", SamplingParams(temperature=0.7, top_k=20, top_p=0.95, seed=1)),
                ("top-p", SamplingParams(temperature=0.7, top_p=0.95)),
                ("greedy with 5 logprobs", SamplingParams(temperature=0.0, logprobs=5)),
            ):
                sampler = Sampler(VllmConfig(), num_reqs, VOCAB_SIZE, DEVICE, state, num_speculative_tokens=num_rows)
                for slot in range(num_reqs):
                    sampler.add_request(slot, params)
                sampler.apply_staged_writes()
                call = partial(TreeSampler(sampler, trees, max_depth), logits, batch)
                label = f"sampler and walk, {what}"
                report.add_ungraphed("sample", label, call, logits.nbytes, batch=num_reqs, rows=num_rows)
            sampled = torch.randint(0, VOCAB_SIZE, (num_reqs * num_rows,), device=DEVICE)
            emitted = torch.empty(num_reqs, max_depth + 1, device=DEVICE, dtype=torch.int64)
            num_emitted = torch.empty(num_reqs, device=DEVICE, dtype=torch.int32)
            walked = (sampled, batch.input_ids, batch.cu_num_logits, batch.idx_mapping, trees.parent_rows)
            walk = partial(walk_tree, *walked, emitted, num_emitted, trees.batch_path_rows, max_depth)
            report.add("sample", "walk", [walk], 12 * num_reqs * num_rows, batch=num_reqs, rows=num_rows)


def sampled_batch(num_reqs: int, num_rows: int) -> SimpleNamespace:
    """What the sampler reads of vLLM's `InputBatch`."""
    slots = np.arange(num_reqs)
    starts = (np.arange(num_reqs + 1) * num_rows).astype(np.int32)
    row = torch.arange(num_rows, device=DEVICE).repeat(num_reqs)
    seq_lens = torch.full((num_reqs,), 16384 + num_rows, dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=num_reqs,
        idx_mapping=torch.from_numpy(slots).to(DEVICE),
        idx_mapping_np=slots,
        expanded_idx_mapping=torch.from_numpy(slots.repeat(num_rows)).to(DEVICE),
        expanded_local_pos=row,
        logits_indices=torch.arange(len(row), device=DEVICE),
        input_ids=torch.randint(0, VOCAB_SIZE, row.shape, device=DEVICE, dtype=torch.int32),
        positions=16384 + row,
        cu_num_logits=torch.from_numpy(starts).to(DEVICE),
        cu_num_logits_np=starts,
        seq_lens=seq_lens.to(DEVICE),
        seq_lens_cpu_upper_bound=seq_lens,
    )


# Compact


def compact(report: Report) -> None:
    from vllm_longspec.step.compact import KVCacheTable, compact_kv_caches

    for num_reqs in (1, 4, 16):
        for block_size in (16, 128):
            num_blocks = num_reqs * (1 + 128 // block_size)
            caches = [
                torch.randn(num_blocks, block_size, QWQ.kv, 2 * HEAD_SIZE, device=DEVICE, dtype=DTYPE).transpose(1, 2)
                for _ in range(NUM_LAYERS)
            ]
            table = KVCacheTable(caches)
            blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32).view(num_reqs, -1)
            first = torch.full((num_reqs,), 5, device=DEVICE, dtype=torch.int32)
            for emitted in (1, 4, 6):
                path = torch.tensor([0, 3, 9, 21, 40, 68], device=DEVICE, dtype=torch.int32).repeat(num_reqs, 1)
                num_emitted = torch.full((num_reqs,), emitted, device=DEVICE, dtype=torch.int32)
                call = partial(compact_kv_caches, table, blocks, first, path, num_emitted, 5)
                num_bytes = 2.0 * num_reqs * NUM_LAYERS * (emitted - 1) * QWQ.kv * 4 * HEAD_SIZE
                keys: dict[str, Any] = {"batch": num_reqs, "block": block_size, "emitted": emitted}
                report.add("compact", f"{NUM_LAYERS} layers", [call], num_bytes, **keys)


PARTS: dict[str, Callable[..., None]] = {
    "attention": attention,
    "draft": draft,
    "sample": sample,
    "compact": compact,
    "hopper": hopper,
}


def summary(report: Report) -> str:
    """A tree's prefix at 16k of context, beside decoding one token; then everything but attention."""
    attention_rows = [row for row in report.rows if row["part"] == "attention" and row["context"] == 16384]
    decode = {(row["heads"], row["batch"]): row["us"] for row in attention_rows if row["what"] == "FA3 decode"}
    lines = ["     us  floor  of decode"]
    for row in attention_rows:
        if row["batch"] <= 4 and row["queries"] in (25, 32, 69) and row["block"] in (16, 128, 160):
            ratio = row["us"] / decode.get((row["heads"], row["batch"]), float("nan"))
            where = f"{row['heads']} batch {row['batch']} queries {row['queries']} block {row['block']}"
            lines.append(f"{row['us']:7.1f} {row['floor_us']:6.1f} {ratio:5.2f}  {where}: {row['what']}")
    for row in report.rows:
        if row["part"] in ("draft", "sample", "compact"):
            lines.append(f"{row['us']:7.1f} {row['floor_us']:6.1f}  {label_of(row)}")
    return "\n".join(lines)


def write(report: Report, path: Path, started: float) -> None:
    import triton
    import vllm

    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "terabytes_per_second": round(report.bytes_per_us / 1e6, 2),
        "teraflops": round(report.flops_per_us / 1e6, 1),
        "seconds": round(time.perf_counter() - started),
    }
    lines = ",\n".join("    " + json.dumps(row) for row in report.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "environment": {json.dumps(environment)},\n  "rows": [\n{lines}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; without any, everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json")
    parser.add_argument("--pool-gib", type=float, default=20.0, help="memory for keys and values")
    arguments = parser.parse_args()

    started = time.perf_counter()
    report = Report()
    with torch.inference_mode():
        report.bytes_per_us, report.flops_per_us = ceilings()
        for part in arguments.parts or PARTS:
            torch.cuda.empty_cache()
            pool = (arguments.pool_gib,) if part in ("attention", "hopper") else ()
            PARTS[part](report, *pool)
            # Whatever happens to the next part.
            write(report, arguments.out, started)
            print(f"-- {part} done after {time.perf_counter() - started:.0f} s", flush=True)
    print(summary(report))
    print(f"{report.bytes_per_us / 1e6:.2f} TB/s, {report.flops_per_us / 1e6:.0f} TFLOP/s")
    if report.failures:
        sys.exit(f"{len(report.failures)} failed:\n" + "\n".join(report.failures))


if __name__ == "__main__":
    main()
