# SPDX-License-Identifier: Apache-2.0
"""Checks that a draft has its target's sizes, since it shares the target's cache, embeddings and head."""

from typing import Any, Protocol

from vllm_longspec.proposers.glide.checkpoint import DraftCheckpoint
from vllm_longspec.targets.families import layer_sizes, multiplier_names, size_of

# What must be equal, in the order of comparison.
SIZES = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
)

# Not compared, but bounded, because the configs of some families list every layer.
MAX_LAYERS = 10_000


class Target(Protocol):
    """The part of vLLM's `ModelConfig` that is read."""

    @property
    def model(self) -> str: ...
    @property
    def hf_text_config(self) -> Any: ...


def check_fit(draft: DraftCheckpoint, target: Target) -> None:
    """Checks sizes in config.json and shapes of parameters, before anything is built from config.json.

    Raises:
        ValueError: names the first size or shape that differs, with both values, or a value that is not a size.
    """
    from transformers import AutoConfig

    for name in (*SIZES[1:], "num_hidden_layers"):
        value = draft.config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(
                f"draft {draft.model} has {name} {value!r} in its config.json, which is no size: use its target's "
                "config.json"
            )
        # Compared before transformers uses it, since it may be arbitrarily large.
        if name in SIZES and value is not None:
            _compare(draft, target, name, value)
    if (draft.config.get("num_hidden_layers") or 1) > MAX_LAYERS:
        raise ValueError(
            f"draft {draft.model} has num_hidden_layers {draft.config['num_hidden_layers']} in its config.json, more "
            f"than {MAX_LAYERS}: use its target's config.json"
        )

    # transformers fills in the family's default of a size that config.json leaves out.
    options = {name: value for name, value in draft.config.items() if name != "model_type"}
    try:
        draft_config = AutoConfig.for_model(draft.config["model_type"], **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"draft {draft.model} has a config.json that is none of a {draft.config['model_type']} model ({reason}): "
            "use its target's config.json"
        ) from None
    for name in (*SIZES, *multiplier_names(draft.config["model_type"])):
        _compare(draft, target, name, size_of(draft_config, name))
    _check_shapes(draft, target)


def _compare(draft: DraftCheckpoint, target: Target, name: str, in_draft: Any) -> None:
    in_target = size_of(target.hf_text_config, name)
    if in_draft != in_target:
        raise ValueError(
            f"draft {draft.model} does not fit target {target.model}: {name} is {in_draft} in the draft, "
            f"{in_target} in the target; use the draft that was trained for this target"
        )


def _check_shapes(draft: DraftCheckpoint, target: Target) -> None:
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target.hf_text_config)
    # (output features, input features)
    projections = {
        "q_proj": (heads * head_size, hidden),
        "k_proj": (kv_heads * head_size, hidden),
        "v_proj": (kv_heads * head_size, hidden),
        "o_proj": (hidden, heads * head_size),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    for name, shape in sorted(draft.shapes.items()):
        *_, module, kind = name.split(".")
        expected = projections.get(module, (hidden,))
        expected = expected[:1] if kind == "bias" else expected
        if shape is not None and shape != expected:
            raise ValueError(
                f"draft {draft.model} does not fit target {target.model}: {name} has shape {list(shape)}, where "
                f"{list(expected)} is needed; use the draft that was trained for this target"
            )
