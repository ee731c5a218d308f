# SPDX-License-Identifier: Apache-2.0
"""A GLIDE draft whose cross-attention sees a part of the cache: the option and its cost."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from benchmarks.shapes import SHAPES
from tests.models import write_draft, write_target
from vllm_longspec import plugin
from vllm_longspec.options import PartialAttention, options_of, parse_cross_attention_budget
from vllm_longspec.proposers.glide.cost import GlideCost
from vllm_longspec.targets.families import cached_token_weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target = write_target(folder / "target", "llama")
    return str(target), str(write_draft(folder / "draft", target))


def engine_config(target: str, speculative_config: dict[str, Any], **settings: Any) -> Any:
    plugin.register()
    return EngineArgs(
        model=target, speculative_config=speculative_config, dtype="float32", skip_tokenizer_init=True, **settings
    ).create_engine_config()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        # The longest request is shorter than the default part.
        ({}, None),
        ({"cross_attention_budget": False}, None),
        ({"cross_attention_budget": 96}, (32, 96)),
        ({"cross-attention-budget": "96"}, (32, 96)),
    ],
)
def test_the_option(pair, given, part):
    target, draft = pair
    config = engine_config(target, {"model": draft, **given})
    options = options_of(config.speculative_config)
    assert options is not None
    assert options.partial_attention == (part and PartialAttention(*part))
    cost = GlideCost.of(config)
    per_token = cached_token_weights(config.model_config.hf_text_config, 1, False)
    assert cost.most_read == (float("inf") if part is None else sum(part) * per_token)


@pytest.mark.parametrize(
    ("given", "max_model_len", "part"),
    [
        ({}, 4128, None),
        ({}, 4129, PartialAttention(32, 4096)),
        ({}, 131072, PartialAttention(32, 4096)),
        ({"cross_attention_budget": None}, 131072, PartialAttention(32, 4096)),
        ({"cross_attention_budget": False}, 131072, None),
        ({"cross_attention_budget": 8192}, 131072, PartialAttention(32, 8192)),
    ],
)
def test_the_default_is_for_long_requests(given, max_model_len, part):
    assert parse_cross_attention_budget(given, max_model_len) == part


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, PartialAttention(32, 4096)),
        ({"cross_attention_budget": False}, None),
        # Those that draft otherwise have no part that nobody asked for.
        ({"method": "magicdec"}, PartialAttention(32, 1024)),
        ({"method": "capture", "spool": "spool", "copy_length": 0}, None),
    ],
)
def test_an_engine_for_long_requests(tmp_path, given, part):
    target = write_target(tmp_path / "target", "llama", max_position_embeddings=8192)
    if "method" not in given:
        given = given | {"model": str(write_draft(tmp_path / "draft", target))}
    config = engine_config(str(target), given, max_model_len=8192, enable_prefix_caching=False)
    options = options_of(config.speculative_config)
    assert options is not None and options.partial_attention == part
    # As workers get it.
    assert options_of(pickle.loads(pickle.dumps(config.speculative_config))) == options


def test_a_part_is_no_larger_than_the_longest_request(pair):
    target, draft = pair
    config = engine_config(target, {"model": draft, "cross_attention_budget": 10**9}, max_model_len=128)
    options = options_of(config.speculative_config)
    assert options is not None and options.partial_attention == PartialAttention(32, 128)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "all"])
def test_values_that_are_refused(pair, value):
    target, draft = pair
    with pytest.raises(ValueError) as error:
        engine_config(target, {"model": draft, "cross_attention_budget": value})
    assert str(error.value) == (
        f"cross_attention_budget must be a positive integer or false, got {value!r}: give the number of last tokens "
        "that the draft attends, or false to attend all"
    )


def test_it_needs_a_glide_draft(pair):
    target, _ = pair
    with pytest.raises(ValueError) as error:
        engine_config(target, {"method": "magicdec", "cross_attention_budget": 96})
    assert str(error.value) == (
        "cross_attention_budget is not supported with the method magicdec: it is an option of a GLIDE draft; leave it "
        "out"
    )
    with pytest.raises(ValueError, match=r"^cross_attention_budget needs a GLIDE draft: no draft was given"):
        engine_config(target, {"cross_attention_budget": 96})


@pytest.mark.parametrize(("num_ranks", "cache_is_quantised"), [(1, False), (2, False), (1, True)])
def test_levels_below_the_root_read_one_layer_of_the_part(num_ranks, cache_is_quantised):
    shape = SimpleNamespace(**SHAPES["llama-3-8b-262k"])
    sizes = {"draft_vocab_size": shape.vocab_size, "num_ranks": num_ranks}
    whole = GlideCost.of_shape(shape, **sizes)
    part = GlideCost.of_shape(shape, **sizes, num_attended=1056, cache_is_quantised=cache_is_quantised)
    token = cached_token_weights(shape, num_ranks, cache_is_quantised)
    cache = 4 * 131072 * token
    spared = 4 * (cache - 4 * 1056 * token) / 32
    assert whole(4, 24, cache) - part(4, 24, cache) == pytest.approx(spared)
    # The root's level alone reads everything.
    assert whole(4, 1, cache) == part(4, 1, cache) and whole(4, 0, cache) == part(4, 0, cache) == 0
    # Requests that are shorter than the part.
    assert whole(4, 24, 4 * 1000 * token) == part(4, 24, 4 * 1000 * token)
