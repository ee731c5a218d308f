# SPDX-License-Identifier: Apache-2.0
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tests.models import SIZES, glide_shapes
from vllm_longspec.proposers.glide.checkpoint import FAMILIES, inspect_draft

CONFIG = {**SIZES, "vocab_size": 64, "model_type": "llama", "architectures": ["LlamaGlideDecoderLayer"]}


def glide_weights(prefix=""):
    return {prefix + name: torch.zeros(shape) for name, shape in glide_shapes(CONFIG).items()}


def write(folder, weights, *, file_name="model.safetensors", **config):
    """A checkpoint; a setting of None is left out of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    if file_name.endswith(".safetensors"):
        save_file(weights, folder / file_name)
    else:
        torch.save(weights, folder / file_name)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout(tmp_path, family):
    model = write(tmp_path, glide_weights(), model_type=family, architectures=[FAMILIES[family]])
    found = inspect_draft(model)
    assert (found.model, found.architecture, found.config["model_type"]) == (model, FAMILIES[family], family)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["SomethingElse"]])
@pytest.mark.parametrize("file_name", ["model.safetensors", "draft.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "glide.", "model."])
def test_recognised_by_parameter_names(tmp_path, architectures, file_name, prefix):
    model = write(tmp_path, glide_weights(prefix), file_name=file_name, architectures=architectures)
    found = inspect_draft(model)
    assert found.architecture == "LlamaGlideDecoderLayer"
    assert found.shapes == glide_shapes(CONFIG)


def test_recognised_across_shards(tmp_path):
    weights = glide_weights()
    halves = sorted(weights)[::2], sorted(weights)[1::2]
    for number, names in enumerate(halves, start=1):
        write(tmp_path, {name: weights[name] for name in names}, file_name=f"model-0000{number}-of-00002.safetensors")
    assert inspect_draft(str(tmp_path)) is not None


def test_recognised_by_architecture_without_weights(tmp_path):
    # `--load-format dummy` needs nothing but a config.
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert inspect_draft(str(tmp_path)).architecture == "LlamaGlideDecoderLayer"


def test_biases_and_unused_projections_are_optional(tmp_path):
    weights = {
        name: weight
        for name, weight in glide_weights().items()
        if not name.endswith("bias") and name not in ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")
    }
    assert inspect_draft(write(tmp_path, weights)) is not None


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_another_kind_of_draft_is_none_whatever_it_is_called(tmp_path, architectures):
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    folder = tmp_path / "sail" / "longspec-glide-vicuna-7b"
    assert inspect_draft(write(folder, weights, architectures=architectures)) is None


@pytest.mark.parametrize(
    "model", ["ngram", "[ngram]", "package.module.Proposer", "s3://bucket/draft", "/no/such/draft"]
)
def test_what_is_no_checkpoint_is_none(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert inspect_draft(model) is None


def test_broken_files_are_none(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert inspect_draft(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": None}))
    (tmp_path / "model.safetensors").write_text("not a header")
    assert inspect_draft(str(tmp_path)) is None


@pytest.mark.parametrize("model_type", ["mistral", None])
def test_unknown_family_is_refused(tmp_path, model_type):
    with pytest.raises(ValueError, match=rf"model_type {model_type!r}.*supported are llama, qwen2") as error:
        inspect_draft(write(tmp_path, glide_weights(), model_type=model_type))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "glide."])
@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "post_cross_attention_layernorm.weight"])
def test_missing_parameter_is_refused(tmp_path, prefix, name):
    weights = glide_weights(prefix)
    del weights[prefix + name]
    with pytest.raises(ValueError, match=rf"lacks parameters: {prefix}{name};") as error:
        inspect_draft(write(tmp_path, weights, architectures=None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "self_attn.o_proj.bias", "glide.mlp.up_proj.weight"])
def test_unexpected_parameter_is_refused(tmp_path, name):
    weights = glide_weights() | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"has unexpected parameters: {name};"):
        inspect_draft(write(tmp_path, weights))


def test_only_a_few_wrong_names_are_listed(tmp_path):
    weights = glide_weights() | {f"layers.{layer}.weight": torch.zeros(1) for layer in range(5)}
    with pytest.raises(ValueError, match=r"layers\.0\.weight, layers\.1\.weight, layers\.2\.weight and 2 more"):
        inspect_draft(write(tmp_path, weights))


def test_named_glide_with_the_weights_of_another_model_is_refused(tmp_path):
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"lacks parameters: cross_attn\.o_proj\.weight.* and \d+ more"):
        inspect_draft(write(tmp_path, weights))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the files put into `files`, and counts what it hands out; an empty local cache."""
    state = SimpleNamespace(files={}, downloads=[], headers=0)

    def download(repo_id, file_name, revision=None):
        assert (repo_id, revision) == ("someone/draft", "main")
        if file_name not in state.files:
            raise huggingface_hub.errors.LocalEntryNotFoundError(file_name)
        state.downloads.append(file_name)
        return state.files[file_name]

    def parse_header(self, repo_id, file_name, revision=None):
        if file_name not in state.files:
            raise huggingface_hub.errors.LocalEntryNotFoundError(file_name)
        state.headers += 1
        return SimpleNamespace(
            tensors={name: SimpleNamespace(shape=list(shape)) for name, shape in glide_shapes(CONFIG).items()}
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", parse_header)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return state


def add_config(hub, folder, architectures):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": architectures}))
    hub.files["config.json"] = folder / "config.json"


@pytest.mark.parametrize("architectures", [None, ["LlamaGlideDecoderLayer"], ["LlamaForCausalLM"]])
def test_hub_header_is_read_without_the_weights(hub, tmp_path, architectures):
    add_config(hub, tmp_path / "hub", architectures)
    hub.files["model.safetensors"] = None
    assert inspect_draft("someone/draft", "main").shapes == glide_shapes(CONFIG)
    assert (hub.downloads, hub.headers) == (["config.json"], 1)


def test_hub_index_is_enough(hub, tmp_path):
    add_config(hub, tmp_path / "hub", None)
    index = tmp_path / "hub" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(glide_weights(), "model-00001-of-00001.safetensors")}))
    hub.files["model.safetensors.index.json"] = index
    assert inspect_draft("someone/draft", "main").shapes == dict.fromkeys(glide_shapes(CONFIG))
    assert (hub.downloads, hub.headers) == (["config.json", "model.safetensors.index.json"], 0)


@pytest.mark.parametrize(
    ("architectures", "recognised"), [(None, True), (["LlamaGlideDecoderLayer"], True), (["LlamaForCausalLM"], False)]
)
def test_hub_bin_file_is_downloaded_only_for_a_likely_draft(hub, tmp_path, architectures, recognised):
    add_config(hub, tmp_path / "hub", architectures)
    write(tmp_path / "weights", glide_weights(), file_name="pytorch_model.bin")
    hub.files["pytorch_model.bin"] = tmp_path / "weights" / "pytorch_model.bin"
    assert (inspect_draft("someone/draft", "main") is not None) is recognised
    assert ("pytorch_model.bin" in hub.downloads) is recognised


def test_hub_without_the_repository(hub):
    assert inspect_draft("someone/draft", "main") is None


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_cache_is_enough_without_a_network(tmp_path, monkeypatch, file_name):
    def no_network(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--draft"
    write(repository / "snapshots" / "0123abcd", glide_weights(), file_name=file_name, architectures=None)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert inspect_draft("someone/draft").architecture == "LlamaGlideDecoderLayer"
    assert inspect_draft("someone/other") is None
