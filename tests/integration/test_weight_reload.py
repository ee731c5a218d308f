# SPDX-License-Identifier: Apache-2.0
"""Weights that change while the engine runs: `collective_rpc("reload_weights")`."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.engine import generate, request
from tests.integration.test_lossless import GREEDY, PAIR, SAMPLINGS, assert_lossless, source_code, speculative
from tests.models import untied


def write_changed(path: Path, target: Path) -> Path:
    """A target with weights that differ by a third, of which its draft still knows something."""
    path.mkdir()
    for file in target.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    weights = load_file(target / "model.safetensors")
    for weight in weights.values():
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_draft_goes_on_with_the_new_weights(tmp_path):
    """The embedding and the head that a draft shares are its target's own, not copies that stay behind."""
    # Of a tied head vLLM's CPU build reloads only the embedding, with a draft or without.
    target, draft = untied(tmp_path / "pair", PAIR / "target", PAIR / "draft")
    changed = write_changed(tmp_path / "changed", target)
    batch = [
        request(prompt, **sampling, max_tokens=24, ignore_eos=True)
        for prompt, sampling in zip(source_code((100, 200)), (GREEDY, SAMPLINGS[0]), strict=True)
    ]
    plain = generate(target, [batch, changed, batch])
    assert plain.tokens[0] != plain.tokens[1]
    result = generate(target, [batch, changed, batch], **speculative(draft, [2, 4, 4]))
    assert_lossless(plain, result)
    assert result.acceptance_length > 1.5
