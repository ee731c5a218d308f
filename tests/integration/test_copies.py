# SPDX-License-Identifier: Apache-2.0
"""Paths copied from a request's own tokens, in the real engine."""

from typing import Any

from tests.engine import generate, request, run_batches
from tests.integration.test_lossless import GREEDY, PAIR, assert_lossless, random_prompts, source_code, speculative
from tests.models import write_draft, write_target
from tests.process import run_alone


def test_copies_go_deeper_than_the_tree():
    """Prompts that end with the beginning of a passage which they had before, and text that repeats itself."""
    target, draft = PAIR / "target", PAIR / "draft"
    passages = [prompt[20:] for prompt in source_code((80, 85, 90, 95))]
    prompts = [passage + passage[:40] for passage in passages]
    samplings: list[dict[str, Any]] = [
        GREEDY,
        {"temperature": 0.7, "seed": 5, "top_p": 0.9},
        # Sampling that reads the tokens before: those of copied nodes too.
        {**GREEDY, "presence_penalty": 0.01},
        GREEDY,
    ]
    requests = [
        [
            request(prompt, **sampling, max_tokens=32, ignore_eos=True)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
    ]
    result = generate(target, requests, **speculative(draft, [2, 4, 8], copy_length=12))
    assert_lossless(generate(target, requests), result)
    # Three levels are drafted.
    assert len(result.accepted_by_depth) == 12
    assert sum(result.accepted_by_depth[3:]) > 10
    assert result.accepted_by_depth[11] > 0
    assert result.acceptance_length > 4


def _count_copies(settings: dict[str, Any], batch: list[Any]) -> dict[str, Any]:
    """Runs requests, and counts what became of their copies by their ids instead of their places in the batch."""
    from tests.oracles import copying as oracle
    from vllm_longspec.copying.lookup import MIN_MATCH
    from vllm_longspec.copying.trust import CopyTrust
    from vllm_longspec.runner.speculator import TreeSpeculator

    expected = oracle.Trust()
    speculators: list[TreeSpeculator] = []
    entered: list[str] = []
    draft, forget = TreeSpeculator._draft, CopyTrust.forget

    def names() -> dict[int, Any]:
        return speculators[0].req_states.index_to_req_id

    def spied_draft(self: TreeSpeculator, num_drafts: int, num_nodes: int, max_prefix_len: int) -> None:
        speculators[:] = [self]
        draft(self, num_drafts, num_nodes, max_prefix_len)
        positions = self.req_states.num_computed_tokens.gpu
        texts = {
            names()[slot]: self.req_states.all_token_ids.gpu[slot, : int(positions[slot]) + 1].tolist()
            for slot in self.idx_mapping[:num_drafts].tolist()
        }
        expected.observe(texts)
        for name, text in texts.items():
            copied, match_len = oracle.find_copy(text, self.options.copy_length)
            if match_len:
                expected.keep(name, text, copied, match_len)

    def spied_forget(self: CopyTrust, idx_mapping: Any) -> None:
        forget(self, idx_mapping)
        if speculators:
            for name in map(names().get, idx_mapping.tolist()):
                entered.append(str(name))
                expected.copies.pop(name, None)

    TreeSpeculator._draft, CopyTrust.forget = spied_draft, spied_forget  # type: ignore[method-assign]
    result = run_batches(settings, [batch])
    trust = speculators[0].trust
    assert trust is not None
    num_lengths = len(trust.num_seen)
    return {
        "tokens": result["tokens"],
        "preemptions": result["metrics"]["vllm:num_preemptions"],
        "entered": entered,
        "counted": [trust.num_seen.tolist(), trust.num_right.tolist()],
        "expected": [
            [counts.get(MIN_MATCH + i, 0) for i in range(num_lengths)] for counts in (expected.seen, expected.right)
        ],
    }


def test_nothing_is_counted_of_a_request_that_was_there_before(tmp_path):
    """Few places and few blocks: requests follow each other in a place, lose it, and come back to another one.

    Of five tokens any three have been there before, so there is something to copy in nearly every step.
    """
    target = write_target(tmp_path / "target", "llama", vocab_size=5)
    draft = write_draft(tmp_path / "draft", target)
    # Two of them need six blocks in the end, and there are five.
    prompts = [prompt * 3 for prompt in random_prompts(5, (11, 12, 11, 13, 12))]
    requests = [
        request(prompt, temperature=0.7 * (i % 2), seed=i, top_k=2, max_tokens=40, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 96}
    drafting = {**speculative(draft, [2, 2], copy_length=6), "num_gpu_blocks_override": 6}
    result, _ = run_alone(_count_copies, {"model": str(target), **settings, **drafting}, requests)
    assert result["preemptions"] > 0
    assert len(result["entered"]) > len(set(result["entered"]))
    assert result["counted"] == result["expected"]
    assert sum(result["counted"][1]) > 10
    assert result["tokens"] == generate(target, [requests], **settings).tokens
