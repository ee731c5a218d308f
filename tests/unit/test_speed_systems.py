# SPDX-License-Identifier: Apache-2.0
"""The systems of `benchmarks.speed`: what vLLM is told."""

import json
from pathlib import Path

import pytest

from benchmarks.speed import systems
from benchmarks.speed.__main__ import parse_arguments
from benchmarks.speed.systems import SYSTEMS, Model, NotMeasurable, check_system, prepare


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "FOLDER", tmp_path / "shapes")
    return Model.find("toy")


@pytest.fixture
def trained(tmp_path, toy):
    return Model("trained", tmp_path / "trained", toy.config)


@pytest.mark.parametrize("system", [*SYSTEMS, "default@8", "gamma2", "magicdec3", "cross1024"])
def test_known_systems(system):
    assert check_system(system) == system


@pytest.mark.parametrize("system", ["tuned", "given@8", "default@0", "gamma"])
def test_unknown_systems(system):
    with pytest.raises(NotMeasurable, match=f"there is no system {system}"):
        check_system(system)


def test_given_is_measured_where_its_options_are(monkeypatch, capsys):
    def systems_of(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["speed", *arguments])
        return parse_arguments().systems

    assert systems_of() == [system for system in SYSTEMS if system != "given"]
    assert systems_of("--given", "{}") == list(SYSTEMS) and systems_of("--systems", "plain") == ["plain"]
    with pytest.raises(SystemExit):
        systems_of("--systems", "plain,given")
    assert "--systems given needs its options: give them with --given" in capsys.readouterr().err


def test_options_must_be_given(toy):
    with pytest.raises(NotMeasurable, match="--given"):
        prepare(toy, "given", 2.5, None)


def test_given_options_are_told_as_they_are(toy):
    options = {"tree_shape": [2, 4], "quantization": None, "num_speculative_tokens_per_batch_size": [[1, 4, 3]]}
    decoding = prepare(toy, "given", 2.5, options)
    assert decoding.options == options
    assert decoding.speculative_config == options | {
        "model": str(systems.FOLDER / "toy-glide"),
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": 2.5,
    }


def test_no_options_are_the_default(toy):
    given, default = (prepare(toy, system, 2.5, {}) for system in ("given", "default"))
    assert given.options == {} and given.speculative_config == default.speculative_config


def test_a_number_of_frequent_tokens_is_that_many(toy):
    decoding = prepare(toy, "given", 2.5, {"frequent_tokens": 512})
    assert decoding.speculative_config is not None and decoding.options == {"frequent_tokens": 512}
    tokens = json.loads(Path(decoding.speculative_config["frequent_tokens"]).read_text())
    assert len(set(tokens)) == 512 and max(tokens) < toy.config["vocab_size"]


@pytest.mark.parametrize("frequent_tokens", ["auto", "auto:512", "tokens.json", False, None])
def test_other_frequent_tokens_are_the_plugins(toy, trained, frequent_tokens):
    for model in (toy, trained):
        config = prepare(model, "given", 2.5, {"frequent_tokens": frequent_tokens}).speculative_config
        assert config is not None and config["frequent_tokens"] is frequent_tokens


def test_random_frequent_tokens_are_not_for_trained_weights(trained):
    with pytest.raises(NotMeasurable, match="random frequent tokens"):
        prepare(trained, "given", None, {"frequent_tokens": 512})


def test_a_trained_draft(trained):
    config = prepare(trained, "given", 2.5, {"gamma": 2}).speculative_config
    assert config == {"gamma": 2, "model": str(trained.trained / "draft")}
    # One of another folder.
    config = prepare(trained, "given", 2.5, {"gamma": 2, "model": "another"}).speculative_config
    assert config == {"gamma": 2, "model": "another"}


def test_a_target_that_drafts_for_itself_has_no_draft(trained):
    options = {"method": "magicdec", "gamma": 3}
    assert prepare(trained, "given", None, options).speculative_config == options
    for system in ("magicdec", "magicdec3"):
        config = prepare(trained, system, None, None).speculative_config
        assert config is not None and "model" not in config
