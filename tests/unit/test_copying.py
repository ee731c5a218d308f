# SPDX-License-Identifier: Apache-2.0
"""Copied paths: the lookup in a request's own tokens, and how far copies are trusted."""

import random

import pytest
import torch
from vllm.v1.worker.gpu.states import RequestState

from tests.oracles import copying as oracle
from vllm_longspec.copying import lookup, trust
from vllm_longspec.copying.lookup import MAX_MATCH, MIN_MATCH, find_copies
from vllm_longspec.copying.trust import CopyTrust
from vllm_longspec.runner.speculator import keep_token_ids_on_device
from vllm_longspec.tree.state import NO_TOKEN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_LEN = 400
UNUSED = 7  # what is past the root in a request's row, left by the request before it


def text_with_repeats(source: random.Random, length: int, vocab_size: int) -> list[int]:
    """Random tokens, some of which are passages from before, now and then with a token changed."""
    text: list[int] = []
    while len(text) < length:
        if len(text) > 4 and source.random() < 0.5:
            start = source.randrange(len(text))
            passage = text[start : start + source.randrange(1, 30)]
            if source.random() < 0.3:
                passage[source.randrange(len(passage))] = source.randrange(vocab_size)
            text += passage
        else:
            text += [source.randrange(vocab_size) for _ in range(source.randrange(1, 8))]
    return text[:length]


def rows_of(texts: dict[int, list[int]], num_slots: int) -> torch.Tensor:
    token_ids = torch.full((num_slots, MAX_LEN), UNUSED, dtype=torch.int32)
    for slot, text in texts.items():
        token_ids[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
    return token_ids.to(DEVICE)


def staged(texts: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The requests' `idx_mapping` and root positions, with one of padding at the end."""
    slots = torch.tensor([*texts, -1], device=DEVICE)
    return slots, torch.tensor([*(len(text) - 1 for text in texts.values()), 0], device=DEVICE)


def find(texts: dict[int, list[int]], copy_length: int, max_root_position: int = MAX_LEN) -> list[tuple]:
    slots, roots = staged(texts)
    token_ids = rows_of(texts, 2 * len(texts) + 1)
    copied, match_lens = find_copies(token_ids, slots, roots, max_root_position, copy_length)
    assert copied[-1].tolist() == [NO_TOKEN] * copy_length
    assert match_lens[-1] == 0
    return list(zip(copied[:-1].tolist(), match_lens[:-1].tolist(), strict=True))


@pytest.mark.parametrize("copy_length", [1, 5, 33])
@pytest.mark.parametrize("vocab_size", [2, 8])
@pytest.mark.parametrize("block", [None, 64])
def test_the_longest_match_at_its_latest_place(monkeypatch, copy_length, vocab_size, block):
    if block is not None:
        # As on a GPU: the context in blocks, of which some hold no match and some are past the root.
        monkeypatch.setattr(lookup, "BLOCK", block)
        monkeypatch.setattr(lookup, "interpreting", lambda: False)
    source = random.Random(copy_length * 100 + vocab_size)
    lengths = [1, 2, 3, 4, 5, 13, *(source.randrange(6, MAX_LEN) for _ in range(5)), MAX_LEN]
    texts = {2 * i: text_with_repeats(source, length, vocab_size) for i, length in enumerate(lengths)}
    found = find(texts, copy_length)
    expected = [oracle.find_copy(text, copy_length) for text in texts.values()]
    assert found == [(copied or [NO_TOKEN] * copy_length, match_len) for copied, match_len in expected]
    assert len({match_len for _, match_len in found}) > 2


def test_bounds_of_a_match():
    passage = list(range(10, 10 + MAX_MATCH + 2))
    cases = [
        # Fewer than the shortest match; exactly that many; more than are compared.
        ([1, 2, *passage[: MIN_MATCH - 1], 3, 4, *passage[: MIN_MATCH - 1]], 0),
        ([1, 2, *passage[:MIN_MATCH], 3, 4, *passage[:MIN_MATCH]], MIN_MATCH),
        ([1, 2, *passage, 3, 4, *passage], MAX_MATCH),
        # The match begins with the text; a match may overlap the tokens that it matches.
        ([*passage[:MIN_MATCH], 3, *passage[:MIN_MATCH]], MIN_MATCH),
        ([5] * (MIN_MATCH + 1), MIN_MATCH),
        ([5] * MIN_MATCH, 0),
    ]
    found = find({i: text for i, (text, _) in enumerate(cases)}, 4, max_root_position=50)
    assert [match_len for _, match_len in found] == [match_len for _, match_len in cases]
    assert found[1][0] == [3, 4, 10, 11]
    assert found[4][0] == [5, 5, 5, 5]


def test_a_period_is_repeated():
    ((copied, match_len),) = find({0: [1, 2, 3, 4] * 4}, 10)
    assert copied == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert match_len == 12


class Requests:
    """Requests whose texts grow by random steps, some of which follow the copy."""

    def __init__(self, copy_length: int, seed: int):
        self.source = random.Random(seed)
        self.copy_length = copy_length
        self.trust = CopyTrust(8, copy_length, DEVICE)
        self.oracle = oracle.Trust()
        self.texts: dict[int, list[int]] = {}
        self.copies: dict[int, list[int]] = {}

    def enter(self, slot: int) -> None:
        self.texts[slot] = text_with_repeats(self.source, self.source.randrange(20, 60), 6)
        self.trust.forget(torch.tensor([slot], device=DEVICE))
        self.oracle.copies.pop(slot, None)
        self.copies.pop(slot, None)

    def grow(self, slot: int) -> None:
        num_new, copied = self.source.randrange(1, self.copy_length + 3), self.copies.get(slot, [])
        num_followed = self.source.randrange(len(copied) + 1)
        self.texts[slot] += [copied[i] if i < num_followed else self.source.randrange(6) for i in range(num_new)]

    def score(self, slots: list[int]) -> None:
        texts = {slot: self.texts[slot] for slot in slots}
        token_ids, (idx_mapping, roots) = rows_of(self.texts, 8), staged(texts)
        copied, match_lens = find_copies(token_ids, idx_mapping, roots, MAX_LEN, self.copy_length)
        scores = self.trust.score(copied, match_lens, token_ids, idx_mapping, roots)
        self.oracle.observe(texts)
        for i, (slot, text) in enumerate(texts.items()):
            expected, match_len = oracle.find_copy(text, self.copy_length)
            self.copies[slot] = expected
            if not match_len:
                assert scores[i].tolist() == [float("-inf")] * self.copy_length
                continue
            assert scores[i].tolist() == pytest.approx(self.oracle.scores(match_len, self.copy_length), rel=1e-5)
            assert (scores[i].diff() < 0).all()
            assert scores[i, 0] < 0
            self.oracle.keep(slot, text, expected, match_len)
        self.check()

    def check(self) -> None:
        for counts, expected in ((self.trust.num_seen, self.oracle.seen), (self.trust.num_right, self.oracle.right)):
            assert counts.tolist() == [expected.get(MIN_MATCH + i, 0) for i in range(len(counts))]


@pytest.mark.parametrize("copy_length", [1, 4, 16])
def test_rates_are_what_copies_turned_out_to_be(monkeypatch, copy_length):
    # Counts are halved within the test.
    for module in (trust, oracle):
        monkeypatch.setattr(module, "WINDOW", 12)
    requests = Requests(copy_length, seed=copy_length)
    for slot in range(6):
        requests.enter(slot)
    for _ in range(30):
        # Some requests miss a step, and some leave their place to another one before they are seen again.
        slots = requests.source.sample(range(6), requests.source.randrange(1, 7))
        for slot in slots:
            if requests.source.random() < 0.15 or len(requests.texts[slot]) > MAX_LEN - 2 * copy_length - 4:
                requests.enter(slot)
            else:
                requests.grow(slot)
        requests.score(slots)
    assert requests.trust.num_right.sum() > 3
    assert (requests.trust.num_right < requests.trust.num_seen).any()


def test_nothing_is_learned_of_another_request():
    requests = Requests(8, seed=0)
    requests.texts = {3: [1, 2, 3, 4, 5] * 5}
    requests.score([3])
    # Another request in the same place, whose tokens go on as the copy did.
    requests.enter(3)
    requests.texts[3] = [1, 2, 3, 4, 5] * 7
    requests.score([3])
    assert requests.trust.num_seen.sum() == 0
    # A request that stays.
    requests.texts[3] = [1, 2, 3, 4, 5] * 8
    requests.score([3])
    assert requests.trust.num_right.tolist() == requests.trust.num_seen.tolist()
    assert requests.trust.num_seen.sum() == 5


def test_right_copies_are_trusted_more_and_wrong_ones_less():
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def score(state: CopyTrust, text: list[int]) -> list[float]:
        token_ids, roots = rows_of({0: text}, 1), torch.tensor([len(text) - 1], device=DEVICE)
        return state.score(*find_copies(token_ids, slots, roots, MAX_LEN, 4), token_ids, slots, roots)[0].tolist()

    text = [1, 2, 3] * 8
    before = score(CopyTrust(1, 4, DEVICE), text)
    for going_on, is_higher in (([1, 2, 3, 1], True), ([9], False)):
        state = CopyTrust(1, 4, DEVICE)
        for _ in range(3):
            score(state, text)
            score(state, text + going_on)
            state.forget(slots)
        assert [(new > old) for new, old in zip(score(state, text), before, strict=True)] == [is_higher] * 4


@pytest.mark.usefixtures("buffers_without_a_gpu")
def test_the_text_of_all_requests_is_in_the_devices_memory():
    states = RequestState(4, 64, 16, 1, 100, DEVICE)
    assert states.all_token_ids.write_contents is not None
    keep_token_ids_on_device(states)
    states.add_request("a", 3, [5, 6, 7], 0, 8)
    states.apply_staged_writes()
    token_ids = states.all_token_ids
    assert token_ids.gpu.shape == (4, 64)
    assert token_ids.gpu[states.req_id_to_index["a"], :4].tolist() == [5, 6, 7, 0]
    # vLLM has no host buffer for what is written to a tensor of the device.
    assert token_ids.write_contents is None
