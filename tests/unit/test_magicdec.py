# SPDX-License-Identifier: Apache-2.0
"""MagicDec at start-up: its options, what it refuses, what it reserves and what it expects to cost."""

import json
import math
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from benchmarks.shapes import SHAPES
from tests.models import write_draft, write_target
from tests.unit.test_graphs import config as graph_config
from tests.unit.test_schedule import config
from vllm_longspec import plugin
from vllm_longspec.options import LongSpecOptions, PartialAttention, attach_options, options_of
from vllm_longspec.proposers.magicdec import setup as magicdec_setup
from vllm_longspec.proposers.magicdec.cost import STEP, MagicDecCost, largest_batch_with_graph
from vllm_longspec.proposers.magicdec.setup import MagicDecSetup
from vllm_longspec.runner.graphs import DraftGraphs
from vllm_longspec.runner.speculator import TreeSpeculator
from vllm_longspec.scheduling.adaptive import MAX_TRIAL_TIME_OF_PLAIN, TRIAL_INTERVAL, AdaptiveVerification
from vllm_longspec.scheduling.cost import StepCost
from vllm_longspec.scheduling.schedule import MOST_ROWS, nodes_by_batch_size, numbers_of
from vllm_longspec.targets.families import cached_token_weights, target_weights
from vllm_longspec.tree.shape import TreeShape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def target(folder):
    return str(write_target(folder / "target", "qwen3"))


@pytest.fixture(scope="module")
def llama(folder):
    """A target that has a GLIDE draft."""
    target = write_target(folder / "llama", "llama")
    return str(target), str(write_draft(folder / "draft", target))


def engine_config(target: str, speculative_config: dict[str, Any], **settings: Any) -> Any:
    plugin.register()
    return EngineArgs(
        model=target, speculative_config=speculative_config, dtype="float32", skip_tokenizer_init=True, **settings
    ).create_engine_config()


def refused(target: str, speculative_config: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ValueError) as error:
        engine_config(target, speculative_config, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_method_alone_is_enough(target):
    vllm_config = engine_config(target, {"method": "magicdec"})
    options = options_of(vllm_config.speculative_config)
    assert options is not None
    assert (options.proposer, options.tree_shape.levels) == ("magicdec", (1, 1, 1, 1))
    assert options.partial_attention == PartialAttention(sinks=32, budget=1024, selection="recent")
    assert vllm_config.speculative_config.num_speculative_tokens == 4
    assert vllm_config.speculative_config.model == target


def test_options_of_the_command_line(target):
    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = '{"method": "magicdec", "gamma": 3, "sinks": 0, "budget": "512", "copy-length": 0, "selection": "recent"}'
    args = parser.parse_args(["--model", target, "--speculative-config", given])
    found = options_of(EngineArgs.from_cli_args(args).create_engine_config().speculative_config)
    assert found is not None
    assert (found.tree_shape.levels, found.copy_length) == ((1, 1, 1), 0)
    assert found.partial_attention == PartialAttention(sinks=0, budget=512)
    assert '"method": "magicdec", "gamma": 4, "sinks": 32, "budget": 1024, "selection": "recent"' in " ".join(
        parser.format_help().split()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spec-method", "magicdec", "--spec-tokens", "2"],
        ["--speculative-config.method", "magicdec", "--speculative-config.gamma", "2"],
    ],
)
def test_flags(target, arguments):
    plugin.register()
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", target, *arguments])
    config = EngineArgs.from_cli_args(args).create_engine_config().speculative_config
    assert config is not None and config.num_speculative_tokens == 2
    options = options_of(config)
    assert options is not None and options.proposer == "magicdec"


def test_vllms_number_of_tokens_is_gamma_without_one(target):
    config = engine_config(target, {"method": "magicdec", "num_speculative_tokens": 8}).speculative_config
    options = options_of(config)
    assert options is not None and options.tree_shape.levels == (1,) * 8
    assert config.num_speculative_tokens == 8


@pytest.mark.parametrize(
    ("given", "drafted"),
    [
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 8], [5, 16, 2]]}, 8),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, "8"]]}, 8),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 2]]}, 2),
        ({"num_speculative_tokens": "8"}, 8),
        # They bound one another.
        ({"num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 4, 8]]}, 3),
        ({"gamma": 3, "num_speculative_tokens_per_batch_size": [[1, 4, 8]]}, 3),
        # Nothing to draft says nothing about how much.
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 0]]}, 4),
    ],
)
def test_the_largest_number_by_batch_size_is_gamma_without_one(target, given, drafted):
    config = engine_config(target, {"method": "magicdec", **given}).speculative_config
    options = options_of(config)
    assert options is not None and options.tree_shape.levels == (1,) * drafted
    assert config.num_speculative_tokens == drafted


def test_changes_to_the_targets_config_reach_its_draft(folder):
    """Without them this config.json is of no model that vLLM knows."""
    target = write_target(folder / "overridden", "qwen3")
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["NobodysForCausalLM"]}))
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048}
    overrides = {
        "architectures": ["Qwen3ForCausalLM"],
        "rope_parameters": rope,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 1,
    }
    config = engine_config(str(target), {"method": "magicdec"}, hf_overrides=overrides)
    draft, target_config = config.speculative_config.draft_model_config, config.model_config
    assert draft.max_model_len == target_config.max_model_len == 8192
    for name, value in overrides.items():
        assert getattr(draft.hf_config, name) == getattr(target_config.hf_config, name) == value
    # It is sent to the engine's processes.
    assert pickle.loads(pickle.dumps(config)).speculative_config.draft_model_config.hf_config.rope_parameters == rope


def test_a_budget_that_is_too_small_for_scores_is_refused_at_once(target):
    scores = {"method": "magicdec", "selection": "scores"}
    said = refused(target, {**scores, "budget": 175}, block_size=32)
    assert said == (
        'budget must be at least 192 tokens with selection "scores" and blocks of 32 tokens, got 175: give more, or '
        '"selection": "recent"'
    )
    engine_config(target, {**scores, "budget": 192}, block_size=32)
    # A longer draft needs more.
    assert "at least 224" in refused(target, {**scores, "budget": 192, "gamma": 31}, block_size=32)
    engine_config(target, {"method": "magicdec", "budget": 1}, block_size=32)


def test_where_every_request_is_attended_as_a_whole_no_block_is_chosen(target):
    """The default budget, which nobody gave, is not too small for a short context."""
    for max_model_len, selection in ((64, "recent"), (1056, "recent"), (1057, "scores")):
        given = {"method": "magicdec", "selection": "scores"}
        options = options_of(engine_config(target, given, max_model_len=max_model_len).speculative_config)
        assert options is not None and options.partial_attention is not None
        assert options.partial_attention.selection == selection


def test_where_a_draft_is_no_graph_nothing_is_drafted_and_start_up_says_so(target, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr(magicdec_setup.logger, "warning", warned.append)
    magicdec = {"method": "magicdec", "adaptive_verification": True}
    config = engine_config(target, magicdec, enforce_eager=True)
    (message,) = warned
    assert "drafts nothing without full CUDA graphs" in message and "give adaptive_verification=false" in message
    cost = MagicDecCost.of(config)
    assert cost.largest_batch == 0 and cost(1, 4, 1e12) == math.inf and cost(1, 0, 1e12) == 0.0
    # What the user wants drafted is.
    engine_config(target, {"method": "magicdec", "adaptive_verification": False}, enforce_eager=True)
    assert len(warned) == 1


@pytest.mark.parametrize("most", [1, 7, 100, 104, 512, 600])
def test_the_cost_knows_which_batches_have_graphs(most, monkeypatch):
    plugin.register()
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    module = "vllm.v1.worker.gpu.cudagraph_utils"
    monkeypatch.setattr(f"{module}.get_pp_group", lambda: rank)
    monkeypatch.setattr(f"{module}.current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    vllm_config = graph_config(GAMMA, most, MagicDecSetup().schedule(GAMMA, MOST_ROWS), True, TreeShape((1,) * GAMMA))
    vllm_config.speculative_config.enforce_eager = False
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    choices = nodes_by_batch_size(vllm_config.speculative_config, most, True)
    draft = DraftGraphs(vllm_config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, choices)
    draft.graphs = dict.fromkeys(draft._capture_descs[CUDAGraphMode.FULL])
    draft._graphs_captured = True
    largest = largest_batch_with_graph(vllm_config)
    for batch_size in range(1, most + 1):
        for number in choices[batch_size]:
            assert number == 0 or (draft.find(batch_size, number) is not None) == (batch_size <= largest)
    vllm_config.speculative_config.enforce_eager = True
    assert largest_batch_with_graph(vllm_config) == 0
    vllm_config.speculative_config.enforce_eager = False
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert largest_batch_with_graph(vllm_config) == 0


def test_a_size_above_the_largest_batch_is_no_graph_of_the_draft(monkeypatch):
    """With cudagraph_mode FULL the target has such graphs. Start-up says what is not drafted for want of one."""
    warned: list[str] = []
    monkeypatch.setattr(magicdec_setup.logger, "warning", warned.append)
    plugin.register()
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: rank)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.current_platform", platform)
    vllm_config = graph_config(GAMMA, 6, MagicDecSetup().schedule(GAMMA, MOST_ROWS), True, TreeShape((1,) * GAMMA))
    options = options_of(vllm_config.speculative_config)
    assert options is not None
    options = replace(options, partial_attention=PartialAttention())
    attach_options(vllm_config.speculative_config, options)
    vllm_config.speculative_config.enforce_eager = False
    compilation = vllm_config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [4, 8], 8
    assert largest_batch_with_graph(vllm_config) == 4
    speculator: Any = SimpleNamespace(
        vllm_config=vllm_config,
        device=torch.device("cpu"),
        speculative_config=vllm_config.speculative_config,
        options=options,
        max_num_reqs=6,
    )
    TreeSpeculator.init_cudagraph_manager(speculator, compilation.cudagraph_mode)
    assert {desc.num_reqs for desc in speculator.graphs._capture_descs[CUDAGraphMode.FULL]} == {4}
    MagicDecSetup.check_engine(vllm_config)
    (message,) = warned
    assert "in batches of more than 4 requests" in message and "add 6 (max_num_seqs) to cudagraph_captu" in message
    compilation.cudagraph_capture_sizes = [4, 6]
    MagicDecSetup.check_engine(vllm_config)
    # Larger batches than any graph are not for the user to mend by sizes.
    vllm_config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size = 100, 6
    MagicDecSetup.check_engine(vllm_config)
    assert len(warned) == 1


def test_slots_are_reserved_for_what_a_draft_writes(target, llama):
    assert engine_config(target, {"method": "magicdec", "gamma": 6}).num_lookahead_tokens == 6
    # No more is ever drafted.
    cut = engine_config(target, {"method": "magicdec", "gamma": 6, "num_speculative_tokens": 2})
    assert cut.num_lookahead_tokens == 2
    assert cut.speculative_config.max_num_new_slots_for_drafting == 0
    assert engine_config(llama[0], {"model": llama[1]}).num_lookahead_tokens == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tree_shape": [2, 2]}, "tree_shape is not supported with the method magicdec: .* give .* as gamma"),
        ({"frequent_tokens": "t.json"}, "frequent_tokens is not supported with the method magicdec: .* leave it out"),
        ({"model": "DRAFT"}, "model='DRAFT' is not supported with the method magicdec: .* leave it out"),
        ({"quantization": "fp8_per_channel"}, "quantization='fp8_per_channel' is not supported with the method magicd"),
        ({"revision": "main"}, "revision='main' is not supported with the method magicdec"),
        ({"parallel_drafting": True}, "parallel_drafting=True in .* is not supported with the method magicdec"),
        ({"gamma": 0}, "gamma must be a positive integer, got 0"),
        ({"gamma": 256}, "^gamma is 256, but at most 255 nodes are supported: give a smaller one"),
        # They say how much is drafted, so it is they who ask for too much.
        ({"num_speculative_tokens": 256}, "^num_speculative_tokens asks for 256 tokens, but at most 255 .* give a sm"),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 300]]}, "^num_speculative_tokens_per_batch_size asks for 3"),
        ({"sinks": -1}, "sinks must be an integer of 0 or more, got -1: .* or leave it out for 32"),
        ({"sinks": True}, "sinks must be an integer of 0 or more, got True"),
        ({"sinks": False}, "sinks must be an integer of 0 or more, got False"),
        ({"budget": 0}, "budget must be a positive integer, got 0: .* or leave it out for 1024"),
        ({"budget": 1.5}, "budget must be a positive integer, got 1.5"),
        ({"selection": "best"}, "selection must be one of recent, scores, got 'best': leave it out"),
    ],
)
def test_options_that_are_refused(target, given, said):

    assert re.search(said, refused(target, {"method": "magicdec", **given}))


@pytest.mark.parametrize("option", [{"sinks": 32}, {"budget": 512}, {"selection": "recent"}])
def test_its_options_are_refused_with_another_draft(llama, option):
    target, draft = llama
    (name,) = option
    said = f"{name} is not supported with a GLIDE draft: it is an option of the method magicdec; leave it out"
    assert refused(target, {"model": draft, **option}) == said


@pytest.mark.parametrize("option", [{"sinks": 32}, {"budget": 512}, {"selection": "recent"}])
def test_its_options_name_it_where_there_is_no_glide_draft(target, option):
    (name,) = option
    said = f'{name} is an option of the method magicdec: add "method": "magicdec"'
    assert refused(target, option) == f"{said}, or leave it out"
    # With a method and a draft of vLLM's too.
    assert refused(target, {"method": "ngram", **option}) == f"{said} instead of 'ngram', or leave it out"
    given = {"model": target, "num_speculative_tokens": 3, **option}
    assert refused(target, given) == f"{said}, or leave it out"


def test_lora_is_refused(target):
    assert refused(target, {"method": "magicdec"}, enable_lora=True) == (
        "LoRA is not supported with the method magicdec: serve without --enable-lora, or with a GLIDE draft"
    )


def test_targets_that_vllm_has_a_method_of_its_own_for(folder):
    """vLLM reads the target's configuration as a draft's, and makes it that of the target's prediction layers."""
    target = write_target(folder / "mimo", "qwen2")
    config = json.loads((target / "config.json").read_text())
    config.update(architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    (target / "config.json").write_text(json.dumps(config))
    assert refused(str(target), {"method": "magicdec"}) == (
        f"a target that vLLM itself drafts for by the method 'mtp' (target {target}) is not supported with the method "
        "magicdec: serve without --speculative-config"
    )


def test_what_trees_do_not_support_is_refused_by_its_name(target):
    said = "attention backend CPU_ATTN cannot verify the tree of the method magicdec: leave --attention-backend out"
    assert refused(target, {"method": "magicdec"}, attention_backend="CPU_ATTN") == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"is_multimodal_model": True},
            "a multimodal target (target TARGET) is not supported with the method magicdec",
        ),
        ({"is_moe": True}, "a mixture of experts (target TARGET) is not supported with the method magicdec"),
        (
            {"quantization": "gptq"},
            "serve on a GPU without step_costs, or give num_speculative_tokens_per_batch_size, the batches that draft",
        ),
        ({"model": "someone/Eagle3-chat"}, "vLLM takes any path with 'eagle3' in it for a draft of another kind"),
    ],
)
def test_targets_that_it_refuses(settings, said):
    settings = {"model": "TARGET", "is_moe": False, "is_multimodal_model": False, "quantization": None, **settings}
    config: Any = SimpleNamespace(**settings)
    with pytest.raises(ValueError) as error:
        MagicDecSetup().check(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_part_is_no_larger_than_the_longest_request(target):
    config = engine_config(target, {"method": "magicdec", "sinks": 10**30, "budget": 10**7}, max_model_len=512)
    options = options_of(config.speculative_config)
    assert options is not None and options.partial_attention == PartialAttention(512, 512)


def test_a_quantised_target_needs_to_be_timed_or_to_be_told_when_to_draft(monkeypatch):
    config: Any = SimpleNamespace(model="TARGET", is_moe=False, is_multimodal_model=False, quantization="gptq")
    for options, own in (({"num_speculative_tokens_per_batch_size": [[1, 8, 4]]}, {}), ({}, {"adapt_nodes": False})):
        MagicDecSetup.find(options, own).check(config)
    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cuda", lambda self: True)
    MagicDecSetup.find({}, {}).check(config)
    with pytest.raises(ValueError, match="whose steps are not timed is not supported"):
        MagicDecSetup.find({}, {"step_costs": "shipped"}).check(config)


@pytest.mark.parametrize(("gamma", "numbers"), [(1, [1]), (2, [2, 1]), (4, [4, 3, 2, 1]), (9, [9, 8, 4, 1])])
def test_every_batch_may_draft_all_tokens_that_there_are_rows_for_or_fewer(gamma: int, numbers: list[int]):
    schedule = MagicDecSetup().schedule(gamma, MOST_ROWS)
    assert numbers_of(schedule, gamma) == [*numbers, 0]
    for batch_size, most in enumerate(build_dynamic_sd_schedule_lookup(schedule, 1024, gamma)[1:], start=1):
        assert most == max((number for number in numbers if batch_size * (1 + number) <= MOST_ROWS), default=0)
    # Without adaptive verification it drafts all the same.
    schedule = MagicDecSetup().schedule(gamma, None)
    assert numbers_of(schedule, gamma) == [gamma, 0]
    assert build_dynamic_sd_schedule_lookup(schedule, 1024, gamma)[1:] == [gamma] * 1024


def test_a_target_without_a_logits_processor_of_its_own_is_loaded():
    """Some compute logits in a part of theirs, and none of them can have adapters of the head."""
    draft = nn.Module()
    proposer = SimpleNamespace(load=lambda *given: draft, renew=lambda: None, describe=lambda: "")
    options = LongSpecOptions("magicdec", TreeShape((1,)))
    speculator: Any = SimpleNamespace(
        proposer=proposer, options=options, num_speculative_steps=1, trust=None, _describe_copying=lambda: "no copies"
    )
    target: Any = nn.Linear(1, 1)
    assert TreeSpeculator.load_draft_model(speculator, target, set()) is draft
    assert target.renew_proposer is proposer.renew


# What follows is in weights that a GPU reads.

GAMMA = 4
PART = 32 + 1024


def cost_of(model: str, num_ranks: int = 1, cache_is_quantised: bool = False) -> StepCost:
    shape = SimpleNamespace(**SHAPES[model])
    weights = target_weights(shape, shape.vocab_size, num_ranks)
    token = cached_token_weights(shape, num_ranks, cache_is_quantised)
    drafting = MagicDecCost(weights, token, PART)
    return StepCost.of_shape(
        shape,
        vocab_size=shape.vocab_size,
        drafting=drafting,
        cache_is_quantised=cache_is_quantised,
        num_ranks=num_ranks,
    )


def test_a_step_of_drafting_reads_the_weights_and_its_part_of_the_cache():
    cost = cost_of("llama-3-8b-262k")
    assert isinstance(cost.drafting, MagicDecCost)
    assert (cost.drafting.target, cost.drafting.token) == (cost.target, cost.token)
    cache = 16 * 32768 * cost.token
    assert cost.drafting(16, 1, cache) == STEP + cost.target + 16 * PART * cost.token
    assert cost.drafting(16, 3, cache) == 3 * cost.drafting(16, 1, cache)
    # No more than there is.
    assert cost.drafting(16, 1, 100 * cost.token) == STEP + cost.target + 100 * cost.token
    assert cost.drafting(16, 0, cache) == 0
    # Blocks by scores: a 64th of the cache for each token.
    scored = replace(cost.drafting, rescored=1 / 64)
    assert scored(16, 3, cache) == cost.drafting(16, 3, cache) + cache / 16
    assert scored(16, 0, cache) == 0
    # Long drafts: each layer chooses once.
    scored = replace(scored, most_rescored=1 / 2)
    assert scored(16, 3, cache) == cost.drafting(16, 3, cache) + cache / 16
    assert scored(16, 31, cache) == cost.drafting(16, 31, cache) + cache / 2
    assert scored(16, 511, cache) == cost.drafting(16, 511, cache) + cache / 2


@pytest.mark.parametrize(
    ("selection", "cache", "rescored"),
    [("recent", "auto", 0.0), ("scores", "auto", 1.9 / 64), ("scores", "fp8", 3.8 / 64)],
)
def test_the_cost_knows_how_blocks_are_chosen(target, selection, cache, rescored):
    config = engine_config(target, {"method": "magicdec", "selection": selection})
    config.cache_config.cache_dtype = cache
    cost = MagicDecCost.of(config)
    assert (cost.rescored, cost.most_rescored) == (rescored, 32 * rescored)


@pytest.mark.parametrize(("batch_size", "context", "most"), [(16, 32768, 0.28), (4, 131072, 0.26)])
def test_a_step_of_drafting_in_steps_of_plain_decoding(batch_size, context, most):
    cost = cost_of("llama-3-8b-262k")
    cache = batch_size * context * cost.token
    plain = 1.5e9 + cost.target + cache
    assert 0.5 * most < cost.drafting(batch_size, 1, cache) / plain <= most


@pytest.mark.parametrize(
    ("batch_size", "context", "measured"),
    [(4, 16384, 3.92), (16, 16384, 2.75), (4, 32768, 3.30), (16, 32768, 2.09), (4, 131072, 2.01)],
)
def test_steps_cost_what_was_measured(batch_size, context, measured):
    """docs/performance.md#self-drafting: steps that draft and verify four tokens, in steps of plain decoding."""
    assert cost_of("llama-3-8b-262k")(batch_size, 4, batch_size * context) == pytest.approx(measured, rel=0.06)


class Engine:
    """Requests of one length, and drafts each of whose tokens is accepted with one probability after the one before."""

    def __init__(self, batch_size: int, context: int):
        self.batch_size, self.num_tokens = batch_size, batch_size * context
        shape = TreeShape((1,) * GAMMA)
        schedule = MagicDecSetup().schedule(GAMMA, MOST_ROWS)
        self.choices = nodes_by_batch_size(config(schedule[0][2], schedule), batch_size, choose=True)
        self.cost = cost_of("llama-3-8b-262k")
        self.adaptive = AdaptiveVerification(self.choices, self.cost, lambda: self.num_tokens, shape)
        self.debts = [0.0] * GAMMA

    def serve(self, acceptance: float, num_steps: int) -> list[int]:
        numbers = []
        for _ in range(num_steps):
            numbers.append(number := self.adaptive[self.batch_size])
            for _ in range(self.batch_size if number else 0):
                self.adaptive.observe(number, self._accept(acceptance, number))
        return numbers

    def _accept(self, acceptance: float, number: int) -> int:
        """As often as it should be, without a random number."""
        accepted = 0
        for depth in range(number):
            self.debts[depth] += acceptance ** (depth + 1)
            if self.debts[depth] >= 1 and accepted == depth:
                self.debts[depth] -= 1
                accepted += 1
        return accepted

    def throughput(self, acceptance: float, numbers: list[int]) -> float:
        tokens = sum(math.fsum(acceptance**depth for depth in range(number + 1)) for number in numbers)
        return tokens / sum(self.cost(self.batch_size, number, self.num_tokens) for number in numbers)


def expected_throughputs(engine: Engine) -> dict[int, float]:
    """By number of tokens drafted, before anything has been observed."""
    acceptance = engine.adaptive._acceptance()
    return {
        number: (1 + acceptance[number]) / engine.cost(engine.batch_size, number, engine.num_tokens)
        for number in engine.choices[engine.batch_size]
    }


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
@pytest.mark.parametrize("context", [256, 1024, 4096, 16384, 131072])
def test_the_first_steps_draft_only_where_the_model_expects_it_to_pay(batch_size, context):
    """Before anything was observed a drafted token is expected to be accepted as often as a typical draft's."""
    engine = Engine(batch_size, context)
    expected = expected_throughputs(engine)
    assert engine.serve(0.0, 1) == [max(expected, key=lambda number: expected[number])]
    # Where no number pays, the first trial comes after more than a hundred steps, however little is accepted.
    if max(expected.values()) == expected[0]:
        engine = Engine(batch_size, context)
        numbers = engine.serve(0.0, 400)
        cost = engine.cost(batch_size, 1, engine.num_tokens)
        assert sum(numbers) <= 400 * MAX_TRIAL_TIME_OF_PLAIN / (cost - 1) + 1
        assert set(numbers[: TRIAL_INTERVAL - 1]) == {0}
        assert engine.throughput(0.0, numbers) >= 0.995


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
@pytest.mark.parametrize("context", [1024, 4096, 16384, 131072])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.5, 0.7, 0.85])
def test_it_is_never_much_slower_than_plain_decoding(batch_size, context, acceptance):
    """Whatever is accepted; from the first steps on, if it is as much as it was of any text."""
    engine = Engine(batch_size, context)
    numbers = engine.serve(acceptance, 2048)
    for first, last in ((0, 64), (64, 256), (256, 512), (256, 2048)):
        throughput = engine.throughput(acceptance, numbers[first:last])
        # Where it was expected to pay, the first step shows that it does not.
        assert throughput >= (0.975 if acceptance < 0.7 and last == 64 else 0.995)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_next_to_nothing_is_drafted_where_a_step_of_drafting_costs_one_of_decoding(batch_size):
    engine = Engine(batch_size, 512)
    numbers = engine.serve(0.9, 500)
    assert numbers.count(0) > 0.96 * len(numbers)
    assert engine.throughput(0.9, numbers) >= 0.99


def test_batches_without_a_graph_never_draft():
    engine = Engine(16, 131072)
    assert sum(engine.serve(0.9, 100)) > 200
    assert isinstance(engine.cost.drafting, MagicDecCost)
    engine.cost = engine.adaptive.cost = replace(engine.cost, drafting=replace(engine.cost.drafting, largest_batch=15))
    assert set(engine.serve(0.9, 200)) == {0}


def test_drafts_come_back_where_contexts_have_grown_and_where_they_are_accepted_again():
    engine = Engine(4, 1024)
    assert engine.serve(0.9, 100).count(0) >= 96
    engine.num_tokens = 4 * 131072
    assert sum(engine.serve(0.9, 100)[-50:]) > 50 * (GAMMA - 0.2)
    assert sum(engine.serve(0.0, 200)[-50:]) < 10
    assert sum(engine.serve(0.9, 150)[-50:]) > 50 * (GAMMA - 0.2)


def test_ranks_and_quantised_caches_share_what_is_read():
    one, two, fp8 = (cost_of("qwq-32b", **kind) for kind in ({}, {"num_ranks": 2}, {"cache_is_quantised": True}))
    assert isinstance(one.drafting, MagicDecCost)
    assert two.drafting == replace(one.drafting, target=one.target / 2, token=one.token / 2)
    assert fp8.drafting == replace(one.drafting, token=one.token / 2)
