# SPDX-License-Identifier: Apache-2.0
"""What a step of a draft's optimizer does to matrices and to other weights."""

import math

import pytest
import torch
from torch import nn

from vllm_longspec.training.optimizer import ADAMW, MUON, OPTIMIZERS, DraftOptimizer, step_flops

SHAPES = [(64, 64), (32, 64), (96, 32)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (64,)]
    found = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for each in found:
        each.grad = torch.randn(each.shape, generator=generator)
    return found


def stepped(name, weight_decay, rate=1e-2):
    """Weights before and after a step, and the gradients."""
    found = parameters()
    before = [each.detach().clone() for each in found]
    gradients = [each.grad for each in found]
    optimizer = DraftOptimizer(name, found, weight_decay)
    for group in optimizer.groups:
        group["lr"] = rate
    optimizer.step()
    assert all(each.grad is None for each in found)
    return before, [each.detach() for each in found], gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    rate, decay = 1e-2, 0.5
    without, with_decay = (stepped(name, weight_decay, rate) for weight_decay in (0.0, decay))
    for before, one, other in zip(without[0], without[1], with_decay[1], strict=True):
        expected = one - rate * decay * before if before.ndim == 2 else one
        torch.testing.assert_close(other, expected, atol=1e-6, rtol=1e-5)


def test_muon_moves_all_directions_of_a_matrix_alike():
    """Next to U V of the gradient's singular value decomposition, with the root mean square of AdamW's steps."""
    rate = 1e-2
    before, after, gradients = stepped(MUON, 0.0, rate)
    for start, end, gradient in list(zip(before, after, gradients, strict=True))[: len(SHAPES)]:
        moved = (start - end) / (0.2 * rate * math.sqrt(max(start.shape)))
        sizes = torch.linalg.svdvals(moved)
        # Few iterations: directions with next to no gradient are not there yet.
        assert sizes.quantile(0.05) > 0.6 and sizes.max() < 1.3
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        along = (left.T @ moved @ right.T).diagonal()
        assert along.sum() / sizes.sum() > 0.99


def test_what_is_no_matrix_takes_the_steps_of_adamw():
    _, by_adamw, _ = stepped(ADAMW, 0.1)
    _, by_muon, _ = stepped(MUON, 0.1)
    assert torch.equal(by_adamw[-1], by_muon[-1])
    assert not any(torch.allclose(one, other) for one, other in zip(by_adamw[:-1], by_muon[:-1], strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_forgotten(name):
    """The next step is that of a new optimizer."""
    found, fresh = parameters(), parameters()
    optimizer, other = (DraftOptimizer(name, each, 0.1) for each in (found, fresh))
    for group in [*optimizer.groups, *other.groups]:
        group["lr"] = 1e-2
    optimizer.step()
    optimizer.forget()
    with torch.no_grad():
        for one, two in zip(found, fresh, strict=True):
            one.copy_(two)
            one.grad = -two.grad
            two.grad = -two.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(one, two) for one, two in zip(found, fresh, strict=True))


def test_operations_of_a_step():
    """What PyTorch's own counter finds on real matrices."""
    from torch.utils.flop_counter import FlopCounterMode

    found = parameters()
    optimizer = DraftOptimizer(MUON, found, 0.1)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert step_flops(MUON, [each.shape for each in found]) == counter.get_total_flops() > 0
    assert step_flops(ADAMW, [each.shape for each in found]) == 0
