# SPDX-License-Identifier: Apache-2.0
"""Penalties, bad words and thinking budgets of a tree's rows are those of vLLM's own kernels for the row's path.

Each path to a leaf is laid out as vLLM expects draft tokens, one after the other as a request's rows. What vLLM's own
sampler makes of these rows is compared bit for bit with what the same nodes get in the tree.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import ReasoningConfig, VllmConfig
from vllm.v1.worker.gpu.input_batch import post_update
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState
from vllm.v1.worker.gpu.states import RequestState

from tests.oracles.tree import path_to_root
from vllm_longspec.tree.history import read_history_along_paths
from vllm_longspec.tree.history.paths import gather_paths
from vllm_longspec.tree.state import TreeState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_MODEL_LEN = 64
CONFIG: Any = VllmConfig()


pytestmark = pytest.mark.usefixtures("buffers_without_a_gpu")


@dataclass
class Request:
    """A tree and what came before it."""

    prompt: list[int]
    output: list[int]
    # Of every row that the request has in this step; -1 for the root and for rows that hold no node.
    parents: list[int]
    tokens: list[int]
    params: dict[str, Any] = field(default_factory=dict)

    def path(self, row: int) -> list[int]:
        """The rows from the first node to this one."""
        path = path_to_root([-1, *(parent or -1 for parent in self.parents[1:])], row) if self.parents[row] >= 0 else []
        return path[::-1]


def random_request(source: random.Random, vocab: list[int], num_rows: int, max_depth: int, **params: Any) -> Request:
    """Half of the nodes continue the deepest path, so that there are deep ones and bushy ones."""
    parents, depths = [-1], [0]
    for row in range(1, num_rows):
        deepest = max(range(row), key=lambda each: (depths[each] < max_depth, depths[each]))
        shallow = [each for each in range(row) if depths[each] < max_depth]
        parents.append(deepest if source.random() < 0.5 else source.choice(shallow))
        depths.append(depths[parents[-1]] + 1)
    tokens = [source.choice(vocab) for _ in parents]
    if num_rows > 4 and source.random() < 0.3:
        # The last rows of a list that had fewer nodes.
        parents[-2:], tokens[-2:] = [-1, -1], [0, 0]
    output = [source.choice(vocab) for _ in range(source.randrange(8))]
    return Request(
        [source.choice(vocab) for _ in range(source.randrange(1, 20))], [*output, tokens[0]], parents, tokens, params
    )


class Step:
    """The state of vLLM's runner before a step, and of these requests' trees."""

    def __init__(self, requests: list[Request], vocab_size: int, max_depth: int, reasoning: Any = None):
        max_num_reqs = len(requests) + 2
        num_rows = max(len(request.parents) for request in requests) + 3
        self.requests = requests
        self.vocab_size = vocab_size
        self.max_depth = max_depth
        self.req_states = RequestState(max_num_reqs, MAX_MODEL_LEN, 4096, num_rows - 1, vocab_size, DEVICE)
        # Whatever was there before.
        stale = torch.Generator(DEVICE).manual_seed(0)
        self.tree = TreeState.allocate(max_num_reqs, num_rows - 1, DEVICE)
        self.tree.depths.random_(1, max_depth + 1, generator=stale)
        self.slots = []
        for number, request in enumerate(requests):
            tokens = request.prompt + request.output
            self.req_states.add_request(str(number), len(request.prompt), tokens, len(tokens) - 1, 8)
            slot = self.req_states.req_id_to_index[str(number)]
            self.slots.append(slot)
            # In the state a tree may have more rows than in the step.
            parents = request.parents + [0] * (num_rows - len(request.parents) if len(request.parents) > 1 else 0)
            self.tree.parent_rows[slot, : len(parents)] = torch.tensor(parents, dtype=torch.int32)
            for row in range(1, len(request.parents)):
                if request.parents[row] >= 0:
                    self.tree.depths[slot, row] = len(request.path(row))
        self.req_states.apply_staged_writes()
        config = CONFIG
        config.reasoning_config = reasoning
        self.sampler, self.theirs = (
            Sampler(config, max_num_reqs, vocab_size, DEVICE, self.req_states, num_speculative_tokens=num_rows)
            for _ in range(2)
        )
        read_history_along_paths(self.sampler, self.tree, max_depth)
        for sampler in (self.sampler, self.theirs):
            for slot, request in zip(self.slots, requests, strict=True):
                sampler.add_request(slot, sampling(request.params))
            sampler.apply_staged_writes()
        num_logits = sum(len(request.parents) for request in requests)
        self.logits = torch.randn(num_logits, vocab_size, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 3

    def tree_context(self) -> LogitsContext:
        lengths = [len(request.parents) for request in self.requests]
        tokens = [token for request in self.requests for token in request.tokens]
        return self._context(lengths, self.slots, tokens)

    def chains(self) -> tuple[LogitsContext, torch.Tensor]:
        """All paths to leaves laid out as chains, and the row of the tree for every row of them.

        Each chain looks like a request of its own that has another's state.
        """
        lengths, slots, tokens, rows, first = [], [], [], [], 0
        for slot, request in zip(self.slots, self.requests, strict=True):
            for row in range(len(request.parents)):
                if row in request.parents:
                    continue
                # A row that holds no node is sampled as the root's is.
                path = [0, *request.path(row)]
                lengths.append(len(path))
                slots.append(slot)
                tokens += [request.tokens[each] for each in path]
                rows += [first + each for each in path[:-1]] + [first + row]
            first += len(request.parents)
        return self._context(lengths, slots, tokens), torch.tensor(rows, device=DEVICE)

    def _context(self, lengths: list[int], slots: list[int], tokens: list[int]) -> LogitsContext:
        local_pos = torch.tensor([row for length in lengths for row in range(length)], dtype=torch.int32, device=DEVICE)
        return LogitsContext(
            expanded_idx_mapping=torch.tensor(np.repeat(slots, lengths), dtype=torch.int32, device=DEVICE),
            # Each request once: vLLM's cache of marks must not be written by two programs.
            idx_mapping=torch.tensor(self.slots, dtype=torch.int32, device=DEVICE),
            idx_mapping_np=np.array(self.slots),
            expanded_local_pos=local_pos,
            input_ids=torch.tensor(tokens, dtype=torch.int32, device=DEVICE),
            pos=torch.zeros_like(local_pos, dtype=torch.int64),
            seq_lens_upper_bound_np=np.full(len(slots), MAX_MODEL_LEN),
        )

    def check(self, kind: type | None = None) -> int:
        """Compares what one kind of state, or all of the sampler's steps, make of the logits of every row.

        Returns how many rows get something else than they would if their paths were ignored.
        """
        context, rows = self.chains()
        expected = self._apply(self.theirs, kind, self.logits[rows], context)
        found = self._apply(self.sampler, kind, self.logits, self.tree_context())
        assert found.dtype == torch.float32
        assert len(rows.unique()) == len(found)
        assert torch.equal(found[rows], expected)
        num_logits = len(found)
        pathless = self._context([1] * num_logits, self._slots_of_rows(), [0] * num_logits)
        ignored = self._apply(self.theirs, kind, self.logits, pathless)
        return int((found != ignored).any(1).sum())

    def _slots_of_rows(self) -> list[int]:
        return [slot for slot, request in zip(self.slots, self.requests, strict=True) for _ in request.parents]

    @staticmethod
    def _apply(sampler: Sampler, kind: type | None, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        logits = logits.clone()
        if kind is None:
            return sampler.apply_sampling_params(
                logits,
                ctx.expanded_idx_mapping,
                ctx.idx_mapping,
                ctx.idx_mapping_np,
                ctx.pos,
                ctx.input_ids,
                ctx.expanded_local_pos,
                ctx.seq_lens_upper_bound_np,
                skip_top_k_top_p=True,
            )
        for state in (*sampler.logits_processors, sampler.thinking_budget_state):
            if isinstance(state, kind):
                state.apply(logits, ctx)  # type: ignore[attr-defined]
        return logits


def sampling(params: dict[str, Any]) -> SamplingParams:
    words = params.get("bad_words_token_ids")
    made = SamplingParams(**{name: value for name, value in params.items() if name != "bad_words_token_ids"})
    # vLLM's front end makes them of strings.
    made._bad_words_token_ids = words
    return made


def reasoning_config(start: list[int], natural_end: list[int], end: list[int]) -> ReasoningConfig:
    config = ReasoningConfig()
    config._reasoning_start_token_ids, config._natural_reasoning_end_token_ids = start, natural_end
    config._reasoning_end_token_ids, config._enabled = end, True
    return config


def mixed_requests(seed: int, vocab: list[int], max_depth: int, draw: Any) -> list[Request]:
    """Requests of 1 to 24 rows; every fourth has none of the parameters."""
    source = random.Random(seed)
    sizes = [1, 2, 24, source.randrange(3, 16)]
    source.shuffle(sizes)
    return [
        random_request(source, vocab, size, max_depth, **(draw(source) if (number + seed) % 4 else {}))
        for number, size in enumerate(sizes)
    ]


def draw_penalties(source: random.Random) -> dict[str, Any]:
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    chosen = source.sample(names, source.randint(1, 3))
    return {name: source.uniform(0.5, 1.9) if name.startswith("rep") else source.uniform(-2.0, 2.0) for name in chosen}


def draw_bad_words(vocab: list[int]):
    def draw(source: random.Random) -> dict[str, Any]:
        count, longest = source.randint(1, 4), source.choice((2, 3, 8))
        words = [[source.choice(vocab) for _ in range(source.randint(1, longest))] for _ in range(count)]
        return {"bad_words_token_ids": words}

    return draw


@pytest.mark.parametrize("max_depth", [1, 3, 17])
def test_paths(max_depth):
    for seed in range(4):
        requests = mixed_requests(seed, list(range(50)), max_depth, lambda source: {})
        step = Step(requests, 50, max_depth)
        paths = gather_paths(step.tree_context(), step.tree, max_depth)
        assert paths.tokens.dtype == paths.depths.dtype == torch.int32
        found = [tokens[:depth] for tokens, depth in zip(paths.tokens.tolist(), paths.depths.tolist(), strict=True)]
        expected = [
            [request.tokens[each] for each in request.path(row)]
            for request in requests
            for row in range(len(request.parents))
        ]
        assert found == expected
        assert max(map(len, found)) == max_depth or max_depth > 3
    if max_depth > 3:
        assert max(map(len, found)) > 8


# Less than a word of the prompt's mask; several of the kernel's blocks, with tokens on both sides of where they meet.
@pytest.mark.parametrize(("vocab_size", "max_depth"), [(7, 3), (8192 + 40, 17)])
def test_penalties(vocab_size, max_depth):
    vocab = list(range(7)) if vocab_size == 7 else [0, 31, 32, 8190, 8191, 8192, 8193, vocab_size - 1]
    changed = 0
    for seed in range(3):
        requests = mixed_requests(seed, vocab, max_depth, draw_penalties)
        changed += Step(requests, vocab_size, max_depth).check(PenaltiesState)
    assert changed > 20


@pytest.mark.parametrize("max_depth", [3, 17])
def test_bad_words(max_depth):
    """Words that end within a path, begin before it, or would need tokens of the prompt."""
    vocab = [0, 1, 2]
    changed = 0
    for seed in range(4):
        step = Step(mixed_requests(seed, vocab, max_depth, draw_bad_words(vocab)), 5, max_depth)
        changed += step.check(BadWordsState)
    assert changed > 15


@pytest.mark.parametrize(
    ("start", "natural_end", "end"),
    [([1], [2], [2]), ([1, 1], [2], [0, 2]), ([1], [0, 2], [2, 1, 0, 2]), ([0, 1, 2], [2, 0], [1, 1, 2, 0])],
)
def test_thinking_budgets(start, natural_end, end):
    """Marks in the prompt, among emitted tokens, in the tree and across; budgets that end anywhere on a path."""
    changed = 0
    for seed, max_depth in enumerate((3, 4, 5, 17)):
        # Token 3 is in no mark.
        vocab = [0, 1, 2, *[3] * 5]
        requests = mixed_requests(
            seed, vocab, max_depth, lambda source: {"thinking_token_budget": source.randrange(1, 6)}
        )
        for request in requests:
            request.prompt += start
            request.output = [3, request.tokens[0]]
            spell(random.Random(seed), request, end)
        step = Step(requests, 4, max_depth, reasoning_config(start, natural_end, end))
        changed += step.check(ThinkingBudgetState)
    assert changed > 10


def spell(source: random.Random, request: Request, mark: list[int]) -> None:
    """Nodes go on with the mark where their parents have begun it."""
    for row, parent in enumerate(request.parents):
        if parent >= 0 and source.random() < 0.7:
            begun = [length for length in range(1, len(mark)) if request.tokens[parent] == mark[length - 1]]
            request.tokens[row] = mark[source.choice(begun)] if begun else request.tokens[row]


def test_all_of_it_at_once():
    """The sampler's whole sequence: logit bias, penalties, bad words, thinking budgets, temperature and min-p."""
    vocab = [0, 1, 2, 3]

    def draw(source: random.Random) -> dict[str, Any]:
        return {
            **draw_penalties(source),
            **draw_bad_words(vocab)(source),
            **({"thinking_token_budget": source.randrange(5)} if source.random() < 0.5 else {}),
            "temperature": source.choice((0.0, 0.7, 1.3)),
            "min_p": source.choice((0.0, 0.1)),
            "logit_bias": {1: source.uniform(-2.0, 2.0)},
        }

    for seed in range(2):
        step = Step(mixed_requests(seed, vocab, 5, draw), 9, 5, reasoning_config([1], [2], [3, 2]))
        assert step.check() > 0


def test_emitted_tokens_are_counted_where_paths_are_read():
    """vLLM counts emitted tokens in tensors of the sampler's state, and rows of the next tree read the same ones."""
    source = random.Random(0)
    request = random_request(source, [0, 1, 2, 3], 6, 3, frequency_penalty=1.0)
    step = Step([request], 5, 3)
    (slot,) = step.slots
    before = step._apply(step.sampler, None, step.logits, step.tree_context())
    for sampler in (step.sampler, step.theirs):
        assert sampler.penalties_state is sampler.logits_processors[1]
        step.req_states.total_len.gpu[slot] = len(request.prompt) + len(request.output)
        post_update(
            torch.tensor([slot], dtype=torch.int32, device=DEVICE),
            step.req_states.num_computed_tokens.gpu,
            step.req_states.last_sampled_tokens,
            sampler.penalties_state.output_bin_counts,
            # The tokens of an accepted path, filled up as the walk does.
            torch.tensor([[4, 4, 2, -1]], device=DEVICE),
            torch.tensor([3], dtype=torch.int32, device=DEVICE),
            torch.tensor([3], dtype=torch.int32, device=DEVICE),
            torch.tensor([0, 6], dtype=torch.int32, device=DEVICE),
            step.req_states.all_token_ids.gpu,
            step.req_states.total_len.gpu,
        )
    step.check(PenaltiesState)
    after = step._apply(step.sampler, None, step.logits, step.tree_context())
    torch.testing.assert_close(before - after, torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0], device=DEVICE).expand(6, 5))
