# SPDX-License-Identifier: Apache-2.0
"""Token ids to train with and to evaluate with, as `prepare_data.py` writes them."""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class Windows:
    """Windows at random places of one long sequence of token ids."""

    ids: Tensor  # int16 or wider, on the training device
    generator: torch.Generator

    def draw(self, count: int, length: int) -> Tensor:
        """int64 [count, length + 1]: the last token is only predicted."""
        starts = torch.randint(len(self.ids) - length, (count, 1), generator=self.generator).to(self.ids.device)
        return self.ids[starts + torch.arange(length + 1, device=self.ids.device)].long()

    def spread(self, count: int, length: int) -> Tensor:
        """The same, evenly spread: for evaluation."""
        starts = torch.linspace(0, len(self.ids) - length - 1, count).long()[:, None].to(self.ids.device)
        return self.ids[starts + torch.arange(length + 1, device=self.ids.device)].long()


def load_ids(path: Path, device: str) -> Tensor:
    with lzma.open(path) as file:
        return torch.from_numpy(np.load(file).astype(np.int16)).to(device)
