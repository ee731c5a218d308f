# SPDX-License-Identifier: Apache-2.0
"""From the command line, or from Python, to the configuration of an engine."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.config.model as model_module
import vllm.platforms
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.config import KVTransferConfig, LoadConfig, ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import get_draft_load_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_longspec.proposers.glide.setup as draft_module
from tests.models import glide_shapes, write_draft, write_target
from tests.quantised_models import write_cache_scales, write_gptq
from vllm_longspec.attention.registry import (
    CPU_BACKEND,
    FLASH_BACKEND,
    TRITON_BACKEND,
    attention_backend,
    choose_attention_backend,
)
from vllm_longspec.configure import configure
from vllm_longspec.options import AUTO_LEVELS, options_of
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.tree.shape import TreeShape


def options_in(vllm_config):
    """The options of an engine with trees; None for another."""
    return options_of(vllm_config.speculative_config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def target(folder):
    return str(write_target(folder / "target", "llama"))


@pytest.fixture(scope="module")
def draft(folder, target):
    return str(write_draft(folder / "draft", folder / "target"))


@pytest.fixture(scope="module")
def ordinary_draft(folder):
    return str(write_target(folder / "longspec-ordinary-draft", "llama", num_hidden_layers=1, seed=2))


def create(target, **settings):
    return EngineArgs(model=target, dtype="float32", skip_tokenizer_init=True, **settings).create_engine_config()


def parse(target, *options):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", target, "--dtype", "float32", "--skip-tokenizer-init", *options])


def with_config(folder, source, **settings):
    """A copy of a checkpoint with other settings in its config.json; None leaves one out."""
    folder.mkdir()
    for file in Path(source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **settings}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def refused(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_python_options_reach_the_engine(target, draft):
    given = {"model": draft, "tree_shape": [2, 4, 4]}
    config = create(target, speculative_config=given)
    assert options_in(config).tree_shape == TreeShape((2, 4, 4))
    assert options_in(config) is not None
    assert config.num_speculative_tokens == 10
    assert config.speculative_config.method == "draft_model"
    assert config.speculative_config.draft_model_config.architecture == "LlamaGlideDecoderLayer"
    assert config.use_v2_model_runner
    assert given == {"model": draft, "tree_shape": [2, 4, 4]}


def test_options_reach_further_api_servers(target, draft, tmp_path):
    """They get the arguments that the first process has read, and read them again before any plugin is loaded."""
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[3, 4, 5, 6]")
    options = ["--speculative-tree-shape", "2", "4", "--speculative-copy-length", "3"]
    options += ["--speculative-frequent-tokens", str(tokens)]
    args = parse(target, "--speculative-model", draft, *options)
    first = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    unpatched = vars(EngineArgs)["from_cli_args"].__func__.longspec_original
    second = unpatched(AsyncEngineArgs, pickle.loads(pickle.dumps(args))).create_engine_config()
    for config in (first, second):
        assert options_in(config).tree_shape == TreeShape((2, 4))
        assert options_in(config).frequent_tokens == str(tokens)
        assert options_in(config).copy_length == 3


@pytest.mark.parametrize(
    ("options", "levels", "num_verified"),
    [
        ({}, (4, 16, 16, 16, 16), 68),
        ({"gamma": 4}, (1, 1, 1, 1), 4),
        ({"num_speculative_tokens": 24}, (4, 16, 16, 16, 16), 24),
        ({"tree_shape": [2, 4, 4], "num_speculative_tokens": 500}, (2, 4, 4), 10),
        ({"tree-shape": [2, 4], "num-speculative-tokens": 3}, (2, 4), 3),
        ({"gamma": 3, "method": "draft_model"}, (1, 1, 1), 3),
    ],
)
def test_shapes_and_verified_nodes(target, draft, options, levels, num_verified):
    config = create(target, speculative_config={"model": draft, **options})
    assert options_in(config).tree_shape.levels == levels
    assert config.num_speculative_tokens == num_verified


def test_qwen2(folder, target):
    qwen2 = write_target(folder / "qwen2", "qwen2")
    qwen2_draft = write_draft(folder / "qwen2-draft", qwen2)
    config = create(str(qwen2), spec_model=str(qwen2_draft))
    assert config.speculative_config.draft_model_config.architecture == "Qwen2GlideDecoderLayer"
    with pytest.raises(ValueError, match="model_type is qwen2 in the draft, llama in the target"):
        create(target, spec_model=str(qwen2_draft))


def test_draft_with_the_config_of_a_quantised_target(tmp_path, target, draft):
    """Its config.json is its target's; how the target is quantised says nothing about the draft."""
    quantised = write_gptq(tmp_path / "target", Path(target))
    settings = json.loads((quantised / "config.json").read_text())["quantization_config"]
    copied = with_config(tmp_path / "draft", draft, quantization_config=settings)
    engine_args = EngineArgs(model=str(quantised), dtype="float16", skip_tokenizer_init=True, spec_model=copied)
    config: Any = engine_args.create_engine_config()
    assert config.model_config.quantization is not None
    assert config.speculative_config.draft_model_config.quantization is None


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"], ["NoSuchModel"]])
def test_missing_or_other_architectures(tmp_path, target, draft, architectures):
    config = create(target, spec_model=with_config(tmp_path / "draft", draft, architectures=architectures))
    assert options_in(config) is not None
    assert config.speculative_config.draft_model_config.architecture == "LlamaGlideDecoderLayer"


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("drafts_length", "settings", "length"),
    [
        (512, {"max_model_len": 1024}, 1024),
        (512, {}, 2048),
        # Overrides are for the target alone.
        (2048, {"hf_overrides": {"rope_parameters": YARN, "max_position_embeddings": 8192}}, 8192),
        (
            2048,
            {"hf_overrides": {"rope_parameters": YARN, "max_position_embeddings": 8192}, "max_model_len": 4096},
            4096,
        ),
        (4096, {"max_model_len": 1024}, 1024),
    ],
)
def test_a_draft_does_not_limit_the_context(tmp_path, target, draft, drafts_length, settings, length):
    short = with_config(tmp_path / "draft", draft, max_position_embeddings=drafts_length)
    config = create(target, spec_model=short, **settings)
    assert config.model_config.max_model_len == length
    # vLLM 0.33 gives the whole engine the shorter of the two.
    assert config.speculative_config.draft_model_config.max_model_len == length


@pytest.mark.parametrize("batch", [{}, {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}])
def test_adapters_need_no_room_for_a_tree_in_every_request(target, draft, batch):
    """The default batches of vLLM, on this device and on an H200, of which each request may take a tree of 68 nodes."""
    config = create(target, spec_model=draft, enable_lora=True, **batch)
    scheduler = config.scheduler_config
    assert scheduler.max_num_batched_tokens < 69 * scheduler.max_num_seqs
    assert config.num_speculative_tokens == config.speculative_config.num_speculative_tokens == 68
    assert options_in(config).tree_shape.num_nodes == 68
    # What others draft still needs it.
    with pytest.raises(ValueError, match="Consider increasing max_num_batched_tokens"):
        ngram = {"method": "ngram", "num_speculative_tokens": 68}
        create(target, speculative_config=ngram, enable_lora=True, **batch)


def test_the_same_arguments_can_be_used_again(target, draft):
    engine_args = EngineArgs(
        model=target, skip_tokenizer_init=True, spec_model=draft, spec_tokens=5, speculative_config={"gamma": 8}
    )
    for _ in range(2):
        config = engine_args.create_engine_config()
        assert (options_in(config).tree_shape.levels, config.num_speculative_tokens) == ((1,) * 8, 5)
    assert engine_args.speculative_config == {"gamma": 8}


@pytest.mark.parametrize("arguments", [EngineArgs, AsyncEngineArgs])
def test_command_line_reaches_the_engine(target, draft, arguments):
    args = parse(target, "--speculative-model", draft, "--speculative-tree-shape", "2", "4", "4")
    config = arguments.from_cli_args(args).create_engine_config()
    assert options_in(config).tree_shape.levels == (2, 4, 4)
    # `vllm bench` makes an LLM of exactly these fields.
    copied = arguments(**vars(arguments.from_cli_args(args)))
    assert options_in(copied.create_engine_config()).tree_shape.levels == (2, 4, 4)


@pytest.mark.parametrize(
    ("options", "levels", "num_verified"),
    [
        (["--speculative-model", "DRAFT"], (4, 16, 16, 16, 16), 68),
        (["--spec-model", "DRAFT", "--spec-tokens", "7"], (4, 16, 16, 16, 16), 7),
        (["--speculative-config", '{"model": "DRAFT", "tree_shape": [3, 3]}'], (3, 3), 6),
        (["--speculative-config", '{"model": "DRAFT"}', "--speculative-tree-shape", "1", "1"], (1, 1), 2),
        (["--speculative-model", "DRAFT", "--speculative-config.gamma", "2"], (1, 1), 2),
        (["--speculative-model", "DRAFT", "--speculative-tree-shape", "auto"], AUTO_LEVELS, 63),
        (["--speculative-model", "DRAFT", "--speculative-config.tree_shape", "auto"], AUTO_LEVELS, 63),
        # vLLM gives the entries of such a list as strings.
        (["--speculative-model", "DRAFT", "--speculative-config.tree_shape+", "2,4"], (2, 4), 6),
        (
            ["--spec-model", "DRAFT", "--speculative-config.tree-shape+", "2", "--speculative-config.tree-shape+=4"],
            (2, 4),
            6,
        ),
        (["--speculative-config", '{"model": "DRAFT", "gamma": "4", "num_speculative_tokens": "3"}'], (1,) * 4, 3),
    ],
)
def test_spellings_of_the_command_line(target, draft, options, levels, num_verified):
    args = parse(target, *(option.replace("DRAFT", draft) for option in options))
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert (options_in(config).tree_shape.levels, config.num_speculative_tokens) == (
        levels,
        num_verified,
    )


@pytest.mark.parametrize("option", ["--speculative-model", "--spec-model"])
def test_draft_of_another_kind_is_vllms_business(target, ordinary_draft, option):
    args = parse(target, option, ordinary_draft, "--spec-tokens", "3")
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert options_in(config) is None
    assert options_in(config) is None
    assert (config.speculative_config.method, config.num_speculative_tokens) == ("draft_model", 3)
    assert config.speculative_config.draft_model_config.architecture == "LlamaForCausalLM"
    assert config.attention_config.backend is None


def test_no_draft_at_all(target):
    config = EngineArgs.from_cli_args(parse(target)).create_engine_config()
    assert config.speculative_config is None
    assert options_in(config) is None
    assert options_in(create(target, speculative_config={"method": "ngram", "num_speculative_tokens": 3})) is None


def test_configuration_survives_a_spawned_process(target, draft):
    """A spawned worker unpickles the configuration before it loads plugins."""
    config = create(target, speculative_config={"model": draft, "tree_shape": [2, 4]})
    config.attention_config.backend = attention_backend(FLASH_BACKEND)
    code = """if True:
        import pickle, sys
        config = pickle.load(sys.stdin.buffer)
        from vllm_longspec.options import options_of
        draft = config.speculative_config.draft_model_config
        levels = options_of(config.speculative_config).tree_shape.levels
        print(*levels, draft.architectures[0], config.attention_config.backend.get_path())
    """
    child = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True, timeout=120)
    assert child.returncode == 0, child.stderr.decode()
    said = "2 4 LlamaGlideDecoderLayer vllm_longspec.attention.flash.TreeFlashAttentionBackend"
    assert child.stdout.decode().splitlines()[-1] == said
    assert options_in(pickle.loads(pickle.dumps(config))).tree_shape.levels == (2, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree_shape": [4, 0]}, "tree_shape must hold positive integers only"),
        ({"tree_shape": [65]}, "65 nodes at level 1"),
        ({"tree_shape": [1, 1], "gamma": 2}, "mutually exclusive"),
        ({"tree_shape": "auto", "gamma": 2}, "mutually exclusive"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be a positive integer"),
        ({"adapt_nodes": "yes"}, "adapt_nodes must be true or false"),
        ({"method": "eagle3"}, "speculative method 'eagle3'"),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method='probabilistic'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(target, draft, options, said):
    with pytest.raises(ValueError) as error:
        create(target, speculative_config={"model": draft, **options})
    assert said in refused(error)


@pytest.mark.parametrize("method", ["MagicDec", "chains"])
def test_an_unknown_method_is_refused_with_the_plugins_among_the_others(target, method):
    with pytest.raises(ValueError) as error:
        create(target, speculative_config={"method": method})
    said = refused(error)
    assert said.startswith(f"there is no speculative method {method!r}: give ")
    assert " magicdec" in said and "leave it out for a GLIDE draft" in said and "'ngram'" in said
    # Whatever else vLLM refuses, it says itself.
    with pytest.raises(ValueError, match="num_speculative_tokens must be provided") as error:
        create(target, speculative_config={"method": "ngram"})
    assert "there is no speculative method" not in str(error.value)


def test_the_method_glide_needs_a_draft(target, draft, ordinary_draft):
    assert options_in(create(target, speculative_config={"method": "glide", "model": draft})) is not None
    for model, said in ((None, "no draft was given"), (ordinary_draft, f"{ordinary_draft} is not one")):
        with pytest.raises(ValueError) as error:
            create(target, speculative_config={"method": "glide", "model": model})
        assert refused(error).startswith(f"the method glide needs a GLIDE draft: {said}")


def find_draft(monkeypatch, on_gpu, target, draft, *, hopper=False, settings=None, num_ranks=1, **options):
    given = {"model": draft, "tree_shape": [2, 4, 4], **options}
    settings = {"dtype": "float16", **(settings or {})}
    arguments = EngineArgs(model=target, skip_tokenizer_init=True, speculative_config=given, **settings)
    model_config = arguments.create_model_config()
    platform = type(vllm.platforms.current_platform)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "is_cuda", lambda self: on_gpu)
        patch.setattr(platform, "is_cpu", lambda self: not on_gpu)
        patch.setattr(platform, "is_device_capability_family", lambda self, family: hopper and family == 90)
        return configure(
            arguments, model_config, ParallelConfig(tensor_parallel_size=num_ranks, distributed_executor_backend="mp")
        )


@pytest.mark.parametrize(
    ("given", "quantization"),
    [
        ({}, "fp8_per_channel"),
        ({"settings": {"dtype": "bfloat16"}}, "fp8_per_channel"),
        ({"settings": {"dtype": "float32"}}, None),
        # A target that is quantised when it is loaded; one that was before is below.
        ({"settings": {"quantization": "fp8_per_channel"}}, "fp8_per_channel"),
        # A kernel that cannot compute with it.
        ({"settings": {"linear_backend": "marlin"}}, None),
        ({"settings": {"kernel_config": {"linear_backend": "marlin"}}}, None),
        ({"settings": {"kernel_config": {"linear_backend_per_quant": {"fp8_w8a8": "marlin"}}}}, None),
        # What nobody has measured.
        ({"hopper": False}, None),
        ({"num_ranks": 2}, "fp8_per_channel"),
        # Shards that are not whole tiles of fp8 kernels.
        ({"num_ranks": 3}, None),
        # What the user says is what is done.
        ({"quantization": None}, None),
        ({"quantization": "fp8_per_tensor"}, "fp8_per_tensor"),
        ({"quantization": "fp8_per_channel", "hopper": False}, "fp8_per_channel"),
    ],
)
def test_a_large_draft_is_quantised(monkeypatch, target, draft, given, quantization):
    monkeypatch.setattr("vllm_longspec.proposers.glide.quantization.LEVEL", 1.0)
    found = find_draft(monkeypatch, True, target, draft, **{"hopper": True, **given})
    assert found.vllm_options["quantization"] == quantization


def test_no_other_draft_is_quantised(monkeypatch, target, draft):
    # Starting its kernels takes longer than reading its weights.
    assert find_draft(monkeypatch, True, target, draft, hopper=True).vllm_options["quantization"] is None
    monkeypatch.setattr("vllm_longspec.proposers.glide.quantization.LEVEL", 1.0)
    assert find_draft(monkeypatch, False, target, draft, hopper=True).vllm_options["quantization"] is None


def test_the_draft_of_a_quantised_target_is_quantised_in_its_own_way(monkeypatch, tmp_path, target, draft):
    monkeypatch.setattr("vllm_longspec.proposers.glide.quantization.LEVEL", 1.0)
    quantised = str(write_gptq(tmp_path / "target", Path(target)))
    assert (
        find_draft(monkeypatch, True, quantised, draft, hopper=True).vllm_options["quantization"] == "fp8_per_channel"
    )


def test_a_draft_is_quantised_for_what_a_rank_reads(monkeypatch, target, draft):
    read = GlideCost.of_shape(AutoConfig.from_pretrained(target), draft_vocab_size=64).level
    # Between what one rank and what each of two reads.
    monkeypatch.setattr("vllm_longspec.proposers.glide.quantization.LEVEL", read * 0.75)
    for num_ranks, quantization in ((1, "fp8_per_channel"), (2, None)):
        found = find_draft(monkeypatch, True, target, draft, hopper=True, num_ranks=num_ranks)
        assert found.vllm_options["quantization"] == quantization


def test_a_smaller_head_leaves_a_draft_its_quantisation(monkeypatch, target, draft):
    """Or it might cost more than it saves."""
    shape = AutoConfig.from_pretrained(target)
    all_tokens, some = (GlideCost.of_shape(shape, draft_vocab_size=size).level for size in (64, 16))
    monkeypatch.setattr("vllm_longspec.proposers.glide.quantization.LEVEL", (all_tokens + some) / 2)
    found = find_draft(monkeypatch, True, target, draft, hopper=True, frequent_tokens="auto:16")
    assert found.options.frequent_tokens == 16
    assert found.vllm_options["quantization"] == "fp8_per_channel"


SCHEDULE = [(1, 8, 4)]
SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5}
DEFAULT_SCHEDULE = [(1, 32, 10), (33, 64, 7), (65, 85, 5), (86, 128, 3), (129, 256, 1), (257, 512, 0)]
# Where nothing says what a step costs.
CHEAP_SCHEDULE = [(1, 8, 10), (9, 16, 7), (17, 21, 5), (22, 32, 3), (33, 64, 1), (65, 128, 0)]


@pytest.mark.parametrize(
    ("on_gpu", "options", "schedule", "chosen_by"),
    [
        (True, {}, DEFAULT_SCHEDULE, "acceptance, measured"),
        (True, {"step_costs": "shipped"}, DEFAULT_SCHEDULE, "acceptance"),
        (True, {"adapt_nodes": False}, DEFAULT_SCHEDULE, "cost, measured"),
        (True, {"adapt_nodes": False, "step_costs": "shipped"}, DEFAULT_SCHEDULE, "cost"),
        # Accepted is what was asked for, of however few nodes.
        (True, SYNTHETIC, DEFAULT_SCHEDULE, "cost, measured"),
        # What the user says is what is done.
        (True, {"num_speculative_tokens_per_batch_size": SCHEDULE}, SCHEDULE, ""),
        (
            True,
            {"num_speculative_tokens_per_batch_size": SCHEDULE, "adapt_nodes": True},
            SCHEDULE,
            "acceptance, measured",
        ),
        # Triton's interpreter verifies all nodes unless it is told otherwise, and has no graphs whose time says much.
        (False, {}, None, ""),
        (False, {"adapt_nodes": True}, DEFAULT_SCHEDULE, "acceptance"),
        (False, {"adapt_nodes": True, "step_costs": "measure"}, DEFAULT_SCHEDULE, "acceptance"),
    ],
)
def test_how_many_nodes_are_verified_by_default(monkeypatch, target, draft, on_gpu, options, schedule, chosen_by):
    found = find_draft(monkeypatch, on_gpu, target, draft, **options)
    assert found.options.adaptive_verification is chosen_by.startswith("acceptance")
    assert found.options.nodes_by_cost is chosen_by.startswith("cost")
    assert found.options.measures_costs is chosen_by.endswith("measured")
    assert found.vllm_options.get("num_speculative_tokens_per_batch_size") == schedule


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, [(1, 102, 4), (103, 128, 3), (129, 170, 2), (171, 256, 1), (257, 1 << 16, 0)]),
        # Every batch drafts all tokens, whatever it costs.
        ({"adaptive_verification": False}, [(1, 1 << 16, 4)]),
        (SYNTHETIC, [(1, 1 << 16, 4)]),
    ],
)
def test_how_many_tokens_a_target_drafts_for_itself(monkeypatch, target, options, schedule):
    found = find_draft(monkeypatch, True, target, None, tree_shape=None, method="magicdec", **options)
    assert not found.options.nodes_by_cost
    assert found.vllm_options["num_speculative_tokens"] == 4
    assert found.vllm_options["num_speculative_tokens_per_batch_size"] == schedule


@pytest.mark.parametrize("value", ["measured", True, 1, []])
def test_where_costs_come_from_is_one_of_two_words(target, draft, value):
    with pytest.raises(ValueError, match="step_costs must be 'measure' or 'shipped', got ") as error:
        create(target, speculative_config={"model": draft, "step_costs": value})
    refused(error)


# With two queries for each KV head; three levels have no 60 nodes.
AUTO_PLANS = {
    63: 8,
    62: 5,
    61: 12,
    31: 8,
    30: 5,
    29: 12,
    28: 3,
    15: 8,
    14: 5,
    13: 12,
    12: 3,
    7: 7,
    6: 5,
    5: 3,
    4: 3,
    3: 3,
    1: 1,
}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("options", "plans", "num_verified"),
    [
        ({}, AUTO_PLANS, 63),
        ({"adaptive_verification": True}, AUTO_PLANS, 63),
        ({"num_speculative_tokens": 4}, {4: 4, 3: 3, 1: 1}, 4),
        # The user's numbers are the most.
        ({"num_speculative_tokens_per_batch_size": [(1, 2, 24), (3, 8, 0)]}, {24: 8, 23: 5, 22: 12, 21: 3}, 24),
    ],
)
def test_levels_are_chosen(monkeypatch, target, draft, on_gpu, options, plans, num_verified):
    found = find_draft(monkeypatch, on_gpu, target, draft, tree_shape="auto", **options)
    assert found.options.tree_shape == TreeShape(AUTO_LEVELS).with_plans(plans)
    assert found.options.adaptive_verification is True
    assert found.vllm_options["num_speculative_tokens"] == num_verified
    assert found.vllm_options["num_speculative_tokens_per_batch_size"][0][2] == num_verified


def test_levels_are_not_chosen_where_nothing_is_followed(monkeypatch, tmp_path, target, draft):
    quantised = str(write_gptq(tmp_path / "target", Path(target)))
    for model, options, said in (
        (target, {"adaptive_verification": False}, "adaptive_verification=false: give the nodes of each level"),
        (target, {"adapt_nodes": False}, "adapt_nodes=false: give"),
        (target, SYNTHETIC, "rejection_sample_method='synthetic', which sets what is accepted: give"),
        (quantised, {"step_costs": "shipped"}, "whose steps are not timed: give"),
    ):
        with pytest.raises(ValueError, match="tree_shape='auto' follows what is accepted") as error:
            find_draft(monkeypatch, True, model, draft, tree_shape="auto", **options)
        assert said in refused(error)


def test_a_quantised_target_has_the_costs_of_its_own_steps_or_none(monkeypatch, tmp_path, target, draft):
    quantised = str(write_gptq(tmp_path / "target", Path(target)))
    found = find_draft(monkeypatch, True, quantised, draft)
    assert found.options.adaptive_verification and found.options.measures_costs
    assert found.vllm_options["num_speculative_tokens_per_batch_size"] == DEFAULT_SCHEDULE
    assert find_draft(monkeypatch, True, quantised, draft, tree_shape="auto").options.tree_shape.plans
    shipped = find_draft(monkeypatch, True, quantised, draft, step_costs="shipped")
    assert not shipped.options.chooses_nodes
    assert shipped.vllm_options["num_speculative_tokens_per_batch_size"] == CHEAP_SCHEDULE
    for on_gpu, options in ((True, {"step_costs": "shipped"}), (False, {})):
        with pytest.raises(ValueError, match="adapt_nodes is not supported with a target of quantization='") as error:
            find_draft(monkeypatch, on_gpu, quantised, draft, adapt_nodes=True, **options)
        assert "serve on a GPU without step_costs" in refused(error)


def test_numbers_by_batch_size_stay_with_data_parallelism(target, draft, ordinary_draft):
    """vLLM drops them for every draft; each engine of a GLIDE draft's target is independent of the others."""
    given = {"num_speculative_tokens_per_batch_size": SCHEDULE}
    parallel = {"data_parallel_size": 2, "distributed_executor_backend": "mp"}
    glide = create(target, speculative_config={"model": draft, "tree_shape": [2, 4], **given}, **parallel)
    assert [tuple(each) for each in glide.speculative_config.num_speculative_tokens_per_batch_size] == SCHEDULE
    others = {"model": ordinary_draft, "method": "draft_model", "num_speculative_tokens": 4, **given}
    other = create(target, speculative_config=others, **parallel)
    assert other.speculative_config.num_speculative_tokens_per_batch_size is None


@pytest.mark.parametrize("options", [{"tree_shape": [2, 4]}, {"gamma": 3}])
def test_a_tree_needs_a_glide_draft(target, ordinary_draft, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} needs a GLIDE draft: {ordinary_draft} is not one") as error:
        create(target, speculative_config={"model": ordinary_draft, "num_speculative_tokens": 3, **options})
    refused(error)
    # MagicDec drafts chains only.
    other = '; or give "method": "magicdec"' if name == "gamma" else ""
    for method in ({}, {"method": "ngram"}):
        with pytest.raises(ValueError) as error:
            create(target, speculative_config={**options, **method})
        said = f"{name} needs a GLIDE draft: no draft was given, add --speculative-model DRAFT"
        assert refused(error) == said + other


def test_frequent_tokens(tmp_path, target, draft):
    few, many = tmp_path / "few.json", tmp_path / "many.json"
    few.write_text("[5, 3, 9]")
    many.write_text(json.dumps(list(range(40))))

    def file_of(*options):
        config = EngineArgs.from_cli_args(parse(target, *options)).create_engine_config()
        return options_in(config).frequent_tokens

    command = ["--speculative-model", draft, "--speculative-tree-shape", "2", "4"]
    assert file_of(*command) is None
    assert file_of(*command, "--speculative-frequent-tokens", str(few)) == str(few)
    with pytest.raises(ValueError, match="asks for 4 nodes at level 1, but 1 nodes above it with 3 tokens each"):
        file_of("--speculative-model", draft, "--speculative-frequent-tokens", str(few))
    given = json.dumps({"model": draft, "frequent_tokens": str(few)})
    with pytest.raises(ValueError, match="--speculative-frequent-tokens and --speculative-config"):
        file_of("--speculative-config", given, "--speculative-frequent-tokens", str(many))
    # The file that comes with a draft is used without being asked for.
    shipped = Path(with_config(tmp_path / "draft", draft)) / "frequent_tokens.json"
    shipped.write_text(many.read_text())
    config = create(target, speculative_config={"model": str(shipped.parent)})
    assert options_in(config).frequent_tokens == str(shipped)
    config = create(target, speculative_config={"model": str(shipped.parent), "frequent_tokens": False})
    assert options_in(config).frequent_tokens is None
    command = ["--speculative-model", str(shipped.parent)]
    assert file_of(*command) == str(shipped)
    assert file_of(*command, "--speculative-frequent-tokens", "false") is None


def test_frequent_tokens_that_are_learned(tmp_path, target, draft):
    command = ["--speculative-model", draft, "--speculative-tree-shape", "2", "4"]

    def learned(*options):
        config = EngineArgs.from_cli_args(parse(target, *command, *options)).create_engine_config()
        return options_in(config).frequent_tokens

    assert learned("--speculative-frequent-tokens", "auto:20") == 20
    # In a vocabulary as small as this one all tokens are drafted.
    assert learned("--speculative-frequent-tokens", "auto") is None
    # A file beside the draft comes first, unless asked otherwise.
    shipped = Path(with_config(tmp_path / "draft", draft))
    (shipped / "frequent_tokens.json").write_text(json.dumps(list(range(40))))
    config = create(target, speculative_config={"model": str(shipped), "frequent_tokens": "auto"})
    assert options_in(config).frequent_tokens is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (8, "must be a file, auto, auto:N or false, got 8"),
        ("no_file.json", "no_file.json cannot be read"),
        ("auto:", "must be auto:N with N from 16 to "),
        ("auto:15", "must be auto:N with N from 16 to "),
        ("auto:999999", "must be auto:N with N from 16 to "),
        ("auto:-20", "must be auto:N with N from 16 to "),
    ],
)
def test_wrong_frequent_tokens_are_refused(target, draft, value, said):
    with pytest.raises(ValueError, match=said) as error:
        create(target, speculative_config={"model": draft, "frequent_tokens": value})
    refused(error)


def test_copies_are_made_unless_they_are_turned_off(target, draft):
    def copy_length(**given):
        return options_in(create(target, speculative_config={"model": draft, **given})).copy_length

    assert [copy_length(), copy_length(copy_length=0), copy_length(gamma=4, copy_length=8)] == [16, 0, 8]
    with pytest.raises(ValueError, match="copy_length must be an integer from 0 to 255, got -1") as error:
        copy_length(copy_length=-1)
    refused(error)


def test_the_same_option_in_two_places_is_refused(target, draft):
    args = parse(
        target, "--speculative-config", f'{{"model": "{draft}", "tree_shape": [1]}}', "--speculative-tree-shape", "2"
    )
    said = r"--speculative-tree-shape and --speculative-config\['tree_shape'\] are mutually exclusive"
    with pytest.raises(ValueError, match=said):
        EngineArgs.from_cli_args(args)
    with pytest.raises(ValueError, match=r"--spec-model and --speculative-config\['model'\] are mutually exclusive"):
        create(target, spec_model=draft, speculative_config={"model": draft})


@pytest.mark.parametrize("shape", [["2.5"], ["four"], ["Auto"], []])
def test_the_command_line_takes_integers_only(target, draft, shape, capsys):
    with pytest.raises(SystemExit):
        parse(target, "--speculative-model", draft, "--speculative-tree-shape", *shape)
    assert "--speculative-tree-shape" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["2,four", "2,", "2 4", "[2,4]"])
def test_lists_of_the_command_line_hold_integers_only(target, draft, given):
    args = parse(target, "--speculative-model", draft, "--speculative-config.tree_shape+", given)
    with pytest.raises(ValueError, match="tree_shape must hold positive integers only, got '") as error:
        EngineArgs.from_cli_args(args).create_engine_config()
    refused(error)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("s3://bucket/draft", "is in object storage, where no GLIDE draft is looked for: copy it to a local folder"),
        # The tests are offline.
        ("misspelt/draft", "is not in the cache of the Hugging Face hub, and the hub is not asked .*HF_HUB_OFFLINE"),
        ("/no/such/draft", "is neither a local folder nor the name of a repository: check it"),
    ],
)
def test_where_a_draft_is_not_is_said(target, model, said):
    args = parse(target, "--speculative-model", model, "--speculative-tree-shape", "2", "4")
    with pytest.raises(ValueError, match=f"tree_shape needs a GLIDE draft: {model} {said}") as error:
        EngineArgs.from_cli_args(args).create_engine_config()
    refused(error)


@pytest.mark.parametrize(("given", "is_warned"), [({}, True), ({"num_speculative_tokens": 3}, False)])
def test_draft_that_is_not_seen_goes_to_vllm_with_a_warning(target, monkeypatch, caplog, given, is_warned):
    """A draft of another kind may be in object storage. vLLM needs to be told how many tokens it drafts."""
    monkeypatch.setattr(draft_module.logger, "propagate", True)
    engine_args = EngineArgs(
        model=target, skip_tokenizer_init=True, speculative_config={"model": "s3://bucket/draft", **given}
    )
    with caplog.at_level(logging.WARNING, logger=draft_module.logger.name):
        assert configure(engine_args, None, None) is None  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == is_warned
    assert all(line.startswith("Draft s3://bucket/draft is in object storage, where no") for line in said)
    assert engine_args.speculative_config == {"model": "s3://bucket/draft", **given}


def test_glide_draft_that_only_vllm_sees_is_refused(target, draft, ordinary_draft, monkeypatch):
    """From object storage vLLM pulls what it needs, and finds an architecture that it knows."""

    def pulls(folder):
        pulled = SimpleNamespace(dir=folder, pull_files=lambda *args, **kwargs: None)
        monkeypatch.setattr(model_module, "ObjectStorageModel", lambda url: pulled)

    given = {"model": "s3://bucket/draft", "num_speculative_tokens": 3}
    pulls(ordinary_draft)
    assert create(target, speculative_config=given).speculative_config.method == "draft_model"
    pulls(draft)
    with pytest.raises(ValueError, match=r"a GLIDE draft cannot be served from where it is: s3://.*in object") as error:
        create(target, speculative_config=given)
    refused(error)


def as_bin(draft, folder, file_name="pytorch_model.bin"):
    """A copy of a draft with its weights in a .bin file, beside what Hugging Face's trainer leaves there."""
    folder = Path(with_config(folder, draft))
    torch.save(load_file(folder / "model.safetensors"), folder / file_name)
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(pickle.dumps(json.JSONEncoder()))
    return str(folder)


TARGETS_FORMATS = [
    ("auto", {}),
    ("safetensors", {"model_loader_extra_config": {"enable_multithread_load": True}}),
    ("fastsafetensors", {}),
    ("sharded_state", {"model_loader_extra_config": {"pattern": "*.safetensors"}}),
    ("runai_streamer", {"model_loader_extra_config": {"concurrency": 4}}),
    ("npcache", {}),
    ("pt", {"ignore_patterns": ["*.bin", "*.safetensors"]}),
    ("mistral", {"safetensors_load_strategy": "torchao"}),
]


@pytest.mark.parametrize(("load_format", "settings"), TARGETS_FORMATS)
@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_draft_is_loaded_in_the_format_of_its_own_files(target, draft, tmp_path, load_format, settings, file_name):
    if file_name != "model.safetensors":
        draft = as_bin(draft, tmp_path / "draft", file_name)
    config = create(target, load_format=load_format, download_dir="/downloads", spec_model=draft, **settings)
    assert config.load_config.load_format == load_format
    load_config = get_draft_load_config(config)
    assert load_config.download_dir == "/downloads"
    # As the speculator does it.
    loader: Any = get_model_loader(load_config)
    draft_config = config.speculative_config.draft_model_config
    weights = dict(loader.get_all_weights(draft_config, torch.nn.Module()))
    assert weights.keys() == glide_shapes(json.loads((Path(target) / "config.json").read_text())).keys()


@pytest.mark.parametrize(
    "given", [{"load_format": "safetensors"}, {"load-format": "SAFETENSORS"}, LoadConfig(load_format="safetensors")]
)
def test_draft_load_config_of_the_user_goes_first(target, draft, given):
    config = create(target, load_format="dummy", speculative_config={"model": draft, "draft_load_config": given})
    assert get_draft_load_config(config) == LoadConfig(load_format="safetensors")


def test_dummy_weights_are_for_both(target, draft, tmp_path):
    """As vLLM documents it, and as models are timed without any weights."""
    without = Path(with_config(tmp_path / "draft", draft))
    (without / "model.safetensors").unlink()
    for model in (draft, str(without)):
        assert get_draft_load_config(create(target, load_format="dummy", spec_model=model)).load_format == "dummy"
    given = {"model": str(without), "draft_load_config": {"load_format": "dummy"}}
    assert get_draft_load_config(create(target, speculative_config=given)).load_format == "dummy"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "has no file of weights: download or export it again, or give draft_load_config {"),
        (
            {"load_format": "pt"},
            "has no file of weights of load_format 'pt', which draft_load_config asks for: download",
        ),
        ("dummy", "draft_load_config must be vLLM's LoadConfig, got 'dummy': give an object such as"),
        ({"format": "pt"}, "draft_load_config has no option 'format', its options are load_format, "),
        ({"download_dir": 5}, "draft_load_config has a download_dir that is none (Input should be a valid string)"),
    ],
)
def test_draft_without_weights_names_draft_load_config(target, draft, tmp_path, given, said):
    without = Path(with_config(tmp_path / "draft", draft))
    (without / "model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        create(target, speculative_config={"model": str(without), "draft_load_config": given})
    assert said in refused(error)


def test_draft_load_config_that_does_not_fit_the_draft_is_refused(target, draft, tmp_path):
    draft = as_bin(draft, tmp_path / "draft")
    said = "load_format 'safetensors', which draft_load_config asks for: its weights are in pytorch_model.bin, leave"
    with pytest.raises(ValueError, match=said) as error:
        create(target, speculative_config={"model": draft, "draft_load_config": {"load_format": "safetensors"}})
    refused(error)


def test_draft_of_another_size_is_refused(tmp_path, target, draft):
    other = with_config(tmp_path / "draft", draft, intermediate_size=256)
    with pytest.raises(ValueError, match="intermediate_size is 256 in the draft, 128 in the target") as error:
        create(target, spec_model=other)
    refused(error)


def test_path_that_vllm_takes_for_another_method_is_refused(tmp_path, target, draft):
    with pytest.raises(ValueError, match="takes any path with 'eagle3' in it for another kind: move it") as error:
        create(target, spec_model=with_config(tmp_path / "not-eagle3", draft))
    refused(error)


def test_sleep_mode_keeps_the_parameters_of_the_draft(target, draft, monkeypatch):
    """vLLM's worker copies what has these names before it discards weights (level 2)."""
    monkeypatch.setattr(vllm.platforms.current_platform, "is_sleep_mode_available", lambda: True)
    settings = {"spec_model": draft, "enable_sleep_mode": True}
    assert create(target, **settings).model_config.sleep_preserve_parameter_names == ["draft.*"]
    named = create(target, **settings, sleep_preserve_parameter_names=["theirs.*", "draft.*"])
    assert named.model_config.sleep_preserve_parameter_names == ["theirs.*", "draft.*"]
    # Without sleep mode, and without trees, nothing is changed.
    assert create(target, spec_model=draft).model_config.sleep_preserve_parameter_names == []
    assert create(target, enable_sleep_mode=True).model_config.sleep_preserve_parameter_names == []


def test_fp8_drafts_and_sleep_mode(target, draft):
    engine_args = EngineArgs(model=target, enable_sleep_mode=True)
    setup = draft_module.GlideSetup.find({"model": draft}, {})
    assert setup is not None
    given: dict[str, Any] = {"quantization": "fp8_per_channel"}
    model_config: Any = None
    parallel_config: Any = None
    with pytest.raises(ValueError, match=r"quantization='fp8_per_channel' of a GLIDE draft .* sleep mode: ") as error:
        setup.vllm_options(engine_args, given, model_config, parallel_config)
    refused(error)
    # Not the default either, of which target and GPU would decide.
    assert setup.vllm_options(engine_args, {}, model_config, parallel_config)["quantization"] is None


def test_sliding_window_of_the_target_is_refused(tmp_path):
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}
    target = write_target(tmp_path / "target", "qwen2", **window)
    draft = write_draft(tmp_path / "draft", target)
    with pytest.raises(ValueError, match=r"a target with a sliding window of 128 \(target .*--disable-sliding-window"):
        create(str(target), spec_model=str(draft))
    assert options_in(create(str(target), spec_model=str(draft), disable_sliding_window=True)) is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_impl": "transformers"}, "model_impl='transformers'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a KV cache of fp8_e5m2 with a model of float32 is not supported"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "a KV cache that is quantised in some layers only is not supported",
        ),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
            "the KV connector ExampleConnector is not supported",
        ),
        ({"attention_backend": "FLASH_ATTN"}, "attention backend FLASH_ATTN cannot verify the tree"),
        (
            {"structured_outputs_config": {"backend": "lm-format-enforcer"}},
            "the structured output backend lm-format-enforcer is not supported",
        ),
    ],
)
def test_unsupported_engine_is_refused_at_start_up(target, draft, settings, said):
    with pytest.raises(ValueError) as error:
        create(target, spec_model=draft, **settings)
    assert said in refused(error)


def test_model_runner_v1_is_refused(target, draft, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=1 or leave it unset"):
        create(target, spec_model=draft)


def test_without_the_interpreter_a_cpu_is_refused(target, draft, monkeypatch):
    if not vllm.platforms.current_platform.is_cpu():
        pytest.skip("the interpreter is for CPUs")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="on a CPU its interpreter: set TRITON_INTERPRET=1 before vLLM starts"):
        create(target, spec_model=draft)


class Gpu:
    """What the choice of an attention backend reads of a platform."""

    @staticmethod
    def is_cpu():
        return False


@pytest.mark.parametrize(("flash_version", "chosen"), [(3, "LONGSPEC_FLASH"), (2, "LONGSPEC_TRITON")])
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_attention_backend_of_a_quantised_cache(target, tmp_path, monkeypatch, flash_version, chosen, from_checkpoint):
    """FlashAttention 2 reads no fp8; the checkpoint may ask for it as well as the user."""
    import vllm.v1.attention.backends.fa_utils as fa_utils

    settings: dict[str, Any] = {} if from_checkpoint else {"kv_cache_dtype": "fp8"}
    if from_checkpoint:
        target = str(write_cache_scales(tmp_path / "target", Path(target), key=1.0, value=1.0))
    engine_args: Any = EngineArgs(model=target, skip_tokenizer_init=True, dtype="bfloat16", **settings)
    model_config = engine_args.create_model_config()
    monkeypatch.setattr(vllm.platforms, "_current_platform", Gpu)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: flash_version)
    choose_attention_backend(engine_args, model_config)
    assert engine_args.attention_backend.name == chosen


@pytest.mark.parametrize(
    ("dtype", "flash_version", "given", "chosen"),
    [
        ("bfloat16", 3, None, "LONGSPEC_FLASH"),
        ("float16", 2, None, "LONGSPEC_FLASH"),
        ("bfloat16", 4, None, "LONGSPEC_TRITON"),
        ("bfloat16", None, None, "LONGSPEC_TRITON"),
        ("float32", 3, None, "LONGSPEC_TRITON"),
        ("bfloat16", 3, "LONGSPEC_TRITON", "LONGSPEC_TRITON"),
        ("bfloat16", 3, "longspec_triton", "LONGSPEC_TRITON"),
        ("float32", 3, "auto", "LONGSPEC_TRITON"),
        ("bfloat16", 3, "FLASH_ATTN", None),
        ("bfloat16", 3, "TRITON_ATTN", None),
    ],
)
def test_attention_backend_on_a_gpu(target, monkeypatch, dtype, flash_version, given, chosen):
    import vllm.v1.attention.backends.fa_utils as fa_utils

    engine_args: Any = EngineArgs(model=target, skip_tokenizer_init=True, dtype=dtype, attention_backend=given)
    model_config = engine_args.create_model_config()
    monkeypatch.setattr(vllm.platforms, "_current_platform", Gpu)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: flash_version)
    if chosen is None:
        with pytest.raises(ValueError, match=f"attention backend {given} cannot verify the tree"):
            choose_attention_backend(engine_args, model_config)
        return
    for _ in range(2):  # its own choice is accepted when the arguments are used again
        choose_attention_backend(engine_args, model_config)
        assert engine_args.attention_backend.name == chosen
    assert engine_args.attention_backend is attention_backend(chosen)


def test_attention_backend_on_a_cpu(target, draft):
    if not vllm.platforms.current_platform.is_cpu():
        pytest.skip("a CPU has a backend of its own")
    member = attention_backend(CPU_BACKEND)
    assert create(target, spec_model=draft).attention_config.backend is member
    assert create(target, spec_model=draft, attention_backend="longspec_cpu").attention_config.backend is member
    given = create(target, spec_model=draft, attention_config={"backend": "LONGSPEC_CPU"})
    assert given.attention_config.backend is member
    for backend in ("CPU_ATTN", "LONGSPEC_TRITON"):
        attention_backend(TRITON_BACKEND)
        with pytest.raises(ValueError, match=f"attention backend {backend} cannot verify the tree"):
            create(target, spec_model=draft, attention_backend=backend)


def test_attention_backend_of_one_kind_of_layer(target, draft):
    per_kind = {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}
    with pytest.raises(ValueError, match=r"TRITON_ATTN for full_attention cannot .* leave backend_per_kind out of"):
        create(target, spec_model=draft, attention_config=per_kind)


def test_arguments_that_are_used_again_know_nothing_of_the_draft(target, draft):
    options = {"model": draft, "tree_shape": [2, 2]}
    engine_args = EngineArgs(model=target, skip_tokenizer_init=True, speculative_config=options)
    config: Any = engine_args.create_engine_config()
    assert config.attention_config.backend.name.startswith("LONGSPEC_")
    # vLLM itself fills in some that were left out.
    plain = EngineArgs(model=target, skip_tokenizer_init=True)
    assert plain.create_engine_config().attention_config.backend is None
    assert vars(engine_args) == {**vars(plain), "speculative_config": {"model": draft, "tree_shape": [2, 2]}}
    engine_args.speculative_config = None
    assert engine_args.create_engine_config().attention_config.backend is None


def test_sampling_parameters_are_judged_by_the_kind_of_draft(target, draft, ordinary_draft):
    glide = create(target, spec_model=draft)
    other = create(target, spec_model=ordinary_draft, spec_tokens=2)
    assert options_in(glide) is not None
    assert options_in(other) is None

    def verify(params, config):
        params.verify(config.model_config, config.speculative_config, config.structured_outputs_config, None)

    exact = SamplingParams(min_p=0.1, logit_bias={3: 1.0})
    verify(exact, glide)
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        verify(exact, other)


def test_trace_replay_is_refused_with_the_request(target, draft):
    """It would replace one token a step, whatever was accepted."""
    config: Any = create(target, spec_model=draft, enable_trace_replay=True)
    params = SamplingParams(trace_decode_token_ids=[3, 4])
    with pytest.raises(ValueError, match="trace_decode_token_ids is not supported with speculative decoding"):
        params.verify(config.model_config, config.speculative_config, config.structured_outputs_config, None)


@pytest.mark.parametrize(
    ("given", "adds"),
    [
        ({}, True),
        ({"cudagraph_capture_sizes": [1, 2, 4]}, False),
        ({"max_cudagraph_capture_size": 8}, False),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}, False),
        ({"compilation_config": {"max_cudagraph_capture_size": 8}}, False),
    ],
)
def test_sizes_of_graphs_that_the_user_gives_are_left_alone(monkeypatch, target, draft, given, adds):
    completed: list[Any] = []
    monkeypatch.setattr("vllm_longspec.configure.capture_largest_batch", completed.append)
    config = create(target, spec_model=draft, **given)
    assert completed == ([config] if adds else [])
