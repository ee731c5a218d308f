# SPDX-License-Identifier: Apache-2.0
"""What is compared: ways to decode a model, and the model's folders that an engine needs for them.

- `plain`: vLLM without speculation
- `eagle3`: vLLM's EAGLE-3 with 5 tokens
- `ngram`: vLLM's prompt lookup with 5 tokens
- `default`: this plugin as it comes
- `default@K`: the same tree, of which the K likeliest nodes are verified
- `unquantised`: this plugin as it comes, but for a draft in the precision that it is stored in
- `crossN`: this plugin as it comes, with N as `cross_attention_budget`
- `gammaN`: this plugin's sequential method
- `magicdec`: the target drafts 4 tokens for itself, or as many as pay (adaptive verification)
- `magicdecN`: the same with N tokens, whatever is accepted
- `given`: this plugin with the options of `--given`, of its speculative configuration; an integer as `frequent_tokens`
  is how many random tokens there are
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks import PAIR, ROOT
from benchmarks.shapes import SHAPES, write_eagle3_head, write_frequent_tokens, write_glide_draft, write_target

# Every other system is this plugin.
VLLM_SYSTEMS = ("plain", "eagle3", "ngram")
SYSTEMS = (*VLLM_SYSTEMS, "default", "gamma4", "unquantised", "magicdec", "given")
_PLUGIN_SYSTEM = re.compile(r"given|unquantised|default(@[1-9]\d*)?|cross[1-9]\d*|gamma[1-9]\d*|magicdec([1-9]\d*)?")
OTHERS_TOKENS = 5
# More than a batch ever has.
MOST_REQUESTS = 1024
# Of models without weights. The same ones every time, since vLLM finds what it has compiled by a model's path.
FOLDER = ROOT / ".data" / "shapes"


class NotMeasurable(Exception):
    """What was asked for and cannot be had, in one line."""


def is_plugin_system(system: str) -> bool:
    return _PLUGIN_SYSTEM.fullmatch(system) is not None


def check_system(system: str) -> str:
    """Raises NotMeasurable if there is no such system."""
    if system not in SYSTEMS and not is_plugin_system(system):
        raise NotMeasurable(
            f"there is no system {system}: give one of {', '.join(SYSTEMS)}, default@K, crossN, gammaN, magicdecN"
        )
    return system


@dataclass(frozen=True)
class Model:
    """A target with its drafts: a shape with random weights, or a folder of trained ones laid out like `pair/`."""

    name: str
    # Folder of a trained target/, draft/ and prompts.jsonl; None for random weights.
    trained: Path | None
    config: dict[str, Any]

    @classmethod
    def find(cls, name: str) -> "Model":
        """Raises NotMeasurable if it is neither the name of a shape, nor `pair`, nor such a folder."""
        if name in SHAPES:
            return cls(name, None, SHAPES[name])
        folder = PAIR if name == "pair" else Path(name)
        config = folder / "target" / "config.json"
        if not config.is_file():
            raise NotMeasurable(f"there is no model {name}: give {', '.join(SHAPES)}, pair, or a folder like pair/")
        return cls("pair" if name == "pair" else folder.name, folder, json.loads(config.read_text()))

    @property
    def num_positions(self) -> int:
        return self.config["max_position_embeddings"]


@dataclass(frozen=True)
class Decoding:
    """A system, ready for an engine."""

    system: str
    # Tokens a step that random weights start with; None for plain decoding and trained weights.
    acceptance: float | None
    # What to tell vLLM; None for plain decoding.
    speculative_config: dict[str, Any] | None
    # The same without paths and acceptance, for the record.
    options: dict[str, Any]


def prepare(model: Model, system: str, acceptance: float | None, given: dict[str, Any] | None) -> Decoding:
    """Writes what the system needs into `FOLDER`, where it is not there yet.

    Raises:
        NotMeasurable: the system cannot decode this model.
    """
    if system == "plain":
        return Decoding(system, None, None, {})
    options = _options(model, system, given)
    speculative_config = dict(options)
    if model.trained is None:
        speculative_config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": acceptance}
    else:
        acceptance = None
    if _is_number(size := options.get("frequent_tokens")):
        path = FOLDER / f"{model.name}-frequent-{size}.json"
        speculative_config["frequent_tokens"] = str(
            _written(write_frequent_tokens, path, size, model.config["vocab_size"])
        )
    if system == "eagle3":
        head = _written(write_eagle3_head, FOLDER / f"{model.name}-eagle3", model.config)
        speculative_config |= {"model": str(head), "draft_load_config": {"load_format": "safetensors"}}
    elif is_plugin_system(system) and options.get("method") != "magicdec" and "model" not in options:
        if model.trained:
            draft = model.trained / "draft"
        else:
            draft = _written(write_glide_draft, FOLDER / f"{model.name}-glide", model.config)
        speculative_config["model"] = str(draft)
    return Decoding(system, acceptance, speculative_config, options)


def target_folder(model: Model) -> Path:
    if model.trained:
        return model.trained / "target"
    return _written(write_target, FOLDER / f"{model.name}-target", model.config)


def _written(write: Callable[..., Path], path: Path, *given: Any) -> Path:
    """What `write` makes of the arguments, in `FOLDER`, which benchmarks on several GPUs share."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / ".lock"):
        return write(path, *given)


def _is_number(frequent_tokens: Any) -> bool:
    """Whether it says how many, which tokens does not matter. The plugin's own option is no number."""
    return isinstance(frequent_tokens, int) and not isinstance(frequent_tokens, bool)


def _options(model: Model, system: str, given: dict[str, Any] | None) -> dict[str, Any]:
    if system == "eagle3":
        if model.trained:
            raise NotMeasurable(f"{model.name} has no EAGLE-3 head")
        return {"method": "eagle3", "num_speculative_tokens": OTHERS_TOKENS}
    if system == "ngram":
        # On the GPU, because vLLM schedules the other one synchronously.
        return {"method": "ngram_gpu", "num_speculative_tokens": OTHERS_TOKENS}
    if system == "given":
        if given is None:
            raise NotMeasurable("the system given has no options of its own: give them with --given")
        if model.trained and _is_number(given.get("frequent_tokens")):
            raise NotMeasurable(f"{model.name} is trained: random frequent tokens would change its acceptance")
        return dict(given)
    if system == "magicdec":
        # By default it is off with acceptance that is set, which for a tree does not depend on the number of nodes.
        return {"method": "magicdec", "adaptive_verification": True}
    if system.startswith("magicdec"):
        return {"method": "magicdec", "gamma": int(system.removeprefix("magicdec")), "adaptive_verification": False}
    if system == "unquantised":
        return {"quantization": None}
    if system.startswith("cross"):
        return {"cross_attention_budget": int(system.removeprefix("cross"))}
    if system.startswith("gamma"):
        # As many as it says, whatever is accepted.
        return {"gamma": int(system.removeprefix("gamma")), "adapt_nodes": False}
    _, _, nodes = system.partition("@")
    # Whatever the size of the batch.
    return {"num_speculative_tokens_per_batch_size": [[1, MOST_REQUESTS, int(nodes)]]} if nodes else {}
