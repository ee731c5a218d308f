# SPDX-License-Identifier: Apache-2.0
"""Drafts and options that are damaged or malicious: refused in one line by the user's own process, before any weight
is read into a model, and nothing in them is run."""

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.models import write_draft, write_target
from vllm_longspec.options import options_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    target = write_target(folder / "target", "llama")
    return target, write_draft(folder / "draft", target)


@pytest.fixture
def target(pair):
    return str(pair[0])


@pytest.fixture
def draft(pair, tmp_path):
    """A sound draft to be damaged."""
    folder = tmp_path / "draft"
    folder.mkdir()
    for file in pair[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def serve(target, **settings):
    return EngineArgs(model=target, dtype="float32", skip_tokenizer_init=True, **settings).create_engine_config()


def refused(target, draft, **options):
    """The one line with which an engine refuses a draft."""
    with pytest.raises(ValueError) as error:
        serve(target, speculative_config={"model": str(draft), **options})
    message = str(error.value)
    assert "\n" not in message
    return message


def change_config(draft, **settings):
    config = json.loads((draft / "config.json").read_text()) | settings
    (draft / "config.json").write_text(json.dumps(config))


def as_bin(draft, content=None):
    """Replaces the safetensors file by a .bin file with the same weights, and what else is given."""
    weights = load_file(draft / "model.safetensors")
    (draft / "model.safetensors").unlink()
    torch.save({**weights, **(content or {})}, draft / "pytorch_model.bin")
    return draft / "pytorch_model.bin"


# Weights.


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_safetensors(target, draft, share):
    file = draft / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    said = refused(target, draft)
    assert f"draft {draft} is a GLIDE draft, but its model.safetensors is damaged (" in said
    assert "download or export it again" in said


def test_header_that_promises_more_than_memory(target, draft):
    (draft / "model.safetensors").write_bytes((10**15).to_bytes(8, "little") + b"{}")
    assert "its model.safetensors is damaged" in refused(target, draft)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_bin(target, draft, share):
    file = as_bin(draft)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "its pytorch_model.bin is damaged (" in refused(target, draft)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_code_is_refused_and_not_run(target, draft, tmp_path, wrapped):
    trace = tmp_path / "trace"
    file = as_bin(draft, {"extra": Malicious(trace)})
    if not wrapped:
        file.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    assert "its pytorch_model.bin holds more than tensors" in refused(target, draft)
    assert not trace.exists()
    # It would have been run by an ordinary unpickler.
    with suppress(Exception):
        torch.load(file, weights_only=False)
    assert trace.exists()


def test_bin_that_holds_no_state_dict(target, draft):
    torch.save([torch.zeros(2)], as_bin(draft))
    assert "its pytorch_model.bin holds more than tensors" in refused(target, draft)


def test_bin_of_an_old_pytorch(target, draft):
    file = as_bin(draft)
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert options_of(serve(target, spec_model=str(draft)).speculative_config) is not None


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "cross_attn.q_proj.bias", "mlp.down_proj.weight"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_wrong_shape(target, draft, name, kind):
    weights = load_file(draft / "model.safetensors")
    right = list(weights[name].shape)
    weights[name] = weights[name][..., :-1].contiguous()
    save_file(weights, draft / "model.safetensors")
    if kind == "bin":
        as_bin(draft)
    said = refused(target, draft)
    assert f"{name} has shape {[*right[:-1], right[-1] - 1]}, where {right} is needed" in said


def test_weight_without_a_dimension(target, draft):
    weights = load_file(draft / "model.safetensors") | {"input_layernorm.weight": torch.tensor(1.0)}
    save_file(weights, draft / "model.safetensors")
    assert "input_layernorm.weight has shape [], where [128] is needed" in refused(target, draft)


@pytest.mark.parametrize("what", ["folder", "dangling link", "link to itself", "pipe"])
def test_weights_that_are_no_file(target, draft, what):
    file = draft / "model.safetensors"
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if what == "link to itself" else draft / "gone")
    assert "its model.safetensors is no file" in refused(target, draft)


# Links and indices.


def test_links_to_files_elsewhere_are_served(target, draft, tmp_path):
    """The hub's cache is nothing but links to blobs in another folder."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in draft.iterdir():
        (linked / file.name).symlink_to(Path("..") / "draft" / file.name)
    assert options_of(serve(target, spec_model=str(linked)).speculative_config) is not None


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "shards/model.safetensors", "..", "", "a\0b", "..\\x", 5, None]
)
def test_index_that_points_elsewhere(target, draft, file):
    index = {"weight_map": {"self_attn.q_proj.weight": file}}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(target, draft)
    assert f"its model.safetensors.index.json has self_attn.q_proj.weight in {file!r}" in said
    assert "an index may name files beside it only" in said


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": "x"}'])
def test_index_that_is_none(target, draft, index):
    (draft / "pytorch_model.bin.index.json").write_text(index)
    assert "pytorch_model.bin.index.json" in refused(target, draft)


# config.json.


def test_missing_config(target, draft):
    (draft / "config.json").unlink()
    said = refused(target, draft)
    assert said == (f"draft {draft} has the parameters of a GLIDE draft, but no config.json: copy its target's there")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b'{"hidden_size": ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"hidden_size": 1' + b"0" * 10_000 + b"}", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'"LlamaGlideDecoderLayer"', "holds no JSON object"),
    ],
)
def test_config_that_is_none(target, draft, content, said):
    (draft / "config.json").write_bytes(content)
    assert f"draft {draft} is a GLIDE draft, but its config.json {said}" in refused(target, draft)


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "intermediate_size",
        "num_hidden_layers",
    ],
)
@pytest.mark.parametrize("value", [10**12, 0, -1, 1.5, "128", True, [128], {}, float("nan")])
def test_absurd_sizes(target, draft, name, value):
    """Also for num_hidden_layers, by which a family's configuration may list every layer."""
    change_config(draft, **{name: value})
    said = refused(target, draft)
    if value == 10**12 and name != "num_hidden_layers":
        assert f"does not fit target {target}: {name} is {value} in the draft" in said
    else:
        assert f"draft {draft} has {name} {value!r} in its config.json" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": 7}, "model_type 7 in its config.json, but the families supported are"),
        ({"model_type": ["llama"]}, "model_type ['llama'] in its config.json"),
        ({"rope_parameters": [1]}, "a config.json that is none of a llama model"),
        ({"rms_norm_eps": "small"}, "a config.json that is none of a llama model"),
        ({"hidden_act": 3}, "a config.json that is none of a llama model"),
        ({"dtype": "no_such_type"}, "a config.json that is none of a llama model"),
        ({"layer_types": ["x"]}, "a config.json that is none of a llama model"),
    ],
)
def test_other_settings_that_make_no_sense(target, draft, settings, said):
    change_config(draft, **settings)
    assert said in refused(target, draft)


@pytest.mark.parametrize("settings", [{"max_position_embeddings": 10**15}, {"quantization_config": None}])
def test_what_the_draft_has_no_use_for_is_not_looked_at(target, draft, settings):
    change_config(draft, **settings)
    assert serve(target, spec_model=str(draft)).model_config.max_model_len == 2048


@pytest.mark.parametrize("architectures", [7, "LlamaGlideDecoderLayer", {"a": 1}, [7, None], [["x"]]])
def test_architectures_of_any_kind_leave_the_decision_to_the_parameters(target, draft, architectures):
    change_config(draft, architectures=architectures)
    assert options_of(serve(target, spec_model=str(draft)).speculative_config) is not None


# Options.


@pytest.mark.parametrize("given", [[1], "tree", 7, {1: 2}, [["model", "x"]]])
def test_speculative_config_that_is_no_object(target, given):
    with pytest.raises(ValueError, match="speculative-config must be a JSON object") as error:
        serve(target, speculative_config=given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["[1]", "7", '"tree"'])
def test_json_of_the_command_line_that_is_no_object(target, given):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", target, "--skip-tokenizer-init", "--speculative-config", given])
    with pytest.raises(ValueError, match="speculative-config must be a JSON object"):
        EngineArgs.from_cli_args(args).create_engine_config()
    args.speculative_tree_shape = [2, 4]
    with pytest.raises(ValueError, match="speculative-config must be a JSON object"):
        EngineArgs.from_cli_args(args)


@pytest.mark.parametrize("given", ["{", "{'model': 'x'}", '{"tree_shape": [1,}'])
def test_command_line_that_is_no_json(target, given, capsys):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", target, "--speculative-config", given])
    assert "--speculative-config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree_shape": [[4, 16]]}, "tree_shape must hold positive integers only, got [4, 16]"),
        ({"tree_shape": [float("nan")]}, "tree_shape must hold positive integers only, got nan"),
        ({"tree_shape": [10**30]}, "at most 255 are supported"),
        ({"tree_shape": [1] * 300}, "300 nodes, but at most 255 are supported"),
        ({"tree_shape": {}}, "tree_shape must be a list"),
        ({"tree_shape": False}, "tree_shape must be a list"),
        ({"tree_shape": ""}, "tree_shape must be a list"),
        ({"gamma": 10**30}, "at most 255 nodes are supported"),
        ({"gamma": [5]}, "gamma must be a positive integer"),
        ({"gamma": float("inf")}, "gamma must be a positive integer"),
        ({"num_speculative_tokens": [5]}, "num_speculative_tokens must be a positive integer"),
        ({"num_speculative_tokens": -(10**30)}, "num_speculative_tokens must be a positive integer"),
        ({"tree_shape": [2, 4], "tree-shape": [1]}, "tree_shape is given twice"),
        ({"method": 5}, "speculative method 5"),
        ({"method": {}}, "speculative method {}"),
    ],
)
def test_malformed_options(target, draft, options, said):
    assert said in refused(target, draft, **options)


def test_more_nodes_than_the_tree_has_are_no_error(target, draft):
    config = serve(target, speculative_config={"model": str(draft), "num_speculative_tokens": 10**30})
    assert config.num_speculative_tokens == 68
