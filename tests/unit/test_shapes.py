# SPDX-License-Identifier: Apache-2.0
"""Shapes of published targets that speed is measured with: transformers reads them, and the draft has their sizes."""

import math

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.shapes import EAGLE3_VOCAB_SIZE, SHAPES, write_eagle3_head, write_glide_draft, write_target
from vllm_longspec.proposers.glide.checkpoint import read_draft
from vllm_longspec.targets.families import FAMILIES, layer_sizes

# Billions of parameters that their names say.
SIZES = {"qwq-32b": 32.8, "llama-3-8b-262k": 8.0, "qwen2.5-7b": 7.6, "qwen3-32b": 32.8, "llama-3.2-3b": 3.2}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_target_and_draft(name, tmp_path):
    config = AutoConfig.from_pretrained(write_target(tmp_path / "target", SHAPES[name]))
    hidden, intermediate, heads, kv_heads, head_size = layer_sizes(config)
    draft = read_draft(str(write_glide_draft(tmp_path / "draft", SHAPES[name])), None, expected=True)
    assert draft.architecture == FAMILIES[config.model_type]
    assert layer_sizes(AutoConfig.from_pretrained(tmp_path / "draft")) == layer_sizes(config)
    if name not in SIZES:
        return
    layer = 2 * hidden * (heads + kv_heads) * head_size + 3 * hidden * intermediate
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    assert (config.num_hidden_layers * layer + embeddings) / 1e9 == pytest.approx(SIZES[name], abs=0.05)


def test_eagle3_head_has_the_targets_heads(tmp_path):
    """Qwen3's heads together are wider than its hidden state."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = SHAPES["qwen3-32b"] | small | {"head_dim": 32, "vocab_size": 1000}
    with safe_open(write_eagle3_head(tmp_path / "head", config) / "model.safetensors", "pt") as head:
        assert head.get_slice("midlayer.self_attn.q_proj.weight").get_shape() == [4 * 32, 2 * 64]
        assert head.get_slice("midlayer.self_attn.o_proj.weight").get_shape() == [64, 4 * 32]
        assert math.prod(head.get_slice("d2t").get_shape()) == min(EAGLE3_VOCAB_SIZE, 500)
