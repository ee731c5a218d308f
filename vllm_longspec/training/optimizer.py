# SPDX-License-Identifier: Apache-2.0
"""What changes a draft's weights: AdamW, or Muon for its matrices and AdamW for norms and biases.

Muon takes the momentum of a matrix's gradient to the nearest orthogonal matrix, so that all of its directions learn at
one rate (Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982, whose scale is that of
AdamW's steps). A draft is a single layer, whose embedding and head are the target's: all that it has of matrices are
projections, which is what Muon is for.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

ADAMW, MUON = "adamw", "muon"
OPTIMIZERS = (ADAMW, MUON)
# Muon learns best at about four times AdamW's learning rate (docs/training.md#muon).
RATES = {ADAMW: 1, MUON: 4}
_BETAS = (0.9, 0.95)
# Of the iteration that takes a matrix to the nearest orthogonal one; PyTorch's default.
_ITERATIONS = 5


class DraftOptimizer:
    """One or two optimizers that take their steps together.

    Args:
        name: one of `OPTIMIZERS`
        parameters: float32; those that are matrices decay
        weight_decay: of a step, times the learning rate
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        parameters = list(parameters)
        matrices = [each for each in parameters if each.ndim == 2]
        others = [each for each in parameters if each.ndim != 2]
        fused = parameters[0].device.type == "cuda"
        # The learning rate is set before every step.
        kept = {"params": others, "weight_decay": 0.0}
        decaying = {"params": matrices, "weight_decay": weight_decay}
        if name == MUON:
            self.members: list[torch.optim.Optimizer] = [
                torch.optim.Muon(
                    matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", ns_steps=_ITERATIONS
                ),
                torch.optim.AdamW([kept], lr=0.0, betas=_BETAS, fused=fused),
            ]
        else:
            self.members = [torch.optim.AdamW([decaying, kept], lr=0.0, betas=_BETAS, fused=fused)]

    @property
    def groups(self) -> list[dict]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()
            member.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Drops all moments."""
        for member in self.members:
            member.state.clear()


def step_flops(name: str, shapes: Iterable[Sequence[int]]) -> float:
    """Of a step, by the shapes of the weights. What AdamW computes of a weight is next to nothing."""
    if name != MUON:
        return 0.0
    matrices = [sorted(shape) for shape in shapes if len(shape) == 2]
    # X X^T, its square, and that times X: two of [m, n] by [n, m] or back, one of [m, m] by [m, m].
    return _ITERATIONS * sum(4.0 * m * m * n + 2.0 * m**3 for m, n in matrices)
