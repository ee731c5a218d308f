# SPDX-License-Identifier: Apache-2.0
"""Whether a GLIDE draft fits its target: it reads the target's cache and shares its embedding, rotation and head."""

from typing import TYPE_CHECKING, Any

from vllm_longspec.proposers.glide.checkpoint import DraftCheckpoint
from vllm_longspec.targets.families import layer_sizes, size_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# What the two must have in common, in the order in which it is compared. The rotary embedding is the target's own.
_SIZES = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
)

# Of the draft's own sizes the only one that is not its target's. Some families' configurations list every layer.
_MAX_LAYERS = 10_000


def check_fit(draft: DraftCheckpoint, target: "ModelConfig") -> None:
    """Refuses a draft that was not made for a target of these sizes, before anything is built from its config.json.

    Raises:
        ValueError: in one line: names the first size or shape that differs, with both values, or what config.json has
            in the place of a size.
    """
    from transformers import AutoConfig

    for name in (*_SIZES[1:], "num_hidden_layers"):
        value = draft.config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(
                f"draft {draft.model} has {name} {value!r} in its config.json, which is no size: use its target's "
                "config.json"
            )
        # What is written down differs from the target's by as much as it likes, so it is compared before it is used.
        if name in _SIZES and value is not None:
            _compare(draft, target, name, value)
    if (draft.config.get("num_hidden_layers") or 1) > _MAX_LAYERS:
        raise ValueError(
            f"draft {draft.model} has num_hidden_layers {draft.config['num_hidden_layers']} in its config.json, more "
            f"than {_MAX_LAYERS}: use its target's config.json"
        )

    # Through transformers, so that a size that config.json leaves out has its family's default.
    options = {name: value for name, value in draft.config.items() if name != "model_type"}
    try:
        draft_config = AutoConfig.for_model(draft.config["model_type"], **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"draft {draft.model} has a config.json that is none of a {draft.config['model_type']} model ({reason}): "
            "use its target's config.json"
        ) from None
    for name in _SIZES:
        _compare(draft, target, name, size_of(draft_config, name))
    _check_shapes(draft, target)


def _compare(draft: DraftCheckpoint, target: "ModelConfig", name: str, in_draft: Any) -> None:
    in_target = size_of(target.hf_text_config, name)
    if in_draft != in_target:
        raise ValueError(
            f"draft {draft.model} does not fit target {target.model}: {name} is {in_draft} in the draft, "
            f"{in_target} in the target; use the draft that was trained for this target"
        )


def _check_shapes(draft: DraftCheckpoint, target: "ModelConfig") -> None:
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(target.hf_text_config)
    # Output and input features of each projection.
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
