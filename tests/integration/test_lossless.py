# SPDX-License-Identifier: Apache-2.0
"""Token for token: an engine with a GLIDE draft emits what the same engine emits without one."""

import json
import random
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.engine import Request, Result, generate, request
from tests.models import LLAMA3_ROPE, agreeing, as_llama, untied, write_draft, write_target, write_wrapper
from vllm_longspec.frequent_tokens import most_frequent
from vllm_longspec.options import DEFAULT_LEVELS

PAIR = Path(__file__).parents[2] / "benchmarks" / "pair"
DEFAULT_SHAPE = list(DEFAULT_LEVELS)

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.0, "seed": 2, "top_k": 20},
    {"temperature": 1.0, "seed": 3, "min_p": 0.05},
    {"temperature": 0.7, "seed": 4, "top_p": 0.9},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 6, "min_tokens": 6, "logit_bias": {5: 2.0}},
]


def speculative(draft: Path, tree_shape: list[int], **options: object) -> dict:
    """Trees are verified throughout, though a random draft is not worth it."""
    return {"speculative_config": {"model": str(draft), "tree_shape": tree_shape, "adapt_nodes": False, **options}}


def assert_lossless(plain: Result, result: Result) -> None:
    assert result.tokens == plain.tokens
    assert result.finish_reasons == plain.finish_reasons
    # Speculation must have run: a tree was verified, and more than once.
    assert result.num_drafts > 1


def batches(prompts: list[list[int]], max_tokens: int = 32) -> list[list[Request]]:
    """Every prompt twice: greedy and sampled requests in one batch, then the other way round from the prefix cache."""
    ways = [[GREEDY, sampling] for sampling in SAMPLINGS]
    return [
        [
            request(prompt, **ways[i][(i + turn) % 2], max_tokens=limit, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        for turn, limit in enumerate((max_tokens, 8))
    ]


def random_prompts(vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


# One token; a few; one less and one more than a block; the window of 512 sliding.
LENGTHS = (1, 3, 31, 33, 200, 640)


@pytest.mark.parametrize(
    ("family", "tied", "num_layers", "kv_heads", "tree_shape"),
    [
        ("llama", False, 2, 2, [1]),
        ("qwen2", True, 1, 1, [1, 1, 1, 1]),
        ("llama", True, 2, 1, [2, 4, 4]),
        ("qwen2", False, 1, 2, DEFAULT_SHAPE),
    ],
)
def test_random_draft(tmp_path, family, tied, num_layers, kv_heads, tree_shape):
    """The worst draft: nearly everything is rejected, so every step leaves holes behind."""
    target = write_target(
        tmp_path / "target", family, tied=tied, num_hidden_layers=num_layers, num_key_value_heads=kv_heads
    )
    draft = write_draft(tmp_path / "draft", target)
    requests = batches(random_prompts(64, LENGTHS), max_tokens=20)
    assert_lossless(generate(target, requests), generate(target, requests, **speculative(draft, tree_shape)))


@pytest.mark.parametrize(
    ("family", "overrides", "settings"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}, {}),
        ("qwen3", {}, {}),
        ("qwen3_moe", {}, {}),
        # As the default of its config: the window bounds the context instead.
        ("mistral", {"sliding_window": 512}, {"disable_sliding_window": True, "max_model_len": 512}),
        ("ministral3", {}, {}),
        ("phi3", {}, {}),
        ("glm4", {}, {}),
        ("granite", {}, {}),
    ],
)
def test_family(tmp_path, family, overrides, settings):
    """A target that a draft of small weights never guesses, and then one of the same sizes that says much the same."""
    target = write_target(tmp_path / "target", family, **overrides)
    draft = write_draft(tmp_path / "draft", target, std=0.02)
    (requests,) = batches(random_prompts(64, (5, 70, 300)), max_tokens=12)[:1]
    models: list[list[Request] | Path] = [requests, agreeing(tmp_path / "agreeing", target), requests]
    plain = generate(target, models, **settings)
    options = speculative(draft, [2, 4, 4], copy_length=0)
    result = generate(target, models, **settings, **options, per_request_spec_decode_metrics="summary")
    assert_lossless(plain, result)
    unlike, alike = (mean(filter(None, lengths)) for lengths in result.acceptance_lengths)
    assert unlike < 1.9 < 2.3 < alike


def test_the_language_model_of_a_multimodal_target(tmp_path):
    """vLLM's own code for the vision tower, which stays unused, needs torchvision: its CUDA builds ask for that."""
    pytest.importorskip("torchvision")
    target = write_wrapper(tmp_path / "target")
    draft = write_draft(tmp_path / "draft", target)
    (requests,) = batches(random_prompts(64, (5, 70, 300)), max_tokens=12)[:1]
    settings = {"language_model_only": True}
    plain = generate(target, [requests], **settings)
    assert_lossless(plain, generate(target, [requests], **settings, **speculative(draft, [2, 4, 4])))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """The trained pair as it ships (Qwen2, tied), and as a Llama model with a head of its own."""
    shipped = (PAIR / "target", PAIR / "draft")
    folder = tmp_path_factory.mktemp("pairs")
    return {"qwen2": shipped, "llama": untied(folder / "untied", *as_llama(folder / "llama", *shipped))}


def source_code(lengths: tuple[int, ...]) -> list[list[int]]:
    """Token ids of held-out source code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    return [tokenizer.encode(json.loads(line)["text"])[:length] for line, length in zip(lines, lengths, strict=False)]


@pytest.mark.parametrize(
    ("family", "tree_shape", "least"),
    [("qwen2", DEFAULT_SHAPE, 2.5), ("llama", [2, 4, 4], 2.0), ("qwen2", [1, 1, 1, 1], 2.0), ("llama", [1], 1.3)],
)
def test_trained_draft(pairs, family, tree_shape, least):
    """A good draft: whole paths are accepted, at every depth and in every sampling."""
    target, draft = pairs[family]
    requests = batches(source_code(LENGTHS))
    plain = generate(target, requests)
    result = generate(target, requests, **speculative(draft, tree_shape))
    assert_lossless(plain, result)
    assert result.acceptance_length >= least
    # The second batch found the prompts of the first one, and with them what trees had left in their last blocks.
    assert result.metrics["vllm:prefix_cache_hits"] >= plain.metrics["vllm:prefix_cache_hits"] > 0


def test_a_draft_that_sees_a_part_of_the_cache(pairs):
    """Short prompts are their own part; of long ones the draft sees three or four blocks, and the target all."""
    target, draft = pairs["qwen2"]
    requests = batches(source_code(LENGTHS))
    plain = generate(target, requests)
    result = generate(target, requests, **speculative(draft, [2, 4, 4], cross_attention_budget=64))
    assert_lossless(plain, result)
    assert result.acceptance_length >= 2


def test_noise_makes_drafts_of_sampled_requests_better(pairs):
    """Drafts ranked with the target's noise: the same tokens in fewer steps, greedy requests as without it."""
    target, draft = pairs["qwen2"]
    prompts = source_code((100, 200, 300))
    # Greedy, sampled from the whole distribution, and from a part of it.
    requests = [
        [
            request(prompt, **{**sampling, "seed": seed}, max_tokens=20, ignore_eos=True)
            for seed, prompt in enumerate(prompts)
        ]
        for sampling in (GREEDY, {"temperature": 1.0}, SAMPLINGS[0])
    ]
    plain = generate(target, requests)
    accepted = {}
    for couple_noise in (False, True):
        options = speculative(draft, [4, 8, 8], couple_noise=couple_noise, copy_length=0)
        result = generate(target, requests, **options, per_request_spec_decode_metrics="summary")
        assert_lossless(plain, result)
        accepted[couple_noise] = [mean(filter(None, lengths)) for lengths in result.acceptance_lengths]
    assert accepted[True][0] == accepted[False][0]
    assert accepted[True][1] > 1.2 * accepted[False][1]
    assert accepted[True][2] > 0.9 * accepted[False][2]


def test_unseeded_sampling_has_the_targets_distribution(pairs):
    """The draft sees the noise of each draw, and still every token is drawn as if there was none."""
    target, draft = pairs["qwen2"]
    sampled = request(source_code((60,))[0], temperature=1.0, n=120, max_tokens=3, ignore_eos=True)
    settings = {"max_num_seqs": 40, "max_num_batched_tokens": 512}
    plain = generate(target, [[sampled]], **settings)
    # With another seed of the engine, from which those of unseeded requests come: otherwise the tokens are the same.
    result = generate(target, [[sampled]], **settings, seed=1, **speculative(draft, [2, 2], copy_length=0))
    # The first token comes with the prompt; the others are mostly nodes.
    assert result.acceptance_length > 1.5
    for length in (2, 3):
        counts = [Counter(tuple(tokens[:length]) for tokens in each.tokens[0]) for each in (plain, result)]
        total = counts[0] + counts[1]
        rare = {text for text, count in total.items() if count < 6}
        bins = [[count[text] for count in counts] for text in total.keys() - rare]
        bins.append([sum(count[text] for text in rare) for count in counts])
        # Two samples of equal size: a chi-square of as many degrees of freedom as there are bins, less one.
        statistic = sum((a - b) ** 2 / (a + b) for a, b in bins)
        degrees = len(bins) - 1
        assert degrees > 1
        # Five standard deviations above its mean.
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_fewer_nodes_than_the_tree(pairs):
    """The list of nodes is cut, and any prefix of it is a tree: as a full batch of eight is verified on a GPU."""
    target, draft = pairs["qwen2"]
    ways = [GREEDY, *SAMPLINGS, {"temperature": 1.3, "seed": 7}]
    lengths = (1, 3, 31, 33, 60, 100, 150, 200)
    requests = [
        [
            request(prompt, **sampling, max_tokens=24, ignore_eos=True)
            for prompt, sampling in zip(source_code(lengths), ways, strict=True)
        ]
    ]
    result = generate(target, requests, **speculative(draft, DEFAULT_SHAPE, num_speculative_tokens=7))
    assert_lossless(generate(target, requests), result)
    assert result.num_draft_tokens <= 7 * result.num_drafts
    assert result.acceptance_length >= 2.5


def test_frequent_tokens(pairs, tmp_path):
    """A draft that may draw a quarter of the tokens only: the target still emits any."""
    target, draft = pairs["qwen2"]
    prompts = source_code((200, 300, 400))
    kept = most_frequent(Counter(token for prompt in source_code((2048,) * 8) for token in prompt), 300)
    path = tmp_path / "frequent_tokens.json"
    path.write_text(json.dumps(kept))
    requests = [[request(prompt, **GREEDY, max_tokens=48, ignore_eos=True) for prompt in prompts]]
    plain = generate(target, requests)
    assert any(token not in kept for tokens in plain.tokens[0] for token in tokens)
    result = generate(target, requests, **speculative(draft, [2, 4, 4], frequent_tokens=str(path)))
    assert_lossless(plain, result)
    assert result.acceptance_length > 1.5


@pytest.mark.parametrize("skip_tokenizer_init", [True, False])
def test_tokens_that_are_learned(pairs, skip_tokenizer_init):
    """A draft that may draw a sixteenth of the tokens at a time, which are soon those that are served.

    With a tokenizer tokens like those are expected, too.
    """
    target, draft = pairs["qwen2"]
    prompts = source_code((200, 300, 400))
    requests = [[request(prompt, **GREEDY, max_tokens=48, ignore_eos=True) for prompt in prompts]]
    plain = generate(target, requests)
    assert any(token >= 256 for tokens in plain.tokens[0] for token in tokens)
    drafting = speculative(draft, [2, 4, 4], frequent_tokens="auto:256", copy_length=0)
    result = generate(target, requests, **drafting, skip_tokenizer_init=skip_tokenizer_init)
    assert_lossless(plain, result)
    # All tokens: 3.24; those that it begins with, which are bytes: 1.06.
    assert result.acceptance_length > 2.4


def test_nodes_by_batch_size(pairs):
    """A batch that shrinks: too large for speculation at first, then verified with few nodes, then with more."""
    target, draft = pairs["qwen2"]
    limits = (8, 8, 16, 16, 24, 56)
    requests = [
        [
            request(prompt, **(GREEDY if i % 2 else SAMPLINGS[i]), max_tokens=limit, ignore_eos=True)
            for i, (prompt, limit) in enumerate(zip(source_code(LENGTHS), limits, strict=True))
        ]
    ]
    schedule = [(1, 1, 14), (2, 4, 5), (5, 8, 0)]
    plain = generate(target, requests)
    options = {"num_speculative_tokens_per_batch_size": schedule}
    result = generate(target, requests, **speculative(draft, [2, 4, 8], **options))
    assert_lossless(plain, result)
    # Some steps had 5 nodes and some 14.
    assert 5 * result.num_drafts < result.num_draft_tokens < 14 * result.num_drafts
    # While more than four requests ran, tokens came without drafts.
    assert sum(limits) - result.num_drafts - result.num_accepted_tokens >= 6 * 6
    assert result.acceptance_length > 1.8


def test_nodes_follow_what_is_accepted(pairs, tmp_path):
    """A draft that nobody follows is given up, and the same option leaves a good one alone."""
    target, draft = pairs["qwen2"]
    useless = write_draft(tmp_path / "draft", target)
    requests = [[request(prompt, **GREEDY, max_tokens=64, ignore_eos=True) for prompt in source_code((33,))]]
    plain = generate(target, requests)
    options = speculative(useless, [2, 4, 4], adapt_nodes=True)
    result = generate(target, requests, **options, async_scheduling=True)
    assert_lossless(plain, result)
    assert result.num_accepted_tokens < result.num_drafts < 32
    result = generate(target, requests, **speculative(draft, [2, 4, 4], adapt_nodes=True))
    assert_lossless(plain, result)
    # All but the first token and what a request's last steps may cut.
    assert result.num_drafts + result.num_accepted_tokens >= 60


def test_preemption(pairs):
    """A cache too small for the batch: requests lose their place, their cache and the draft's window, and come back."""
    target, draft = pairs["qwen2"]
    requests = [[request(prompt, temperature=0.0, max_tokens=64) for prompt in source_code((120, 150, 180, 200, 220))]]
    settings = {"max_model_len": 512}
    plain = generate(target, requests, **settings)
    result = generate(target, requests, **settings, num_gpu_blocks_override=28, **speculative(draft, DEFAULT_SHAPE))
    assert result.metrics["vllm:num_preemptions"] > 0
    assert_lossless(plain, result)


def test_stops_in_the_middle_of_a_path(pairs, tmp_path):
    """EOS or a stop token on an accepted path: what was accepted after it is not emitted."""
    from transformers import AutoTokenizer

    target, draft = pairs["qwen2"]
    prompts = source_code((100, 160, 220, 280, 340, 400))
    greedy = {"temperature": 0.0, "max_tokens": 48}
    free = generate(target, [[request(prompt, ignore_eos=True, **greedy) for prompt in prompts]])
    # What the model is about to say anyway becomes the end: a token of the first prompt's continuation becomes EOS, and
    # each of the other prompts gets a stop token of its own.
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free.tokens[0][0][10])
    tokenizer.save_pretrained(tmp_path)
    stops: list[list[int]] = [[]] + [[tokens[10 + i]] for i, tokens in enumerate(free.tokens[0][1:])]
    requests = [[request(prompt, stop_token_ids=stop, **greedy) for prompt, stop in zip(prompts, stops, strict=True)]]
    settings = {"tokenizer": str(tmp_path), "skip_tokenizer_init": False}
    plain = generate(target, requests, **settings)
    assert plain.finish_reasons[0] == ["stop"] * len(prompts)
    assert plain.tokens[0][0][-1] == tokenizer.eos_token_id
    result = generate(target, requests, **settings, **speculative(draft, [2, 4, 4]))
    assert_lossless(plain, result)
    # Steps were longer than one token: some end was not the last token of its step.
    assert result.acceptance_length > 2


def test_end_of_the_context(tmp_path):
    """Prompts that end at, and just before, `max_model_len`: trees are cut to what fits."""
    target = write_target(tmp_path / "target", "llama")
    draft = write_draft(tmp_path / "draft", target)
    prompts = random_prompts(64, (128, 127, 126, 124, 120, 100))
    requests = [[request(prompt[:127], temperature=0.0, ignore_eos=True, max_tokens=64) for prompt in prompts]]
    settings = {"max_model_len": 128}
    result = generate(target, requests, **settings, **speculative(draft, [2, 4, 4]))
    assert_lossless(generate(target, requests, **settings), result)


def test_logprobs_come_from_the_rows_that_were_emitted(pairs):
    target, draft = pairs["qwen2"]
    samplings = [{"temperature": 0.0, "logprobs": 0}, {"temperature": 0.0, "logprobs": 5}, {"temperature": 0.0}]
    samplings += [{"temperature": 1.0, "seed": 7, "logprobs": 3}]
    requests = [
        [
            request(prompt, max_tokens=32, **sampling)
            for prompt, sampling in zip(source_code((60, 90, 120, 150)), samplings, strict=True)
        ]
    ]
    plain = generate(target, requests)
    result = generate(target, requests, **speculative(draft, [2, 4, 4]))
    assert_lossless(plain, result)
    for expected, found in zip(plain.logprobs[0], result.logprobs[0], strict=True):
        assert (found is None) == (expected is None)
        for at_plain, at_tree in zip(expected or [], found or [], strict=True):
            assert at_tree.keys() == at_plain.keys()
            assert at_tree == pytest.approx(at_plain, abs=1e-3)


def test_bfloat16(pairs):
    """Target, draft and cache in half precision: the same text, up to tokens that rounding cannot tell apart."""
    target, draft = pairs["qwen2"]
    greedy = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    prompts = source_code((60, 90, 120))
    settings = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    plain = generate(target, [[request(prompt, **greedy, logprobs=5) for prompt in prompts]], **settings)
    requests = [[request(prompt, **greedy) for prompt in prompts]]
    result = generate(target, requests, **settings, **speculative(draft, [2, 4]))
    num_same = 0
    for expected, found, logprobs in zip(plain.tokens[0], result.tokens[0], plain.logprobs[0], strict=True):
        assert logprobs is not None
        length = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if len(set(pair)) > 1), 16)
        num_same += length
        if length < 16:
            # bfloat16 has eight bits, and logits of this size a step of a sixteenth.
            one, other = (logprobs[length][str(tokens[length])] for tokens in (expected, found))
            assert one - other < 0.25
    assert num_same > 24
    assert result.acceptance_length > 1.8
