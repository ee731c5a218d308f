# SPDX-License-Identifier: Apache-2.0
"""A draft as LongSpec's training code saves it becomes one that vLLM loads, through the console command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
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


class Unsafe:
    pass


def code(weights: dict[str, Any]) -> None:
    weights["config"] = Unsafe()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bad_name, "has unexpected parameters: self_attn.q_norm.weight"),
        (bad_shape, "mlp.up_proj.weight has shape [700, 256], where [704, 256] is needed"),
        (bad_dtype, "has weights of torch.bfloat16, torch.float32"),
        (no_tensor, "holds more than tensors by name"),
        (code, "pickled code is never run"),
    ],
)
def test_what_is_no_draft_of_the_target_is_refused(tmp_path, shipped, spoil, said):
    weights = dict(shipped)
    spoil(weights)
    folder, out = trained(tmp_path / "trained", weights), tmp_path / "draft"
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        convert(folder, TARGET, out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_what_cannot_be_read_is_refused(tmp_path, shipped):
    folder = trained(tmp_path / "trained", shipped)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "cut.pth").write_bytes((folder / PICKLED_NAME).read_bytes()[:5000])
    for arguments, said in (
        ((tmp_path / "nothing.pth", TARGET, tmp_path / "draft"), "there is no file"),
        ((tmp_path, TARGET, tmp_path / "draft"), "there is no file"),
        ((tmp_path / "cut.pth", TARGET, tmp_path / "draft"), "is damaged"),
        ((folder, TARGET, folder), "exists already: give a new folder"),
        ((folder, str(tmp_path), tmp_path / "draft"), "has no config.json that can be read"),
        ((folder, str(other), tmp_path / "draft"), "has model_type 'gpt2', but the families"),
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
    with pytest.raises(SystemExit, match="vllm-longspec convert: there is no file"):
        commands.main(["convert", str(tmp_path), "--target", TARGET, "--out", str(tmp_path / "draft")])
