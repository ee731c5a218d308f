# SPDX-License-Identifier: Apache-2.0
"""The draft as it runs in vLLM, from its checkpoint to the ordered tree, against the plain layer on the whole text."""

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.config.quantization import QUANT_KEY_NAMES, QuantizationConfigArgs, QuantSpec
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.model_loader import get_model

from tests.models import LLAMA3_ROPE, write_draft, write_target
from tests.oracles import tree as tree_oracle
from tests.oracles.glide import PlainDraft
from vllm_longspec.attention.prefix import prefix_attention
from vllm_longspec.proposers.glide import head, window_attention
from vllm_longspec.proposers.glide.beam import CrossAttention, grow_trees
from vllm_longspec.proposers.glide.growing_trees import GrowingTrees
from vllm_longspec.proposers.glide.model import GlideForCausalLM
from vllm_longspec.proposers.glide.proposer import GlideProposer
from vllm_longspec.proposers.glide.window import MAX_REBUILD_REQS, DraftWindow, list_settled
from vllm_longspec.runner.model_state import TreeModelState
from vllm_longspec.runner.speculator import TreeSpeculator
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.shape import TreeShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 1024
BLOCK_SIZE = 32
NUM_SLOTS = 11
WINDOW = 512

# Tokens before the root. A node's window reaches back to the first of them until they are 512 less its depth.
HISTORIES = [1, 3, 60, 511, 512, 513, 514, 700]
SOME_HISTORIES = [3, 60, 512, 700]
DEFAULT_SHAPE = (4, 16, 16, 16, 16)

# The largest difference between a log-probability in float32 and in float64.
TOLERANCE = 1e-4

# As transformers 5 writes it, and as the published longchat checkpoints have it.
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
LINEAR_BEFORE_TRANSFORMERS_5 = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0}

# Family, tied embeddings, KV heads, vocabulary size, other settings of config.json. vLLM pads a vocabulary of 60 to 64.
TARGETS: dict[str, tuple[str, bool, int, int, dict[str, Any]]] = {
    "llama": ("llama", False, 2, 64, {}),
    "llama tied linear": ("llama", True, 1, 60, LINEAR),
    "llama linear old config": ("llama", False, 1, 64, LINEAR_BEFORE_TRANSFORMERS_5),
    "qwen2": ("qwen2", False, 1, 60, {}),
    "qwen2 tied": ("qwen2", True, 1, 64, {}),
    "llama llama3": ("llama", False, 1, 64, {"rope_parameters": LLAMA3_ROPE}),
    "qwen3": ("qwen3", False, 1, 64, {}),
    "qwen3_moe": ("qwen3_moe", False, 2, 64, {}),
    "glm4": ("glm4", False, 2, 64, {}),
    "granite": ("granite", True, 2, 64, {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory) -> Iterator[None]:
    """What one of vLLM's worker processes has before it loads a model, undone afterwards."""
    store = tmp_path_factory.mktemp("groups") / "store"
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            # The same that vLLM's CPU worker replaces for good.
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
            patch.setattr("vllm.utils.torch_utils.is_pin_memory_available", lambda: False)
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if DEVICE.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, f"file://{store}", 0, backend)
            initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()


@dataclass
class Pair:
    """A draft and its target as vLLM's model runner has them, and the draft's plain twin."""

    speculator: TreeSpeculator
    target: nn.Module
    plain: PlainDraft

    @property
    def draft(self) -> GlideForCausalLM:
        return self.speculator.model


def load(
    target: Path,
    draft: Path,
    tree_shape: tuple[int, ...] = (1,),
    weights: dict[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Pair:
    """Loads both checkpoints as vLLM's model runner does; the twin gets `weights`, or else the draft's."""
    speculator, target_model = load_models(target, draft, tree_shape, **settings)
    return Pair(speculator, target_model, PlainDraft(target, weights or load_file(draft / "model.safetensors")))


def load_models(
    target: Path,
    draft: Path,
    tree_shape: tuple[int, ...] = (1,),
    dtype: Literal["float32", "bfloat16"] = "float32",
    drafting: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[TreeSpeculator, nn.Module]:
    vllm_config = EngineArgs(
        model=str(target),
        # Drafted trees alone: what is copied depends on no draft.
        speculative_config={"model": str(draft), "tree_shape": list(tree_shape), "copy_length": 0, **(drafting or {})},
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_SLOTS,
        block_size=BLOCK_SIZE,
        enforce_eager=True,
        **settings,
    ).create_engine_config()
    # `propose` below fills it in.
    request_state = SimpleNamespace()
    with set_current_vllm_config(vllm_config):
        speculator = TreeSpeculator(vllm_config, DEVICE, request_state)  # type: ignore[arg-type]
        target_model = get_model(vllm_config=vllm_config)
        speculator.load_model(target_model)
        speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
    return speculator, target_model


def write_pair(folder: Path, name: str, **overrides: Any) -> tuple[Path, Path]:
    family, tied, num_kv_heads, vocab_size, config = TARGETS[name]
    settings = {"num_key_value_heads": num_kv_heads, "vocab_size": vocab_size, **overrides}
    if "rope_scaling" in config:
        target = write_target(folder / "target", family, tied=tied, **settings)
        edit_config(target, rope_parameters=None, **config)
    else:
        target = write_target(folder / "target", family, tied=tied, **settings, **config)
    # Larger weights make for a draft so sure of itself that rounding is all one would see of the rest.
    return target, write_draft(folder / "draft", target, std=0.1)


def edit_config(checkpoint: Path, **changes: object) -> None:
    """Changes settings of a config.json; those that become None are removed."""
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[[str], Pair]:
    folder = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def load_named(name: str) -> Pair:
        target, draft = write_pair(folder / name, name)
        return load(target, draft)

    return load_named


class Batch:
    """Requests that have just been given a root: their text, and the target's cache with K and V of what precedes it.

    Whatever must not be read is poisoned: NaN in the cache, and ids that no vocabulary has in the text.
    """

    def __init__(self, histories: list[int], draft: GlideForCausalLM, seed: int = 0):
        source = random.Random(seed)
        vocab_size = draft.logits_processor.org_vocab_size
        num_kv_heads, head_size = draft.self_attn.num_kv_heads, draft.self_attn.head_size
        self.num_reqs = len(histories)
        self.slots = source.sample(range(max(NUM_SLOTS, len(histories))), len(histories))
        self.histories = [[source.randrange(vocab_size) for _ in range(length)] for length in histories]
        self.roots = [source.randrange(vocab_size) for _ in histories]
        self.root_tokens = torch.tensor(self.roots, device=DEVICE)
        self.root_positions = torch.tensor(histories, device=DEVICE)
        self.idx_mapping = torch.tensor(self.slots, device=DEVICE)
        self.token_ids = torch.full((max(NUM_SLOTS, len(histories)), MAX_MODEL_LEN), 10**6, dtype=torch.int32)
        for slot, history in zip(self.slots, self.histories, strict=True):
            self.token_ids[slot, : len(history)] = torch.tensor(history)
        self.token_ids = self.token_ids.to(DEVICE)

        generator = torch.Generator().manual_seed(seed)
        num_blocks = [-(-length // BLOCK_SIZE) for length in histories]
        blocks = source.sample(range(1, 1 + sum(num_blocks)), sum(num_blocks))
        self.block_table = torch.zeros(len(histories), max(num_blocks), dtype=torch.int32)
        self.kv_cache = torch.full((1 + len(blocks), num_kv_heads, BLOCK_SIZE, 2 * head_size), torch.nan)
        self.target_kv = [torch.randn(length, num_kv_heads, 2 * head_size, generator=generator) for length in histories]
        for request, length in enumerate(histories):
            for position in range(length):
                if position % BLOCK_SIZE == 0:
                    self.block_table[request, position // BLOCK_SIZE] = blocks.pop()
                block = self.block_table[request, position // BLOCK_SIZE]
                self.kv_cache[block, :, position % BLOCK_SIZE] = self.target_kv[request][position]
        self.block_table = self.block_table.to(DEVICE)
        self.kv_cache = self.kv_cache.to(DEVICE)

    def new_window(self, draft: GlideForCausalLM) -> DraftWindow:
        window = DraftWindow(self.token_ids.shape[0], draft, torch.float32, DEVICE)
        window.kv.fill_(torch.nan)
        return window

    def rebuilt_window(self, draft: GlideForCausalLM) -> DraftWindow:
        window = self.new_window(draft)
        with torch.inference_mode():
            window.rebuild(
                self.token_ids, self.idx_mapping, self.root_positions, max(len(each) for each in self.histories)
            )
        return window

    def cross_attention(self, scale: float) -> CrossAttention:
        prefix_lens = self.root_positions.to(torch.int32)
        query_starts = torch.arange(self.num_reqs + 1, dtype=torch.int32, device=DEVICE)

        def attend(query: torch.Tensor, width: int, depth: int) -> torch.Tensor:
            output = torch.empty_like(query)
            lse = torch.empty(query.shape[1], query.shape[0], device=DEVICE)
            prefix_attention(
                query,
                self.kv_cache,
                self.block_table,
                prefix_lens,
                query_starts * width,
                width,
                scale,
                output,
                lse,
            )
            return output

        return attend

    @torch.inference_mode()
    def grow(
        self,
        draft: GlideForCausalLM,
        levels: tuple[int, ...],
        window: DraftWindow,
        num_new: list[int] | None = None,  # tokens before each root that the window lacks, by default none
    ) -> GrowingTrees:
        settled = torch.tensor(num_new or [0] * self.num_reqs, dtype=torch.int32, device=DEVICE)
        max_new = max(1, int(settled.max()))
        requests = self.token_ids, self.idx_mapping, self.root_positions, settled, max_new
        return grow_trees(
            draft,
            TreeShape(levels),
            list_settled(*requests, self.root_tokens, max_position=MAX_MODEL_LEN - 1),
            self.root_positions,
            self.idx_mapping,
            window.kv,
            # Of the target's last layer.
            self.cross_attention(draft.multipliers.attention),
            max_position=MAX_MODEL_LEN - 1,
        )


def check_tree(
    plain: PlainDraft,
    batch: Batch,
    request: int,
    levels: tuple[int, ...],
    tokens: list[int],
    parents: list[int],
    log_probs: list[float] | None = None,
    part: list[int] | None = None,  # positions that the cross-attention sees below the root; None for all
) -> list[float]:
    """Every node's log-probability is the plain layer's, and every level holds the best nodes that it could hold.

    Nodes are in draft order: level after level. Returns the cumulative log-probabilities of the plain layer.
    """
    seen = batch.target_kv[request]
    history_kv = plain.self_kv(batch.histories[request])
    expected: list[float] = []
    level, cumulative = [-1], torch.zeros(1, dtype=torch.float64)
    for width in levels:
        paths = [
            [batch.roots[request]] + [tokens[node] for node in reversed(tree_oracle.path_to_root(parents, parent))]
            for parent in level
        ]
        candidates = cumulative[:, None] + plain.next_log_probs(history_kv, paths, *seen.chunk(2, dim=-1))
        nodes = range(len(expected), len(expected) + width)
        assert all(parents[node] in level for node in nodes)
        assert len({(parents[node], tokens[node]) for node in nodes}) == width
        cumulative = torch.stack([candidates[level.index(parents[node]), tokens[node]] for node in nodes])
        best = candidates.flatten().topk(width).values
        torch.testing.assert_close(cumulative.sort(descending=True).values, best, rtol=0, atol=TOLERANCE)
        expected += cumulative.tolist()
        level = list(nodes)
        # K and V of a node do not depend on what its cross-attention saw.
        seen = batch.target_kv[request] if part is None else batch.target_kv[request][part]
    if log_probs is not None:
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(expected), rtol=0, atol=TOLERANCE)
    return expected


@pytest.mark.parametrize(
    ("name", "levels", "histories"),
    [
        ("llama", DEFAULT_SHAPE, SOME_HISTORIES),
        ("llama", (2, 4, 4), HISTORIES),
        ("llama tied linear", DEFAULT_SHAPE, SOME_HISTORIES),
        ("llama linear old config", DEFAULT_SHAPE, SOME_HISTORIES),
        ("llama linear old config", (1, 1, 1, 1), HISTORIES),
        ("qwen2", DEFAULT_SHAPE, HISTORIES),
        ("qwen2", (1, 1, 1, 1), SOME_HISTORIES),
        ("qwen2 tied", DEFAULT_SHAPE, SOME_HISTORIES),
        ("qwen2 tied", (2, 4, 4), HISTORIES),
        # Families whose layer or sizes differ.
        *((name, (2, 4, 4), [60, 600]) for name in ("llama llama3", "qwen3", "qwen3_moe", "glm4", "granite")),
    ],
    ids=str,
)
def test_drafts_what_the_plain_layer_drafts(pairs, name, levels, histories):
    pair = pairs(name)
    batch = Batch(histories, pair.draft)
    drafted = batch.grow(pair.draft, levels, batch.rebuilt_window(pair.draft))
    assert drafted.tokens.shape == drafted.log_probs.shape == drafted.parents.shape == (len(histories), sum(levels))

    num_nodes = (sum(levels) + 1) // 2
    ordered_tokens = torch.zeros(batch.num_reqs, num_nodes, dtype=torch.int64, device=DEVICE)
    parent_rows = torch.zeros(NUM_SLOTS, 1 + num_nodes, dtype=torch.int32, device=DEVICE)
    depths = torch.zeros_like(parent_rows)
    masks = torch.zeros(NUM_SLOTS, 1 + num_nodes, -(-(1 + num_nodes) // 32), dtype=torch.int32, device=DEVICE)
    order_tree(
        drafted.tokens,
        drafted.log_probs,
        drafted.parents,
        batch.idx_mapping,
        ordered_tokens,
        parent_rows,
        depths,
        masks,
        len(levels),
    )
    for request, slot in enumerate(batch.slots):
        tokens, parents = drafted.tokens[request].tolist(), drafted.parents[request].tolist()
        log_probs = drafted.log_probs[request].tolist()
        check_tree(pair.plain, batch, request, levels, tokens, parents, log_probs)
        order = tree_oracle.order_nodes(log_probs, parents)[:num_nodes]
        expected_parent_rows, expected_depths, expected_masks = tree_oracle.describe_tree(order, parents)
        assert ordered_tokens[request].tolist() == [tokens[node] for node in order]
        assert parent_rows[slot].tolist() == expected_parent_rows
        assert depths[slot].tolist() == expected_depths
        assert [tree_oracle.mask_to_rows(words) for words in masks[slot].tolist()] == expected_masks


def test_a_split_window_drafts_the_same(pairs, monkeypatch):
    pair = pairs("llama")
    batch = Batch(SOME_HISTORIES, pair.draft)
    window = batch.rebuilt_window(pair.draft)
    drafted = []
    for num_splits in (1, 4):
        monkeypatch.setattr(window_attention, "choose_num_splits", lambda *_, chosen=num_splits: chosen)
        drafted.append(batch.grow(pair.draft, (2, 4, 4), window))
    whole, split = drafted
    assert torch.equal(split.tokens, whole.tokens) and torch.equal(split.parents, whole.parents)
    torch.testing.assert_close(split.log_probs, whole.log_probs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen2 tied"])
def test_a_restricted_head_drafts_the_best_of_its_tokens(tmp_path, name):
    """As the plain layer whose head has no rows but the frequent tokens', each with the target's own number."""
    target, draft = write_pair(tmp_path, name)
    pair = load(target, draft)
    batch = Batch([40, 600], pair.draft)
    vocab_size = pair.draft.draft_vocab_size
    kept = random.Random(0).sample(range(vocab_size), vocab_size // 3)
    with set_current_vllm_config(pair.speculator.vllm_config):
        pair.draft.take_own_head(torch.tensor(kept, device=DEVICE))
    assert pair.draft.draft_vocab_size == len(kept)

    def restricted(*args: Any) -> torch.Tensor:
        log_probs = pair.plain.next_log_probs(*args)
        left_out = torch.ones(vocab_size, dtype=torch.bool)
        left_out[kept] = False
        return log_probs.masked_fill(left_out, float("-inf")).log_softmax(-1)

    plain = SimpleNamespace(self_kv=pair.plain.self_kv, next_log_probs=restricted)
    levels = (2, 4, 4)
    drafted = batch.grow(pair.draft, levels, batch.rebuilt_window(pair.draft))
    for request in range(batch.num_reqs):
        tokens, parents = drafted.tokens[request].tolist(), drafted.parents[request].tolist()
        assert set(tokens) <= set(kept)
        check_tree(plain, batch, request, levels, tokens, parents, drafted.log_probs[request].tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("num_kept", [48, 47, None])
def test_a_head_is_quantised_with_its_draft(tmp_path, num_kept):
    """vLLM quantises the draft's layer while loading it; the head is made later, of rows that are the target's."""
    target, draft = write_pair(tmp_path, "llama")
    pair = load(target, draft, dtype="bfloat16")
    head = pair.draft.lm_head
    vocab_size = pair.draft.draft_vocab_size
    kept = None if num_kept is None else torch.arange(num_kept, device=DEVICE)
    pair.draft.quant_config = OnlineQuantizationConfig(
        QuantizationConfigArgs(linear=QuantSpec(QUANT_KEY_NAMES["fp8_per_channel_static"]))
    )
    with set_current_vllm_config(pair.speculator.vllm_config):
        pair.draft.take_own_head(kept)
    hidden = torch.randn(5, head.weight.shape[1], device=DEVICE).to(torch.bfloat16)

    def check_logits() -> None:
        expected = nn.functional.linear(hidden, head.weight[:vocab_size] if kept is None else head.weight[kept]).float()
        logits = pair.draft.compute_logits(hidden).float()
        # Without the rows that pad the target's vocabulary.
        assert logits.shape == (5, num_kept or vocab_size)
        assert 0 < (logits - expected).norm() / expected.norm() < 0.06

    check_logits()
    weight = pair.draft.lm_head.weight
    assert weight.dtype == torch.float8_e4m3fn
    # It is not the target's head that was changed.
    assert pair.target.lm_head is head and head.weight.dtype == torch.bfloat16

    # New rows, where a CUDA graph reads the old ones.
    head.weight.data.copy_(head.weight.roll(1, 1))
    pair.speculator.proposer.renew()
    check_logits()
    if DEVICE.type == "cuda":
        assert pair.draft.lm_head.weight is weight


@pytest.mark.parametrize("is_quantised", [False, True])
def test_a_head_that_learns_has_the_rows_of_its_tokens(tmp_path, is_quantised):
    target, draft = write_pair(tmp_path, "llama")
    pair = load(target, draft, dtype="bfloat16")
    head = pair.draft.lm_head
    vocab_size = pair.draft.draft_vocab_size
    if is_quantised:
        pair.draft.quant_config = OnlineQuantizationConfig(
            QuantizationConfigArgs(linear=QuantSpec(QUANT_KEY_NAMES["fp8_per_channel_static"]))
        )
    tokens = torch.tensor(random.Random(0).sample(range(vocab_size), 21), device=DEVICE)
    with set_current_vllm_config(pair.speculator.vllm_config):
        pair.draft.take_own_head(tokens[:20].clone(), learns=True)
    hidden = torch.randn(5, head.weight.shape[1], device=DEVICE).to(torch.bfloat16)
    weight, token_ids = pair.draft.lm_head.weight, pair.draft.token_ids

    def check(expected_tokens: torch.Tensor) -> None:
        assert pair.draft.token_ids is token_ids and torch.equal(pair.draft.token_ids, expected_tokens)
        expected = nn.functional.linear(hidden, head.weight[expected_tokens]).float()
        logits = pair.draft.compute_logits(hidden).float()
        assert logits.shape == (5, 20)
        assert (logits - expected).norm() / expected.norm() < (0.06 if is_quantised else 0.01)

    check(tokens[:20])
    # The last of these stays, as where there is nothing better.
    slots = torch.tensor([3, 19, 7], device=DEVICE)
    others = torch.stack([tokens[20], tokens[3], tokens[7]])
    with torch.inference_mode():
        pair.draft.replace_tokens(slots, others)
    tokens = tokens[:20].index_copy(0, slots, others)
    check(tokens)
    # A CUDA graph reads this tensor.
    assert pair.draft.lm_head.weight is weight
    head.weight.data.copy_(head.weight.roll(1, 1))
    pair.speculator.proposer.renew()
    check(tokens)
    slots, others = torch.tensor([0, 1], device=DEVICE), tokens[[1, 0]]
    with torch.inference_mode():
        pair.draft.replace_tokens(slots, others)
    check(tokens.index_copy(0, slots, others))


@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 20), (4, 33)])
def test_each_rank_has_the_rows_of_its_slots(tmp_path, monkeypatch, num_ranks, num_tokens, is_quantised):
    """Whole tiles on each rank, padded behind the last token's: together they are the head that one rank has."""
    pair = load(*write_pair(tmp_path, "llama"), dtype="bfloat16")
    whole, quant_config = pair.draft.lm_head, None
    if is_quantised:
        quant_config = OnlineQuantizationConfig(
            QuantizationConfigArgs(linear=QuantSpec(QUANT_KEY_NAMES["fp8_per_channel_static"]))
        )
    size = whole.weight.shape[0] // num_ranks
    shards: list[Any] = [
        SimpleNamespace(
            weight=whole.weight[rank * size :][:size],
            tp_rank=rank,
            tp_size=num_ranks,
            shard_indices=SimpleNamespace(org_vocab_start_index=rank * size, num_org_elements=size),
        )
        for rank in range(num_ranks)
    ]
    # What ranks reduce together, in one process.
    of_rank = head.rows_of_all_ranks
    monkeypatch.setattr(head, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(head, "tensor_model_parallel_all_reduce", lambda rows: rows)

    def rows_of_all_ranks(_: Any, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([of_rank(shard, tokens) for shard in shards]).sum(0)

    tokens = torch.tensor(random.Random(0).sample(range(64), num_tokens), device=DEVICE)
    copies = []
    with set_current_vllm_config(pair.speculator.vllm_config):
        alone = head.copy_head(whole, tokens, quant_config, writable=True)
        monkeypatch.setattr(head, "rows_of_all_ranks", rows_of_all_ranks)
        for shard in shards:
            copies.append(head.copy_head(shard, tokens, quant_config, writable=True))

    def rows(copied: Any) -> list[torch.Tensor]:
        weight = copied.weight.data
        return [weight.t().float(), copied.weight_scale.data] if is_quantised else [weight]

    def check() -> None:
        for of_one, *of_ranks in zip(rows(alone), *map(rows, copies), strict=True):
            assert all(part.shape[0] % 16 == 0 for part in of_ranks)
            assert torch.equal(torch.cat(of_ranks)[:num_tokens], of_one[:num_tokens])

    assert all(copied.tp_size == num_ranks for copied in copies)
    check()
    slots = torch.tensor([num_tokens - 1, 0, 3, 17], device=DEVICE)
    others = tokens.roll(1)[:4]
    for copied in (alone, *copies):
        head.write_rows(copied, slots, rows_of_all_ranks(None, others))
    check()


@pytest.mark.parametrize("most_reduced", [0, 1 << 20])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_logits_of_the_ranks_are_side_by_side(tmp_path, monkeypatch, num_rows, most_reduced):
    """And those of the padding at the end are left out."""
    pair = load(*write_pair(tmp_path, "llama"))
    with set_current_vllm_config(pair.speculator.vllm_config):
        logits_processor = head.DraftLogits(20)
    whole = torch.randn(num_rows, 24)
    whole[0, 3], whole[0, 17] = float("-inf"), float("nan")
    shards = whole.chunk(3, dim=1)

    def all_reduce(of_rank: torch.Tensor) -> torch.Tensor:
        others = whole.clone()
        others[:, 8:16] = 0
        assert torch.equal(of_rank, torch.where(torch.arange(24) // 8 == 1, whole, 0))
        return of_rank + others

    monkeypatch.setattr(head, "MOST_REDUCED", most_reduced)
    monkeypatch.setattr(head, "get_tensor_model_parallel_world_size", lambda: 3)
    monkeypatch.setattr(head, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(head, "tensor_model_parallel_all_reduce", all_reduce)
    monkeypatch.setattr(
        "vllm.model_executor.layers.logits_processor.tensor_model_parallel_all_gather",
        lambda logits: torch.cat(shards, 1),
    )
    monkeypatch.setattr(logits_processor, "use_all_gather", True)
    applied = SimpleNamespace(apply=lambda layer, hidden, bias: shards[1])
    layer: Any = SimpleNamespace(tp_size=3, quant_method=applied)
    torch.testing.assert_close(
        logits_processor(layer, torch.zeros(num_rows, 8)), whole[:, :20], rtol=0, atol=0, equal_nan=True
    )


def test_every_rank_copies_of_a_head_that_is_not_divided(tmp_path):
    """Such as vLLM's with `disable_tp`, whatever the rank."""
    pair = load(*write_pair(tmp_path, "llama"), dtype="bfloat16")
    whole: Any = SimpleNamespace(weight=pair.draft.lm_head.weight, tp_rank=0, tp_size=1)
    tokens = torch.tensor(random.Random(0).sample(range(64), 20), device=DEVICE)
    with set_current_vllm_config(pair.speculator.vllm_config), pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.layers.linear.get_tensor_model_parallel_rank", lambda: 1)
        copied = head.copy_head(whole, tokens, None, writable=True)
    assert (copied.tp_rank, copied.tp_size) == (0, 1)
    assert torch.equal(copied.weight[: len(tokens)], whole.weight[tokens])


def test_the_draft_runs_vllms_kernels_where_the_target_is_left_to_the_compiler(tmp_path):
    pair = load(*write_pair(tmp_path, "llama"), compilation_config={"custom_ops": ["none"]})
    of_target, of_draft = pair.target.model.layers[0].mlp.act_fn, pair.draft.mlp.act_fn
    assert of_target._forward_method == of_target.forward_native
    assert of_draft._forward_method in (of_draft.forward_cpu, of_draft.forward_cuda)
    # What the target is compiled with is its own.
    assert pair.speculator.vllm_config.compilation_config.custom_ops == ["none"]


def test_the_draft_is_loaded_in_its_own_way(tmp_path):
    target, draft = write_pair(tmp_path, "llama")
    drafting: Any = {"draft_load_config": {"load_format": "safetensors"}}
    weights = load_file(draft / "model.safetensors")
    norm = next(weight for name, weight in weights.items() if "input_layernorm" in name)
    for settings, is_loaded in (({}, False), ({"drafting": drafting}, True)):
        pair = load(target, draft, load_format="dummy", **settings)
        assert torch.equal(pair.draft.input_layernorm.weight.cpu(), norm) is is_loaded


def test_drafts_up_to_the_last_position(tmp_path):
    """At the end of the context the deeper levels are beyond what the rotary embedding knows, and are cut off later."""
    target, draft = write_pair(tmp_path, "llama", num_key_value_heads=1, max_position_embeddings=MAX_MODEL_LEN)
    pair = load(target, draft)
    batch = Batch([MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1, 40], pair.draft)
    levels = (2, 4, 4, 4)
    # Not every rotary kernel says so when a position is out of its range.
    last_positions = []
    pair.draft.register_forward_pre_hook(lambda _, args: last_positions.append(int(args[1].max())))
    drafted = batch.grow(pair.draft, levels, batch.rebuilt_window(pair.draft))
    assert max(last_positions) == MAX_MODEL_LEN - 1
    for request, depth in enumerate((2, 1, 4)):
        shown = levels[:depth]
        columns = (drafted.tokens, drafted.parents, drafted.log_probs)
        check_tree(pair.plain, batch, request, shown, *(column[request, : sum(shown)].tolist() for column in columns))
    assert int(drafted.tokens.min()) >= 0
    assert int(drafted.tokens.max()) < 64


def live_window(window: DraftWindow, slot: int, root_position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the last 512 tokens before the root, in the order of the text."""
    entries = torch.arange(max(0, root_position - WINDOW), root_position) % WINDOW
    kv = window.kv[slot].cpu()[entries]
    return kv[:, 0], kv[:, 1]


def test_window_holds_the_last_tokens_however_it_came_about(pairs):
    """Rebuilt, appended to step by step, or rebuilt in place of another request's: the plain layer's K and V."""
    pair = pairs("llama")
    # More requests than are rebuilt at a time.
    lengths = [1, 2, 5, 60, 300, 507, 509, 510, 512, 700]
    assert len(lengths) > MAX_REBUILD_REQS
    max_new = 6
    batch = Batch([length + 5 * max_new for length in lengths], pair.draft)
    twins = [pair.plain.self_kv(history) for history in batch.histories]

    def check(window: DraftWindow, root_positions: torch.Tensor) -> None:
        for slot, root_position, (keys, values) in zip(batch.slots, root_positions.tolist(), twins, strict=True):
            actual_keys, actual_values = live_window(window, slot, root_position)
            live = slice(max(0, root_position - WINDOW), root_position)
            torch.testing.assert_close(actual_keys, keys[live].float(), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(actual_values, values[live].float(), rtol=1e-5, atol=1e-4)
        others = sorted(set(range(NUM_SLOTS)) - set(batch.slots))
        assert others and bool(window.kv[others].isnan().all())

    source = random.Random(0)
    root_positions = torch.tensor(lengths, device=DEVICE)
    with torch.inference_mode():
        appended = batch.new_window(pair.draft)
        appended.rebuild(batch.token_ids, batch.idx_mapping, root_positions, max(lengths))
        check(appended, root_positions)
        for _ in range(5):
            num_new = [source.randint(1, max_new) for _ in lengths]
            num_new[source.randrange(len(lengths))] = max_new
            root_positions = root_positions + torch.tensor(num_new, device=DEVICE)
            # vLLM counts sampled tokens in int32.
            settled = torch.tensor(num_new, dtype=torch.int32, device=DEVICE)
            appended.append(batch.token_ids, batch.idx_mapping, root_positions, settled, max_new)
            check(appended, root_positions)

        rebuilt = batch.new_window(pair.draft)
        # What an earlier request left in the slots.
        rebuilt.kv[batch.idx_mapping] = 1e4
        rebuilt.rebuild(batch.token_ids, batch.idx_mapping, root_positions, int(root_positions.max()))
        check(rebuilt, root_positions)
        for slot, root_position in zip(batch.slots, root_positions.tolist(), strict=True):
            for one, other in zip(
                live_window(appended, slot, root_position), live_window(rebuilt, slot, root_position), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotates_in_kernels", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "granite"])
def test_settled_tokens_run_with_the_roots(pairs, monkeypatch, name, rotates_in_kernels):
    """The windows and trees of a pass of their own before the draft, with as many passes as the draft has levels."""
    draft, levels, max_new = pairs(name).draft, (2, 4, 3), 4
    if not rotates_in_kernels:
        monkeypatch.setattr(GlideForCausalLM, "rotary_table", None)
    # The fourth only pads the batch: nothing of it is written, however many tokens it seems to have.
    batch, num_new = Batch([1, 60, 514, 300, 700], draft), [1, 4, 2, 4, 3]
    apart = batch.new_window(draft)
    settled = torch.tensor(num_new, dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        apart.rebuild(batch.token_ids, batch.idx_mapping, batch.root_positions - settled, 700)
        batch.idx_mapping[3], batch.root_tokens[3], batch.root_positions[3] = -1, 0, 0
        together = batch.new_window(draft)
        together.kv.copy_(apart.kv)
        apart.append(batch.token_ids, batch.idx_mapping, batch.root_positions, settled, max_new)
    assert not torch.equal(apart.kv.nan_to_num(), together.kv.nan_to_num())
    expected = batch.grow(draft, levels, apart)

    rows: list[int] = []
    hook = draft.self_attn.qkv_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    drafted = batch.grow(draft, levels, together, num_new)
    hook.remove()
    assert rows == [len(num_new) * (1 + max_new), *(len(num_new) * width for width in levels[:-1])]
    torch.testing.assert_close(together.kv, apart.kv, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(drafted.tokens, expected.tokens) and torch.equal(drafted.parents, expected.parents)
    torch.testing.assert_close(drafted.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


def test_shares_the_modules_of_the_target(pairs):
    for name in ("llama", "qwen2 tied"):
        draft, target = pairs(name).draft, pairs(name).target
        assert draft.embed_tokens is target.model.embed_tokens
        assert draft.lm_head is target.lm_head
        assert draft.rotary_emb is target.model.layers[-1].self_attn.rotary_emb
        assert draft.logits_processor is target.logits_processor
        assert draft.embed_tokens.weight.data_ptr() == target.model.embed_tokens.weight.data_ptr() != 0
        # The layer's own: qkv and o, q and o, gate_up and down, three norms, and biases for qkv and q.
        shared = {id(parameter) for parameter in target.parameters()}
        own = {name for name, parameter in draft.named_parameters() if id(parameter) not in shared}
        assert own == {
            *(f"self_attn.{name}" for name in ("qkv_proj.weight", "qkv_proj.bias", "o_proj.weight")),
            *(f"cross_attn.{name}" for name in ("q_proj.weight", "q_proj.bias", "o_proj.weight")),
            *(f"mlp.{name}" for name in ("gate_up_proj.weight", "down_proj.weight")),
            *(f"{norm}layernorm.weight" for norm in ("input_", "post_self_attention_", "post_cross_attention_")),
        }


def check_draft(pair: Pair) -> None:
    batch = Batch([90], pair.draft)
    levels = (2, 4)
    drafted = batch.grow(pair.draft, levels, batch.rebuilt_window(pair.draft))
    columns = (drafted.tokens, drafted.parents, drafted.log_probs)
    check_tree(pair.plain, batch, 0, levels, *(column[0].tolist() for column in columns))


def test_rotates_as_the_target_does(tmp_path):
    """The rotary embedding is the target's, whatever the draft's own config.json says."""
    target, draft = write_pair(tmp_path, "llama tied linear")
    edit_config(draft, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    check_draft(load(target, draft))


@pytest.mark.parametrize(("family", "has_table"), [("phi3", False), ("ministral3", True)])
def test_queries_alone_are_rotated_as_with_keys(tmp_path, family, has_table):
    """The cross-attention has queries only; longrope's module would not take them."""
    target = write_target(tmp_path / "target", family)
    speculator, target_model = load_models(target, write_draft(tmp_path / "draft", target))
    draft = speculator.model
    # Attention rotates by the table of yarn's module, but not of longrope's.
    assert (draft.rotary_table is not None) == has_table
    head_size = draft.self_attn.head_size
    positions = torch.tensor([0, 3, 200, 900], device=DEVICE)
    query, key = torch.randn(2, 4, 4 * head_size, device=DEVICE)
    expected, expected_key = target_model.model.layers[-1].self_attn.rotary_emb(positions, query.clone(), key.clone())
    alone, nothing = draft.rotate(positions, query.clone(), None)
    assert nothing is None
    torch.testing.assert_close(alone.view_as(query), expected.view_as(query))
    # It is a rotation: not what came in, unless at position 0 or by a constant factor.
    assert not torch.allclose(alone[1:].view_as(query[1:]), query[1:], atol=0.1)
    both = draft.rotate(positions, query.clone(), key.clone())
    torch.testing.assert_close(torch.stack(both).view(2, 4, -1), torch.stack((expected, expected_key)).view(2, 4, -1))


@pytest.mark.parametrize(
    ("family", "file_name", "prefix", "dtype", "with_biases"),
    [
        ("llama", "model.safetensors", "glide.", torch.bfloat16, True),
        ("llama", "pytorch_model.bin", "model.", torch.float32, True),
        ("llama", "pytorch_model.bin", "", torch.bfloat16, False),
        ("qwen2", "model.safetensors", "model.", torch.float16, False),
        ("qwen2", "pytorch_model.bin", "glide.", torch.bfloat16, True),
    ],
)
def test_loads_every_form_of_checkpoint(tmp_path, family, file_name, prefix, dtype, with_biases):
    target, draft = write_pair(tmp_path, family)
    weights = {name: weight.to(dtype) for name, weight in load_file(draft / "model.safetensors").items()}
    stored = {prefix + name: weight for name, weight in weights.items() if with_biases or not name.endswith("bias")}
    (draft / "model.safetensors").unlink()
    if file_name.endswith("bin"):
        torch.save(stored, draft / file_name)
    else:
        save_file(stored, draft / file_name)

    expected = {name: weight.float() for name, weight in weights.items()}
    for name in expected.keys() - {name.removeprefix(prefix) for name in stored}:
        expected[name] = torch.zeros_like(expected[name])
    check_draft(load(target, draft, weights=expected))


@dataclass
class Scheduled:
    """A request's part in a step of the model runner."""

    request: int
    computed_before: int
    computed: int  # afterwards; the position of the root, unless the prompt goes on
    prompt_len: int

    @property
    def is_prefilling(self) -> bool:
        return self.computed_before < self.prompt_len

    @property
    def num_sampled(self) -> int:
        if self.is_prefilling:
            return int(self.computed == self.prompt_len)
        return self.computed - self.computed_before


def proposer_of(speculator: TreeSpeculator) -> GlideProposer:
    assert isinstance(speculator.proposer, GlideProposer)
    return speculator.proposer


def propose(speculator: TreeSpeculator, batch: Batch, step: list[Scheduled]) -> torch.Tensor:
    """Calls the speculator as vLLM's model runner does after a step."""
    slots = [batch.slots[each.request] for each in step]
    # Of the text, what has been emitted; the rest is not known yet.
    token_ids = torch.full_like(batch.token_ids, 10**6)
    num_computed = torch.zeros(token_ids.shape[0], dtype=torch.int32, device=DEVICE)
    last_sampled = torch.full((token_ids.shape[0], 1), 10**6, dtype=torch.int64, device=DEVICE)
    for slot, each in zip(slots, step, strict=True):
        num_known = max(each.prompt_len, each.computed + 1)
        token_ids[slot, :num_known] = batch.token_ids[slot, :num_known]
        num_computed[slot] = each.computed
        last_sampled[slot] = batch.token_ids[slot, each.computed]
    request_state = speculator.req_states
    request_state.all_token_ids = SimpleNamespace(gpu=token_ids)  # type: ignore[assignment]
    request_state.last_sampled_tokens = last_sampled
    request_state.num_computed_tokens = SimpleNamespace(gpu=num_computed)  # type: ignore[assignment]
    block_table = batch.block_table[[each.request for each in step]]
    speculator.block_tables = SimpleNamespace(input_block_tables=[block_table])  # type: ignore[assignment]
    speculator.block_table = block_table.new_zeros(NUM_SLOTS, block_table.shape[1])
    layers = speculator.vllm_config.compilation_config.static_forward_context
    layers[proposer_of(speculator).target_layer_name].kv_cache = batch.kv_cache

    prompt_lens = np.array([each.prompt_len for each in step], dtype=np.int32)
    before = np.array([each.computed_before for each in step], dtype=np.int32)
    # A decoding request has its whole tree in the step, most of which is rejected.
    num_scheduled = np.array(
        [
            each.computed - each.computed_before if each.is_prefilling else 1 + speculator.num_speculative_steps
            for each in step
        ],
        dtype=np.int32,
    )
    num_sampled = torch.tensor([each.num_sampled for each in step], dtype=torch.int32, device=DEVICE)
    input_batch = SimpleNamespace(
        num_reqs=len(step),
        idx_mapping=torch.tensor(slots, device=DEVICE),
        idx_mapping_np=np.array(slots),
        num_scheduled_tokens=num_scheduled,
        query_start_loc_np=np.concatenate(([0], num_scheduled.cumsum())),
        num_computed_prefill_tokens_np=np.minimum(before, prompt_lens),
        prefill_len_np=prompt_lens,
        is_prefilling_np=before < prompt_lens,
        has_structured_output_reqs=False,
        seq_lens=torch.from_numpy(before + num_scheduled).to(DEVICE),
        seq_lens_cpu_upper_bound=torch.from_numpy(before + num_scheduled),
    )
    unused = torch.zeros(0, device=DEVICE)
    return speculator.propose(
        input_batch,
        attn_metadata=None,
        slot_mappings={proposer_of(speculator).target_layer_name: unused},
        last_hidden_states=unused,
        aux_hidden_states=None,
        num_sampled=num_sampled,
        num_rejected=torch.from_numpy(num_scheduled).to(DEVICE) - num_sampled,
        last_sampled=last_sampled,
        next_prefill_tokens=unused,
        temperature=torch.zeros(speculator.max_num_reqs, device=DEVICE),
        seeds=torch.zeros(speculator.max_num_reqs, dtype=torch.int64, device=DEVICE),
    )


def attended(root_position: int, budget: int | None) -> list[int]:
    """Positions that the cross-attention sees below the root: all, or the blocks with one of the first 32 or last
    `budget` tokens."""
    positions = range(root_position)
    if budget is None:
        return list(positions)
    blocks = {place // BLOCK_SIZE for place in positions if place < 32 or place >= root_position - budget}
    return [place for place in positions if place // BLOCK_SIZE in blocks]


@pytest.mark.parametrize("budget", [None, 100])
def test_proposes_from_step_to_step(tmp_path, budget):
    """Prompts in chunks, prompts that end and requests that settle a few tokens a step, in one batch."""
    levels = (2, 4, 4)
    target, draft = write_pair(tmp_path, "llama", num_key_value_heads=1)
    pair = load(target, draft, levels, drafting={"cross_attention_budget": budget})
    speculator = pair.speculator
    assert ("32 first and 100 last tokens" in proposer_of(speculator).describe()) == (budget == 100)
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE))])
    proposer_of(speculator).set_cache(cache)  # type: ignore[arg-type]
    batch = Batch([26, 605, 535], pair.draft)
    proposer_of(speculator).window.kv.fill_(torch.nan)
    # A step settles at most one token more than the tree is deep. The order of the requests is of no importance, though
    # vLLM puts those first that decode.
    steps = [
        [Scheduled(1, 400, 600, 600), Scheduled(2, 0, 64, 530), Scheduled(0, 0, 20, 20)],
        [Scheduled(2, 64, 300, 530), Scheduled(0, 20, 24, 20), Scheduled(1, 600, 601, 600)],
        [Scheduled(0, 24, 25, 20), Scheduled(1, 601, 603, 600), Scheduled(2, 300, 530, 530)],
        [Scheduled(2, 530, 534, 530), Scheduled(1, 603, 604, 600)],
    ]
    for step in steps:
        proposed = propose(speculator, batch, step).tolist()
        for tokens, each in zip(proposed, step, strict=True):
            assert len(tokens) == sum(levels)
            if each.computed < each.prompt_len:
                assert set(tokens) == {0}
                continue
            slot, root_position = batch.slots[each.request], each.computed
            parent_rows, depths = (
                speculator.tree_state.parent_rows[slot].tolist(),
                speculator.tree_state.depths[slot].tolist(),
            )
            rows = sorted(range(1, 1 + sum(levels)), key=lambda row: depths[row])
            number = {row: index for index, row in enumerate(rows)} | {0: -1}
            seen = SimpleNamespace(
                histories=[batch.histories[each.request][:root_position]],
                roots=[batch.histories[each.request][root_position]],
                target_kv=[batch.target_kv[each.request][:root_position]],
            )
            log_probs = check_tree(
                pair.plain,
                seen,  # type: ignore[arg-type]
                0,
                levels,
                [tokens[row - 1] for row in rows],
                [number[parent_rows[row]] for row in rows],
                part=attended(root_position, budget),
            )
            listed = [log_probs[number[row]] for row in range(1, 1 + sum(levels))]
            assert all(later <= earlier + TOLERANCE for earlier, later in itertools.pairwise(listed))


def test_requests_that_pad_a_batch_change_nothing(tmp_path):
    """A CUDA graph drafts for more requests than there are; those that pad the batch have slot -1."""
    target, draft = write_pair(tmp_path, "llama", num_key_value_heads=1)
    levels = (2, 4, 4)
    speculator = load(target, draft, levels).speculator
    batch = Batch([26, 605], speculator.model)
    # A token more than the prompt, which becomes the root.
    step = [Scheduled(0, 0, 25, 25), Scheduled(1, 0, 604, 604)]
    tokens = propose(speculator, batch, step)
    state = {name: tensor.clone() for name, tensor in vars(speculator.tree_state).items()}
    window = proposer_of(speculator).window.kv.clone()

    speculator.idx_mapping[2:4] = -1
    speculator.num_sampled[2:4] = 3
    speculator.draft_tokens.fill_(-7)
    speculator._draft(4, sum(levels), MAX_MODEL_LEN)
    assert torch.equal(speculator.draft_tokens[:2], tokens)
    assert (speculator.draft_tokens[2:] == -7).all()
    for name, tensor in state.items():
        assert torch.equal(getattr(speculator.tree_state, name), tensor), name
    torch.testing.assert_close(proposer_of(speculator).window.kv, window)


def test_a_draft_for_fewer_nodes_lists_the_same_ones(tmp_path):
    """Narrower levels are enough for the likeliest nodes, as `TreeShape.for_best` says."""
    levels = (2, 4, 4, 4)
    target, draft = write_pair(tmp_path, "llama", num_key_value_heads=1)
    speculator = load(target, draft, levels).speculator
    batch = Batch([26, 605, 61], speculator.model)
    step = [Scheduled(request, 0, length, length) for request, length in enumerate((25, 604, 60))]
    tokens = propose(speculator, batch, step)
    parent_rows, depths, masks = (
        tensor[batch.slots].clone()
        for tensor in (
            speculator.tree_state.parent_rows,
            speculator.tree_state.depths,
            speculator.tree_state.ancestor_masks,
        )
    )
    for num_nodes in (1, 2, 3, 5, 9):
        speculator._draft(3, num_nodes, MAX_MODEL_LEN)
        rows = slice(1 + num_nodes)
        assert torch.equal(speculator.draft_tokens[:3, :num_nodes], tokens[:, :num_nodes])
        assert torch.equal(speculator.tree_state.parent_rows[batch.slots, rows], parent_rows[:, rows])
        assert torch.equal(speculator.tree_state.depths[batch.slots, rows], depths[:, rows])
        assert torch.equal(speculator.tree_state.ancestor_masks[batch.slots, rows], masks[:, rows])


def test_a_new_request_in_a_slot_has_no_nodes_until_it_is_drafted_for(tmp_path):
    """Nothing of the slot's last request can be accepted."""
    target, draft = write_pair(tmp_path, "qwen2 tied")
    speculator = load(target, draft, (2, 4, 4)).speculator
    tree = speculator.tree_state
    # A token more than the prompt, which becomes the root.
    batch = Batch([41, 62, 34], speculator.model)
    # vLLM's runner tells this class of new requests.
    model_state = TreeModelState.__new__(TreeModelState)
    model_state.__dict__.update(tree_state=tree, device=DEVICE, added_log_cutoffs={})
    model_state.add_request_to_proposer = speculator.proposer.add_request
    model_state.rope_state = model_state.prompt_embeds_state = None

    def start(*requests: int) -> None:
        for request in requests:
            new = SimpleNamespace(sampling_params=SamplingParams(temperature=0.0))
            model_state.add_request(batch.slots[request], new)  # type: ignore[arg-type]
        model_state.apply_staged_writes()

    def proposed() -> list[tuple[list[int], list[int]]]:
        prompts = [Scheduled(request, 0, length, length) for request, length in enumerate((40, 61, 33))]
        tokens = propose(speculator, batch, prompts).tolist()
        return list(zip(tokens, tree.parent_rows[batch.slots].tolist(), strict=True))

    start(0, 1, 2)
    trees = proposed()
    assert all(min(parent_rows[1:]) == 0 for _, parent_rows in trees)
    start(1)
    parent_rows = tree.parent_rows[batch.slots].tolist()
    assert parent_rows == [trees[0][1], [-1] * 11, trees[2][1]]
    assert proposed() == trees
