# SPDX-License-Identifier: Apache-2.0
"""The teacher in Transformers gives the last layer's keys and values and the hidden states of every family."""

import functools
import json
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import DynamicCache

from tests.models import FAMILY_SETTINGS, GLIDE_ARCHITECTURES, LLAMA3_ROPE, write_target, write_wrapper
from vllm_longspec.training.layer import GlideLayer, inverse_frequencies
from vllm_longspec.training.target import check_served, load_shared
from vllm_longspec.training.teachers import Sample
from vllm_longspec.training.teachers.hf import HfTeacher

FAMILIES = sorted(GLIDE_ARCHITECTURES)


def sample(num_tokens, supervised_from, gap=0):
    positions = torch.arange(num_tokens)
    positions = torch.where(positions < 4, positions, positions + gap)
    return Sample(torch.randint(64, (num_tokens,)), torch.arange(num_tokens) >= supervised_from, positions)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    written = {}

    def target(family):
        if family not in written:
            overrides: dict[str, Any] = {"rope_parameters": LLAMA3_ROPE} if family == "llama" else {}
            written[family] = (
                write_wrapper(folder / family)
                if family == "wrapper"
                else write_target(folder / family, family, tied=family == "qwen2", **overrides)
            )
        return written[family]

    return target


@pytest.mark.parametrize("family", [*FAMILIES, "wrapper"])
def test_lessons(targets, family):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    path = targets(family)
    shared = load_shared(str(path))
    teacher = HfTeacher(shared, "cpu", torch.float32, tokens_at_once=700)
    samples = [sample(300, 280), sample(290, 1), sample(40, 20), sample(50, 30, gap=1000)]
    lessons = list(teacher.teach(samples))
    assert [lesson.sample for lesson in lessons] == samples

    kind = AutoModelForImageTextToText if family == "wrapper" else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    if family == "phi3":
        decoder = model.model
        # The table for long texts.
        decoder.rotary_emb.original_inv_freq = inverse_frequencies(shared.config).float()
    for lesson in lessons:
        cache = DynamicCache()
        ids, positions = lesson.sample.input_ids[None], lesson.sample.positions[None]
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, past_key_values=cache).logits[0, lesson.sample.rows]
        torch.testing.assert_close(lesson.keys, cache.layers[-1].keys[0].transpose(0, 1))
        torch.testing.assert_close(lesson.values, cache.layers[-1].values[0].transpose(0, 1))
        found = shared.logit_scale * lesson.hidden @ shared.head.float().T
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_all_pairs_is_made(targets, monkeypatch, family):
    """It would not fit for long samples, and keeps attention from its fast kernels. Gaps in positions make none."""
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    samples = [sample(40, 20), sample(50, 30, gap=1000)]
    list(HfTeacher(load_shared(str(targets(family))), "cpu", torch.float32).teach(samples))
    assert masks == [None, None]


def test_a_batch_is_computed_by_itself(targets, monkeypatch):
    """However alike the samples of the next are, so that a run may be resumed between them."""
    teacher = HfTeacher(load_shared(str(targets("llama"))), "cpu", torch.float32)
    shapes = []
    decoder = teacher.decoder.forward

    def watched(**given):
        shapes.append(tuple(given["input_ids"].shape))
        return decoder(**given)

    monkeypatch.setattr(teacher.decoder, "forward", watched)
    batches = [[sample(30, 20), sample(31, 20)], [sample(31, 20)], [sample(30, 20)] * 3]
    lessons = list(teacher.teach_batches(batches))
    assert [lesson.sample for lesson in lessons] == [each for batch in batches for each in batch]
    assert shapes == [(2, 31), (1, 31), (3, 30)]


def test_a_gpu_gets_the_target_without_a_copy_on_the_host(targets, monkeypatch):
    from transformers import AutoModelForCausalLM

    asked = []

    def load(_folder, **given):
        asked.append(given.get("device_map"))
        return MagicMock()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    shared = load_shared(str(targets("llama")))
    HfTeacher(shared, "cuda:1", torch.bfloat16)
    HfTeacher(shared, "cpu", torch.bfloat16)
    assert asked == [{"": torch.device("cuda:1")}, None]


def test_a_compiled_teacher(targets, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    shared = load_shared(str(targets("qwen3")))
    samples = [sample(30, 20), sample(31, 20), sample(40, 5)]
    lessons = zip(
        HfTeacher(shared, "cpu", torch.float32).teach(samples),
        HfTeacher(shared, "cpu", torch.float32, compiled=True).teach(samples),
        strict=True,
    )
    for expected, found in lessons:
        for name in ("keys", "values", "hidden"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    # Not one for each layer.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafts_rotation_is_that_of_its_target(targets, family):
    """A key of the target, turned back, is the same at all positions."""
    torch.manual_seed(0)
    shared = load_shared(str(targets(family)))
    teacher = HfTeacher(shared, "cpu", torch.float32)
    layer = GlideLayer(shared.config)
    # Two tokens without a history, at different places: all layers are alike but for the rotation.
    unrotated = []
    for position in (3, 700):
        (lesson,) = teacher.teach(
            [Sample(torch.tensor([5, 6]), torch.tensor([False, True]), torch.tensor([position, position + 1]))]
        )
        turned = layer.rotate(torch.eye(lesson.keys.shape[-1])[None, None], torch.tensor([[position]]))[0, 0]
        unrotated.append(lesson.keys[0] @ torch.linalg.inv(turned))
    torch.testing.assert_close(*unrotated, atol=2e-3, rtol=2e-3)


def test_what_is_served_is_what_may_be_trained(tmp_path, targets):
    check_served(str(targets("llama")))
    sliding = write_target(tmp_path / "sliding", "mistral", sliding_window=64)
    with pytest.raises(ValueError, match=r"sliding window of 64 .* give another --target"):
        check_served(str(sliding))
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "none"):
        with pytest.raises(ValueError, match=r"--target .* has no config\.json that can be read"):
            check_served(str(tmp_path / missing))
    other = json.loads((sliding / "config.json").read_text()) | {"model_type": "gpt2"}
    (sliding / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"has model_type 'gpt2' .* but the families with GLIDE drafts are llama"):
        check_served(str(sliding))


def test_targets_without_what_a_draft_shares(tmp_path, targets):
    from safetensors.torch import load_file, save_file

    path = write_target(tmp_path / "headless", "llama")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight").to(torch.int8)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no lm_head\.weight"):
        load_shared(str(path))
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        load_shared(str(write_target(tmp_path / "gelu", "llama", hidden_act="gelu")))
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        load_shared(str(path))


def test_every_family_has_a_target(targets):
    assert set(FAMILY_SETTINGS) <= set(FAMILIES)


@pytest.mark.parametrize("family", ["llama", "ministral3", "phi3", "glm4"])
def test_a_drafts_rotation_is_that_of_vllm(targets, family):
    """Of types llama3, yarn, longrope for long contexts, and of pairs of neighbours in a part of the head."""
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    path = targets(family)
    config = load_shared(str(path)).config
    # Of a Phi's, which has a rotation of its own for contexts above 256.
    model = ModelConfig(str(path), skip_tokenizer_init=True, dtype="float32", max_model_len=2048)
    served = VllmConfig(model_config=model, device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(served):
        rotary = get_rope(
            getattr(config, "head_dim", None) or 32,
            config.max_position_embeddings,
            is_neox_style=family != "glm4",
            rope_parameters=dict(config.rope_parameters),
            dtype=torch.float32,
        )
    layer = GlideLayer(config)
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 7, 255, 256, 300, 1999])
    heads = torch.randn(len(positions), 2, layer.self_attn.head_dim)
    forward = getattr(rotary, "forward_native", rotary.forward)
    expected, _ = forward(positions, heads.flatten(1).clone(), heads.flatten(1).clone())
    found = layer.rotate(heads[None], positions[None])[0]
    torch.testing.assert_close(found, expected.view_as(found), atol=1e-3, rtol=1e-3)
