# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from tests.models import SIZES
from vllm_longspec.proposers.glide.checkpoint import DraftCheckpoint
from vllm_longspec.proposers.glide.fit import check_fit

CONFIG = {**SIZES, "vocab_size": 64, "model_type": "llama"}


def check(draft_config, target_config):
    target_options = {name: value for name, value in target_config.items() if name != "model_type"}
    target = AutoConfig.for_model(target_config["model_type"], **target_options)
    # Of vLLM's ModelConfig, the name and the text config are read.
    model_config: Any = SimpleNamespace(model="TARGET", hf_text_config=target)
    check_fit(DraftCheckpoint("DRAFT", "", draft_config), model_config)


def test_same_sizes_fit():
    check(CONFIG, CONFIG)


@pytest.mark.parametrize(
    ("name", "in_draft", "in_target"),
    [
        ("hidden_size", 512, 128),
        ("num_attention_heads", 8, 4),
        ("num_key_value_heads", 4, 2),
        ("head_dim", 64, 32),
        ("vocab_size", 128, 64),
        ("intermediate_size", 256, 128),
        ("model_type", "qwen2", "llama"),
    ],
)
def test_each_size_is_named_with_both_values(name, in_draft, in_target):
    with pytest.raises(ValueError) as error:
        check({**CONFIG, name: in_draft}, CONFIG)
    message = str(error.value)
    assert message.startswith(
        f"draft DRAFT does not fit target TARGET: {name} is {in_draft} in the draft, {in_target} in the target"
    )
    assert "\n" not in message


def test_multipliers_are_the_targets():
    granite = {**CONFIG, "model_type": "granite", "residual_multiplier": 0.22}
    check(granite, granite)
    with pytest.raises(ValueError, match=r"residual_multiplier is 1.0 in the draft, 0.22 in the target"):
        check({**CONFIG, "model_type": "granite"}, granite)
    # vLLM ignores them in other families.
    check({**CONFIG, "residual_multiplier": 0.5}, CONFIG)


def test_what_a_config_leaves_out_has_its_default():
    derived = {**CONFIG, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    left_out = {name: value for name, value in derived.items() if name not in ("num_key_value_heads", "head_dim")}
    check(left_out, derived)
    check(derived, left_out)
    with pytest.raises(ValueError, match="num_key_value_heads is 4 in the draft, 2 in the target"):
        check(left_out, {**derived, "num_key_value_heads": 2})


@pytest.mark.parametrize(
    "not_compared", [{"rope_theta": 500000.0}, {"max_position_embeddings": 64}, {"num_hidden_layers": 7}]
)
def test_what_the_target_decides_is_not_compared(not_compared):
    check({**CONFIG, **not_compared}, CONFIG)
