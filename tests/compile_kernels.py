# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for an NVIDIA GPU, on a machine that has none: `python -m tests.compile_kernels`.

Triton's interpreter runs what no compiler would take: types that differ between two branches, operations that a GPU
does not have. Triton's compiler and the assembler that comes with it need no GPU, only to be told for which to compile.
So the kernels' own Python wrappers are called here as they are on a GPU, and each launch is compiled instead.
Prints the kernels' names.
"""

# ruff: noqa: E402 (what is imported depends on what is set up before)

import os
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from vllm_longspec.interpreter import InterpreterDriver

# vLLM puts placeholders in the place of Triton where not exactly one driver is active when this is first imported.
if not torch.cuda.is_available():
    backends["cpu"] = Backend(compiler=None, driver=InterpreterDriver)
import vllm.triton_utils

backends.pop("cpu", None)
assert vllm.triton_utils.HAS_TRITON

from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

from vllm_longspec.attention.cache_scales import CacheScales
from vllm_longspec.attention.partial import PartialTables
from vllm_longspec.attention.prefix import prefix_attention
from vllm_longspec.attention.tree import tree_attention
from vllm_longspec.copying.lookup import find_copies
from vllm_longspec.copying.trust import CopyTrust
from vllm_longspec.options import PartialAttention
from vllm_longspec.proposers.glide.attention_splits import merge_splits
from vllm_longspec.proposers.glide.embedding import embed_and_normalise
from vllm_longspec.proposers.glide.fp8_inputs import activate, add, normalise
from vllm_longspec.proposers.glide.growing_trees import GrowingTrees
from vllm_longspec.proposers.glide.learned_head import count_tokens
from vllm_longspec.proposers.glide.rotation import RotaryTable
from vllm_longspec.proposers.glide.window import DraftWindow, list_settled
from vllm_longspec.proposers.glide.window_attention import window_attention, write_window
from vllm_longspec.proposers.interface import Roots
from vllm_longspec.proposers.magicdec import block_scores as scores_module
from vllm_longspec.proposers.magicdec.block_scores import Refresh, block_scores
from vllm_longspec.proposers.magicdec.choose_blocks import choose_blocks, shortened_tables
from vllm_longspec.proposers.magicdec.inputs import DraftInputs
from vllm_longspec.runner.roots import read_roots
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.best_children import best_children
from vllm_longspec.tree.compact import KVCacheTable, compact_kv_caches
from vllm_longspec.tree.coupling import LevelNoise, TargetNoise
from vllm_longspec.tree.history.bad_words import apply_bad_words
from vllm_longspec.tree.history.paths import gather_paths
from vllm_longspec.tree.history.penalties import apply_penalties
from vllm_longspec.tree.history.thinking_budget import apply_thinking_budget
from vllm_longspec.tree.layout import lay_out_trees
from vllm_longspec.tree.merge import merge_path
from vllm_longspec.tree.order import order_tree
from vllm_longspec.tree.sample import _rows_of_emitted
from vllm_longspec.tree.shape import TreeShape
from vllm_longspec.tree.state import TreeState
from vllm_longspec.tree.synthetic import list_a_path_early, walk_synthetically
from vllm_longspec.tree.walk import walk_tree

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes of a program
compiled: set[str] = set()


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands where Triton compiles and launches a kernel, and specialises as Triton does.

    Integers that are 1 become constants. The compiler is told of those that 16 divides, and that addresses are among
    them: without that it would not use wide loads.
    """
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        is_integer = type(value) is int and not parameter.do_not_specialize
        is_one = is_integer and value == 1
        if parameter.is_constexpr or is_one or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (is_integer and value % 16 == 0):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options)
    assert binary.asm["cubin"]
    # A kernel that needs more compiles, and cannot be launched. Scores do with 69 rows, of which no chain has as many
    # that pays.
    is_small = binary.metadata.shared <= SHARED_MEMORY or kernel.__name__ == "_block_scores_kernel"
    assert is_small, f"{kernel.__name__}: {binary.metadata.shared} bytes of shared memory"
    compiled.add(kernel.__name__)


def compile_tree_kernels(num_nodes: int) -> None:
    """Everything that does not depend on the model's data type."""
    num_reqs, max_depth = 3, 5
    tree = TreeState.allocate(num_reqs, num_nodes, torch.device("cpu"))
    batch = TreeBatch.allocate(tree, max_depth)
    slots = torch.arange(num_reqs)
    starts = torch.zeros(num_reqs + 1, dtype=torch.int32)
    tokens = torch.zeros(num_reqs, 68, dtype=torch.int64)
    order_tree(
        tokens,
        tokens.float(),
        tokens.int(),
        slots,
        tokens[:, :num_nodes],
        tree.parent_rows,
        tree.depths,
        tree.ancestor_masks,
        max_depth,
    )
    lay_out_trees(tree, batch, num_reqs, slots, starts, starts[1:], tokens.flatten().int(), tokens.flatten())
    emitted = torch.zeros(num_reqs, max_depth + 1, dtype=torch.int64)
    num_emitted = torch.zeros(num_reqs, dtype=torch.int32)
    for row_tokens in (tokens.flatten(), tokens.flatten().int()):
        walk_tree(
            tokens.flatten(),
            row_tokens,
            starts,
            slots,
            tree.parent_rows,
            emitted,
            num_emitted,
            batch.path_rows,
            max_depth,
        )
        walk_synthetically(
            torch.zeros(max_depth),
            slots,
            tokens.flatten(),
            tree.depths,
            tokens.flatten(),
            row_tokens,
            starts,
            slots,
            tree.parent_rows,
            emitted,
            num_emitted,
            batch.path_rows,
        )
    _rows_of_emitted(num_reqs, starts, batch.path_rows, emitted, num_emitted)


def compile_history_kernels(vocab_size: int, max_depth: int, mark_lens: tuple[int, int, int]) -> None:
    num_reqs, num_rows = 3, 8
    tree = TreeState.allocate(num_reqs, num_rows - 1, torch.device("cpu"))
    counts, per_req = torch.zeros(num_reqs, vocab_size, dtype=torch.int32), torch.zeros(num_reqs, dtype=torch.int32)
    logits = torch.zeros(num_reqs * num_rows, vocab_size)
    for slots in (torch.zeros(len(logits), dtype=torch.int32), torch.zeros(len(logits), dtype=torch.int64)):
        context: Any = SimpleNamespace(
            expanded_idx_mapping=slots, expanded_local_pos=slots.int(), input_ids=slots.int()
        )
        paths = gather_paths(context, tree, max_depth)
        penalty = per_req.float()
        apply_penalties(logits, slots, paths, penalty, penalty, penalty, counts[:, : vocab_size // 32 + 1], counts)
        apply_bad_words(logits, slots, paths, counts, counts, per_req, counts, per_req, per_req, 2)
        marks = [torch.zeros(length, dtype=torch.int32) for length in mark_lens]
        apply_thinking_budget(logits, slots, paths, per_req, counts, per_req, per_req, per_req, *marks)


def compile_attention_kernels(dtype: torch.dtype, head_size: int) -> None:
    num_reqs, width, num_heads, num_kv_heads, block_size = 2, 16, 8, 2, 16
    num_tokens = num_reqs * width
    query = torch.zeros(num_tokens, num_heads, head_size, dtype=dtype)
    kv_cache = torch.zeros(4, num_kv_heads, block_size, 2 * head_size, dtype=dtype)
    block_table = torch.zeros(num_reqs, 4, dtype=torch.int32)
    lengths = torch.zeros(num_reqs, dtype=torch.int32)
    starts = torch.zeros(num_reqs + 1, dtype=torch.int32)
    masks = torch.zeros(num_reqs, width, 1, dtype=torch.int32)
    slots = torch.zeros(num_tokens, dtype=torch.int64)
    output, lse = torch.empty_like(query), torch.zeros(num_heads, num_tokens)
    prefix_attention(query, kv_cache, block_table, lengths, starts, width, 0.1, output, lse)
    tree_attention(query, kv_cache, slots, starts, masks, width, 0.1, lse, output)
    compact_kv_caches(KVCacheTable([kv_cache] * 2), block_table, lengths, masks[:, :6, 0], lengths, 5)
    stored = kv_cache.to(torch.uint8)
    # One scale for all heads, with a quantised query; and a scale for each, without.
    one, each = torch.ones(()), torch.ones(num_kv_heads)
    for rows, scales in ((query.to(torch.float8_e4m3fn), CacheScales(one, one, one)), (query, CacheScales(each, each))):
        prefix_attention(rows, stored, block_table, lengths, starts, width, 0.1, output, lse, scales)
        tree_attention(rows, stored, slots, starts, masks, width, 0.1, lse, output, scales)
        compile_score_kernel(rows, stored, block_table, lengths, starts, lse, scales)
    compile_score_kernel(query, kv_cache, block_table, lengths, starts, lse, None)

    window_kv = torch.zeros(num_reqs, 512, 2, num_kv_heads, head_size, dtype=dtype)
    node_kv = torch.zeros(num_reqs, width, 2, num_kv_heads, head_size, dtype=dtype)
    level, key = query.view(num_reqs, width, num_heads, head_size), query[:, :num_kv_heads]
    level_key, requests = level[:, :, :num_kv_heads], slots[:num_reqs]
    # Each channel of a head rotated, half of them, and none.
    for table in (
        RotaryTable(torch.zeros(100, head_size, dtype=dtype), True),
        RotaryTable(torch.zeros(100, head_size // 2, dtype=dtype), False),
        None,
    ):
        for num_splits in (1, 4):
            splits = window_attention(
                level,
                level_key,
                level_key,
                window_kv,
                requests,
                requests,
                slots.view(num_reqs, width),
                table,
                node_kv,
                masks,
                0,
                0,
                0.1,
                num_splits=num_splits,
            )
        write_window(window_kv, key, key, slots, slots, table)
    unquantised: Any = None
    quantised: Any = SimpleNamespace(_input_quant_key=kFp8DynamicTokenSym)
    for layer in (unquantised, quantised):
        merge_splits(layer, splits)


def compile_score_kernel(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    lse: torch.Tensor,
    scales: CacheScales | None,
) -> None:
    refresh = Refresh(torch.zeros(len(lengths), dtype=torch.int64), lengths, lengths, 4, 1, 100, 45)
    block_size, scores = kv_cache.shape[2], torch.zeros(len(lengths), 4)
    # One row tile and several; a block and more blocks a unit.
    for max_query_len, unit_blocks in ((5, 1), (69, 2)):
        block_scores(
            query,
            kv_cache,
            block_table,
            lengths,
            starts,
            max_query_len,
            0.1,
            lse,
            refresh,
            unit_blocks * block_size,
            scores,
            scales,
        )


def compile_selection_kernels(max_num_units: int, unit_blocks: int, num_chosen: int) -> None:
    num_reqs, num_layers = 2, 3
    lengths = torch.zeros(num_reqs, dtype=torch.int32)
    indices = torch.zeros(num_reqs, dtype=torch.int64)
    scores = torch.zeros(num_reqs, max_num_units)
    blocks = torch.zeros(num_layers, num_reqs, num_chosen, dtype=torch.int32)
    counts = blocks[:, :, 0].contiguous()
    for phase, is_last in ((0, False), (1, True)):
        refresh = Refresh(indices, lengths, lengths, 4, phase, 100, 45)
        choose_blocks(scores, lengths, refresh, 2, 64, 16, unit_blocks, blocks[phase], counts[phase], is_last)
    tables = torch.zeros(num_layers, num_reqs, num_chosen + 7, dtype=torch.int32)
    shortened_tables(blocks[0], indices, indices, 2, 16 * num_chosen + 64, 16, blocks, counts, counts, 45, tables)


def compile_draft_kernels(dtype: torch.dtype) -> None:
    num_reqs, width = 2, 16
    for vocab_size, num_children in ((32000, 16), (100, 100)):
        logits = torch.zeros(num_reqs * width, vocab_size, dtype=dtype)
        best_children(logits, torch.zeros(num_reqs, width), num_children)
        slots = torch.zeros(num_reqs, dtype=torch.int64)
        for use_fp64, token_ids in ((False, None), (True, torch.zeros(vocab_size, dtype=torch.int64))):
            level = LevelNoise(TargetNoise(torch.zeros(4), slots, torch.zeros(4), use_fp64), slots, slots, 0)
            best_children(logits, torch.zeros(num_reqs, width), num_children, level, token_ids)
    unused: Any = None
    linear: Any = SimpleNamespace(_input_quant_key=kFp8DynamicTokenSym)
    for size in (704, 27648):
        activate(unused, linear, torch.zeros(width, 2 * size, dtype=dtype))
    for hidden_size in (64, 3584, 8192):
        hidden = torch.zeros(width, hidden_size, dtype=dtype)
        add(linear, hidden, 0.22, hidden)
        norm: Any = SimpleNamespace(weight=hidden[0], variance_epsilon=1e-6)
        for layer in (linear, unused):
            embed_and_normalise(torch.zeros(width, dtype=torch.int64), hidden, 12.0, norm, layer)
        for weight in (hidden[0], hidden[0].float()):
            norm.weight = weight
            for residual in (None, hidden):
                normalise(norm, linear, hidden, residual)


def compile_window_kernels(max_new: int) -> None:
    slots = torch.zeros(2, dtype=torch.int64)
    counts = torch.zeros(4, dtype=torch.int32)
    roots = read_roots(slots, counts, torch.zeros(4, 1, dtype=torch.int64))

    def window_kv(tokens: torch.Tensor, positions: torch.Tensor) -> tuple[Any, ...]:
        return (*torch.zeros(2, tokens.shape[0], 2, 64), None)

    model: Any = SimpleNamespace(self_attn=SimpleNamespace(num_kv_heads=2, head_size=64), window_kv=window_kv)
    window = DraftWindow(4, model, torch.float32, torch.device("cpu"))
    token_ids = torch.zeros(4, 100, dtype=torch.int32)
    window.append(token_ids, slots, roots.positions, counts[:2], max_new)
    list_settled(token_ids, slots, roots.positions, counts[:2], max_new, roots.tokens, max_position=99)
    count_tokens(torch.zeros(50, dtype=torch.int64), token_ids, slots, roots.positions, counts[:2], max_new)


def compile_copy_kernels(copy_length: int, max_model_len: int, num_nodes: int) -> None:
    slots = torch.zeros(2, dtype=torch.int64)
    token_ids = torch.zeros(4, max_model_len, dtype=torch.int32)
    copied, match_lens = find_copies(token_ids, slots, slots, max_model_len, copy_length)
    scores = CopyTrust(4, copy_length, torch.device("cpu")).score(copied, match_lens, token_ids, slots, slots)
    tokens = torch.zeros(2, num_nodes, dtype=torch.int64)
    merge_path(tokens, tokens.float(), tokens.int(), copied[:, :num_nodes], scores[:, :num_nodes])


def compile_level_kernel(levels: tuple[int, ...]) -> None:
    trees = GrowingTrees(TreeShape(levels), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 512, 2, 1, 64), 100)
    trees.plant()
    for depth, width in enumerate(levels, start=1):
        choices = torch.zeros(2 * trees.shape.width(depth - 1), width, dtype=torch.int64)
        for token_ids in (None, torch.zeros(10, dtype=torch.int64)):
            trees.add_level(depth, choices, choices.float(), token_ids)
    list_a_path_early(trees.log_probs, trees.parents, levels, levels[0] > 1)


def compile_magicdec_kernels(part: PartialAttention, block_size: int, max_model_len: int) -> None:
    slots = torch.zeros(2, dtype=torch.int64)
    inputs = DraftInputs.allocate(part, block_size, 4, max_model_len, 2, torch.device("cpu"))
    whole = torch.zeros(2, max_model_len // block_size, dtype=torch.int32)
    for step in (0, 1, 3):
        inputs.write(step, slots, slots, Roots(slots, slots, slots.int()), whole)
    tables = PartialTables.allocate(part.sinks, part.budget, block_size, 4, max_model_len, torch.device("cpu"))
    tables.write(whole, slots.int())


def main() -> None:
    JITFunction.run = compile_launch
    scores_module.num_programs = lambda device: 264
    for num_nodes in (1, 68):
        compile_tree_kernels(num_nodes)
    for vocab_size, max_depth, mark_lens in ((152064, 5, (1, 1, 1)), (32000, 16, (1, 2, 5)), (50257, 1, (3, 1, 2))):
        compile_history_kernels(vocab_size, max_depth, mark_lens)
    for levels in ((1,), (4, 16, 16, 16, 16)):
        compile_level_kernel(levels)
    for copy_length, max_model_len, num_nodes in ((1, 1000, 1), (16, 131072, 68), (16, 4096, 4)):
        compile_copy_kernels(copy_length, max_model_len, num_nodes)
    for max_num_units, unit_blocks, num_chosen in ((20, 1, 1), (4096, 2, 60), (16384, 4, 252)):
        compile_selection_kernels(max_num_units, unit_blocks, num_chosen)
    for max_new in (1, 6, 512):
        compile_window_kernels(max_new)
    for part, block_size, max_model_len in (
        (PartialAttention(), 16, 131072),
        (PartialAttention(sinks=0, budget=1), 32, 96),
    ):
        compile_magicdec_kernels(part, block_size, max_model_len)
    for dtype, head_size in ((torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 64)):
        compile_attention_kernels(dtype, head_size)
        compile_draft_kernels(dtype)
    print("\n".join(sorted(compiled)))


if __name__ == "__main__":
    main()
