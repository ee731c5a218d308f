# SPDX-License-Identifier: Apache-2.0
"""A draft as LongSpec's training code saves it becomes one that vLLM loads, through the console command."""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks import PAIR
from tests.models import write_draft, write_wrapper
from vllm_longspec import commands
from vllm_longspec.proposers.glide.checkpoint import PICKLED_NAME, read_draft
from vllm_longspec.proposers.glide.convert import convert
from vllm_longspec.version import __version__

TARGET = str(PAIR / "target")


@pytest.fixture(scope="module")
def shipped() -> dict[str, torch.Tensor]:
    return load_file(PAIR / "draft" / "model.safetensors")


def trained(folder: Path, weights: dict[str, Any]) -> Path:
    """A folder as the training code leaves it: no config.json, but the tokenizer and its own settings."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / PICKLED_NAME)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def target_of(folder: Path, text: str | bytes) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def refused(folder: Path, target: str, out: Path, said: str) -> None:
    """The command says this in one line, without a traceback, and leaves beside `out` what was there."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(SystemExit) as stopped:
        commands.main(["convert", str(folder), "--target", target, "--out", str(out)])
    message = str(stopped.value.code)
    assert said in message
    assert message.startswith("vllm-longspec convert: ")
    assert "\n" not in message
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before


# As the trainer writes it, as the whole model's state, and as it is inside the reference's model.
@pytest.mark.parametrize("prefix", ["", "draft_model.", "glide."])
def test_the_shipped_draft_again(tmp_path, shipped, prefix, capsys):
    weights = {prefix + name: weight for name, weight in shipped.items()}
    if prefix == "draft_model.":
        weights["model.embed_tokens.weight"] = torch.zeros(2, 2)
    folder, out = trained(tmp_path / "checkpoint-last", weights), tmp_path / "draft"
    commands.main(["convert", str(folder), "--target", TARGET, "--out", str(out)])
    assert f"vllm serve {TARGET} --speculative-model {out}" in capsys.readouterr().out
    converted = load_file(out / "model.safetensors")
    assert converted.keys() == shipped.keys()
    for name, weight in shipped.items():
        assert converted[name].dtype == weight.dtype
        assert torch.equal(converted[name], weight)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((PAIR / "draft" / "config.json").read_text())
    assert read_draft(str(out)).architecture == "Qwen2GlideDecoderLayer"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_draft_of_another_family(tmp_path, wrapped):
    """Its config is that of the language model, also inside a multimodal target."""
    target, as_text = tmp_path / "target", tmp_path / "text"
    as_text.mkdir()
    write_wrapper(target)
    text = json.loads((target / "config.json").read_text())["text_config"]
    (as_text / "config.json").write_text(json.dumps(text))
    weights = load_file(write_draft(tmp_path / "weights", as_text) / "model.safetensors")
    out = tmp_path / "draft"
    converted = convert(trained(tmp_path / "trained", weights), str(target if wrapped else as_text), out)
    assert converted.architecture == "Ministral3GlideDecoderLayer"
    config = json.loads((out / "config.json").read_text())
    assert config == {**text, "architectures": ["Ministral3GlideDecoderLayer"], "dtype": "float32"}
    assert read_draft(str(out)).shapes == converted.shapes


def test_start_up_names_the_command(tmp_path, shipped):
    folder = trained(tmp_path / "checkpoint-last", shipped)
    for model in (folder, folder / PICKLED_NAME):
        with pytest.raises(ValueError, match="vllm-longspec convert") as error:
            read_draft(str(model))
        assert "\n" not in str(error.value)
    # With the target's config.json beside it, as older error messages told.
    (folder / "config.json").write_text((PAIR / "target" / "config.json").read_text())
    with pytest.raises(ValueError, match="vllm-longspec convert"):
        read_draft(str(folder))


def bad_name(weights: dict[str, Any]) -> None:
    weights["self_attn.q_norm.weight"] = torch.zeros(64)


def bad_shape(weights: dict[str, Any]) -> None:
    weights["mlp.up_proj.weight"] = torch.zeros(700, 256, dtype=torch.bfloat16)


def bad_dtype(weights: dict[str, Any]) -> None:
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].float()


def no_tensor(weights: dict[str, Any]) -> None:
    weights["step"] = 7


def number_for_a_name(weights: dict[Any, Any]) -> None:
    weights[0] = torch.zeros(2)


def without_values(weights: dict[str, Any]) -> None:
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].to("meta")


def diverged(weights: dict[str, Any]) -> None:
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].clone()
    weights["mlp.up_proj.weight"][3, 5] = float("nan")


def overflown(weights: dict[str, Any]) -> None:
    weights["input_layernorm.weight"] = weights["input_layernorm.weight"].clone()
    weights["input_layernorm.weight"][0] = float("inf")


def sparse(weights: dict[str, Any]) -> None:
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].to_sparse()


def quantised(weights: dict[str, Any]) -> None:
    weight = weights["mlp.up_proj.weight"].float()
    weights["mlp.up_proj.weight"] = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


def all_integers(weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        weights[name] = weight.to(torch.int8)


def all_doubles(weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        weights[name] = weight.double()


class Unsafe:
    pass


def code(weights: dict[str, Any]) -> None:
    weights["config"] = Unsafe()


# PyTorch is about to give up tensors of its quantised types, which older files may hold.
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bad_name, "has unexpected parameters: self_attn.q_norm.weight"),
        (bad_shape, "mlp.up_proj.weight has shape [700, 256], where [704, 256] is needed"),
        (bad_dtype, "has weights of torch.bfloat16, torch.float32"),
        (no_tensor, "holds more than tensors by name"),
        (number_for_a_name, "holds more than tensors by name"),
        (without_values, "has mlp.up_proj.weight as a tensor of device meta without values"),
        (sparse, "has mlp.up_proj.weight as a tensor of layout torch.sparse_coo"),
        (quantised, "has mlp.up_proj.weight as a tensor of qint8"),
        (all_integers, "as a tensor of int8, but a draft has dense tensors of float16, bfloat16, float32"),
        (all_doubles, "as a tensor of float64"),
        (diverged, "has NaN or infinite values in mlp.up_proj.weight, with which nothing can be drafted: "),
        (overflown, "has NaN or infinite values in input_layernorm.weight"),
        (code, "pickled code is never run"),
    ],
)
def test_what_is_no_draft_of_the_target_is_refused(tmp_path, shipped, spoil, said):
    weights = dict(shipped)
    spoil(weights)
    refused(trained(tmp_path / "trained", weights), TARGET, tmp_path / "draft", said)


def test_views_become_tensors_of_their_own(tmp_path, shipped):
    weights = {name: weight.t().contiguous().t() for name, weight in shipped.items()}
    weights["input_layernorm.weight"] = torch.ones(1, dtype=torch.bfloat16).expand(256)
    weights["self_attn.q_proj.weight"] = torch.nn.Parameter(shipped["self_attn.q_proj.weight"])
    # Two names of one tensor.
    weights["post_cross_attention_layernorm.weight"] = weights["post_self_attention_layernorm.weight"]
    assert not weights["mlp.up_proj.weight"].is_contiguous()
    convert(trained(tmp_path / "trained", weights), TARGET, tmp_path / "new" / "draft")
    converted = load_file(tmp_path / "new" / "draft" / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(converted[name], weight)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ("{'model_type': 'qwen2'}", "is not JSON in UTF-8"),
        (b'{"model_type": "\xff"}', "is not JSON in UTF-8"),
        ("[" * 100_000, "is not JSON in UTF-8"),
        ("{}", "has model_type None in its config.json, but the families"),
        ('{"model_type": ["qwen2"]}', "has model_type ['qwen2'] in its config.json, but the families"),
        ('{"model_type": "gpt2"}', "has model_type 'gpt2' in its config.json, but the families"),
    ],
)
def test_a_config_of_no_target_is_refused(tmp_path, shipped, text, said):
    target = target_of(tmp_path / "target", text)
    refused(trained(tmp_path / "trained", shipped), target, tmp_path / "draft", f"--target {target} {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "x"}, "has hidden_size 'x' in its config.json, which is no size"),
        ({"hidden_size": True}, "has hidden_size True in its config.json, which is no size"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0 in its config.json, which is no size"),
        ({"vocab_size": -1}, "has vocab_size -1 in its config.json, which is no size"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000 in its config.json, more than 10000"),
        ({"hidden_size": None}, "cannot be used (Validation error for field 'hidden_size': TypeError:"),
        ({"rope_scaling": "x"}, "cannot be used (Validation error for field 'rope_parameters': TypeError:"),
        ({"quantization_config": 5}, "cannot be used ('int' object has no attribute"),
    ],
)
def test_sizes_of_the_target_are_its_own_fault(tmp_path, shipped, changes, said):
    config = json.loads((PAIR / "target" / "config.json").read_text())
    target = target_of(tmp_path / "target", json.dumps(config | changes))
    refused(trained(tmp_path / "trained", shipped), target, tmp_path / "draft", f"--target {target} {said}")


# Below a file, below a missing folder below a file, and where nobody may write.
@pytest.mark.parametrize("place", ["file/draft", "file/more/draft", "/sys/draft", "new/" + 300 * "x"])
def test_a_place_that_cannot_be_written(tmp_path, shipped, place):
    folder = trained(tmp_path / "trained", shipped)
    (tmp_path / "file").touch()
    refused(folder, TARGET, tmp_path / place, f"--out {tmp_path / place} cannot be written (")
    assert not (tmp_path / "new").exists()


def test_what_is_in_the_way_stays(tmp_path, shipped):
    folder = trained(tmp_path / "trained", shipped)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "dangling"):
        refused(folder, TARGET, tmp_path / name, f"--out {tmp_path / name} exists already: give a new folder")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
@pytest.mark.parametrize("parent", ["there", "new/more"])
def test_a_write_that_fails_leaves_nothing(tmp_path, shipped, monkeypatch, error, parent):
    def stops(weights: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", stops)
    folder = trained(tmp_path / "trained", shipped)
    (tmp_path / "there").mkdir()
    refused(folder, TARGET, tmp_path / parent / "draft", "cannot be written (No space left")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "there", tmp_path / "trained"]


def test_the_folder_is_as_readable_as_any_new_one(tmp_path, shipped):
    out, other = tmp_path / "draft", tmp_path / "other"
    convert(trained(tmp_path / "trained", shipped), TARGET, out)
    other.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["draft", "other", "trained"]


def test_a_target_that_is_not_found(tmp_path, shipped, monkeypatch, caplog):
    folder = trained(tmp_path / "trained", shipped)
    for target, said in (
        (str(tmp_path), "has no config.json that can be read: give the target's own folder"),
        (str(folder / PICKLED_NAME), "has no config.json that can be read ("),
        ("nobody/nothing", "give its folder, or check the name and --revision"),
        ("s3://bucket/target", "give its folder, or check the name and --revision"),
    ):
        refused(folder, target, tmp_path / "draft", said)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    refused(folder, "someone/target", tmp_path / "draft", "download it and give its folder")
    # Nothing but the error, such as a warning that takes the target for a draft.
    assert not caplog.records


def test_what_cannot_be_read_is_refused(tmp_path, shipped):
    folder = trained(tmp_path / "trained", shipped)
    (tmp_path / "cut.pth").write_bytes((folder / PICKLED_NAME).read_bytes()[:5000])
    for arguments, said in (
        ((tmp_path / "nothing.pth", TARGET, tmp_path / "draft"), "there is no file"),
        ((tmp_path, TARGET, tmp_path / "draft"), "there is no file"),
        ((tmp_path / "cut.pth", TARGET, tmp_path / "draft"), "is damaged"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            convert(*arguments)
        assert "\n" not in str(error.value)


def test_the_console_command(tmp_path, capsys):
    for argv, code, said in (
        (["--version"], 0, __version__),
        (["--help"], 0, "frequent-tokens"),
        (["convert", "--help"], 0, "--target"),
        ([], 2, "COMMAND"),
        (["serve"], 2, "invalid choice: 'serve'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            commands.main(argv)
        assert stopped.value.code == code
        output = capsys.readouterr()
        assert said in output.out + output.err
    refused(tmp_path, TARGET, tmp_path / "draft", "there is no file")
    # OSErrors and errors of several lines of the libraries that commands call.
    with pytest.raises(SystemExit) as stopped:
        commands.main(["frequent-tokens", "--model", TARGET, str(tmp_path / "nothing.txt")])
    assert str(tmp_path / "nothing.txt") in str(stopped.value.code)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["frequent-tokens", "--model", "nobody/nothing", str(tmp_path / "nothing.txt")])
    message = str(stopped.value.code)
    assert message.startswith("vllm-longspec frequent-tokens: ")
    assert "\n" not in message
