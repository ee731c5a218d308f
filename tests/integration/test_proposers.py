# SPDX-License-Identifier: Apache-2.0
"""The contract of a proposer, by one that has no draft model: an engine with it emits plain decoding's tokens."""

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine import request, run_batches
from tests.models import write_target
from tests.process import run_alone
from tests.proposers.repeat import RepeatProposer
from vllm_longspec import plugin, proposers
from vllm_longspec.attention.backend import Observer
from vllm_longspec.options import options_of
from vllm_longspec.proposers.magicdec.selection import BlockSelection

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
REPEAT = ("repeat", "tests.proposers.repeat.RepeatSetup")
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "presence_penalty": 0.1},
    {"temperature": 0.3, "seed": 3, "top_p": 0.9},
]


def run_registered(settings: dict[str, Any], batches: list[Any]) -> dict[str, Any]:
    """The proposer also chooses blocks by what verifications attend, though it does not use them."""
    proposers.register(*REPEAT)
    selections = []

    def observers(self: RepeatProposer) -> dict[str, Observer]:
        names = list(self.vllm_config.compilation_config.static_forward_context)
        selections.append(BlockSelection.allocate(32, 192, 3, len(names), 8, 1024, 32, self.device))
        return {name: selections[0].observer(layer) for layer, name in enumerate(names)}

    setattr(RepeatProposer, "observers", observers)  # noqa: B010
    result = run_batches(settings, batches)
    [selection] = selections
    return {**result, "verified": selection.verified_len.tolist(), "chosen": selection.num_blocks.tolist()}


def test_an_engine_with_a_proposer_of_somebody_elses() -> None:
    """Prompts that repeat four tokens, which the target goes on with for a while."""
    prompts = [[476, 260, 325, 258] * length for length in (4, 64)]
    batches = [
        [request(prompt, max_tokens=24, ignore_eos=True, **sampling) for prompt in prompts for sampling in SAMPLINGS]
    ]
    settings = {"model": str(PAIR / "target")}
    plain, _ = run_alone(run_batches, settings, batches)
    speculative = {**settings, "speculative_config": {"method": "repeat", "gamma": 4, "adaptive_verification": False}}
    result, printed = run_alone(run_registered, speculative, batches)
    assert result["tokens"] == plain["tokens"]
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 20
    # Every request up to its last verification, which emits at most 5 tokens. The long prompt has one block to choose.
    last = [len(prompt) + 24 for prompt in prompts for _ in SAMPLINGS]
    seen = sorted(filter(None, result["verified"]))
    assert len(seen) == len(last) and all(-6 <= length - end < 0 for length, end in zip(seen, last, strict=True))
    long = [index for index, count in enumerate(result["chosen"][0]) if count]
    assert len(long) == len(SAMPLINGS) and all(result["verified"][index] for index in long)
    assert result["chosen"] == [[int(index in long) for index in range(8)]] * 6
    assert "Proposer repeat: tree shape [1, 1, 1, 1], 4 of 4 nodes verified" in printed


@pytest.fixture
def registered():
    plugin.register()
    proposers.register(*REPEAT)
    yield
    del proposers._SETUPS["repeat"]


@pytest.mark.usefixtures("registered")
def test_a_proposer_is_found_by_its_method(tmp_path):
    target = write_target(tmp_path / "target", "llama")
    config: Any = EngineArgs(
        model=str(target),
        speculative_config={"method": "repeat", "gamma": 3},
        dtype="float32",
        skip_tokenizer_init=True,
    ).create_engine_config()
    options = options_of(config.speculative_config)
    assert options is not None
    assert (options.proposer, options.tree_shape.levels) == ("repeat", (1, 1, 1))
    assert config.speculative_config.num_speculative_tokens == 3
    # It may be registered again, as every process that loads plugins does, but not another one under its name.
    proposers.register(*REPEAT)
    for taken in ("repeat", "ngram", "eagle3", "mtp"):
        with pytest.raises(ValueError, match=r"register another\.Setup under another name"):
            proposers.register(taken, "another.Setup")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give its length as gamma"),
        ({"gamma": 4, "frequent_tokens": "tokens.json"}, "frequent_tokens needs a draft"),
    ],
)
def test_what_a_proposer_refuses_is_said(tmp_path, given, said):
    target = write_target(tmp_path / "target", "llama")
    with pytest.raises(ValueError, match=said):
        EngineArgs(model=str(target), speculative_config={"method": "repeat", **given}).create_engine_config()


def test_the_documentation_shows_the_whole_of_it():
    root = Path(__file__).parents[2]
    source = (root / "tests" / "proposers" / "repeat.py").read_text()
    assert f"```python\n{source}```" in (root / "docs" / "add-a-proposer.md").read_text()
    assert len(source.splitlines()) < 60
