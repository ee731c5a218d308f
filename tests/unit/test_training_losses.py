# SPDX-License-Identifier: Apache-2.0
"""The fused losses and their gradients are those of dense ones, and each is what its formula says."""

import math

import pytest
import torch

from vllm_longspec.training.losses import ACCEPTED, AGREED, LOSS, LossWeights, depth_weights, draft_loss, row_losses

NONE = {"next_token": 0.0, "kl": 0.0}


def dense_loss(name, q, p, label, acceptance):
    """Of one row at one depth, written with probabilities."""
    accepted = torch.minimum(p, q).sum()
    divergence = (p * (p / q).log()).sum()
    share = math.exp(-3 * acceptance)
    return {
        "next_token": -q[label].log(),
        "kl": divergence,
        "tv": (p - q).abs().sum() / 2,
        "lk": -accepted.log(),
        "lk_hybrid": share * divergence + (1 - share) * (1 - accepted),
    }[name]


def inputs(depths=3, rows=11, hidden=8, vocab=20):
    torch.manual_seed(0)
    draft = torch.randn(depths, rows, hidden, dtype=torch.float64, requires_grad=True)
    target, head = torch.randn(rows, hidden, dtype=torch.float64), torch.randn(vocab, hidden, dtype=torch.float64)
    return draft, target, torch.randint(vocab, (rows,)), head


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(
    "weights",
    [
        *({**NONE, name: 1.0} for name in ("next_token", "kl", "tv", "lk", "lk_hybrid")),
        {"next_token": 0.1, "kl": 0.5, "tv": 0.3, "lk": 0.2, "lk_hybrid": 0.7},
    ],
    ids=str,
)
def test_losses_and_gradients(weights, chunk):
    draft, target, labels, head = inputs()
    by_depth, acceptance = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.5, 0.1])
    total, statistics = draft_loss(
        draft, target, labels, head, 0.5, by_depth, acceptance, LossWeights(**weights), chunk=chunk
    )
    (found,) = torch.autograd.grad(2.5 * total, draft)

    q, p = (0.5 * draft @ head.T).softmax(-1), (0.5 * target @ head.T).softmax(-1)
    losses = torch.stack(
        [
            torch.stack(
                [
                    sum(
                        factor * dense_loss(name, q[depth, row], p[row], labels[row], acceptance[depth])
                        for name, factor in weights.items()
                        if factor
                    )
                    for row in range(11)
                ]
            )
            for depth in range(3)
        ]
    )
    expected = (losses.sum(1) * by_depth).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, torch.autograd.grad(2.5 * expected, draft)[0])
    torch.testing.assert_close(statistics[:, LOSS], losses.sum(1))
    torch.testing.assert_close(statistics[:, ACCEPTED], torch.minimum(p, q).sum((1, 2)))
    assert statistics[:, AGREED].tolist() == (q.argmax(-1) == p.argmax(-1)).sum(1).tolist()


def test_a_loss_without_gradient_needs_none():
    draft, target, labels, head = inputs()
    with torch.no_grad():
        total, _ = draft_loss(draft, target, labels, head, 1.0, torch.ones(3), torch.ones(3), LossWeights(), chunk=4)
    assert not total.requires_grad


def test_the_losses_are_least_where_the_draft_is_the_target():
    _, target, labels, head = inputs()
    for name in ("kl", "tv", "lk", "lk_hybrid"):
        weights = LossWeights(**{**NONE, name: 1.0})
        total, statistics = draft_loss(
            target.expand(3, -1, -1).contiguous(), target, labels, head, 1.0, torch.ones(3), torch.ones(3), weights
        )
        assert abs(total.item()) < 1e-9
        assert statistics[:, AGREED].tolist() == [11] * 3
        torch.testing.assert_close(statistics[:, ACCEPTED], torch.full((3,), 11.0, dtype=torch.float64))


def test_the_losses_are_one_graph():
    """So that compiling them makes few kernels."""
    compiled = torch.compile(row_losses, backend="aot_eager", fullgraph=True)
    draft, target = torch.randn(3, 8, 20, requires_grad=True), torch.randn(8, 20)
    arguments = (draft, target, torch.randint(20, (8,)), LossWeights(0.1, 0.2, 0.3, 0.4, 0.5), torch.ones(3))
    for found, expected in zip(compiled(*arguments), row_losses(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


def test_all_logits_never_exist_at_once():
    rows, vocab = 512, 4096
    draft, target = torch.randn(1, rows, 16, requires_grad=True), torch.randn(rows, 16)
    head, labels = torch.randn(vocab, 16), torch.randint(vocab, (rows,))
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                each.numel() for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)
            )
            return result

    with Watch():
        total, _ = draft_loss(draft, target, labels, head, 1.0, torch.ones(1), torch.ones(1), LossWeights(), chunk=16)
        total.backward()
    assert max(sizes) <= max(16 * vocab, head.numel(), draft.numel())


def test_depths_count_as_often_as_they_are_reached():
    acceptance = torch.tensor([0.8, 0.5, 0.5, 0.1])
    found = depth_weights(acceptance, (1, 2, 3, 4), expected=True)
    reached = torch.tensor([1.0, 0.8, 0.4, 0.2])
    torch.testing.assert_close(found, reached / reached.mean())
    torch.testing.assert_close(depth_weights(acceptance, (2, 4), expected=True), torch.tensor([0.8, 0.2]) / 0.6)
    # One that is drawn alone counts as often too.
    torch.testing.assert_close(depth_weights(acceptance, (4,), expected=True), torch.tensor([0.2]) / 0.6)
    assert depth_weights(acceptance, (2, 4), expected=False).tolist() == [1, 1]


@pytest.mark.parametrize("weights", [{"kl": -1.0}, {"next_token": 0.0, "kl": 0.0}])
def test_weights_that_make_no_loss(weights):
    with pytest.raises(ValueError, match="0 or more"):
        LossWeights(**weights)
