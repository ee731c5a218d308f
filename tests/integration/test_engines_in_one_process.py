# SPDX-License-Identifier: Apache-2.0
"""Several engines in one process: what one with a GLIDE draft replaces is its own, whoever comes before, after or
beside it.

A script is a list of lines: ["start", engine], ["end", engine], and ["generate", *engines], which makes one step of
each engine in turn until all requests are answered. An engine goes by the name of its settings.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.engine import CPU_SETTINGS, SETTINGS
from tests.models import write_draft, write_target
from tests.process import run_alone

# One process has the engines of all tests.
pytestmark = pytest.mark.xdist_group("engines_in_one_process")

WINDOW = 16
# One longer than the window of the target that has one, one that grows longer than that.
PROMPTS = [[(7 * i + 3) % 60 for i in range(40)], [(5 * i + 1) % 60 for i in range(12)]]
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}]
NUM_TOKENS = 8

# Levels of the trees, and the engine whose tokens must be the same.
SHAPES = {"narrow": (2, 2), "deep": (3, 3, 3)}
WITHOUT_A_DRAFT = {"narrow": "plain", "deep": "plain", "plain": "plain", "window": "window"}

Settings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("models")
    target = write_target(folder / "target", "llama")
    draft = write_draft(folder / "draft", target)
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    windowed = write_target(folder / "windowed", "qwen2", seed=3, **window)

    def speculating(*levels: int) -> dict[str, Any]:
        options = {"model": str(draft), "tree_shape": list(levels)}
        return {"model": str(target), "speculative_config": options, "per_request_spec_decode_metrics": "summary"}

    return {
        "plain": {"model": str(target)},
        "window": {"model": str(windowed)},
        **{name: speculating(*levels) for name, levels in SHAPES.items()},
    }


class Script:
    """A script that is followed, in the process of its engines."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.engines: dict[str, Any] = {}
        self.backends: dict[str, list[str]] = {}
        self.texts: dict[str, list[list[list[int]]]] = {}
        self.histograms: dict[str, list[list[int]]] = {}

    def start(self, name: str) -> None:
        from vllm import LLM

        defaults = SETTINGS if torch.cuda.is_available() else SETTINGS | CPU_SETTINGS
        engine = LLM(**(defaults | self.settings[name])).llm_engine
        self.engines[name] = engine
        layers = engine.vllm_config.compilation_config.static_forward_context.values()
        self.backends.setdefault(name, []).extend(sorted({layer.attn_backend.get_name() for layer in layers}))

    def end(self, name: str) -> None:
        self.engines.pop(name).engine_core.shutdown()
        gc.collect()

    def generate(self, *names: str) -> None:
        from vllm import SamplingParams

        texts: dict[str, dict[str, list[int]]] = {name: {} for name in names}
        for name in names:
            for number, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
                params = SamplingParams(**sampling, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
                self.engines[name].add_request(str(number), {"prompt_token_ids": prompt}, params)
        while any(self.engines[name].has_unfinished_requests() for name in names):
            for name in names:
                for output in self.engines[name].step():
                    if output.finished:
                        (completion,) = output.outputs
                        texts[name][output.request_id] = list(completion.token_ids)
                        if completion.spec_decode_metrics is not None:
                            histogram = list(completion.spec_decode_metrics.histogram)
                            self.histograms.setdefault(name, []).append(histogram)
        for name in names:
            self.texts.setdefault(name, []).append([text for _, text in sorted(texts[name].items())])


def _follow(lines: Sequence[Sequence[str]], settings: Settings) -> dict[str, Any]:
    script = Script(settings)
    for command, *names in lines:
        getattr(script, command)(*names)
    return {"backends": script.backends, "texts": script.texts, "histograms": script.histograms}


@pytest.fixture(scope="module")
def follow(settings) -> Callable[..., dict[str, Any]]:
    def follow(*lines: str) -> dict[str, Any]:
        result, _ = run_alone(_follow, [line.split() for line in lines], settings)
        return result

    return follow


def in_turn(*names: str) -> list[str]:
    return [f"{command} {name}" for name in names for command in ("start", "generate", "end")]


@pytest.fixture(scope="module")
def alone(follow) -> dict[str, list[list[int]]]:
    """What each engine without a draft says in a process of its own."""
    return {name: follow(*in_turn(name))["texts"][name][0] for name in ("plain", "window")}


SCRIPTS = {
    # A draft's engine before and after each of the others, and two with different trees.
    "one after the other": in_turn("deep", "window", "narrow", "plain"),
    "side by side": [
        *("start narrow", "start window", "start deep", "start plain"),
        "generate narrow window deep plain",
        "generate plain deep window narrow",
    ],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_engine_does_what_it_does_alone(follow, alone, name):
    result = follow(*SCRIPTS[name])
    for engine, texts in result["texts"].items():
        assert texts == [alone[WITHOUT_A_DRAFT[engine]]] * len(texts), engine
    for engine, backends in result["backends"].items():
        ours = {backend.startswith("LONGSPEC_") for backend in backends}
        assert ours == {engine in SHAPES}, (engine, backends)
    assert set(result["histograms"]) == set(SHAPES) & set(result["texts"])
    for engine, histograms in result["histograms"].items():
        # Steps by what they accepted, which is at most a copied path of as many nodes as this engine's tree has.
        assert {len(histogram) for histogram in histograms} == {1 + sum(SHAPES[engine])}, engine
        assert sum(count for histogram in histograms for count in histogram[1:]) > 0, engine


def test_vllm_ends_what_engines_share_with_the_first_that_ends(follow):
    """How far vLLM itself allows two engines in one process: they run side by side until one of them ends."""
    with pytest.raises(AssertionError, match="pipeline model parallel group is not initialized"):
        follow("start plain", "start window", "generate plain window", "end window", "generate plain")


def _find_what_is_replaced(settings: Settings) -> list[str]:
    """What vLLM's modules and classes call by a name that meant something else before an engine with a draft ran."""
    script = Script(settings)

    def run(name: str) -> None:
        script.start(name)
        script.generate(name)
        script.end(name)

    # What vLLM's own workers replace for good, they have replaced then.
    run("plain")
    before = _callables()
    run("narrow")
    after = _callables()
    from vllm.v1.attention.backends import registry

    replaced = [name for name, value in before.items() if after.get(name) is not value]
    return replaced + [f"override of {member.name}" for member in registry._ATTN_OVERRIDES]


def _callables() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "vllm":
            continue
        for name, value in list(vars(module).items()):
            if callable(value):
                found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                for member, function in list(vars(value).items()):
                    if callable(function) or isinstance(function, staticmethod | classmethod | property):
                        found[f"{module_name}.{name}.{member}"] = function
    return found


def test_an_engine_with_a_draft_replaces_nothing_for_good(settings):
    replaced, _ = run_alone(_find_what_is_replaced, settings)
    assert replaced == []
