# SPDX-License-Identifier: Apache-2.0
"""How good a draft is on samples that it is not trained with, without an engine: what one drafted token is worth."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_longspec.training.forward import lay_out, pack
from vllm_longspec.training.learner import Learner
from vllm_longspec.training.losses import ACCEPTED, AGREED, CHUNK_BYTES, LOSS
from vllm_longspec.training.teachers import Lesson


@torch.no_grad()
def measure(
    model: nn.Module, learner: Learner, lessons: Sequence[Lesson], device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """Of all rows at every depth: the loss, and how often the draft's token is the target's.

    Args:
        model: the learner, as it is wrapped for several GPUs

    Returns:
        lists by depth: `loss`; `accepted`, sum min(p, q); `greedy`, both have the same most probable token; `coupled`,
        both draw the same token at temperature 1 with the same noise, as a draft that knows the target's noise does.
        And `chain` by `greedy` and `coupled`: tokens a step of a chain as deep as the tree, one more than it drafts.
    """
    model.eval()
    levels = len(learner.acceptance)
    withheld = tuple(range(1, levels + 1))
    sums = torch.zeros(levels, 4, dtype=torch.float64)
    num_rows = 0
    for number, lesson in enumerate(lessons):
        layout = lay_out([lesson.sample])
        packed = pack([lesson], layout, device)
        _, statistics, hidden = model(packed, withheld)
        sums[:, :3] += statistics.double().cpu()
        generator = torch.Generator(device=device).manual_seed(seed + number)
        sums[:, 3] += _coupled(learner, hidden, packed.hidden, generator)
        num_rows += len(layout.labels)
    model.train()
    shares = sums / max(1, num_rows)
    found: dict[str, Any] = {
        name: [round(share, 4) for share in shares[:, column].tolist()]
        for name, column in (("loss", LOSS), ("accepted", ACCEPTED), ("greedy", AGREED), ("coupled", 3))
    }
    found["chain"] = {
        name: round(1 + float(torch.tensor(found[name]).cumprod(0).sum()), 3) for name in ("greedy", "coupled")
    }
    return found | {"rows": num_rows}


def _coupled(
    learner: Learner,
    hidden: Tensor,  # [depths, num_rows, hidden_size]
    target_hidden: Tensor,  # [num_rows, hidden_size]
    generator: torch.Generator,
) -> Tensor:
    """float64 [depths] on the CPU: rows at which both draw the same token."""
    head, scale = learner.shared.head, learner.shared.logit_scale
    matches = torch.zeros(len(hidden), dtype=torch.float64)
    chunk = max(1, CHUNK_BYTES[head.device.type] // (4 * len(head) * (len(hidden) + 2)))
    for start in range(0, hidden.shape[1], chunk):
        rows = slice(start, start + chunk)
        target = scale * (target_hidden[rows].to(head.dtype) @ head.T).float()
        noise = torch.empty_like(target).exponential_(generator=generator).log_().neg_()  # Gumbel
        drawn = (target + noise).argmax(-1)
        drafted = (scale * (hidden[:, rows].to(head.dtype) @ head.T).float() + noise).argmax(-1)
        matches += (drafted == drawn).sum(1).double().cpu()
    return matches
