# SPDX-License-Identifier: Apache-2.0
"""Steps that the plugin would take over stored answers, from the target's states and the draft alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_longspec.options import PartialAttention
from vllm_longspec.training.continuations import Part
from vllm_longspec.training.copies import Trust, find_copy
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer
from vllm_longspec.training.sampling import Sampling, lower, noise_given, truncate
from vllm_longspec.training.teachers import Lesson
from vllm_longspec.training.walk import Level, Passage, Vocabulary, accepted_of_listed, coupled, kept_part, walk
from vllm_longspec.tree.shape import TreeShape


class Steps(NamedTuple):
    """A part's steps in order."""

    part: Part
    roots: list[int]  # index of each root in its answer
    accepted: list[int]  # nodes


class Likelihood(NamedTuple):
    """Sums over tokens that say whether a text was drawn as is assumed, by `Predictor.likelihood`."""

    num_tokens: int
    greedy: int  # tokens that are the target's most probable
    surprise: float  # negative log-likelihood less its expectation
    variance: float  # of the surprise


@dataclass
class Drafting:
    """What of the engine's options decides which nodes are verified."""

    shape: TreeShape
    num_nodes: int
    copy_length: int
    couple_noise: bool = True
    token_ids: Tensor | None = None  # int64, the only tokens that are drafted
    part: PartialAttention | None = None  # what the cross-attention below the root sees; None for all of the prefix
    block_size: int = 16  # of the cache, in tokens

    @property
    def cross_attention_budget(self) -> int | bool:
        """The option that asks for the part: false for all."""
        return False if self.part is None else self.part.budget

    @property
    def reach(self) -> int:
        """Most nodes that a step accepts."""
        return max(self.shape.max_depth, min(self.copy_length, self.num_nodes))


@dataclass
class Predictor:
    """Walks parts in the order in which an engine that has one request at a time would."""

    target: Vocabulary
    glide: GlideLayer
    drafting: Drafting
    sampling: Sampling
    seed: int = 0
    # Of the copies of all requests so far.
    trust: Trust = field(default_factory=Trust)

    @torch.inference_mode()
    def steps(self, lesson: Lesson, part: Part) -> Steps:
        """The steps over a part, whose tokens are all supervised in the lesson's sample."""
        shape = self.drafting.shape.for_best(self.drafting.num_nodes).levels
        passage = self._passage(lesson, part)
        noise = None
        if self.sampling.temperature > 0 and self.drafting.couple_noise:
            noise = _Noise(self, lesson, part)
        rescore = None
        if noise is not None:
            rescore = coupled(noise, lambda logits: lower(logits / self.sampling.temperature, self.sampling))
        ids = passage.ids[0]
        known = ids.tolist()

        def count(levels: Sequence[Level], roots: Tensor) -> Tensor:
            root = int(roots[0])
            copied, scores = self._copy(ids, root)
            expected = known[root + 1 : root + 1 + self.drafting.reach]
            accepted = accepted_of_listed(levels, 0, expected, self.drafting.num_nodes, copied, scores)
            return torch.tensor([accepted], device=roots.device)

        part_of_prefix = self.drafting.part
        kept = None if part_of_prefix is None else kept_part(part_of_prefix, len(ids), self.drafting.block_size)
        found = walk(
            self.target, self.glide, passage, shape, self.drafting.token_ids, rescore, count, self.drafting.reach, kept
        )
        if found and self.drafting.copy_length:
            # An engine drafts once more before it finds that a request is done.
            _, root, emitted = found[-1]
            self._copy(ids, part.start + root + emitted)
            self.trust.forget()
        return Steps(
            part, [part.output_position + root for _, root, _ in found], [emitted - 1 for *_, emitted in found]
        )

    @torch.inference_mode()
    def likelihood(self, lesson: Lesson, part: Part) -> Likelihood:
        """How well the stored tokens fit what they are taken for: draws of the target with this sampling."""
        num_tokens, greedy, surprise, variance = 0, 0, 0.0, 0.0
        for rows in torch.arange(part.start, part.end - 1).split(64):
            logits = self.logits(lesson, rows)
            tokens = lesson.sample.input_ids[rows + 1].to(logits.device)
            num_tokens += len(rows)
            greedy += int((logits.argmax(-1) == tokens).sum())
            if self.sampling.temperature > 0:
                log_probs = self.drawn_from(logits, tokens).double().log_softmax(-1)
                information = -log_probs
                probabilities = log_probs.exp()
                entropy = (probabilities * information).sum(-1)
                surprise += float((information.gather(-1, tokens[:, None])[:, 0] - entropy).sum())
                variance += float(((probabilities * information.square()).sum(-1) - entropy.square()).sum())
        return Likelihood(num_tokens, greedy, surprise, variance)

    def logits(self, lesson: Lesson, rows: Tensor) -> Tensor:
        """The target's, float32 [rows, vocabulary], at indices of the text, each one before a supervised token."""
        places = torch.searchsorted(lesson.sample.rows, rows)
        return self.target.head(lesson.hidden[places.to(lesson.hidden.device)])

    def drawn_from(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What noise was added to, [rows, vocabulary], when these tokens, [rows], were drawn."""
        scaled = logits / self.sampling.temperature
        # Rounding, or other sampling than this, may have put them past the cutoff.
        places = tokens[:, None]
        return truncate(scaled, self.sampling).scatter(-1, places, scaled.gather(-1, places))

    def draw_noise(self, lesson: Lesson, part: Part, position: int) -> Tensor:
        """The noise with which the token after this position was drawn, float32 [drafted tokens]."""
        logits = self.logits(lesson, torch.tensor([position]))
        token = lesson.sample.input_ids[position + 1].to(logits.device)[None]
        # The same for every tree that reaches the position, and for every order of parts.
        seed = hash((self.seed, part.text, position)) & 0x7FFFFFFF
        generator = torch.Generator(logits.device).manual_seed(seed)
        noise = noise_given(self.drawn_from(logits, token), token, generator)[0].float()
        return noise if self.drafting.token_ids is None else noise[self.drafting.token_ids]

    def _passage(self, lesson: Lesson, part: Part) -> Passage:
        device = lesson.keys.device
        ids = lesson.sample.input_ids[: part.end].to(device)[None]
        # What is in float32 here is accumulated in float32 by the engine's kernels, whatever its own type.
        keys, values = (each[None, : part.end].float() for each in (lesson.keys, lesson.values))
        window_start = max(0, part.start - SELF_ATTENTION_WINDOW)
        positions = torch.arange(window_start, part.end, device=device)[None]
        _, window_keys, window_values = self.glide.self_qkv(self.target.embed(ids[:, window_start:]), positions)
        ends = torch.tensor([part.end - 1], device=device)
        return Passage(ids, part.start, ends, (keys, values), (window_keys, window_values), window_start)

    def _copy(self, ids: Tensor, root: int) -> tuple[list[int], list[float]]:
        """A path from the text, as long as can be listed, and its scores."""
        if not self.drafting.copy_length:
            return [], []
        copied, match_length = find_copy(ids, root, self.drafting.copy_length)
        scores = self.trust.score(ids, root, copied, match_length)
        return copied[: self.drafting.num_nodes], scores[: self.drafting.num_nodes]


class _Noise:
    """The noise at a position, drawn when it is first asked for and kept for the roots after."""

    def __init__(self, predictor: Predictor, lesson: Lesson, part: Part):
        self.predictor, self.lesson, self.part = predictor, lesson, part
        self.kept: dict[int, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:  # [batch] -> float32 [batch, vocabulary]
        return torch.stack([self._at(position) for position in positions.tolist()])

    def _at(self, position: int) -> Tensor:
        if position not in self.kept:
            reach = self.predictor.drafting.shape.max_depth
            for old in [each for each in self.kept if each < position - reach]:
                del self.kept[old]
            self.kept[position] = self.predictor.draw_noise(self.lesson, self.part, position)
        return self.kept[position]
