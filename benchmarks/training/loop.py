# SPDX-License-Identifier: Apache-2.0
"""Training of a target, of any size; `draft.py` has its draft trained by the package.

Schedules follow the clock, so that a run takes the time it is given on any machine, or a number of steps.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.training.losses import target_loss
from benchmarks.training.target import Target, load_target, save_model
from benchmarks.training.text import Windows


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of a run."""

    sizes: dict[str, Any]  # changes to the target's configuration
    window: int  # tokens per training window of the target
    draft_windows: tuple[int, ...]  # for the draft; drawn anew each step
    batch_tokens: int
    target_lr: float
    draft_lr: float
    target_seconds: float
    draft_seconds: float
    evaluation_windows: int
    prompts_per_length: int
    new_tokens: int
    # The last part of the target's training has longer windows: attention over them costs too much to train with alone.
    long_window: int = 0
    long_share: float = 0.0


@dataclass
class Budget:
    """How much of a training phase is done: by the clock, or by steps where their number is given."""

    seconds: float
    max_steps: int | None
    steps: int = 0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def done(self) -> float:
        return min(1.0, self.steps / self.max_steps if self.max_steps else self.elapsed() / self.seconds)


def num_processes() -> int:
    """Of torchrun; each has a GPU and windows of its own, and all have the same weights."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def initialise(module: nn.Module, num_layers: int) -> None:
    """Normal weights; those that write into the residual stream smaller with the number of layers."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if into_residual else 0.02)


def optimise(
    name: str, module: nn.Module, loss_of_step: Callable[[], Tensor], peak_lr: float, budget: Budget, device: str
) -> None:
    """AdamW with a short warm-up and a cosine decay to nothing, for as long as the budget of the first process says."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=device.startswith("cuda"))
    next_report = 0.0
    while (done := _agreed(budget.done(), device)) < 1.0:
        lr = peak_lr * min(1.0, (done + 1e-4) / 0.02) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = lr
        loss = loss_of_step()
        loss.backward()
        if num_processes() > 1:
            for parameter in module.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= num_processes()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        budget.steps += 1
        value = loss.item()  # waits for the device: the clock is the schedule
        if not math.isfinite(value):
            raise RuntimeError(f"the {name}'s loss is {value} at step {budget.steps}")
        if done >= next_report and (num_processes() == 1 or distributed.get_rank() == 0):
            print(f"{name}: step {budget.steps}, {budget.elapsed():.0f} s, loss {value:.4f}, lr {lr:.2e}", flush=True)
            next_report += 0.05


def _agreed(done: float, device: str) -> float:
    """The first process's share, on all of them."""
    if num_processes() == 1:
        return done
    share = torch.tensor(done, dtype=torch.float64, device=device)
    distributed.broadcast(share, src=0)
    return share.item()


def train_target(
    plan: Plan, config: dict, train: Windows, folder: Path, device: str, seed: int, max_steps: int | None
) -> tuple[Target, Budget]:
    """Trains a target and saves it. Returns it as it was saved, frozen and rounded to bfloat16, and what it took.

    With several processes a step has `plan.batch_tokens` in all, but no less than a window of each.
    """
    torch.manual_seed(seed)
    target = Target(config).to(device)
    initialise(target, config["num_hidden_layers"])
    budget = Budget(plan.target_seconds, max_steps)

    def loss() -> Tensor:
        window = plan.long_window if budget.done() >= 1 - plan.long_share else plan.window
        count = max(1, plan.batch_tokens // num_processes() // window)
        return target_loss(target, train.draw(count, window), device)

    optimise("target", target, loss, plan.target_lr, budget, device)
    if num_processes() > 1:
        if distributed.get_rank() == 0:
            save_model(target, config, folder)
        distributed.barrier()
    else:
        save_model(target, config, folder)
    return load_target(folder).to(device).requires_grad_(False), budget
