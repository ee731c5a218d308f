# SPDX-License-Identifier: Apache-2.0
"""The draft with what it shares of the target: the module whose forward pass is a loss."""

import torch
from torch import Tensor, nn

from vllm_longspec.training.forward import Packed, draft_hidden
from vllm_longspec.training.layer import GlideLayer
from vllm_longspec.training.losses import ACCEPTED, LossWeights, at_depths, depth_weights, draft_loss
from vllm_longspec.training.target import SharedTarget

# Of the estimate of acceptance, at each step.
_DECAY = 0.95


class Learner(nn.Module):
    """Args:
    shared: on the trainer's device, in the dtype that is computed in. Its tensors are no parameters of this module.
    levels: numbers of withheld keys, from 1 on
    expected_weights: whether depths count as often as a tree's path gets there, or equally
    """

    acceptance: Tensor

    def __init__(
        self,
        glide: GlideLayer,
        shared: SharedTarget,
        levels: int,
        weights: LossWeights,
        expected_weights: bool,
        compiled_losses: bool,
    ) -> None:
        super().__init__()
        self.glide = glide
        self.shared, self.weights, self.compiled_losses = shared, weights, compiled_losses
        self.expected_weights = expected_weights
        # Estimates by depth. All are as good until something is known.
        self.register_buffer("acceptance", torch.ones(levels), persistent=False)

    def forward(self, packed: Packed, withheld: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sum of losses over rows, averaged over depths, `draft_loss`'s statistics by depth, and, but for training,
        what the head multiplies, [len(withheld), num_rows, hidden_size].
        """
        hidden = draft_hidden(self.glide, self.shared.embedding[packed.layout.ids], packed, withheld)
        total, statistics = draft_loss(
            hidden,
            packed.hidden,
            packed.layout.labels,
            self.shared.head,
            self.shared.logit_scale,
            depth_weights(self.acceptance, withheld, self.expected_weights),
            at_depths(self.acceptance, withheld),
            self.weights,
            self.compiled_losses,
        )
        return total / len(withheld), statistics, None if self.training else hidden

    @torch.no_grad()
    def learn_acceptance(self, statistics: Tensor, num_rows: Tensor) -> None:
        """Args:
        statistics: [levels, 3] sums of a step over all ranks
        num_rows: [levels] rows of each depth
        """
        seen = num_rows > 0
        share = statistics[:, ACCEPTED] / num_rows.clamp(min=1)
        self.acceptance.copy_(
            torch.where(seen, _DECAY * self.acceptance + (1 - _DECAY) * share, self.acceptance).to(self.acceptance)
        )
