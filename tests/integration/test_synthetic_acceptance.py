# SPDX-License-Identifier: Apache-2.0
"""Synthetic acceptance in an engine: as many tokens a step as asked for, with a draft that is nearly always wrong."""

import pytest

from tests.engine import generate, request
from tests.models import write_draft, write_target


@pytest.mark.parametrize(
    ("num_nodes", "length"),
    [
        # Of equally probable nodes only the first two levels would fit.
        (5, 2.5),
        # A node for each level, and none beside the path.
        (3, 4.0),
    ],
)
def test_acceptance_length_is_the_one_asked_for(tmp_path, num_nodes, length):
    target = write_target(tmp_path / "target", "llama", vocab_size=512)
    draft = write_draft(tmp_path / "draft", target)
    # They repeat themselves, and are copied from: a copied path, deeper than the tree, is not what is accepted.
    prompts = [[(seed * 37 + i % 4 * 11) % 500 + 3 for i in range(20)] for seed in range(6)]
    sampling = {"max_tokens": 60, "ignore_eos": True}
    requests = [
        request(prompt, temperature=float(seed % 2), seed=seed, **sampling) for seed, prompt in enumerate(prompts)
    ]
    speculative = {
        "model": str(draft),
        "tree_shape": [2, 4, 4],
        "num_speculative_tokens": num_nodes,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": length,
    }
    result = generate(target, [requests], speculative_config=speculative)
    assert [len(tokens) for tokens in result.tokens[0]] == [60] * 6
    # Two or three tokens a step with equal chances: within four standard deviations. A request's last steps may be cut.
    steps = result.num_drafts
    assert steps >= 6 * 59 / length
    assert result.acceptance_length == pytest.approx(length, abs=4 * 0.5 / steps**0.5)
