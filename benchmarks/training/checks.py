# SPDX-License-Identifier: Apache-2.0
"""What a trained pair must pass before it is used, and how good it is in figures that need no engine."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.training.losses import MAX_WITHHELD, DraftStep, anchored_positions, draft_forward, target_loss
from benchmarks.training.target import TINY, Target, load_target, target_config
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer


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
