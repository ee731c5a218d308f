# SPDX-License-Identifier: Apache-2.0
"""Times of the kernels that a step adds to plain decoding, on one GPU:

    python -m benchmarks.kernels [attention splits window children gemms norms sample compact copy scores learn]
        [--out benchmarks/results/kernels.json]

- attention, of one layer: FlashAttention 3 for one token, as vLLM calls it for plain decoding; FlashAttention 3 for the
  prefix of a tree; the tree itself; and both together, which is what verifying costs;
- splits: the same for one token and the part of a context that a target sees when it drafts for itself, with vLLM's
  bound on splits within CUDA graphs and with one split for each request and KV head;
- window: a draft's attention to its window of 512 tokens and its tree, with what prepares the next layer's input, for
  one with fp8 weights and one without, by the number of splits of the window; and how many are taken by default;
- children: the best (parent, token) pairs of one level of the draft, without noise, with it for greedy requests, for
  sampled ones, and for those with top-p;
- gemms: those of a draft's layer and of a head of 65,536 rows with fp8 weights, by the number of rows;
- norms: the norm that quantises the input of such a GEMM, with a residual to add and without, by vLLM's kernel and by
  the draft's; of rows in the L2 cache, where the GEMM before leaves them;
- sample: sampling all rows of a tree with vLLM's sampler, and with the draw that takes its place, each with the walk;
- compact: moving accepted K and V in all layers;
- copy: what copied paths add to a draft;
- learn: what a head of 65,536 rows that learns its tokens adds: counting what a step emitted, counting a prompt, and an
  exchange of rows, the GPU's time and the host's; and the sum in a step in which nothing comes in but what is emitted;
- scores: what choosing blocks by scores adds to a verification, of one layer, if all requests are due, if they take
  turns, and if none is, beside FlashAttention 3 for the same rows; and the tables that a draft step makes of it.

Every time is that of one call within a CUDA graph of many, which use inputs in turn that the L2 cache cannot hold all
of; the median of some replays. What no graph can hold is the sum of its kernels. Random numbers in bfloat16, heads of
128.
"""

import argparse
import json
import random
import statistics
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.reporting import environment, markdown
from benchmarks.shapes import LLAMA_3_8B_262K, QWQ_32B

if TYPE_CHECKING:
    from vllm_longspec.attention.backend import PrefixAttention

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
# More than twice the L2 cache of an H200.
COLD_BYTES = 160 << 20
HEAD_SIZE = 128
BLOCK_SIZE = 16
# K and V to read from.
CACHE_BYTES = 20 << 30
MODELS = {"qwq-32b": QWQ_32B, "llama-3-8b-262k": LLAMA_3_8B_262K}
CONTEXTS = (4096, 16384, 65536, 131072)
BATCHES = (1, 4, 16)
# (context, batch) of lookups
COPIES = ((16384, 1), (16384, 16), (131072, 1), (131072, 64))
# (context, batch) of selections by scores, and the rows of their verifications
SELECTIONS = ((32768, 16), (131072, 4))
CHAIN_ROWS = 5
# The bound on splits that vLLM gives FlashAttention for plain decoding within CUDA graphs.
GRAPH_SPLITS = 32
# Rows of a tile of FlashAttention 3.
TILE = 128
DEFAULT_ROWS = 69
# What a target sees that drafts for itself, and batches of such requests.
PART, PART_BATCHES = 1088, (1, 2, 4, 8, 12, 16, 32, 64)
# (KV heads of a draft's rank, query heads of each), batches, and nodes of a level, of which the root is one
WINDOW_HEADS = ((4, 4), (4, 5), (8, 4), (8, 5))
WINDOW_BATCHES, WINDOW_WIDTHS = (1, 2, 4, 8, 16), (1, 5, 16)
WINDOW_SPLITS = (1, 2, 4, 8)
# (batch, rows of a request) that are sampled
SAMPLED = ((1, 25), (1, 69), (4, 25), (4, 69), (16, 8), (64, 2))
MAX_DEPTH = 5
# (batch, parents and children of a request) of levels; at batch 16 no level of the default tree is as wide as 7
LEVELS = ((1, 16), (4, 16), (16, 16), (16, 7), (16, 6), (16, 5))
# Rows of a head that learns its tokens.
LEARNED_TOKENS = 65536
# Rows that a level of drafts may have.
GEMM_ROWS = (1, 8, 16, 17, 20, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 136, 160, 192, 200, 224, 256)
# Sizes and numbers of rows that are normalised.
NORM_SIZES, NORM_ROWS = (3584, 4096, 5120), (1, 4, 16, 64, 256)
# Of inputs that are used in turn.
MAX_COPIES = 32

Call = Callable[[], Any]
Row = dict[str, Any]


def measure(calls: Sequence[Call], target_us: float = 2500.0, replays: int = 7) -> float:
    """Microseconds of one of `calls`, which do the same to different inputs."""
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
    return round(statistics.median(times), 2)


def measure_without_graph(call: Call, num_calls: int = 10) -> float:
    """Microseconds that the GPU works for one call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_calls):
            call()
        torch.cuda.synchronize()
    return round(sum(event.self_device_time_total for event in profile.key_averages()) / num_calls, 2)


@dataclass
class Batch:
    """Requests of equal context and equally many rows."""

    query: torch.Tensor  # [num_reqs * width, num_heads, HEAD_SIZE]
    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE]
    block_table: torch.Tensor  # int32 [num_reqs, max_blocks]
    prefix_lens: torch.Tensor  # int32 [num_reqs]
    query_starts: torch.Tensor  # int32 [num_reqs + 1]
    slots: torch.Tensor  # int64 [num_reqs * width]
    masks: torch.Tensor  # int32 [num_reqs, width, num_words]
    output: torch.Tensor  # as the query
    context: int
    width: int

    def schedule(self, causal: bool, num_splits: int) -> torch.Tensor:
        """What FlashAttention 3 would otherwise work out in every layer."""
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        return get_scheduler_metadata(
            batch_size=self.prefix_lens.shape[0],
            max_seqlen_q=self.width,
            max_seqlen_k=self.context,
            num_heads_q=self.query.shape[1],
            num_heads_kv=self.kv_cache.shape[1],
            headdim=HEAD_SIZE,
            cache_seqlens=self.prefix_lens,
            qkv_dtype=DTYPE,
            cu_seqlens_q=self.query_starts,
            page_size=BLOCK_SIZE,
            causal=causal,
            num_splits=num_splits,
        )

    def prefix_attention(self, causal: bool = False, num_splits: int = 0) -> Callable[[], torch.Tensor]:
        """FlashAttention 3 over the cache, scheduled once for all layers; returns the log-sum-exps."""
        return partial(self._attend_prefix, causal, num_splits, self.schedule(causal, num_splits))

    def _attend_prefix(self, causal: bool, num_splits: int, schedule: torch.Tensor) -> torch.Tensor:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        keys, values = self.kv_cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
        _, lse = flash_attn_varlen_func(
            q=self.query,
            k=keys,
            v=values,
            out=self.output,
            cu_seqlens_q=self.query_starts,
            max_seqlen_q=self.width,
            seqused_k=self.prefix_lens,
            max_seqlen_k=self.context,
            softmax_scale=HEAD_SIZE**-0.5,
            causal=causal,
            block_table=self.block_table,
            return_softmax_lse=True,
            scheduler_metadata=schedule,
            num_splits=num_splits,
            fa_version=3,
        )
        return lse

    def seen(self, indices: torch.Tensor) -> "PrefixAttention":
        """The attention of the rows to their prefix, as an observer sees it in an engine."""
        from vllm_longspec.attention.backend import PrefixAttention, TreeRequests

        trees = TreeRequests(
            self.prefix_lens.shape[0],
            self.query.shape[0],
            self.query_starts,
            self.width,
            self.prefix_lens,
            self.context,
            self.block_table,
            self.slots,
            self.masks,
            in_graph=True,
            idx_mapping=indices,
        )
        return PrefixAttention(trees, self.query, self.kv_cache, HEAD_SIZE**-0.5, self.prefix_attention()(), None)

    def attend_tree(self, prefix_lse: torch.Tensor) -> None:
        from vllm_longspec.attention.tree import tree_attention

        tree_attention(
            self.query,
            self.kv_cache,
            self.slots,
            self.query_starts,
            self.masks,
            self.width,
            HEAD_SIZE**-0.5,
            prefix_lse,
            self.output,
        )

    def verification(self) -> Call:
        prefix = self.prefix_attention()
        return lambda: self.attend_tree(prefix())


def make_batches(kv_cache: torch.Tensor, num_heads: int, context: int, num_reqs: int, width: int) -> list[Batch]:
    """As many batches as the L2 cache needs to forget one before it comes again."""
    num_blocks, num_kv_heads = kv_cache.shape[:2]
    # A length that no tile divides.
    prefix_len = context - 27
    blocks = -(-(context + TILE) // BLOCK_SIZE)
    count = max(2, min(8, -(-COLD_BYTES // (context * num_reqs * num_kv_heads * 4 * HEAD_SIZE))))
    order = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    positions = prefix_len + torch.arange(width, device=DEVICE)
    batches = []
    for index in range(count):
        first = index * num_reqs * blocks % (num_blocks - num_reqs * blocks + 1)
        block_table = order[first : first + num_reqs * blocks].view(num_reqs, blocks).contiguous()
        slots = block_table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        query = torch.randn(num_reqs * width, num_heads, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
        masks = torch.randint(-(2**31), 2**31 - 1, (num_reqs, width, -(-width // 32)), device=DEVICE, dtype=torch.int32)
        batches.append(
            Batch(
                query,
                kv_cache,
                block_table,
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


def random_cache(num_kv_heads: int) -> torch.Tensor:
    """K and V of CACHE_BYTES, [num_blocks, num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE]."""
    num_blocks = CACHE_BYTES // (BLOCK_SIZE * num_kv_heads * 4 * HEAD_SIZE)
    # As vLLM lays them out by default: tokens first.
    memory = torch.empty(num_blocks, BLOCK_SIZE, num_kv_heads, 2 * HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    for chunk in memory.split(1 << 14):
        chunk.normal_()
    return memory.transpose(1, 2)


def attention() -> Iterator[Row]:
    for model, config in MODELS.items():
        num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        kv_cache = random_cache(num_kv_heads)
        num_blocks = kv_cache.shape[0]
        full_tile = TILE // (num_heads // num_kv_heads)
        for context in CONTEXTS:
            for num_reqs in BATCHES:
                if 2 * num_reqs * (context + TILE) > num_blocks * BLOCK_SIZE:
                    continue
                batches = make_batches(kv_cache, num_heads, context, num_reqs, 1)
                one_query = measure([batch.prefix_attention(causal=True, num_splits=GRAPH_SPLITS) for batch in batches])
                for width in (8, full_tile, DEFAULT_ROWS):
                    batches = make_batches(kv_cache, num_heads, context, num_reqs, width)
                    lse = torch.zeros(num_heads, num_reqs * width, device=DEVICE)
                    both = measure([batch.verification() for batch in batches])
                    yield {
                        "model": model,
                        "context": context,
                        "batch": num_reqs,
                        "rows": width,
                        "FA3, one query": one_query,
                        "FA3, prefix": measure([batch.prefix_attention() for batch in batches]),
                        "tree": measure([partial(batch.attend_tree, lse) for batch in batches]),
                        "FA3 + tree": both,
                        "times one query": round(both / one_query, 2),
                    }


def splits() -> Iterator[Row]:
    config = LLAMA_3_8B_262K
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_cache = random_cache(num_kv_heads)
    for num_reqs in PART_BATCHES:
        batches = make_batches(kv_cache, num_heads, PART, num_reqs, 1)
        yield {"batch": num_reqs} | {
            name: measure([batch.prefix_attention(causal=True, num_splits=most) for batch in batches])
            for name, most in ((f"up to {GRAPH_SPLITS} splits", GRAPH_SPLITS), ("one split", 1))
        }


def window() -> Iterator[Row]:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

    from vllm_longspec.proposers.glide.attention_splits import AttentionSplits, merge_splits
    from vllm_longspec.proposers.glide.model import WINDOW_SIZE
    from vllm_longspec.proposers.glide.rotation import RotaryTable
    from vllm_longspec.proposers.glide.window_attention import window_attention

    def attend(layer: Any, num_splits: int, inputs: tuple[Any, ...]) -> None:
        merge_splits(layer, window_attention(*inputs, num_splits=num_splits))

    root = 4096
    table = RotaryTable(torch.randn(root + MAX_DEPTH, HEAD_SIZE, device=DEVICE, dtype=DTYPE), True)
    layers: dict[str, Any] = {"fp8": SimpleNamespace(_input_quant_key=kFp8DynamicTokenSym), "bf16": SimpleNamespace()}
    for num_kv_heads, group in WINDOW_HEADS:
        num_slots = COLD_BYTES // (WINDOW_SIZE * 2 * num_kv_heads * HEAD_SIZE * DTYPE.itemsize)
        ring_shape = (max(num_slots, *WINDOW_BATCHES), WINDOW_SIZE, 2, num_kv_heads, HEAD_SIZE)
        ring = torch.randn(ring_shape, device=DEVICE, dtype=DTYPE)
        for num_reqs, width in product(WINDOW_BATCHES, WINDOW_WIDTHS):
            # Below the root, levels as wide as this one.
            depth = 0 if width == 1 else MAX_DEPTH - 1
            first_row = 1 + (depth - 1) * width if depth else 0
            num_rows = first_row + width
            num_heads = num_kv_heads * (group + 2)
            qkv = torch.randn(num_reqs, width, num_heads, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
            query, key, value = qkv.split([num_kv_heads * group, num_kv_heads, num_kv_heads], dim=2)
            positions = torch.full((num_reqs, width), root + depth, device=DEVICE)
            nodes = torch.randn(num_reqs, num_rows, 2, num_kv_heads, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
            masks = torch.full((num_reqs, num_rows, -(-num_rows // 32)), -1, device=DEVICE, dtype=torch.int32)
            roots = positions[:, 0] - depth
            level = roots, positions, table, nodes, masks, first_row, depth, HEAD_SIZE**-0.5
            slots = torch.arange(len(ring), device=DEVICE).split(num_reqs)[: len(ring) // num_reqs]
            inputs = [(query, key, value, ring, each, *level) for each in slots]
            by_default = window_attention(*inputs[0])
            for name, layer in layers.items():
                row: Row = {"KV heads": num_kv_heads, "group": group, "batch": num_reqs, "width": width, "o_proj": name}
                for num_splits in WINDOW_SPLITS:
                    way = f"{num_splits} splits" if num_splits > 1 else "whole"
                    row[way] = measure([partial(attend, layer, num_splits, each) for each in inputs])
                yield row | {"default": len(by_default.values) if isinstance(by_default, AttentionSplits) else 1}


def children() -> Iterator[Row]:
    from vllm_longspec.tree.best_children import best_children
    from vllm_longspec.tree.coupling import LevelNoise, TargetNoise

    vocab_size = QWQ_32B["vocab_size"]
    for num_reqs, width in LEVELS:
        slots = torch.arange(num_reqs, device=DEVICE)
        log_probs = -torch.rand(num_reqs, width, device=DEVICE)
        copies = max(1, COLD_BYTES // (num_reqs * width * vocab_size * DTYPE.itemsize))
        logits = [
            torch.randn(num_reqs * width, vocab_size, device=DEVICE, dtype=DTYPE)
            for _ in range(min(copies, MAX_COPIES))
        ]

        def noise(temperature: float, log_cutoff: float, slots: torch.Tensor = slots) -> LevelNoise:
            temperatures = torch.full((len(slots),), temperature, device=DEVICE)
            cutoffs = torch.full_like(temperatures, log_cutoff)
            return LevelNoise(TargetNoise(temperatures, slots, cutoffs, use_fp64=False), slots, 16384 + slots, 1)

        ways = {
            "no noise": None,
            "greedy": noise(0.0, -torch.inf),
            "temperature": noise(0.7, -torch.inf),
            "temperature and top-p": noise(0.7, -3.0),
        }
        yield {"batch": num_reqs, "width": width} | {
            name: measure([partial(best_children, each, log_probs, width, way) for each in logits])
            for name, way in ways.items()
        }


def gemms() -> Iterator[Row]:
    from vllm import _custom_ops as ops

    def quantised(num_rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randn(num_rows, size, device=DEVICE).to(torch.float8_e4m3fn)
        return rows, torch.ones(num_rows, 1, device=DEVICE)

    for name, model in MODELS.items():
        hidden, inner = model["hidden_size"], model["intermediate_size"]
        queries, keys = (model[key] * HEAD_SIZE for key in ("num_attention_heads", "num_key_value_heads"))
        # Self-attention, cross-attention and MLP: sizes of inputs and outputs.
        layer = [(hidden, queries + 2 * keys), (queries, hidden)]
        layer += [(hidden, queries), (queries, hidden)]
        layer += [(hidden, 2 * inner), (inner, hidden)]
        weights = [quantised(outputs, inputs) for inputs, outputs in layer]
        head = quantised(min(LEARNED_TOKENS, model["vocab_size"]), hidden)
        for num_rows in GEMM_ROWS:
            rows = {size: quantised(num_rows, size) for size in {inputs for inputs, _ in layer}}

            def multiply(
                weights: Sequence[tuple[torch.Tensor, torch.Tensor]],
                rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = rows,
            ) -> None:
                for weight, weight_scale in weights:
                    data, scale = rows[weight.shape[1]]
                    ops.cutlass_scaled_mm(data, weight.t(), scale, weight_scale.t(), DTYPE)

            yield {
                "model": name,
                "rows": num_rows,
                "layer": measure([partial(multiply, weights)]),
                "head": measure([partial(multiply, [head])]),
            }


def norms() -> Iterator[Row]:
    from vllm_longspec.proposers.glide.fp8_inputs import _norm_and_quantise

    for size, num_rows in product(NORM_SIZES, NORM_ROWS):
        norm: Any = SimpleNamespace(weight=torch.rand(size, device=DEVICE, dtype=DTYPE), variance_epsilon=1e-6)
        # What is added again and again stops growing where it is rounded away.
        hidden, residual = torch.randn(2, num_rows, size, device=DEVICE, dtype=DTYPE)
        rows = torch.empty(num_rows, size, device=DEVICE, dtype=torch.float8_e4m3fn)
        scales = torch.empty(num_rows, 1, device=DEVICE)
        row: Row = {"size": size, "rows": num_rows}
        for suffix, added in (("", None), (", residual", residual)):
            vllm_norm = torch.ops._C.rms_norm_dynamic_per_token_quant
            row[f"vLLM's kernel{suffix}"] = measure(
                [partial(vllm_norm, rows, hidden, norm.weight, scales, norm.variance_epsilon, None, added)]
            )
            row[f"as it is{suffix}"] = measure([partial(_norm_and_quantise, norm, hidden, added, rows, scales)])
        yield row


def sample() -> Iterator[Row]:
    """Sampling and walk: with vLLM's sampler, and as it is, which differs where there is only a temperature."""
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_longspec.tree import sample as tree_sample
    from vllm_longspec.tree.batch import TreeBatch
    from vllm_longspec.tree.sample import TreeSampler
    from vllm_longspec.tree.state import TreeState

    vocab_size = QWQ_32B["vocab_size"]
    samplings = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature": SamplingParams(temperature=0.7, seed=1),
        "top-k and top-p": SamplingParams(temperature=0.7, top_k=20, top_p=0.95, seed=1),
    }
    draws_at_temperature = tree_sample.draws_at_temperature
    for num_reqs, num_rows in SAMPLED:
        state = RequestState(num_reqs, 32768, 4096, num_rows - 1, vocab_size, DEVICE)
        trees = TreeState.allocate(num_reqs, num_rows - 1, DEVICE)
        tree_batch = TreeBatch.allocate(trees, MAX_DEPTH)
        trees.parent_rows[:, 1:] = torch.arange(num_rows - 1, device=DEVICE, dtype=torch.int32) // 4
        batch: Any = sampled_batch(num_reqs, num_rows, vocab_size)
        # As spread as those of a language model, so that some tokens have most of the probability.
        logits = [3 * torch.randn(num_reqs * num_rows, vocab_size, device=DEVICE, dtype=DTYPE) for _ in range(3)]
        for name, params in samplings.items():
            sampler = Sampler(VllmConfig(), num_reqs, vocab_size, DEVICE, state, num_speculative_tokens=num_rows)
            # As in an engine with coupled drafts.
            sampler.use_flashinfer = False
            for slot in range(num_reqs):
                sampler.add_request(slot, params)
            sampler.apply_staged_writes()
            sample_and_walk = TreeSampler(sampler, trees, tree_batch, MAX_DEPTH)
            row: Row = {"batch": num_reqs, "rows": num_rows, "sampling": name}
            emitted: list[torch.Tensor] = []
            for way, draws in (("vLLM's sampler", lambda *_: False), ("as it is", draws_at_temperature)):
                tree_sample.draws_at_temperature = draws
                emitted += [sample_and_walk(each, batch).sampled_token_ids for each in logits]
                row[way] = round(
                    measure_without_graph(partial(for_each, sample_and_walk, logits, batch)) / len(logits), 1
                )
            tree_sample.draws_at_temperature = draws_at_temperature
            row["same tokens"] = all(map(torch.equal, emitted[: len(logits)], emitted[len(logits) :]))
            yield row


def for_each(call: Callable[..., Any], inputs: Sequence[torch.Tensor], *others: object) -> None:
    for each in inputs:
        call(each, *others)


def sampled_batch(num_reqs: int, num_rows: int, vocab_size: int) -> SimpleNamespace:
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
        input_ids=torch.randint(0, vocab_size, row.shape, device=DEVICE, dtype=torch.int32),
        positions=16384 + row,
        cu_num_logits=torch.from_numpy(starts).to(DEVICE),
        cu_num_logits_np=starts,
        seq_lens=seq_lens.to(DEVICE),
        seq_lens_cpu_upper_bound=seq_lens,
    )


def compact() -> Iterator[Row]:
    from vllm_longspec.tree.compact import KVCacheTable, compact_kv_caches

    num_layers, num_kv_heads = QWQ_32B["num_hidden_layers"], QWQ_32B["num_key_value_heads"]
    for num_reqs in BATCHES:
        num_blocks = num_reqs * (1 + TILE // BLOCK_SIZE)
        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, 2 * HEAD_SIZE)
        layers = [torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(num_layers)]
        table = KVCacheTable(layers)
        blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32).view(num_reqs, -1)
        prefix_lens = torch.full((num_reqs,), 5, device=DEVICE, dtype=torch.int32)
        path = torch.tensor([0, 3, 9, 21, 40, 68], device=DEVICE, dtype=torch.int32).repeat(num_reqs, 1)
        for emitted in (1, 4, 6):
            num_emitted = torch.full((num_reqs,), emitted, device=DEVICE, dtype=torch.int32)
            call = partial(compact_kv_caches, table, blocks, prefix_lens, path, num_emitted, MAX_DEPTH)
            yield {"layers": num_layers, "batch": num_reqs, "emitted tokens": emitted, "compaction": measure([call])}


def copy() -> Iterator[Row]:
    """All that copied paths add to a draft: lookup, score and merge, in random text and in text of one token."""
    for context, num_reqs in COPIES:
        yield {
            "context": context,
            "batch": num_reqs,
            "random text": measure([copied_path(context, num_reqs, QWQ_32B["vocab_size"])]),
            "one token": measure([copied_path(context, num_reqs, 1)]),
        }


def copied_path(context: int, num_reqs: int, vocab_size: int) -> Callable[[], object]:
    from vllm_longspec.copying.lookup import find_copies
    from vllm_longspec.copying.trust import CopyTrust
    from vllm_longspec.options import DEFAULT_COPY_LENGTH
    from vllm_longspec.tree.merge import merge_path

    num_nodes = DEFAULT_ROWS - 1
    slots = torch.arange(num_reqs, device=DEVICE)
    roots = torch.full((num_reqs,), context - 1, device=DEVICE)
    text = torch.randint(0, vocab_size, (num_reqs, context), device=DEVICE, dtype=torch.int32)
    tokens = torch.randint(0, QWQ_32B["vocab_size"], (num_reqs, num_nodes), device=DEVICE)
    parents = torch.arange(num_nodes, device=DEVICE, dtype=torch.int32).repeat(num_reqs, 1) // 4 - 1
    trust = CopyTrust(num_reqs, DEFAULT_COPY_LENGTH, DEVICE)

    def call() -> object:
        copied, match_lens = find_copies(text, slots, roots, context, DEFAULT_COPY_LENGTH)
        scores = trust.score(copied, match_lens, text, slots, roots)
        return merge_path(tokens, -tokens.float(), parents, copied, scores)

    return call


def scores() -> Iterator[Row]:
    from vllm_longspec.proposers.magicdec.selection import BlockSelection

    config = LLAMA_3_8B_262K
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    num_layers = config["num_hidden_layers"]
    kv_cache = random_cache(num_kv_heads)
    for context, num_reqs in SELECTIONS:
        batches = make_batches(kv_cache, num_heads, context, num_reqs, CHAIN_ROWS)
        sinks, budget = 32, 1024
        num_steps = CHAIN_ROWS - 1
        selection = BlockSelection.allocate(sinks, budget, num_steps, num_layers, num_reqs, context, BLOCK_SIZE, DEVICE)
        indices = torch.arange(num_reqs, device=DEVICE)
        seen = [batch.seen(indices) for batch in batches]
        row: Row = {"context": context, "batch": num_reqs}
        row["FA3"] = measure([batch.prefix_attention() for batch in batches])
        verified_len = torch.full_like(selection.verified_len, context)
        # Before its first verification all is due; then it depends on layer, place and the tokens that were emitted.
        for name, lengths, layers in (
            ("all", torch.zeros_like(verified_len), [0]),
            ("in turn", verified_len - num_steps, range(num_layers)),
            ("none", verified_len, [0]),
        ):
            selection.verified_len.copy_(lengths)
            selection.chosen_at.fill_(context)
            pairs = [(layer, attention) for layer in layers for attention in seen]
            row[f"scores, {name}"] = measure([partial(selection.score, *pair) for pair in pairs])
            row[f"choice, {name}"] = measure([partial(selection.choose, layer, seen.trees) for layer, seen in pairs])
        width = selection.num_sinks + budget // BLOCK_SIZE + 1
        tables = torch.zeros(num_layers, num_reqs, width, device=DEVICE, dtype=torch.int32)
        row["tables, all layers"] = measure(
            [
                partial(selection.write_tables, batch.block_table, indices, batch.prefix_lens.long(), tables)
                for batch in batches
            ]
        )
        yield row


def learn() -> Iterator[Row]:
    from vllm_longspec.proposers.glide.head import rows_of_all_ranks, write_rows
    from vllm_longspec.proposers.glide.learned_head import EXCHANGED, INTERVAL, UNIT, choose_exchange, count_tokens
    from vllm_longspec.proposers.glide.resemblance import Resemblance

    vocab_size, hidden = QWQ_32B["vocab_size"], QWQ_32B["hidden_size"]
    size = min(LEARNED_TOKENS, vocab_size // 2)
    rows = torch.randn(vocab_size, hidden, device=DEVICE, dtype=DTYPE)
    head: Any = SimpleNamespace(weight=rows, tp_size=1)
    counts = torch.randint(0, 1 << 40, (vocab_size,), device=DEVICE)
    token_ids = torch.arange(size, device=DEVICE)
    # Random words share features as words do: some 5 each, among 26 ** 3 runs of letters.
    source = random.Random(0)
    texts = ["".join(source.choices(string.ascii_lowercase, k=source.randint(2, 10))) for _ in range(vocab_size)]
    resemblance = Resemblance(texts, DEVICE)
    whole: Any = SimpleNamespace(weight=torch.zeros(size, hidden, device=DEVICE, dtype=DTYPE), tp_size=1)
    quantised: Any = SimpleNamespace(
        tp_size=1,
        weight=torch.zeros(size, hidden, device=DEVICE).to(torch.float8_e4m3fn).t(),
        weight_scale=torch.ones(size, 1, device=DEVICE),
    )

    def exchange(copied: Any) -> None:
        expected = counts + resemblance.expected(counts, UNIT)
        slots, tokens = choose_exchange(expected, token_ids, 16, min(EXCHANGED, size - 16))
        token_ids.index_copy_(0, slots, tokens)
        write_rows(copied, slots, rows_of_all_ranks(head, tokens))

    def on_the_host(copied: Any, num_calls: int = 20) -> float:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(num_calls):
            exchange(copied)
        took = time.perf_counter() - started
        return round(1e6 * took / num_calls, 2)

    exchanges = {name: partial(exchange, copied) for name, copied in (("bf16", whole), ("fp8", quantised))}
    times = {f"exchange, {name}": measure_without_graph(call) for name, call in exchanges.items()}
    times["what is expected"] = measure_without_graph(partial(resemblance.expected, counts, UNIT))
    times["exchange, fp8, host"] = on_the_host(quantised)
    for num_reqs in BATCHES:
        slots = torch.arange(num_reqs, device=DEVICE)
        roots = torch.full((num_reqs,), 16384, device=DEVICE)
        text = torch.randint(0, vocab_size, (num_reqs, 16384), device=DEVICE, dtype=torch.int32)
        emitted = torch.full((num_reqs,), MAX_DEPTH + 1, device=DEVICE, dtype=torch.int32)
        prompt = torch.full_like(emitted, 16384)
        counted = measure([partial(count_tokens, counts, text, slots, roots, emitted, MAX_DEPTH + 1)])
        yield {
            "batch": num_reqs,
            "rows": size,
            "exchanged": EXCHANGED,
            "count emitted": counted,
            "count prompts of 16k": measure([partial(count_tokens, counts, text, slots, roots, prompt, 16384)]),
            **times,
            "a step, fp8": round(counted + times["exchange, fp8"] / INTERVAL, 2),
        }


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "attention": attention,
    "splits": splits,
    "window": window,
    "children": children,
    "gemms": gemms,
    "norms": norms,
    "sample": sample,
    "compact": compact,
    "copy": copy,
    "scores": scores,
    "learn": learn,
}


def table(rows: Sequence[Row]) -> str:
    return markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; without any, everything")
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    arguments = parser.parse_args()

    report: dict[str, Any] = {"environment": environment(arguments.commit), "unit": "microseconds"}
    with torch.inference_mode():
        for part in arguments.parts or PARTS:
            report[part] = list(PARTS[part]())
            print(f"{part}, microseconds\n\n{table(report[part])}\n", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
