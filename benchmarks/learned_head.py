# SPDX-License-Identifier: Apache-2.0
"""What a head that learns its tokens costs in acceptance when the texts that are served change, on a CPU:

    apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
    TRITON_INTERPRET=1 python -m benchmarks.learned_head handbook [--sizes 32768 49152 65536]

Texts of one kind after the other: modules of Python's standard library, then the Debian Administrator's Handbook in
English, Russian, German, Chinese, French, Arabic and Japanese, as far as it is translated, and other modules; in the
vocabulary of 131,072 tokens that comes with mistral-common, which vLLM requires. Requests of each are served in a
batch, an equal part of a text's tokens being prompts. No model runs. A walk goes along the text, which is what a target
would emit: in a step each request emits `EMITTED` tokens, and a draft's tree may or may not have the ones after. A
draft whose head lacks a token is wrong there.

With all tokens a draft is right about a token with a probability that depends on how often the token came up before in
the request, as it does with the shipped pair (`benchmarks/training/rarity.py`): the odds of that are multiplied such
that a step of the whole benchmark emits 3.82 tokens. "at a constant rate" is a draft which is right about every token
with the same probability. No target runs whose alternatives the head would learn, so more is lost than in an engine.

The ways: "learned" as in an engine; "no prompts" leaves out the counts of prompts, as if the target answered in a
language that nobody has asked in; "counted only" expects no tokens that are like others, as without a tokenizer; "first
tokens only" learns nothing.

The counts and exchanges are those of the engine (`vllm_longspec/proposers/glide/learned_head.py`).
"""

import argparse
import json
import random
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import RESULTS
from benchmarks.reporting import environment, markdown
from benchmarks.training.rarity import class_of
from vllm_longspec.frequent_tokens import first_tokens
from vllm_longspec.proposers.glide.learned_head import HeadLearner
from vllm_longspec.proposers.glide.resemblance import Resemblance
from vllm_longspec.proposers.interface import Requests, Roots

LEVELS = 5
TOKENS_PER_STEP = 3.82
# Of a drafted token being right, at a constant rate with which a step emits as many.
RIGHT = 0.8155
# Tokens that a request emits in a step.
EMITTED = 4
SIZES = (32768, 49152, 65536)
# Steps after a change of texts, from one to the next.
WINDOWS = (0, 100, 200, 400, 800)
# The handbook's folders, and the first words of the names of their scripts' characters.
LANGUAGES = {
    "English": ("en-US", ("LATIN",)),
    "Russian": ("ru-RU", ("CYRILLIC",)),
    "German": ("de-DE", ("LATIN",)),
    "Chinese": ("zh-CN", ("CJK",)),
    "French": ("fr-FR", ("LATIN",)),
    "Arabic": ("ar-MA", ("ARABIC",)),
    "Japanese": ("ja-JP", ("CJK", "HIRAGANA", "KATAKANA")),
}
DOMAINS = ("code", *LANGUAGES, "code again")


class Paragraphs(HTMLParser):
    """The text of a page of the handbook that is in paragraphs; its blocks of code are in no translation."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[bool] = []  # for each open <div>: whether it is a paragraph
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self.open.append(dict(attrs).get("class") == "para")
            if self.open[-1]:
                self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if any(self.open):
            self.texts[-1] += data


@cache
def paragraphs_of(page: Path) -> list[str]:
    return Paragraphs(page.read_text()).texts


def is_written_in(text: str, scripts: tuple[str, ...]) -> bool:
    """Whether most letters are of these scripts."""
    letters = [character for character in text if character.isalpha()]
    inside = sum(unicodedata.name(letter, "").startswith(scripts) for letter in letters)
    return 2 * inside > len(letters)


def texts_of(handbook: Path, domain: str) -> Iterator[str]:
    if domain.startswith("code"):
        library = Path(sysconfig.get_path("stdlib"))
        paths = sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")])
        paths = [path for path in paths if "test" not in str(path) and "site-packages" not in str(path)]
        # Other files when it comes again.
        for path in paths[1::2] if domain.endswith("again") else paths[::2]:
            yield path.read_text(errors="replace")
        return
    pages = handbook / "usr/share/doc/debian-handbook/html"
    folder, scripts = LANGUAGES[domain]
    for path in sorted((pages / folder).glob("*.html")):
        # What is not translated is in English.
        original = pages / "en-US" / path.name
        left_out = set() if domain == "English" else set(paragraphs_of(original))
        texts = [text.strip() for text in paragraphs_of(path) if text not in left_out]
        if kept := [text for text in texts if text and is_written_in(text, scripts)]:
            yield "\n".join(kept) + "\n"


def load_tokenizer() -> Any:
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")


def encode(tokenizer: Any, handbook: Path, num_tokens: int) -> dict[str, list[int]]:
    """Up to `num_tokens` tokens of each domain, in texts of a random order."""
    encoded = {}
    for domain in DOMAINS:
        texts = list(texts_of(handbook, domain))
        if not texts:
            raise SystemExit(f"{handbook} has no text in {domain}: give the unpacked package debian-handbook")
        random.Random(0).shuffle(texts)
        tokens: list[int] = []
        for text in texts:
            if len(tokens) >= num_tokens:
                break
            tokens += tokenizer.encode(text, bos=False, eos=False)
        encoded[domain] = tokens[:num_tokens]
    return encoded


def rarities(tokens: list[int]) -> list[int]:
    """For each token of a request the class of how often it came up before in the request."""
    before: Counter[int] = Counter()
    found = []
    for token in tokens:
        found.append(class_of(before[token]))
        before[token] += 1
    return found


def requests_of(tokens: list[int], request_tokens: int) -> list[list[int]]:
    starts = range(0, len(tokens) - request_tokens + 1, request_tokens)
    return [tokens[start : start + request_tokens] for start in starts]


def calibrate(right: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
    """Multiplies the odds of `right`, by rarity, such that a step along the answers emits `TOKENS_PER_STEP`."""
    classes = torch.tensor([rarities(text) for text in texts])
    roots = torch.arange(classes.shape[1] // 2, classes.shape[1] - LEVELS, EMITTED)
    following = classes[:, roots[:, None] + torch.arange(1, LEVELS + 1)]
    low, high = -5.0, 5.0
    for _ in range(30):
        middle = (low + high) / 2
        tried = (right.logit() + middle).sigmoid()
        emitted = 1 + tried[following].cumprod(-1).sum(-1).mean()
        low, high = (middle, high) if emitted < TOKENS_PER_STEP else (low, middle)
    return tried


class Head:
    """What a learner needs of a draft."""

    def __init__(self, size: int, vocab_size: int, resemblance: Resemblance | None):
        self.resemblance = resemblance
        # Special tokens have the lowest ids here.
        tokens, _ = first_tokens(size, vocab_size, ())
        self.token_ids = torch.tensor(tokens)
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64)
        self.is_in = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_in[self.token_ids] = True
        self.num_rows = self.num_exchanges = 0
        # There is no target whose alternatives could be counted: the same token always, which is in the head.
        self.logits = torch.full((1, vocab_size), -100.0)
        self.logits[0, 0] = 0.0

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits

    def replace_tokens(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        self.num_exchanges += 1
        self.num_rows += int((self.token_ids[slots] != tokens).sum())
        self.is_in[self.token_ids[slots]] = False
        self.token_ids[slots] = tokens
        self.is_in[tokens] = True


class Step(NamedTuple):
    """Tokens that a step emits, on average."""

    tokens: float
    of_all: float  # with a head of all tokens
    tokens_at_a_constant_rate: float
    of_all_at_a_constant_rate: float


def expected_tokens(has_row: torch.Tensor, right: torch.Tensor) -> Step:
    """Of a step whose next tokens, [LEVELS or fewer], have rows or have not and are drafted with these chances."""

    def emitted(chances: torch.Tensor) -> float:
        return 1 + float(chances.cumprod(0).sum())

    constant = torch.full_like(right, RIGHT)
    return Step(emitted(right * has_row), emitted(right), emitted(constant * has_row), emitted(constant))


class Walk:
    def __init__(
        self,
        head: Any,
        right: torch.Tensor,  # [NUM_CLASSES] chance of a drafted token by its rarity
        batch: int,
        request_tokens: int,
        with_prompts: bool,
        learns: bool,
    ):
        self.head, self.right, self.batch, self.request_tokens = head, right, batch, request_tokens
        self.with_prompts, self.learns = with_prompts, learns
        self.learner = HeadLearner(head, 0)

    def run(self, tokens: list[int]) -> list[Step]:
        prompt_len = self.request_tokens // 2
        waiting = iter(requests_of(tokens, self.request_tokens))
        texts = torch.zeros(self.batch, self.request_tokens, dtype=torch.int32)
        chances = torch.zeros(self.batch, self.request_tokens)
        roots = torch.full((self.batch,), self.request_tokens)
        slots = torch.arange(self.batch)
        steps: list[Step] = []
        while True:
            if self.learns:
                self.learner.start_step(torch.zeros(1, 1))
            # Those that have ended make room, one a step.
            ended = (roots >= self.request_tokens).nonzero()[:, 0]
            if len(ended):
                text = next(waiting, None)
                if text is None:
                    return steps
                slot = ended[:1]
                texts[slot], roots[slot] = torch.tensor(text, dtype=torch.int32), prompt_len
                chances[slot] = self.right[rarities(text)]
                if self.learns and self.with_prompts:
                    self.learner.add_prompts(slot, Roots(slot, roots[slot], roots[slot].int()), texts, prompt_len)
            is_running = roots < self.request_tokens
            mapping = slots.where(is_running, -1)
            found = []
            for slot, root in zip(slots[is_running].tolist(), roots[is_running].tolist(), strict=True):
                # The root itself is known.
                following = slice(root + 1, root + 1 + LEVELS)
                found.append(expected_tokens(self.head.is_in[texts[slot, following].long()], chances[slot, following]))
            steps.append(Step(*(sum(column) for column in zip(*found, strict=True))))
            roots = (roots + EMITTED).clamp(max=self.request_tokens)
            if self.learns:
                num_new = torch.full((self.batch,), EMITTED, dtype=torch.int32)
                requests_now = Requests(
                    mapping, Roots(slots, roots, roots.int()), num_new, EMITTED, texts, texts, 0, None
                )
                self.learner.count_emitted(requests_now)


def lost(steps: list[Step]) -> tuple[float, float] | tuple[None, None]:
    """Share of the tokens per step that is lost, and the same at a constant rate."""
    if not steps:
        return None, None
    step = Step(*(sum(column) for column in zip(*steps, strict=True)))
    constant = step.tokens_at_a_constant_rate / step.of_all_at_a_constant_rate
    return round(1 - step.tokens / step.of_all, 4), round(1 - constant, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handbook", type=Path, help="the unpacked package debian-handbook")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tokens", type=int, default=50_000, help="of each domain, at most")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--request-tokens", type=int, default=1024, help="prompt and answer, half and half")
    parser.add_argument("--ways", nargs="+", default=["learned", "no prompts", "counted only", "first tokens only"])
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "learned-head.json")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer()
    vocab_size = tokenizer.n_words
    encoded = encode(tokenizer, arguments.handbook, arguments.tokens)
    resemblance = Resemblance([tokenizer.decode([token]) for token in range(vocab_size)], torch.device("cpu"))
    rarity = json.loads((RESULTS / "rarity.json").read_text())
    texts = [text for tokens in encoded.values() for text in requests_of(tokens, arguments.request_tokens)]
    right = calibrate(torch.tensor(rarity["right"]), texts)
    print("right by rarity:", [round(chance, 3) for chance in right.tolist()], flush=True)
    records: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for way in arguments.ways:
            head = Head(size, vocab_size, None if way == "counted only" else resemblance)
            learns = way != "first tokens only"
            walk = Walk(head, right, arguments.batch, arguments.request_tokens, way != "no prompts", learns)
            for domain, tokens in encoded.items():
                rows, exchanges = head.num_rows, head.num_exchanges
                steps = walk.run(tokens)
                record = {
                    "size": size,
                    "way": way,
                    "domain": domain,
                    "tokens": len(tokens),
                    "distinct": len(set(tokens)),
                    "steps": len(steps),
                    "exchanges": head.num_exchanges - exchanges,
                    "rows": head.num_rows - rows,
                }
                ends = (*WINDOWS[1:], len(steps))
                for start, end in zip(WINDOWS, ends, strict=True):
                    record[f"lost from step {start}"], _ = lost(steps[start:end])
                record["lost after step 200"], record["at a constant rate"] = lost(steps[200:])
                print(json.dumps(record), flush=True)
                records.append(record)
    result = {
        "vocabulary": vocab_size,
        "batch": arguments.batch,
        "request_tokens": arguments.request_tokens,
        "right by rarity": [round(chance, 4) for chance in right.tolist()],
        "environment": environment(arguments.commit),
        "records": records,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    names = list(records[0])
    print(markdown([names, *([str(record[name]) for name in names] for record in records)]))


if __name__ == "__main__":
    main()
