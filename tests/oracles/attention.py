# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache as its definition says, one query row and one head at a time, in float64.

Also the batches that the attention kernels are checked on: a paged cache in which everything that must not be read is
NaN, and trees as lists of parents.
"""

import itertools
import random
from dataclasses import dataclass, replace

import torch

from vllm_longspec.attention.cache_scales import CacheScales, as_stored

# Norm of the error over the norm of the result, for one row of one head.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# Query heads, KV heads, block size, physical layout of the cache.
GEOMETRIES = [
    (4, 4, 16, "tokens_first"),
    (8, 2, 32, "heads_first"),
    (5, 1, 48, "tokens_first"),
    (8, 8, 16, "heads_first"),
    (6, 2, 32, "layers_interleaved"),
]


def attention_cases() -> list[tuple[torch.dtype, int, int, int, int, str]]:
    """Every dtype with every head size, each with one of the geometries; every dtype meets every geometry."""
    pairs = itertools.product(TOLERANCE, [32, 64, 80, 96, 128, 256])
    return [(*pair, *GEOMETRIES[index % len(GEOMETRIES)]) for index, pair in enumerate(pairs)]


def quantised_cases() -> list[tuple[torch.dtype, bool, bool, int, int, int, str]]:
    """Every dtype with one scale for all KV heads and one for each, and with queries of both kinds."""
    cases = itertools.product(TOLERANCE, [False, True], [False, True])
    return [(*case, *GEOMETRIES[index % len(GEOMETRIES)]) for index, case in enumerate(cases)]


@dataclass
class PagedBatch:
    """A ragged batch of requests, each with a cached prefix and the rows of a query right after it."""

    query: torch.Tensor  # [num_tokens, num_heads, head_size], a slice of a wider tensor
    kv_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table: torch.Tensor  # int32 [num_reqs, max_num_blocks]
    prefix_lens: torch.Tensor  # int32 [num_reqs]
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    slot_mapping: torch.Tensor  # int64 [num_tokens] slots of the query's own rows
    scale: float
    # of a quantised cache, which is then a tensor of bytes
    scales: CacheScales | None = None
    # None: the query's
    output_dtype: torch.dtype | None = None

    @property
    def max_query_len(self) -> int:
        return int(self.query_start_loc.diff().max())

    def empty_results(self, num_further_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp, full of NaN, with room for tokens of further requests."""
        num_tokens, num_heads, head_size = self.query.shape
        num_tokens += num_further_tokens
        output = torch.full((num_tokens, num_heads, head_size), torch.nan, dtype=self.output_dtype or self.query.dtype)
        lse = torch.full((num_heads, num_tokens), torch.nan)
        return output.to(self.query.device), lse.to(self.query.device)


def make_batch(
    prefix_lens: list[int],
    query_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    layout: str,
    device: str,
    seed: int = 0,
) -> PagedBatch:
    """Random queries, keys and values. Blocks are handed out in random order; no slot without a token can be used."""
    generator = torch.Generator().manual_seed(seed)
    total_lens = [prefix_len + query_len for prefix_len, query_len in zip(prefix_lens, query_lens, strict=True)]
    blocks_per_request = [-(-total_len // block_size) for total_len in total_lens]
    num_blocks = 1 + sum(blocks_per_request)
    shape = (num_blocks, num_kv_heads, block_size, 2 * head_size)
    if layout == "heads_first":
        kv_cache = torch.empty(shape, dtype=dtype)
    elif layout == "tokens_first":
        kv_cache = torch.empty(num_blocks, block_size, num_kv_heads, 2 * head_size, dtype=dtype).permute(0, 2, 1, 3)
    else:
        kv_cache = torch.full((num_blocks, 3, *shape[1:]), torch.nan, dtype=dtype)[:, 1]
    kv_cache.fill_(torch.nan)

    # Block 0 stays without tokens, and stands in the table wherever a request has no block.
    order = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()
    block_table = torch.zeros(len(total_lens), max(1, *blocks_per_request), dtype=torch.int32)
    slots: list[int] = []
    for request, total_len in enumerate(total_lens):
        for index in range(blocks_per_request[request]):
            block_table[request, index] = order.pop()
        for position in range(total_len):
            block = int(block_table[request, position // block_size])
            kv_cache[block, :, position % block_size] = torch.randn(
                num_kv_heads, 2 * head_size, generator=generator
            ).to(dtype)
            if position >= prefix_lens[request]:
                slots.append(block * block_size + position % block_size)

    wide = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_size, generator=generator).to(dtype)
    starts = [sum(query_lens[:request]) for request in range(len(query_lens) + 1)]
    # Moving a tensor to another device keeps the strides only of a dense one.
    on_device = torch.empty_strided(kv_cache.shape, kv_cache.stride(), dtype=dtype, device=device).copy_(kv_cache)
    return PagedBatch(
        query=wide.to(device)[:, :num_heads],
        kv_cache=on_device,
        block_table=block_table.to(device),
        prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        scale=head_size**-0.5,
    )


def quantise(batch: PagedBatch, per_head: bool, with_query: bool) -> PagedBatch:
    """The same batch with a cache of fp8, and queries of fp8 if asked for; what that rounds off is not in it."""
    num_heads, num_kv_heads, head_size = batch.query.shape[1], batch.kv_cache.shape[1], batch.query.shape[2]
    device = batch.query.device
    generator = torch.Generator().manual_seed(3)
    shape = (num_kv_heads,) if per_head else ()
    key, value, query = (0.2 + torch.rand(shape, generator=generator) for _ in range(3))

    cache = batch.kv_cache.cpu().float()
    cache[..., :head_size] /= key.view(-1, 1, 1)
    cache[..., head_size:] /= value.view(-1, 1, 1)
    stored = torch.empty_strided(batch.kv_cache.shape, batch.kv_cache.stride(), dtype=torch.float8_e4m3fn)
    on_device = torch.empty_strided(stored.shape, stored.stride(), dtype=torch.uint8, device=device)
    on_device.copy_(stored.copy_(cache).view(torch.uint8))
    rows = batch.query
    if with_query:
        of_heads = query.expand(num_kv_heads).repeat_interleave(num_heads // num_kv_heads)
        rows = (rows.float() / of_heads[:, None].to(device)).to(torch.float8_e4m3fn)
    scales = CacheScales(key.to(device), value.to(device), query.to(device) if with_query else None)
    return replace(batch, query=rows, kv_cache=on_device, scales=scales, output_dtype=batch.query.dtype)


def attend(
    query: torch.Tensor,  # [head_size]
    keys: torch.Tensor,  # [num_keys, head_size]
    values: torch.Tensor,  # [num_keys, head_size]
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's attention and its log-sum-exp, in float64."""
    if len(keys) == 0:
        return torch.zeros(len(query), dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
    scores = keys.double() @ query.double() * scale
    return torch.softmax(scores, dim=0) @ values.double(), torch.logsumexp(scores, dim=0)


def gather(batch: PagedBatch, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at these slots, float64 [num_kv_heads, len(slots), head_size] each."""
    block_size = batch.kv_cache.shape[2]
    cache = as_stored(batch.kv_cache.cpu())
    rows = [cache[slot // block_size, :, slot % block_size].double() for slot in slots]
    head_size = cache.shape[3] // 2
    both = torch.stack(rows, dim=1) if rows else torch.empty(cache.shape[1], 0, 2 * head_size, dtype=torch.float64)
    keys, values = both[..., :head_size], both[..., head_size:]
    if batch.scales is not None:
        keys = keys * batch.scales.key.cpu().double().view(-1, 1, 1)
        values = values * batch.scales.value.cpu().double().view(-1, 1, 1)
    return keys, values


def attend_slots(batch: PagedBatch, slots_of_rows: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in which row i of request r attends the slots `slots_of_rows[r][i]`, and its log-sum-exp.

    Returns float64 [num_tokens, num_heads, head_size] and [num_heads, num_tokens].
    """
    num_tokens, num_heads, head_size = batch.query.shape
    query = batch.query.cpu().double()
    num_kv_heads = batch.kv_cache.shape[1]
    group = num_heads // num_kv_heads
    if batch.scales is not None and batch.scales.query is not None:
        query *= batch.scales.query.cpu().expand(num_kv_heads).repeat_interleave(group)[:, None]
    output = torch.empty(num_tokens, num_heads, head_size, dtype=torch.float64)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float64)
    token = 0
    for slots_of_row in slots_of_rows:
        for slots in slots_of_row:
            keys, values = gather(batch, slots)
            for head in range(num_heads):
                output[token, head], lse[head, token] = attend(
                    query[token, head], keys[head // group], values[head // group], batch.scale
                )
            token += 1
    assert token == num_tokens
    return output, lse


def prefix_slots(batch: PagedBatch, request: int) -> list[int]:
    block_size = batch.kv_cache.shape[2]
    blocks = batch.block_table[request].tolist()
    return [
        blocks[position // block_size] * block_size + position % block_size
        for position in range(int(batch.prefix_lens[request]))
    ]


def row_slots(batch: PagedBatch, request: int) -> list[int]:
    start, end = batch.query_start_loc[request : request + 2].tolist()
    return batch.slot_mapping[start:end].tolist()


def random_tree(num_rows: int, rng: random.Random) -> list[int]:
    """Row of each row's parent, parents first; -1 for the root."""
    return [-1] + [rng.randrange(row) for row in range(1, num_rows)]


def chain(num_rows: int) -> list[int]:
    return list(range(-1, num_rows - 1))


def ancestors(parents: list[int]) -> list[list[int]]:
    """For each row, itself and its ancestors, lowest row first."""
    paths = []
    for row in range(len(parents)):
        path = [row]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        paths.append(sorted(path))
    return paths


def pack_masks(attended: list[list[list[int]]], num_rows: int, device: str) -> torch.Tensor:
    """Int32 [num_reqs, num_rows, num_words], bit k of row i of request r set for k in `attended[r][i]`."""
    num_words = -(-num_rows // 32)
    masks = torch.zeros(len(attended), num_rows, num_words, dtype=torch.int64)
    for request, rows in enumerate(attended):
        for row, others in enumerate(rows):
            for other in others:
                masks[request, row, other // 32] |= 1 << other % 32
    # As a word of 32 bits, so that bit 31 is the sign.
    return torch.where(masks >= 2**31, masks - 2**32, masks).to(torch.int32).to(device)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest relative error of any row's vector; the last dimension holds the vectors."""
    difference = (actual.cpu().double() - expected).norm(dim=-1)
    norm = expected.norm(dim=-1)
    return float((difference / norm.where(norm > 0, 1.0)).max())
