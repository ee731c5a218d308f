# SPDX-License-Identifier: Apache-2.0
"""From a workload's texts to token ids of prompts: in a chat template, without their middle if they are too long.

A text that is too long loses its middle, as in LongBench, since what is asked stands at its ends. LongSpec's own
benchmark leaves long texts out instead; both leave out prompts of 1,200 tokens or fewer.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from vllm_longspec.bench.workloads import Workload, read_records
from vllm_longspec.training import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a prompt must be longer than, as in LongSpec's benchmark.
SHORTEST = 1200
# FastChat's Vicuna format, which LongChat uses too; the tokenizers of both have no template.
VICUNA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}"
    "{% else %}A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.{% set rest = messages %}{% endif %} "
    "{% for message in rest %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Prompt(NamedTuple):
    place: str
    token_ids: list[int]
    num_cut: int  # tokens of the text's middle that were left out


@dataclass
class Chosen:
    """Prompts of one workload, and what was left out."""

    name: str
    prompts: list[Prompt] = field(default_factory=list)
    num_short: int = 0
    num_cut: int = 0
    num_long: int = 0

    def describe(self) -> str:
        """One line."""
        lengths = sorted(len(prompt.token_ids) for prompt in self.prompts)
        what = f"{self.name}: {len(lengths)} prompts"
        if lengths:
            what += f" of {lengths[0]:,} to {lengths[-1]:,} tokens, {lengths[len(lengths) // 2]:,} in the middle"
        if self.num_cut:
            what += f"; {self.num_cut} lost the middle of their text"
        if self.num_short:
            what += f"; {self.num_short} of {SHORTEST:,} tokens or fewer were left out"
        if self.num_long:
            what += f"; {self.num_long} too long for the window were left out"
        return what


class TemplateRefusal(ValueError):
    """A chat template raised an error for messages."""


class Renderer:
    """Renders texts as a user's message, in at most `max_tokens` tokens.

    Args:
        target: its name tells whether Vicuna's format fits, if its tokenizer has none.
        template: a chat template instead of the tokenizer's own.
        as_they_are: texts are no messages, as a base model wants them.

    Raises:
        ValueError: the tokenizer has no chat template, and the target is of no family whose template is known; or
            nothing of a text fits.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        target: str,
        max_tokens: int,
        template: str | None = None,
        as_they_are: bool = False,
    ):
        self.tokenizer = tokenizer
        self.target = target
        self.max_tokens = max_tokens
        self.template = template
        self.as_they_are = as_they_are
        if tokenizer.chat_template is None and template is None:
            if any(name in target.lower() for name in ("vicuna", "longchat")):
                self.template = VICUNA_TEMPLATE
            elif not as_they_are:
                self._refuse("texts as they are")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"the tokenizer of {self.target} has no chat template: give one by --chat-template, or give "
            f"--no-chat-template for {what}"
        )

    def render(self, text: str) -> list[int]:
        """The token ids of a text as a user's message."""
        if self.as_they_are:
            return self.tokenizer.encode(text)
        return self.render_messages([{"role": "user", "content": text}], None)

    def render_messages(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """The token ids of a conversation.

        Raises:
            ValueError: there is no chat template.
            TemplateRefusal: it raises an error.
        """
        if self.template is None and self.tokenizer.chat_template is None:
            self._refuse("workloads of plain texts only, without messages")
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates raise errors of their own, and any that Python has
            raise TemplateRefusal(f"the chat template refuses it ({' '.join(str(error).split())})") from error
        return list(ids)

    def fit(self, text: str) -> tuple[list[int], int]:
        """The token ids of a text's prompt, and how many of its tokens were cut out of the middle."""
        rendered = self.render(text)
        if len(rendered) <= self.max_tokens:
            return rendered, 0
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        kept = len(ids) - (len(rendered) - self.max_tokens)
        # What is cut and put together may make more tokens than its parts had.
        while kept > 1:
            rendered = self.render(self._without_middle(ids, kept))
            if len(rendered) <= self.max_tokens:
                return rendered, len(ids) - kept
            kept -= len(rendered) - self.max_tokens
        raise ValueError(
            f"{self.max_tokens} tokens hold no prompt: give a larger --max-model-len or fewer --output-len"
        )

    def _without_middle(self, ids: list[int], kept: int) -> str:
        head, tail = kept - kept // 2, kept // 2
        # Not -0, which would be all.
        ends = ids[:head], ids[len(ids) - tail :]
        return "".join(self.tokenizer.decode(part, skip_special_tokens=True) for part in ends)


def choose(workload: Workload, folder: Path | None, renderer: Renderer, max_prompts: int | None, seed: int) -> Chosen:
    """The first prompts of a workload that are long enough, in an order that the seed decides.

    Args:
        folder: of the user's, instead of the Hugging Face hub.
        max_prompts: at most so many; None for all.

    Raises:
        ValueError: as `read_records` and `Renderer.fit` do, or no prompt is or can be long enough.
    """
    if renderer.max_tokens <= SHORTEST and not workload.short:
        raise ValueError(
            f"--workload {workload.name}: prompts of {SHORTEST:,} tokens or fewer are left out, and the window less "
            f"--output-len holds {renderer.max_tokens:,}: give a larger --max-model-len or fewer --output-len"
        )
    records = list(read_records(workload, folder))
    random.Random(seed).shuffle(records)
    chosen = Chosen(workload.title)
    for place, record in records:
        if len(chosen.prompts) == max_prompts:
            break
        try:
            token_ids, num_cut = renderer.fit(workload.ask(record))
        except TemplateRefusal as error:
            raise ValueError(f"--workload {workload.name}, {place}: {error}; give one by --chat-template") from error
        if len(token_ids) <= SHORTEST and not workload.short:
            chosen.num_short += 1
            continue
        chosen.prompts.append(Prompt(place, token_ids, num_cut))
        chosen.num_cut += num_cut > 0
    if not chosen.prompts:
        raise ValueError(
            f"--workload {workload.name}: none of its {len(records)} texts makes more than {SHORTEST:,} tokens"
        )
    return chosen


def choose_own(path: Path, renderer: Renderer, vocab_size: int, max_prompts: int | None, seed: int) -> Chosen:
    """The user's prompts, one a line, in an order that the seed decides.

    A line is what `vllm-longspec generate` reads: `messages`, which go through the chat template, `prompt` or `text`,
    which is tokenised as it is, or `input_ids`. What is too long is left out: what it may lose is not known.

    Raises:
        ValueError: a line is no prompt, or none is short enough.
    """
    if generate.check_prompts(path, vocab_size).number == 0:
        raise ValueError(f"--workload {path} has no prompts: give a file with at least one line")
    prompts = list(generate.read_prompts([path]))
    random.Random(seed).shuffle(prompts)
    chosen = Chosen(str(path))
    for prompt in prompts:
        if len(chosen.prompts) == max_prompts:
            break
        token_ids = _own_token_ids(prompt, renderer)
        if len(token_ids) > renderer.max_tokens:
            chosen.num_long += 1
            continue
        chosen.prompts.append(Prompt(prompt.place, token_ids, 0))
    if not chosen.prompts:
        raise ValueError(
            f"--workload {path}: none of its {len(prompts)} prompts fits {renderer.max_tokens:,} tokens: give a larger "
            "--max-model-len or fewer --output-len"
        )
    return chosen


def _own_token_ids(prompt: generate.Prompt, renderer: Renderer) -> list[int]:
    if prompt.kind == "input_ids":
        return prompt.content
    if prompt.kind == "prompt":
        return renderer.tokenizer.encode(prompt.content)
    try:
        return renderer.render_messages(generate.to_answer(prompt.content), prompt.tools)
    except TemplateRefusal as error:
        raise ValueError(f"{prompt.place}: {error}") from error
