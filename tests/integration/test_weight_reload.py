# SPDX-License-Identifier: Apache-2.0
"""Weights that change while the engine runs: `collective_rpc("reload_weights")`."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.engine import Request, generate, request
from tests.integration.test_lossless import GREEDY, PAIR, SAMPLINGS, assert_lossless, source_code, speculative
from tests.models import untied


def write_changed(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path.mkdir()
    for file in target.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def by_a_third(weights: dict[str, torch.Tensor]) -> None:
    """So that a draft still knows something of its target."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def by_other_rows(weights: dict[str, torch.Tensor]) -> None:
    """Each token gets the logit that another one had."""
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)


def requests() -> list[Request]:
    return [
        request(prompt, **sampling, max_tokens=24, ignore_eos=True)
        for prompt, sampling in zip(source_code((100, 200)), (GREEDY, SAMPLINGS[0]), strict=True)
    ]


def test_draft_goes_on_with_the_new_weights(tmp_path):
    """The embedding and the head that a draft shares are its target's own, not copies that stay behind."""
    # Of a tied head vLLM's CPU build reloads only the embedding, with a draft or without.
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    changed = write_changed(tmp_path / "changed", target, by_a_third)
    plain = generate(target, [requests(), changed, requests()])
    assert plain.tokens[0] != plain.tokens[1]
    result = generate(target, [requests(), changed, requests()], **speculative(draft, [2, 4, 4]))
    assert_lossless(plain, result)
    assert result.acceptance_length > 1.5


def test_a_head_of_its_own_has_the_new_rows(tmp_path):
    """The very trees that are drafted where these weights were the first."""
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    changed = write_changed(tmp_path / "changed", target, by_other_rows)
    frequent_tokens = tmp_path / "frequent_tokens.json"
    frequent_tokens.write_text(json.dumps(list(range(2048))))
    drafting = speculative(draft, [2, 4, 4], frequent_tokens=str(frequent_tokens))
    first = generate(changed, [requests()], **drafting)
    reloaded = generate(target, [changed, requests()], **drafting)
    assert reloaded.tokens == first.tokens
    assert reloaded.num_drafts == first.num_drafts > 1
    assert reloaded.num_accepted_tokens == first.num_accepted_tokens > 1
