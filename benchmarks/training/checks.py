# SPDX-License-Identifier: Apache-2.0
"""What a trained pair must pass before it is used, and how good it is in figures that need no engine."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.training.losses import target_loss
from benchmarks.training.target import Target, load_target


@torch.no_grad()
def held_out_loss(target: Target, evaluation: Tensor, device: str) -> float:
    parts = evaluation.split(8)
    return sum(target_loss(target, part, device).item() for part in parts) / len(parts)


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
