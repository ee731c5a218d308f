# SPDX-License-Identifier: Apache-2.0
"""Training of a target and of its GLIDE draft: the parts that `train.py`, and pairs of other sizes, are made of.

Schedules follow the clock, so that a run takes the time it is given on any machine, or a number of steps.

The draft is trained as LongSpec trains (arXiv 2502.17421): the target is frozen; the draft sees token ids through the
target's embedding; its cross-attention sees the target's keys with the last few withheld, as while drafting; positions
start with a few anchors and go on at a random offset, so that short windows train large positions. The loss is the
cross-entropy with the next token, mixed with that with the target's own distribution, which the draft is to predict.
"""

import json
import lzma
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from glide import SELF_ATTENTION_WINDOW, GlideLayer
from target import Target, load_target, repeat_heads, save_model, target_config
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention

# Rows at depths 0 to 4 are fed to the draft while it grows a tree of five levels. A row at depth d sees the target's
# keys up to the root and without it, that is, at distances above d.
MAX_WITHHELD = 5
NUM_ANCHORS = 4
# The rest of the draft's loss is the cross-entropy with the target's distribution.
NEXT_TOKEN_WEIGHT = 0.1

# Sizes of a toy.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


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


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def mixed_precision(device: str) -> AbstractContextManager:
    return torch.autocast(device.split(":")[0], compute_dtype(device), enabled=device.startswith("cuda"))


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
    """AdamW with a short warm-up and a cosine decay to nothing, for as long as the budget says."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=device.startswith("cuda"))
    next_report = 0.0
    while (done := budget.done()) < 1.0:
        lr = peak_lr * min(1.0, (done + 1e-4) / 0.02) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = lr
        loss = loss_of_step()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        budget.steps += 1
        value = loss.item()  # waits for the device: the clock is the schedule
        if not math.isfinite(value):
            raise RuntimeError(f"the {name}'s loss is {value} at step {budget.steps}")
        if done >= next_report:
            print(f"{name}: step {budget.steps}, {budget.elapsed():.0f} s, loss {value:.4f}, lr {lr:.2e}", flush=True)
            next_report += 0.05


def target_loss(target: Target, windows: Tensor, device: str) -> Tensor:
    with mixed_precision(device):
        positions = torch.arange(windows.shape[1] - 1, device=device)
        hidden, _ = target(windows[:, :-1], positions, dtype=compute_dtype(device))
        return cross_entropy(target.head(hidden).flatten(0, 1), windows[:, 1:].flatten())


def windowed_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Causal attention over the last 512 positions, in chunks that see themselves and the chunk before.

    Args:
        queries, keys, values: [batch, heads, tokens, head_dim]; tokens a multiple of 512
        positions: int [tokens], strictly increasing
    """
    size = SELF_ATTENTION_WINDOW
    batch, heads, tokens, head_dim = queries.shape
    chunks = tokens // size

    def chunked(x: Tensor) -> Tensor:  # [chunks, batch * heads, size, head_dim]
        return x.reshape(batch * heads, chunks, size, head_dim).transpose(0, 1)

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=2)

    own = positions.reshape(chunks, size)
    # Nothing precedes the first chunk: a position beyond all others is never in the past.
    before = torch.cat((torch.full_like(own[:1], torch.iinfo(own.dtype).max // 2), own[:-1]))
    distances = own[:, :, None] - torch.cat((before, own), dim=1)[:, None, :]
    mask = (distances >= 0) & (distances <= size)
    output = scaled_dot_product_attention(
        chunked(queries), with_previous(chunked(keys)), with_previous(chunked(values)), attn_mask=mask[:, None]
    )
    return output.transpose(0, 1).reshape(batch, heads, tokens, head_dim)


def draft_forward(
    glide: GlideLayer,
    embeddings: Tensor,  # [batch, tokens, hidden_size]
    positions: Tensor,  # int [tokens]
    cross_keys: Tensor,  # [batch, kv_heads, tokens, head_dim]
    cross_values: Tensor,
    withheld: int,
) -> Tensor:
    """`GlideLayer.forward` for whole windows, with fast attention: token i sees target keys 0 to i - withheld."""
    queries, keys, values = (part.transpose(1, 2) for part in glide.self_qkv(embeddings, positions[None]))
    heads, tokens = queries.shape[1:3]
    output = windowed_attention(queries, repeat_heads(keys, heads), repeat_heads(values, heads), positions)
    hidden = embeddings + glide.self_attn.o_proj(output.transpose(1, 2).flatten(2))
    # Token i against keys up to i - withheld is plain causal attention once the first `withheld` queries, which see
    # nothing, and the last `withheld` keys, which nobody sees, are cut off.
    queries = glide.cross_q(hidden, positions[None]).transpose(1, 2)[:, :, withheld:]
    keys, values = (repeat_heads(part[:, :, : tokens - withheld], heads) for part in (cross_keys, cross_values))
    output = pad(scaled_dot_product_attention(queries, keys, values, is_causal=True), (0, 0, withheld, 0))
    hidden = hidden + glide.cross_attn.o_proj(output.transpose(1, 2).flatten(2))
    return hidden + glide.mlp(glide.post_cross_attention_layernorm(hidden))


def anchored_positions(length: int, offset: int, device: str) -> Tensor:
    """The first few positions, then `offset` of them left out, then the rest: int64 [length]."""
    positions = torch.arange(length, device=device)
    return torch.where(positions < NUM_ANCHORS, positions, positions + offset)


def check_draft_forward() -> None:
    """The training forward pass must be the layer's own. Raises AssertionError."""
    torch.manual_seed(0)
    config = SimpleNamespace(**target_config(16, 0, **TINY))
    glide = GlideLayer(config)
    tokens, withheld = 3 * SELF_ATTENTION_WINDOW, 3
    positions = anchored_positions(tokens, 100, "cpu")
    embeddings = torch.randn(2, tokens, config.hidden_size)
    keys, values = torch.randn(2, 2, config.num_key_value_heads, tokens, 32).unbind(0)
    distances = positions[:, None] - positions
    index = torch.arange(tokens)
    expected, _ = glide(
        embeddings,
        positions[None],
        ((distances >= 0) & (distances <= SELF_ATTENTION_WINDOW))[None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        (index <= index[:, None] - withheld)[None],
    )
    torch.testing.assert_close(draft_forward(glide, embeddings, positions, keys, values, withheld), expected)


@dataclass
class DraftStep:
    """Losses of the draft next to a frozen target."""

    target: Target
    glide: GlideLayer
    device: str

    def logits(self, windows: Tensor, offset: int, withheld: int) -> tuple[Tensor, Tensor]:
        """The target's and the draft's logits for every next token, each [batch, tokens, vocab_size]."""
        dtype = compute_dtype(self.device)
        ids = windows[:, :-1]
        positions = anchored_positions(ids.shape[1], offset, self.device)
        with torch.no_grad():
            hidden, caches = self.target(ids, positions, dtype=dtype)
            expected = self.target.head(hidden)
            embeddings = self.target.embed(ids, dtype)
        hidden = draft_forward(self.glide, embeddings, positions, *caches[-1], withheld)
        return expected, self.target.head(hidden)

    def loss(self, windows: Tensor, offset: int, withheld: int) -> Tensor:
        with mixed_precision(self.device):
            expected, drafted = self.logits(windows, offset, withheld)
            labels = expected.flatten(0, 1).float().softmax(-1).mul_(1 - NEXT_TOKEN_WEIGHT)
            next_tokens = windows[:, 1:].reshape(-1, 1)
            labels.scatter_add_(1, next_tokens, torch.full_like(next_tokens, NEXT_TOKEN_WEIGHT, dtype=labels.dtype))
            return cross_entropy(drafted.flatten(0, 1), labels)

    @torch.no_grad()
    def agreement(self, windows: Tensor, withheld: int) -> float:
        """How often the draft's most probable next token is the target's."""
        with mixed_precision(self.device):
            expected, drafted = self.logits(windows, 0, withheld)
            return (expected.argmax(-1) == drafted.argmax(-1)).float().mean().item()


def train_target(
    plan: Plan, config: dict, train: Windows, folder: Path, device: str, seed: int, max_steps: int | None
) -> tuple[Target, Budget]:
    """Trains a target and saves it. Returns it as it was saved, frozen and rounded to bfloat16, and what it took."""
    torch.manual_seed(seed)
    target = Target(config).to(device)
    initialise(target, config["num_hidden_layers"])
    budget = Budget(plan.target_seconds, max_steps)

    def loss() -> Tensor:
        window = plan.long_window if budget.done() >= 1 - plan.long_share else plan.window
        return target_loss(target, train.draw(plan.batch_tokens // window, window), device)

    optimise("target", target, loss, plan.target_lr, budget, device)
    save_model(target, config, folder)
    return load_target(folder).to(device).requires_grad_(False), budget


def train_draft(
    plan: Plan, target: Target, train: Windows, folder: Path, device: str, max_steps: int | None
) -> tuple[DraftStep, Budget]:
    """Trains the draft of a frozen target and saves it. Returns its losses and what it took."""
    config = target.config
    glide = GlideLayer(SimpleNamespace(**config)).to(device)
    initialise(glide, 1)
    step = DraftStep(target, glide, device)

    def loss() -> Tensor:
        choice, withheld = torch.randint(1 << 30, (2,), generator=train.generator).tolist()
        length = plan.draft_windows[choice % len(plan.draft_windows)]
        most = config["max_position_embeddings"] - length
        offset = int(torch.randint(most + 1, (), generator=train.generator))
        windows = train.draw(plan.batch_tokens // length, length)
        return step.loss(windows, offset, 1 + withheld % MAX_WITHHELD)

    budget = Budget(plan.draft_seconds, max_steps)
    optimise("draft", glide, loss, plan.draft_lr, budget, device)
    save_model(glide, {**config, "architectures": ["Qwen2GlideDecoderLayer"]}, folder)
    return step, budget


@torch.no_grad()
def held_out_loss(target: Target, evaluation: Tensor, device: str) -> float:
    parts = evaluation.split(8)
    return sum(target_loss(target, part, device).item() for part in parts) / len(parts)


def agreement_by_withheld_keys(step: DraftStep, evaluation: Tensor) -> dict[int, float]:
    """How often draft and target agree on the most probable token, by how many of the last keys are withheld."""
    parts = evaluation.split(8)
    return {
        withheld: round(sum(step.agreement(part, withheld) for part in parts) / len(parts), 4)
        for withheld in range(1, MAX_WITHHELD + 1)
    }


def check_files(folder: Path, windows: Tensor) -> float:
    """Transformers must load the saved target and compute the same loss. Returns that loss; raises RuntimeError."""
    reference = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, ids = load_target(folder), windows[:, :-1].cpu()
    with torch.no_grad():
        expected = reference(ids).logits
        hidden, _ = ours(ids, torch.arange(ids.shape[1]))
        difference = (ours.head(hidden) - expected).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"the logits of the saved target differ by {difference} from those of transformers")
    return cross_entropy(expected.flatten(0, 1), windows[:, 1:].flatten().cpu()).item()


def check_tokenizer(folder: Path, prompts: Path) -> None:
    """Transformers' tokenizer must encode the prompts as the file does. Raises RuntimeError."""
    ours, theirs = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    for line in prompts.read_text().splitlines():
        prompt = json.loads(line)
        if theirs(prompt["text"])["input_ids"] != ours.encode(prompt["text"]).ids:
            raise RuntimeError(f"transformers encodes the prompt of {prompt['path']} to other tokens")
