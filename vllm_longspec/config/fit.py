# SPDX-License-Identifier: Apache-2.0
"""Whether a GLIDE draft fits its target: it reads the target's cache and shares its embedding, rotation and head."""

from typing import TYPE_CHECKING, Any

from vllm_longspec.config.checkpoint import DraftCheckpoint

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


def check_fit(draft: DraftCheckpoint, target: "ModelConfig") -> None:
    """Refuses a draft that was not made for a target of these sizes.

    Raises:
        ValueError: names the first size that differs, with both values.
    """
    from transformers import AutoConfig

    # Through transformers, so that a size that config.json leaves out has its family's default.
    options = {name: value for name, value in draft.config.items() if name != "model_type"}
    draft_config = AutoConfig.for_model(draft.config["model_type"], **options)
    for name in _SIZES:
        in_draft, in_target = _size(draft_config, name), _size(target.hf_text_config, name)
        if in_draft != in_target:
            raise ValueError(
                f"draft {draft.model} does not fit target {target.model}: {name} is {in_draft} in the draft, "
                f"{in_target} in the target; use the draft that was trained for this target"
            )


def _size(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if value is None and name == "num_key_value_heads":
        return config.num_attention_heads
    if value is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    return value
