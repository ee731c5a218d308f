# SPDX-License-Identifier: Apache-2.0
"""The loss of a target over whole windows of text."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.training.target import Target


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def mixed_precision(device: str) -> AbstractContextManager:
    return torch.autocast(device.split(":")[0], compute_dtype(device), enabled=device.startswith("cuda"))


def target_loss(target: Target, windows: Tensor, device: str) -> Tensor:
    with mixed_precision(device):
        positions = torch.arange(windows.shape[1] - 1, device=device)
        hidden, _ = target(windows[:, :-1], positions, dtype=compute_dtype(device))
        return cross_entropy(target.head(hidden).flatten(0, 1), windows[:, 1:].flatten())
