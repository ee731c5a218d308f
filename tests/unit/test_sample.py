# SPDX-License-Identifier: Apache-2.0
"""The tree sampler around vLLM's own: what it emits, how often, and which rows its log-probabilities come from."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.metrics import logits as logits_metrics
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from tests.oracles import tree as oracle
from vllm_longspec.interpreter import interpreting
from vllm_longspec.interpreter.sampling import get_num_nans
from vllm_longspec.tree import draw, sample
from vllm_longspec.tree.batch import TreeBatch
from vllm_longspec.tree.sample import TreeSampler, _rows_of_emitted
from vllm_longspec.tree.state import TreeState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 64


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch, sampling_without_a_gpu):
    if interpreting():
        monkeypatch.setattr(logits_metrics, "get_num_nans", functools.partial(get_num_nans, None))  # type: ignore[arg-type]


class Request:
    """A tree, the target's logits at its rows, and how to sample."""

    def __init__(
        self,
        parents: list[int],
        tokens: list[int],
        logits: torch.Tensor,  # [num_rows, vocab_size]
        position: int,
        params: SamplingParams,
    ):
        self.parents = parents
        self.tokens = tokens
        self.logits = logits
        self.position = position
        self.params = params
        self.depths = [0]
        for parent in parents[1:]:
            self.depths.append(self.depths[parent] + 1)


class Step:
    """A step's batch of trees, with the state that vLLM's runner would hold."""

    def __init__(self, requests: list[Request], max_depth: int, logprobs_mode: str = "raw_logprobs"):
        num_reqs, vocab_size = len(requests), requests[0].logits.shape[1]
        num_rows = max(len(request.parents) for request in requests)
        max_num_reqs = num_reqs + 2
        self.vocab_size = vocab_size
        self.requests = requests
        # Slots in another order than the batch.
        self.slots = list(range(max_num_reqs - 1, 1, -1))
        self.state = RequestState(max_num_reqs, MAX_MODEL_LEN, 4096, num_rows - 1, vocab_size, DEVICE)
        self.sampler = Sampler(
            VllmConfig(),
            max_num_reqs,
            vocab_size,
            DEVICE,
            self.state,
            logprobs_mode=logprobs_mode,  # type: ignore[arg-type]
            num_speculative_tokens=num_rows,
        )
        tree = TreeState.allocate(max_num_reqs, num_rows - 1, DEVICE)
        for slot, request in zip(self.slots, requests, strict=True):
            self.sampler.add_request(slot, request.params)
            tree.parent_rows[slot, : len(request.parents)] = torch.tensor(request.parents, dtype=torch.int32)
        self.sampler.apply_staged_writes()
        self.tree_sampler = TreeSampler(self.sampler, tree, TreeBatch.allocate(tree, max_depth), max_depth)

        lengths = np.array([len(request.parents) for request in requests])
        self.starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        seq_lens = torch.tensor([request.position for request in requests]) + torch.from_numpy(lengths)
        # Other tokens stand between those of the trees, as in a batch that also holds prompts.
        num_logits = int(self.starts[-1])
        self.batch = SimpleNamespace(
            num_reqs=num_reqs,
            idx_mapping=torch.tensor(self.slots, device=DEVICE),
            idx_mapping_np=np.array(self.slots),
            expanded_idx_mapping=torch.tensor(np.repeat(self.slots, lengths), device=DEVICE),
            expanded_local_pos=torch.tensor([row for length in lengths for row in range(length)], device=DEVICE),
            logits_indices=torch.arange(num_logits, device=DEVICE) * 2 + 1,
            input_ids=self._interleave([token for request in requests for token in request.tokens], torch.int32),
            positions=self._interleave(
                [request.position + depth for request in requests for depth in request.depths], torch.int64
            ),
            cu_num_logits=torch.from_numpy(self.starts).to(DEVICE),
            cu_num_logits_np=self.starts,
            seq_lens=seq_lens.to(DEVICE, torch.int32),
            seq_lens_cpu_upper_bound=seq_lens.to(torch.int32),
        )

    @staticmethod
    def _interleave(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([torch.full((len(values),), 3), torch.tensor(values)], dim=1).flatten().to(DEVICE, dtype)

    def run(self, invalid_drafts: torch.Tensor | None = None) -> SamplerOutput:
        logits = torch.cat([request.logits for request in self.requests]).to(DEVICE)
        return self.tree_sampler(logits, self.batch, invalid_drafts=invalid_drafts)  # type: ignore[arg-type]

    def sample_one(self, request: int, row: int) -> int:
        """What vLLM's sampler draws at one row when the row is all that there is."""
        slot = self.slots[request]
        drawn, _ = self.sampler.sample(
            self.requests[request].logits[row : row + 1].to(DEVICE),
            torch.tensor([slot], device=DEVICE),
            torch.tensor([slot], device=DEVICE),
            np.array([slot]),
            torch.tensor([self.requests[request].position + self.requests[request].depths[row]], device=DEVICE),
            torch.tensor([0], device=DEVICE),
            torch.tensor([0], device=DEVICE),
            np.array([MAX_MODEL_LEN]),
        )
        return int(drawn)


def emitted_by(output: SamplerOutput) -> list[list[int]]:
    return [
        tokens[:count]
        for tokens, count in zip(output.sampled_token_ids.tolist(), output.num_sampled.tolist(), strict=True)
    ]


def random_request(source: torch.Generator, vocab_size: int, num_rows: int, params: SamplingParams) -> Request:
    """A tree of likely tokens; siblings have different ones, as in every drafted tree."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=source))

    logits = torch.randn(num_rows, vocab_size, generator=source) * 2
    parents, tokens, taken = [-1], [draw(vocab_size)], set()
    while len(parents) < num_rows:
        parent = draw(len(parents))
        token = int(logits[parent].softmax(-1).multinomial(1, generator=source))
        if (parent, token) not in taken:
            taken.add((parent, token))
            parents.append(parent)
            tokens.append(token)
    return Request(parents, tokens, logits, 1 + draw(40), params)


SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.6, "seed": 2},
    {"temperature": 1.3, "seed": 3, "top_k": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.7},
    {"temperature": 0.9, "seed": 5, "min_p": 0.2},
    {"temperature": 0.8, "seed": 6, "top_k": 4, "top_p": 0.8, "min_p": 0.05},
]


def mixed_requests(count: int, vocab_size: int = 5, **settings: object) -> list[Request]:
    """All kinds of sampling in one batch; requests of 1 to 9 rows."""
    source = torch.Generator().manual_seed(0)
    return [
        random_request(source, vocab_size, 1 + index % 9, SamplingParams(**SAMPLINGS[index % 7], **settings))  # type: ignore[arg-type]
        for index in range(count)
    ]


def requests_at_temperatures(count: int, vocab_size: int = 5) -> list[Request]:
    source = torch.Generator().manual_seed(0)
    return [
        random_request(
            source, vocab_size, 1 + index % 9, SamplingParams(temperature=(0.0, 0.6, 1.3)[index % 3], seed=index)
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("make", [mixed_requests, requests_at_temperatures])
def test_emits_what_sampling_one_token_after_the_other_emits(monkeypatch, make):
    own_draws = []

    def draw_at_temperature(*arguments):
        own_draws.append(arguments)
        return draw.draw_at_temperature(*arguments)

    monkeypatch.setattr(draw, "interpreting", lambda: False)
    monkeypatch.setattr(sample, "draw_at_temperature", draw_at_temperature)
    step = Step(make(28), max_depth=8)
    step.tree_sampler.is_warm = True
    output = step.run()
    assert len(own_draws) == (make is requests_at_temperatures)
    num_accepted = 0
    for index, (request, tokens) in enumerate(zip(step.requests, emitted_by(output), strict=True)):
        row: int | None = 0
        expected = []
        while row is not None:
            expected.append(step.sample_one(index, row))
            row = next(
                (
                    child
                    for child in range(len(request.parents))
                    if request.parents[child] == row and request.tokens[child] == expected[-1]
                ),
                None,
            )
        assert tokens == expected
        num_accepted += len(tokens) - 1
    lengths = [len(request.parents) for request in step.requests]
    rejected = [length - len(tokens) for length, tokens in zip(lengths, emitted_by(output), strict=True)]
    assert output.num_rejected.tolist() == rejected
    # Paths were walked, not only roots.
    assert num_accepted >= 10


def test_the_warm_up_compiles_the_draw_at_a_temperature(monkeypatch):
    """Its requests have every sampling parameter, so that vLLM's sampler draws for them."""
    draws = []
    monkeypatch.setattr(sample, "interpreting", lambda: False)
    monkeypatch.setattr(sample, "draw_at_temperature", lambda *arguments: draws.append(arguments))
    step = Step(mixed_requests(3), max_depth=8)
    first, second = step.run(), step.run()
    assert len(draws) == 1
    assert emitted_by(first) == emitted_by(second)


def test_greedy_requests_emit_the_path_of_the_best_tokens():
    source = torch.Generator().manual_seed(1)
    requests = [random_request(source, 4, 9, SamplingParams(temperature=0.0)) for _ in range(12)]
    step = Step(requests, max_depth=8)
    emitted = emitted_by(step.run())
    for request, tokens in zip(requests, emitted, strict=True):
        best = request.logits.argmax(-1).tolist()
        assert tokens == oracle.walk(best, request.tokens, request.parents)[0]
    assert max(map(len, emitted)) >= 3


def test_a_draft_token_that_no_grammar_allowed_is_not_accepted():
    source = torch.Generator().manual_seed(2)
    # Single paths of likely tokens of which the second is invalid, and trees of which none is.
    logits = torch.randn(6, 5, 4, generator=source)
    paths = [
        Request([-1, 0, 1, 2, 3], [0, *each.argmax(-1).tolist()[:-1]], each, 9, SamplingParams(temperature=0.0))
        for each in logits
    ]
    trees = [random_request(source, 4, 5, SamplingParams(temperature=0.0)) for _ in range(6)]
    requests = [request for pair in zip(paths, trees, strict=True) for request in pair]
    invalid_drafts = torch.tensor([request in paths and row >= 2 for request in requests for row in range(5)])
    free = emitted_by(Step(requests, max_depth=4).run())
    emitted = emitted_by(Step(requests, max_depth=4).run(invalid_drafts.to(DEVICE)))
    for request, tokens, all_tokens in zip(requests, emitted, free, strict=True):
        if request in paths:
            assert len(all_tokens) == 5
            assert tokens == all_tokens[:2]
        else:
            assert tokens == all_tokens


def test_every_request_is_told_its_own_nans():
    requests = mixed_requests(5)
    greedy = SamplingParams(temperature=0.0)
    # Two nodes, one after the other; the other rows hold none.
    requests.append(Request([-1, 0, 1, -1, -1], [1, 2, 3, 0, 0], torch.zeros(5, 5), 9, greedy))
    assert [len(request.parents) for request in requests] == [1, 2, 3, 4, 5, 5]
    # Request, row, tokens: roots, inner nodes, the last rows, and rows that hold no node.
    for request, row, tokens in ((1, 1, [4]), (3, 0, [0, 1]), (3, 3, [0, 1, 2, 3, 4]), (5, 2, [2]), (5, 3, [0, 1])):
        requests[request].logits[row, tokens] = torch.nan
    step = Step(requests, max_depth=8)
    assert step.run().num_nans is None
    step.sampler.compute_nans = True
    num_nans = step.run().num_nans
    assert num_nans is not None and num_nans.dtype == torch.int32
    assert num_nans.tolist() == [0, 1, 0, 7, 0, 1]


def test_a_prompt_that_goes_on_emits_nothing():
    requests = mixed_requests(3)
    step = Step(requests, max_depth=8)
    step.state.prefill_len.np[step.slots[0]] = MAX_MODEL_LEN
    step.state.prefill_len.copy_to_uva()
    output = step.run()
    assert output.num_sampled.tolist()[0] == output.num_rejected.tolist()[0] == 0
    assert all(count > 0 for count in output.num_sampled.tolist()[1:])


def chi_square_p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of counts at least as far from the expected ones; the rare outcomes count as one."""
    rare = expected < 5
    observed, expected = (
        torch.cat([counts[~rare], counts[rare].sum()[None]]).double() for counts in (observed, expected)
    )
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def test_emitted_tokens_have_the_distribution_of_the_target(monkeypatch):
    """Unseeded requests over six tokens: every outcome of a step is as frequent as the target's logits make it."""
    num_reqs, vocab_size = 600, 6
    # The root's children are 2 and 4; the children of 2 are 0 and 2. Drafted tokens are likely ones and unlikely ones.
    parents, tokens = [-1, 0, 1, 0, 1], [5, 2, 0, 4, 2]
    logits = torch.tensor(
        [
            [0.0, -1.0, 1.5, 0.3, -0.5, 0.2],
            [1.0, 0.0, -0.7, 0.5, -1.0, 0.3],
            [0.0, 0.8, -0.3, -1.0, 0.4, 0.1],
            [-0.5, 0.9, 0.2, 0.0, 0.6, -1.2],
            [0.7, -0.4, 0.0, 0.3, 0.9, -0.8],
        ]
    )
    probs = logits.double().softmax(-1)
    outcomes: dict[tuple[int, ...], float] = {}

    def add_outcomes(row: int, emitted: tuple[int, ...], prob: float) -> None:
        for token in range(vocab_size):
            children = [child for child in range(1, 5) if parents[child] == row and tokens[child] == token]
            token_prob = prob * float(probs[row, token])
            if children:
                add_outcomes(children[0], (*emitted, token), token_prob)
            else:
                outcomes[(*emitted, token)] = token_prob

    add_outcomes(0, (), 1.0)
    assert sum(outcomes.values()) == pytest.approx(1.0)
    assert len(outcomes) == 4 + 6 + 4 + 6 + 6

    # vLLM draws the seeds of unseeded requests from NumPy's generator.
    monkeypatch.setattr(np.random, "randint", np.random.RandomState(0).randint)
    requests = [Request(parents, tokens, logits, 7, SamplingParams(temperature=1.0)) for _ in range(num_reqs)]
    emitted = emitted_by(Step(requests, max_depth=2).run())
    observed = torch.zeros(len(outcomes))
    index = {outcome: number for number, outcome in enumerate(outcomes)}
    for sequence in emitted:
        observed[index[tuple(sequence)]] += 1
    expected = torch.tensor(list(outcomes.values())) * num_reqs
    assert chi_square_p_value(observed, expected) > 1e-4


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
@pytest.mark.parametrize("num_logprobs", [0, 2, 5])
def test_logprobs_are_those_of_the_rows_that_were_drawn_from(mode, num_logprobs):
    step = Step(mixed_requests(9, logprobs=num_logprobs), max_depth=8, logprobs_mode=mode)
    output = step.run()
    emitted = emitted_by(output)
    assert max(map(len, emitted)) >= 3
    logprobs = output.logprobs_tensors
    assert logprobs is not None
    assert logprobs.cu_num_generated_tokens == step.starts.tolist()
    for index, (request, tokens) in enumerate(zip(step.requests, emitted, strict=True)):
        scores = request.logits
        if mode.startswith("processed"):
            anything = torch.zeros(len(scores), dtype=torch.int64, device=DEVICE)
            scores = step.sampler.sample(
                scores.to(DEVICE),
                torch.full((len(scores),), step.slots[index], device=DEVICE),
                torch.tensor([step.slots[index]], device=DEVICE),
                np.array([step.slots[index]]),
                # Positions, tokens and rows matter to the draw, not to the logits.
                anything,
                anything,
                anything,
                np.array([MAX_MODEL_LEN]),
                return_logprobs=True,
            )[1].cpu()
        if mode.endswith("logprobs"):
            scores = scores.log_softmax(-1)
        # The accepted tokens lead down the tree; each was drawn at the row of the one before.
        row = 0
        for offset, token in enumerate(tokens):
            place = int(step.starts[index]) + offset
            best = scores[row].topk(num_logprobs)
            # Which of the tokens that are out (-inf) comes first is anyone's choice.
            assert logprobs.logprob_token_ids[place, 0] == token
            possible = best.values > float("-inf")
            assert logprobs.logprob_token_ids[place, 1:].cpu()[possible].tolist() == best.indices[possible].tolist()
            torch.testing.assert_close(
                logprobs.logprobs[place].cpu(), torch.stack([scores[row, token], *best.values]), rtol=0, atol=1e-5
            )
            assert logprobs.selected_token_ranks[place] == int((scores[row] >= scores[row, token]).sum())
            if offset < len(tokens) - 1:
                (row,) = [
                    child
                    for child in range(len(request.parents))
                    if request.parents[child] == row and request.tokens[child] == token
                ]


@pytest.mark.parametrize("max_rows", [8, 10**6])
def test_logprobs_of_named_tokens(monkeypatch, max_rows):
    monkeypatch.setattr(sample, "get_max_chunk_logits", lambda vocab_size: max_rows)
    requests = mixed_requests(9)
    wanted: list[dict] = [{"logprob_token_ids": [4, 1, 3]}, {"logprobs": 2}, {"logprob_token_ids": [0]}] * 3
    for request, params in zip(requests, wanted, strict=True):
        for name, value in params.items():
            setattr(request.params, name, value)
    step = Step(requests, max_depth=8)
    output = step.run()
    logprobs = output.logprobs_tensors
    assert logprobs is not None
    emitted = emitted_by(output)
    assert max(map(len, emitted)) >= 3
    for index, (request, tokens) in enumerate(zip(requests, emitted, strict=True)):
        row = 0
        for place, token in enumerate(tokens, int(step.starts[index])):
            scores = request.logits[row].log_softmax(-1)
            named = request.params.logprob_token_ids or scores.topk(2).indices.tolist()
            expected = [token, *named]
            assert logprobs.logprob_token_ids[place, : len(expected)].tolist() == expected
            torch.testing.assert_close(
                logprobs.logprobs[place, : len(expected)].cpu(), scores[expected], rtol=0, atol=1e-5
            )
            # The widest request has three; nothing is in the columns that others leave.
            assert logprobs.logprobs[place, len(expected) :].tolist() == [-np.inf] * (4 - len(expected))
            children = zip(request.parents, request.tokens, strict=True)
            row = next((child for child, node in enumerate(children) if node == (row, token)), -1)


def test_a_large_batch_goes_through_in_slices(monkeypatch):
    whole = Step(mixed_requests(9, logprobs=1), max_depth=8)
    expected = whole.run()
    # Fewer rows at a time than the largest request has, which goes alone.
    monkeypatch.setattr(sample, "get_max_chunk_logits", lambda vocab_size: 8)
    sliced = Step(mixed_requests(9, logprobs=1), max_depth=8)
    output = sliced.run()
    assert emitted_by(output) == emitted_by(expected)
    assert output.num_rejected.tolist() == expected.num_rejected.tolist()
    assert output.logprobs_tensors is not None and expected.logprobs_tensors is not None
    assert output.logprobs_tensors.cu_num_generated_tokens == expected.logprobs_tensors.cu_num_generated_tokens
    for index, tokens in enumerate(emitted_by(expected)):
        rows = slice(int(whole.starts[index]), int(whole.starts[index]) + len(tokens))
        for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
            one, other = (getattr(each.logprobs_tensors, name)[rows] for each in (output, expected))
            assert torch.equal(one, other), name
    # The rows of the walk, which the cache is compacted by.
    path_rows = [each.tree_sampler.batch.path_rows for each in (sliced, whole)]
    assert torch.equal(*path_rows)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_rows_of_emitted(width):
    generator = torch.Generator().manual_seed(width)
    num_rows = [5, 1, 9, width, 7]
    starts = [sum(num_rows[:request]) for request in range(len(num_rows) + 1)]
    paths, tokens = [], []
    for length in num_rows:
        count = int(torch.randint(1, min(width, length) + 1, (1,), generator=generator))
        deeper = (1 + torch.randperm(length - 1, generator=generator)[: count - 1]).sort().values.tolist()
        paths.append([0, *deeper])
        tokens.append(torch.randint(1, 2**40, (count,), generator=generator).tolist())
    # Both come out of wider tensors, as when a batch goes through in slices; past the end there is nothing to read.
    path_rows = torch.full((len(num_rows), width + 2), -1, dtype=torch.int32)
    emitted = torch.full((len(num_rows), width + 1), -1)
    for request, (path, drawn) in enumerate(zip(paths, tokens, strict=True)):
        path_rows[request, : len(path)] = torch.tensor(path)
        emitted[request, : len(drawn)] = torch.tensor(drawn)

    # Two more rows of padding after the last request.
    num_logits = starts[-1] + 2
    rows, row_tokens = _rows_of_emitted(
        num_logits,
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        path_rows.to(DEVICE)[:, :width],
        emitted.to(DEVICE)[:, :width],
        torch.tensor([len(path) for path in paths], dtype=torch.int32, device=DEVICE),
    )
    expected_rows, expected_tokens = [0] * num_logits, [0] * num_logits
    for start, path, drawn in zip(starts, paths, tokens, strict=False):
        for offset, (row, token) in enumerate(zip(path, drawn, strict=True)):
            expected_rows[start + offset] = start + row
            expected_tokens[start + offset] = token
    assert rows.dtype == row_tokens.dtype == torch.int64
    assert rows.tolist() == expected_rows
    assert row_tokens.tolist() == expected_tokens
