# SPDX-License-Identifier: Apache-2.0
"""A head that learns its tokens: what is counted, what is exchanged, and rows in the place of others."""

import itertools
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.config import ModelConfig

from benchmarks import PAIR, RESULTS
from benchmarks.learned_head import WINDOWS
from benchmarks.shapes import SHAPES
from vllm_longspec.frequent_tokens import first_tokens, token_texts
from vllm_longspec.proposers.glide.head import write_rows
from vllm_longspec.proposers.glide.head_size import LOST, MAX_LOST, choose_head_size
from vllm_longspec.proposers.glide.learned_head import (
    ALTERNATIVE,
    EXCHANGED,
    HALVING,
    INTERVAL,
    MAX_URGENT,
    PROBABLE,
    UNIT,
    URGENT_INTERVAL,
    HeadLearner,
    choose_exchange,
    count_tokens,
)
from vllm_longspec.proposers.glide.resemblance import NGRAM, SCALE, Resemblance, features_of
from vllm_longspec.proposers.glide.setup import GlideSetup
from vllm_longspec.proposers.interface import Requests, Roots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 700
HIDDEN = torch.zeros(3, 4, device=DEVICE)


def counted(vocab_size, texts, slots, roots, num_new):
    """What `count_tokens` adds, token by token."""
    counts = [0] * vocab_size
    for slot, root, number in zip(slots, roots, num_new, strict=True):
        for position in range(max(0, root - number), root):
            if slot >= 0 and 0 <= texts[slot][position] < vocab_size:
                counts[texts[slot][position]] += UNIT
    return counts


@pytest.mark.parametrize(
    ("vocab_size", "roots", "num_new", "max_new"),
    [
        (50, [3], [1], 6),
        # A request that has emitted nothing, padding, one with more new tokens than there are before its root.
        (50, [10, 0, 600, 2, 20], [4, 1, 6, 6, 0], 6),
        (1000, [1, 699, 130], [128, 128, 128], 128),
        # Whole prompts.
        (1000, [1, 600, 0, 333], [600] * 4, 600),
        (20000, [129, 128, 127], [129] * 3, 129),
        (50, [0], [0], 0),
    ],
)
def test_counts_are_those_of_the_tokens_before_the_roots(vocab_size, roots, num_new, max_new):
    source = random.Random(max_new)
    # Some ids are outside the vocabulary.
    texts = [[source.randrange(-1, vocab_size + 3) for _ in range(MAX_MODEL_LEN)] for _ in range(7)]
    slots = source.sample(range(7), len(roots))
    if len(slots) > 1:
        slots[1] = -1
    before = torch.randint(0, 9, (vocab_size,), device=DEVICE)
    counts = before.clone()
    count_tokens(
        counts,
        torch.tensor(texts, dtype=torch.int32, device=DEVICE),
        torch.tensor(slots, device=DEVICE),
        torch.tensor(roots, device=DEVICE),
        torch.tensor(num_new, dtype=torch.int32, device=DEVICE),
        max_new,
    )
    assert (counts - before).tolist() == counted(vocab_size, texts, slots, roots, num_new)


def exchanged(counts, token_ids, num_pinned, number):
    """`choose_exchange` by sorting, as a mapping of the slots whose tokens change."""
    inside = sorted(range(num_pinned, len(token_ids)), key=lambda slot: (counts[token_ids[slot]], -token_ids[slot]))
    outside = sorted(set(range(len(counts))) - set(token_ids), key=lambda token: (-counts[token], token))
    pairs = zip(inside[:number], outside[:number], strict=False)
    return {slot: token for slot, token in pairs if counts[token] > counts[token_ids[slot]]}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("vocab_size", "size", "num_pinned", "number"),
    [(60, 20, 0, 5), (60, 50, 7, 43), (300, 16, 4, 12), (1000, 999, 1, 30)],
)
def test_the_most_counted_take_the_slots_of_the_least(vocab_size, size, num_pinned, number, seed):
    source = random.Random(seed)
    # Few different counts, so that many are equal; large ones, which must not overflow.
    counts = [source.choice([0, 0, 1, 5, 10**12, 2 * 10**12]) for _ in range(vocab_size)]
    token_ids = source.sample(range(vocab_size), size)
    slots, tokens = choose_exchange(
        torch.tensor(counts, device=DEVICE), torch.tensor(token_ids, device=DEVICE), num_pinned, number
    )
    assert slots.shape == tokens.shape == (number,)
    assert len(set(slots.tolist())) == number and min(slots.tolist()) >= num_pinned
    after = list(token_ids)
    for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
        after[slot] = token
    assert len(set(after)) == size
    changed = {slot: token for slot, token in enumerate(after) if token != token_ids[slot]}
    assert changed == exchanged(counts, token_ids, num_pinned, number)


def test_exchanges_end_when_the_head_has_the_most_counted():
    counts = torch.randint(0, 100, (500,), device=DEVICE)
    token_ids = torch.arange(64, device=DEVICE)
    for _ in range(8):
        slots, tokens = choose_exchange(counts, token_ids, 4, 10)
        token_ids[slots] = tokens
    kept = counts[token_ids[4:]].sort(descending=True).values
    assert kept.tolist() == counts[4:].sort(descending=True).values[:60].tolist()
    slots, tokens = choose_exchange(counts, token_ids, 4, 10)
    assert tokens.equal(token_ids[slots])


def test_counts_of_any_size_keep_their_order():
    """A token that is counted more than others stays, however often: some prompts are cached and long."""
    counts = torch.arange(151936, device=DEVICE)
    counts[:4] = torch.tensor([2**46, 2**50, 2**62, 2**63 - 1])
    slots, tokens = choose_exchange(counts, torch.arange(64, device=DEVICE), 0, 64)
    after = torch.arange(64, device=DEVICE).index_copy_(0, slots, tokens).tolist()
    assert {0, 1, 2, 3, *range(151936 - 60, 151936)} == set(after)


class Head:
    """The part of a draft that learns."""

    def __init__(self, vocab_size: int, size: int):
        self.token_ids = torch.arange(size, device=DEVICE)
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64, device=DEVICE)
        self.resemblance: Resemblance | None = None
        self.num_exchanges = 0
        self.seen: list[torch.Tensor] = []
        # Of one row; by default all rows have a token as probable that is always there.
        self.logits = torch.full((vocab_size,), -100.0, device=DEVICE)
        self.logits[0] = 0.0

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.seen.append(hidden_states)
        return self.logits.expand(len(hidden_states), -1)

    def replace_tokens(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        self.token_ids[slots] = tokens
        self.num_exchanges += 1


def learner_of(vocab_size: int, size: int, num_pinned: int = 0) -> tuple[Any, HeadLearner]:
    head: Any = Head(vocab_size, size)
    return head, HeadLearner(head, num_pinned)


def add_prompt(learner: HeadLearner, tokens: list[int]) -> None:
    text = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    zero, root = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([len(tokens)], device=DEVICE)
    learner.add_prompts(zero, Roots(zero, root, root.int()), text, len(tokens))


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (" the", {" th", "the", "script LATIN"}),
        ("жжжжж", {"жжж", "script CYRILLIC"}),
        ("(ж", {"(ж", "script CYRILLIC"}),
        ("数据", {"数据", "script CJK"}),
        # A sign without a letter.
        ("\N{DEVANAGARI VOWEL SIGN I}", {"\N{DEVANAGARI VOWEL SIGN I}", "script DEVANAGARI"}),
        ("    ", {"   ", "script of none"}),
        ("\ufffd", {"\ufffd", "script of none"}),
        ("", {"", "script of none"}),
    ],
)
def test_features_are_runs_of_characters_and_the_script(text, features):
    assert features_of(text) == features and NGRAM == 3


def expected(counts, texts):
    """`Resemblance.expected` token by token."""
    by_token = [features_of(text) for text in texts]
    shares = {}
    for feature in set().union(*by_token):
        having = [token for token, features in enumerate(by_token) if feature in features]
        shares[feature] = sum(min(counts[token], UNIT) for token in having) // len(having)
    return [
        sum(shares[feature] for feature in features) * len(texts) // (SCALE * len(features) * (token + 1))
        for token, features in enumerate(by_token)
    ]


def some_texts(number: int) -> list[str]:
    source = random.Random(number)
    alphabets = ("abcd ", "абвг ", "数据库 ", "01.", "")
    return ["".join(source.choices(alphabets[token % 5] or "\ufffd", k=token % 7)) for token in range(number)]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_expected_by_the_shares_of_their_features(seed):
    texts = some_texts(300)
    source = random.Random(seed)
    counts = [source.choice([0, 0, UNIT // 16, UNIT, 10**12]) for _ in texts]
    resemblance = Resemblance(texts, DEVICE)
    found = resemblance.expected(torch.tensor(counts, device=DEVICE), UNIT)
    assert found.dtype == torch.int64 and found.tolist() == expected(counts, texts)
    # Ranks with the same texts and counts expect the same.
    again = Resemblance(list(texts), DEVICE).expected(torch.tensor(counts, device=DEVICE), UNIT)
    assert again.equal(found)
    assert not resemblance.expected(torch.zeros(300, dtype=torch.int64, device=DEVICE), UNIT).any()


def test_what_is_expected_survives_that_weights_are_discarded():
    """Buffers are kept at level 2 of sleep mode, and no checkpoint has them."""
    resemblance = Resemblance(some_texts(50), DEVICE)
    assert set(vars(resemblance)["_buffers"]) == set(Resemblance.__annotations__)
    assert not resemblance.state_dict()


def test_a_script_brings_in_tokens_that_nobody_has_seen():
    """A prompt in another script: its tokens come in, then others of the script, and those of no use leave."""
    source = random.Random(0)

    def words(letters: str) -> list[str]:
        return ["".join(source.choices(letters, k=4)) for _ in range(200)]

    # Ranks of the scripts are mixed.
    texts = [
        text for pair in zip(words("abcdefgh"), words("абвгдежз"), words("αβγδεζηθ"), strict=True) for text in pair
    ]
    cyrillic = set(range(1, 600, 3))

    def run(resemblance: Resemblance | None) -> list[int]:
        head, learner = learner_of(600, 300)
        head.resemblance = resemblance
        learner.start_step(HIDDEN)
        add_prompt(learner, sorted(cyrillic)[::4])
        for _ in range(2 * INTERVAL):
            learner.start_step(HIDDEN)
        return head.token_ids.tolist()

    learned = run(Resemblance(texts, DEVICE))
    assert cyrillic <= set(learned)
    # Two ranks decide the same, slot by slot.
    assert learned == run(Resemblance(texts, DEVICE))
    # Without texts only what was seen comes in.
    assert set(run(None)) - set(range(300)) <= set(sorted(cyrillic)[::4])


def test_a_language_brings_in_tokens_that_look_like_it():
    """Two languages in one script, told apart by runs of their letters."""
    endings = ("schen", "isch", "ung", "lich"), ("tion", "ment", "eaux", "ique")
    source = random.Random(1)
    texts = ["".join(source.choices("bdfgklmnprstv", k=2)) + source.choice(endings[token % 2]) for token in range(400)]
    head, learner = learner_of(400, 220)
    head.resemblance = Resemblance(texts, DEVICE)
    learner.start_step(HIDDEN)
    add_prompt(learner, list(range(0, 400, 8)))
    for _ in range(2 * INTERVAL):
        learner.start_step(HIDDEN)
    share = sum(token % 2 == 0 for token in head.token_ids.tolist()) / 200
    # Half of those that it began with.
    assert share > 0.9


def test_texts_of_tokens():
    model_config = ModelConfig(str(PAIR / "target"))
    texts = token_texts(model_config)
    assert texts is not None and len(texts) == 4096
    assert texts[:2] == ["<|endoftext|>", "!"] and " the" in texts
    # A vocabulary is often padded beyond the tokenizer's.
    padded = ModelConfig(str(PAIR / "target"), hf_overrides={"vocab_size": 4224})
    assert token_texts(padded) == [*texts, *[""] * 128]
    assert token_texts(ModelConfig(str(PAIR / "target"), skip_tokenizer_init=True)) is None


def test_texts_of_a_vocabulary_with_holes(tmp_path):
    """Of a tokenizer, too, that marks leading spaces and drops them when it decodes a single token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581a": 1, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model_config = ModelConfig(str(PAIR / "target"), tokenizer=str(tmp_path), hf_overrides={"vocab_size": 7})
    assert token_texts(model_config) == ["<unk>", " a", "", "", "b", "", ""]


def test_tokens_of_a_prompt_are_there_before_its_first_draft():
    head, learner = learner_of(20000, 2000, num_pinned=10)
    learner.start_step(HIDDEN)
    add_prompt(learner, list(range(5000, 5200)))
    assert set(range(5000, 5200)) <= set(head.token_ids.tolist())
    assert set(range(10)) <= set(head.token_ids.tolist())


def test_the_tokens_of_a_long_prompt_are_added_within_a_bounded_number_of_steps():
    head, learner = learner_of(20000, 5000)
    learner.start_step(HIDDEN)
    num_tokens = 3 * EXCHANGED
    prompt = list(range(5000, 5000 + num_tokens)) + list(range(5000, 5100)) * 4
    add_prompt(learner, prompt)
    # Those that occur most come first.
    assert set(range(5000, 5100)) <= set(head.token_ids.tolist())
    added = [head.num_exchanges]
    for _ in range(2 * URGENT_INTERVAL):
        learner.start_step(HIDDEN)
        added.append(head.num_exchanges)
    assert set(range(5000, 5000 + num_tokens)) <= set(head.token_ids.tolist())
    # Steps between two exchanges.
    times = [step for step in range(1, len(added)) if added[step] > added[step - 1]]
    assert all(later - earlier >= URGENT_INTERVAL for earlier, later in itertools.pairwise(times))
    # What is needed is over; then once in a while.
    for _ in range(INTERVAL + MAX_URGENT * URGENT_INTERVAL):
        learner.start_step(HIDDEN)
    before = head.num_exchanges
    for _ in range(10 * INTERVAL):
        learner.start_step(HIDDEN)
    assert head.num_exchanges == before + 10


def test_many_prompts_do_not_exchange_in_every_step():
    head, learner = learner_of(5000, 1000)
    for step in range(100):
        learner.start_step(HIDDEN)
        add_prompt(learner, [2000 + step, 3000 + step])
    assert head.num_exchanges <= 1 + 100 // URGENT_INTERVAL
    learner.start_step(HIDDEN)
    assert learner.num_urgent <= MAX_URGENT


def test_emitted_tokens_come_in_and_old_ones_go():
    head, learner = learner_of(1000, 32)

    def emit(tokens: list[int], num_steps: int) -> None:
        text = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        zero, root = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([len(tokens)], device=DEVICE)
        num_new = torch.tensor([len(tokens)], dtype=torch.int32, device=DEVICE)
        requests = Requests(zero, Roots(zero, root, root.int()), num_new, len(tokens), text, text, 0, None)
        for _ in range(num_steps):
            learner.start_step(HIDDEN)
            learner.count_emitted(requests)

    # A quarter of the slots at a time.
    emit(list(range(500, 532)), 5 * INTERVAL)
    assert set(head.token_ids.tolist()) == set(range(500, 532))
    emit(list(range(600, 632)), 10 * INTERVAL)
    assert set(head.token_ids.tolist()) == set(range(600, 632))
    # Counts are halved.
    count = head.token_counts[500].item()
    for _ in range(HALVING):
        learner.start_step(HIDDEN)
    assert head.token_counts[500].item() == count // 2


def test_what_might_have_been_emitted_comes_in():
    head, learner = learner_of(1000, 32)
    head.logits[700:710], head.logits[710:720] = -PROBABLE + 0.01, -PROBABLE - 0.01
    hidden = torch.arange(70, device=DEVICE).float().unsqueeze(1)
    for _ in range(3 * INTERVAL):
        learner.start_step(hidden)
    assert set(range(700, 710)) <= set(head.token_ids.tolist()) and 710 not in head.token_ids.tolist()
    # A bounded number of rows, spread over the step, before each exchange.
    assert [rows[:, 0].tolist() for rows in head.seen] == [list(range(0, 70, 5))] * 3
    assert head.token_counts[700].item() == 3 * 14 * ALTERNATIVE
    # What is emitted counts more.
    assert 14 * ALTERNATIVE < UNIT


@pytest.mark.parametrize("size", [16, 20, 1000])
def test_a_head_begins_with_special_tokens_and_the_lowest_ids(size):
    tokens, num_pinned = first_tokens(size, 5000, [4999, 7, 4998, 4999, 5000, 3])
    assert len(set(tokens)) == len(tokens) == size
    assert tokens[:num_pinned] == [4999, 7, 4998, 3][: size // 4]
    others = [token for token in range(size + 2) if token not in (3, 7)]
    assert num_pinned == 4 and tokens[num_pinned:] == others[: size - 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
# Of all ranks; of one, so that the others have nothing to write; all slots.
@pytest.mark.parametrize("slots", [[3, 47, 0, 11, 31], [20, 16], [4], [*range(1, 48), 0]])
def test_rows_are_written_as_they_would_be_loaded(dtype, is_quantised, num_ranks, slots):
    """As vLLM's own quantisation of the whole weight stores them, by each rank in its own slots."""
    from vllm.model_executor.layers.quantization.online.fp8 import _fp8_channel_scale, _fp8_quant_per_channel
    from vllm.model_executor.layers.quantization.utils.quant_utils import weight_amax

    torch.manual_seed(0)
    weight = torch.randn(48, 64, device=DEVICE).to(dtype)
    weight[5] = 0

    def shard(weight: torch.Tensor, rank: int) -> Any:
        weight = weight.chunk(num_ranks)[rank]
        ranks = {"tp_size": num_ranks, "tp_rank": rank}
        if not is_quantised:
            return SimpleNamespace(weight=torch.nn.Parameter(weight.clone(), False), **ranks)
        scale = _fp8_channel_scale(weight_amax(weight, dim=-1, keepdim=True))
        quantised = torch.nn.Parameter(_fp8_quant_per_channel(weight, scale).t(), False)
        return SimpleNamespace(weight=quantised, weight_scale=torch.nn.Parameter(scale), **ranks)

    written = [shard(weight, rank) for rank in range(num_ranks)]
    slots = torch.tensor(slots, device=DEVICE)
    rows = torch.randn(len(slots), 64, device=DEVICE).to(dtype)
    rows[-1] *= 1000
    rows[1:2] = 0
    weight[slots] = rows
    for rank in range(num_ranks):
        write_rows(written[rank], slots, rows)
        expected = shard(weight, rank)
        assert written[rank].weight.float().equal(expected.weight.float())
        if is_quantised:
            # vLLM compiles its own for a GPU, and may then multiply where this divides.
            torch.testing.assert_close(written[rank].weight_scale, expected.weight_scale, rtol=1e-6, atol=0)


def test_prompts_need_no_more_than_a_bounded_number_of_rows():
    _, learner = learner_of(20000, 4000, num_pinned=3900)
    assert learner.num_exchanged == 100 < EXCHANGED
    _, learner = learner_of(20000, 4 * EXCHANGED)
    assert learner.num_exchanged == EXCHANGED
    # What one prompt suggests does not replace all of a small head.
    _, learner = learner_of(20000, 1024)
    assert learner.num_exchanged == 256


def size_for(model: str, num_ranks: int = 1, **overrides: int) -> int | None:
    shape = {**SHAPES[model], **overrides}
    return choose_head_size(SimpleNamespace(**shape), shape["vocab_size"], num_ranks)


def test_what_a_size_loses_is_what_was_measured():
    records = json.loads((RESULTS / "learned-head.json").read_text())["records"]
    windows = [f"lost from step {start}" for start in WINDOWS if start >= 200]
    lost: dict[int, float] = {}
    for record in records:
        if record["way"] == "learned":
            lost[record["size"]] = max([lost.get(record["size"], 0), *(record[window] for window in windows)])
    assert {size: round(share, 3) for size, share in lost.items()} == LOST


def test_a_head_learns_where_it_pays():
    for model in ("qwq-32b", "llama-3-8b-262k"):
        size = size_for(model)
        assert size is not None and LOST[size] <= MAX_LOST
    # The layers are so many that the head is nothing beside them.
    assert size_for("qwq-32b", num_hidden_layers=640) is None
    # Ranks share a smaller head as they share all weights.
    assert [size_for(model, num_ranks) for model in ("qwq-32b", "qwen2.5-7b") for num_ranks in (2, 4, 8)] == [65536] * 6
    # It saves less where it takes a smaller part of the time: starting kernels takes as long on any number of ranks.
    assert size_for("qwq-32b", num_ranks=64) is None
    # The vocabularies of the trained pairs and of Llama 2.
    assert [size_for("llama-3-8b-262k", vocab_size=size) for size in (4096, 16384, 32000)] == [None] * 3


@pytest.mark.parametrize("given", [None, "auto", "auto:32768"])
@pytest.mark.parametrize("quantization", [None, "fp8_per_channel", "fp8_per_tensor"])
def test_a_head_with_one_scale_does_not_learn(given, quantization, tmp_path):
    """A row that is written later may not fit the scale of those before."""
    shape = SHAPES["qwq-32b"]
    target: Any = SimpleNamespace(hf_text_config=SimpleNamespace(**shape), get_vocab_size=lambda: shape["vocab_size"])
    checkpoint: Any = SimpleNamespace(model=str(tmp_path))
    ranks: Any = SimpleNamespace(tensor_parallel_size=1)
    setup = GlideSetup(checkpoint, None)

    def size() -> str | int | None:
        return setup.frequent_tokens(given, {"quantization": quantization}, target, ranks)

    if quantization != "fp8_per_tensor":
        assert size() == (32768 if given == "auto:32768" else size_for("qwq-32b"))
    elif given == "auto:32768":
        with pytest.raises(ValueError, match=r"which has one scale .* a file of tokens"):
            size()
    else:
        assert size() is None
