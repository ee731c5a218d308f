# SPDX-License-Identifier: Apache-2.0
"""Engines whose target drafts for itself: plain decoding's tokens, whatever its drafts leave in the cache."""

import re
from typing import Any

import pytest
import torch

from tests.engine import generate, request, run_batches
from tests.integration.test_lossless import (
    GREEDY,
    PAIR,
    SAMPLINGS,
    assert_lossless,
    batches,
    random_prompts,
    source_code,
)
from tests.models import write_target
from tests.process import run_alone

LENGTHS = (1, 33, 200, 640)


def magicdec(**options: Any) -> dict[str, Any]:
    """Drafts are verified throughout, though for a model this small they are seldom worth it."""
    return {"speculative_config": {"method": "magicdec", "adaptive_verification": False, **options}}


def test_trained_target():
    """Prompts shorter and longer than the part that drafts attend, in chunks and from the prefix cache."""
    target, requests = PAIR / "target", batches(source_code(LENGTHS), max_tokens=16)
    plain = generate(target, requests)
    result = generate(target, requests, **magicdec(sinks=32, budget=64))
    assert_lossless(plain, result)
    assert result.acceptance_length >= 2.0
    # What a draft leaves in a block is never taken for what the target wrote.
    assert result.metrics["vllm:prefix_cache_hits"] >= plain.metrics["vllm:prefix_cache_hits"] > 0


def _check_tables(settings: dict[str, Any], each_batch: list[Any]) -> dict[str, Any]:
    """Runs requests, and looks at the block tables of every draft step."""
    from vllm_longspec.proposers.magicdec.proposer import MagicDecProposer
    from vllm_longspec.proposers.magicdec.selection import BlockSelection

    counted = {"tables": 0, "with chosen blocks": 0, "that differ between layers": 0, "wrong": 0}
    write_tables = BlockSelection.write_tables

    def spied(self: BlockSelection, block_table: Any, idx_mapping: Any, positions: Any, tables: Any) -> None:
        write_tables(self, block_table, idx_mapping, positions, tables)
        for place, (index, position) in enumerate(zip(idx_mapping.tolist(), positions.tolist(), strict=True)):
            own = block_table[place, : position // self.block_size + 1].tolist()
            per_layer = [[block for block in table if block] for table in tables[:, place].tolist()]
            chosen = [
                [own[block] for block in row[:count]]
                for row, count in zip(self.blocks[:, index].tolist(), self.num_blocks[:, index].tolist(), strict=True)
            ]
            counted["tables"] += len(per_layer)
            counted["with chosen blocks"] += sum(map(bool, chosen))
            counted["that differ between layers"] += len({tuple(table) for table in per_layer}) > 1
            for table, blocks in zip(per_layer, chosen, strict=True):
                # In the request's own order: the first, the chosen, the last.
                counted["wrong"] += (
                    table != [block for block in own if block in table]
                    or len(table) != len(per_layer[0])
                    or not {own[0], *blocks, *own[-2:]} <= set(table)
                )

    proposers: list[MagicDecProposer] = []
    set_cache = MagicDecProposer.set_cache

    def spied_set_cache(self: MagicDecProposer, kv_cache_config: Any) -> None:
        set_cache(self, kv_cache_config)
        proposers[:] = [self]

    BlockSelection.write_tables = spied  # type: ignore[method-assign]
    MagicDecProposer.set_cache = spied_set_cache  # type: ignore[method-assign]
    result = run_batches(settings, each_batch)
    (proposer,) = proposers
    kept = [proposer.query_start_loc]
    # Attention backends of GPUs keep buffers in what builds their metadata.
    builders = [builder for groups in proposer.attn_groups for group in groups for builder in group.metadata_builders]
    for owner in (proposer.inputs, proposer.selection, *builders):
        tensors = [value for value in vars(owner).values() if isinstance(value, torch.Tensor)]
        kept += [tensor for tensor in tensors if tensor.device == proposer.device]
    return {**counted, **result, "bytes": sum(tensor.nbytes for tensor in kept)}


def test_blocks_by_scores():
    """Layers attend blocks of their own, also where prompts are cut into chunks or come from the prefix cache."""
    target, requests = PAIR / "target", batches(source_code(LENGTHS), max_tokens=16)
    drafting = magicdec(sinks=32, budget=192, selection="scores")
    result, printed = run_alone(_check_tables, {"model": str(target), **drafting}, requests)
    assert result["tokens"] == generate(target, requests).tokens
    assert result["with chosen blocks"] > result["tables"] // 10 and result["that differ between layers"] > 10
    assert result["wrong"] == 0
    metrics = result["metrics"]
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > metrics["vllm:spec_decode_num_drafts"]
    assert "32 first and 192 chosen or last tokens" in printed
    assert re.findall(r"at most (\d+) blocks of (\d+) .* take (\d+) bytes", printed) == [
        (str(1 + 7), "32", str(result["bytes"]))
    ]


@pytest.mark.parametrize("family", ["qwen3", "opt", "olmo2", "phi"])
def test_a_family_without_glide_drafts(tmp_path, family):
    """Norms of queries and keys; learned positions, which must be the true ones; two that vLLM runs with the
    Transformers backend. Random weights attend everything."""
    overrides: dict[str, Any] = {"ffn_dim": 128, "word_embed_proj_dim": 128} if family == "opt" else {}
    target = write_target(tmp_path / "target", family, **overrides)
    requests = batches(random_prompts(64, (3, 33, 300)), max_tokens=8)
    assert_lossless(generate(target, requests), generate(target, requests, **magicdec(gamma=2, sinks=1, budget=33)))


def test_a_draft_that_attends_everything_is_the_target():
    """Greedy, sampled from the whole distribution, with a seed and without one."""
    ways: list[dict[str, Any]] = [GREEDY, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0}, {"temperature": 0.6}]
    requests = [
        [
            request(prompt, **way, max_tokens=20, ignore_eos=True)
            for prompt, way in zip(source_code((100, 200, 33, 1)), ways, strict=False)
        ]
    ]
    result = generate(PAIR / "target", requests, **magicdec(budget=1024, copy_length=0))
    assert result.num_accepted_tokens == result.num_draft_tokens > 40


def _check_slots(settings: dict[str, Any], each_batch: list[Any]) -> dict[str, Any]:
    """Runs requests, and looks up the owner of every slot that a draft writes."""
    from vllm.v1.attention.backends.utils import PAD_SLOT_ID

    from vllm_longspec.proposers.magicdec.inputs import DraftInputs
    from vllm_longspec.runner.speculator import TreeSpeculator

    speculators: list[TreeSpeculator] = []
    counted = {"written": 0, "past the end": 0, "wrong": 0, "drafts": 0, "most requests": 0}
    draft, write = TreeSpeculator._draft, DraftInputs.write

    def spied_draft(self: TreeSpeculator, num_drafts: int, num_nodes: int, max_prefix_len: int) -> None:
        speculators[:] = [self]
        counted["drafts"] += 1
        counted["most requests"] = max(counted["most requests"], num_drafts)
        draft(self, num_drafts, num_nodes, max_prefix_len)

    def spied_write(self: DraftInputs, step: int, tokens: Any, idx_mapping: Any, roots: Any, block_table: Any) -> None:
        write(self, step, tokens, idx_mapping, roots, block_table)
        tables = speculators[0].block_tables
        slots = self.slot_mapping[0, : len(idx_mapping)].tolist()
        for index, root, slot in zip(idx_mapping.tolist(), roots.positions.tolist(), slots, strict=True):
            if root + step > self.max_position:
                counted["past the end"] += 1
                counted["wrong"] += slot != PAD_SLOT_ID
                continue
            # Allocated before this step, and the request's own.
            blocks = tables.block_tables[0].gpu[index, : tables.num_blocks.np[0, index]].tolist()
            place, offset = divmod(root + step, self.block_size)
            counted["written"] += 1
            counted["wrong"] += place >= len(blocks) or slot != blocks[place] * self.block_size + offset

    TreeSpeculator._draft, DraftInputs.write = spied_draft, spied_write  # type: ignore[method-assign]
    result = run_batches(settings, each_batch)
    return {**counted, "tokens": result["tokens"], "preemptions": result["metrics"]["vllm:num_preemptions"]}


def test_few_places_and_few_blocks_and_requests_that_come_to_the_end():
    """Requests lose their blocks and get others while steps are in flight, and end at `max_model_len`; with copies,
    which make a step emit more than is drafted."""
    samplings = [GREEDY, SAMPLINGS[0], SAMPLINGS[4], {**GREEDY, "presence_penalty": 0.01}]
    prompts = source_code((60, 65, 40, 92, 95))
    requests = [
        [
            request(prompt, **samplings[i % 4], max_tokens=96 - len(prompt), ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
    ]
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 96, "async_scheduling": True}
    drafting = {**magicdec(sinks=16, budget=16, copy_length=8), "num_gpu_blocks_override": 6}
    result, _ = run_alone(_check_slots, {"model": str(PAIR / "target"), **settings, **drafting}, requests)
    assert result["preemptions"] > 0 and result["past the end"] > 0 and result["written"] > 50
    assert result["wrong"] == 0
    assert result["tokens"] == generate(PAIR / "target", requests, **settings).tokens


def test_steps_without_nodes_draft_nothing():
    """Where the schedule has no nodes for a batch its steps are plain ones, and drafts come back with a smaller one."""
    lengths = (8, 8, 30)
    prompts = source_code((40, 50, 60))
    requests = [
        [
            request(prompt, **GREEDY, max_tokens=length, ignore_eos=True)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
    ]
    drafting = magicdec(num_speculative_tokens_per_batch_size=[[1, 1, 4], [2, 8, 0]])
    result, _ = run_alone(_check_slots, {"model": str(PAIR / "target"), **drafting}, requests)
    # The last request is alone for 22 tokens.
    assert result["most requests"] == 1 and 2 <= result["drafts"] <= 12
    assert result["wrong"] == 0
    assert result["tokens"] == generate(PAIR / "target", requests).tokens
