# SPDX-License-Identifier: Apache-2.0
"""What a head that learns its tokens costs in acceptance when the texts that are served change, on a CPU:

    pip download --no-deps --no-binary :all: django==5.2 && tar xzf Django-5.2.tar.gz
    TRITON_INTERPRET=1 python -m benchmarks.learned_head Django-5.2 [--sizes 8192 16384 32768 65536]

Texts of one archive in turn: Python code, English prose, then the archive's Russian, Chinese and Arabic, and code
again; in the vocabulary of 131,072 tokens that comes with mistral-common, which vLLM requires. Requests of each are
served in a batch, an equal part of a text's tokens being prompts. No model runs. A walk goes along the text, which is
what a target would emit: in a step each request emits `EMITTED` tokens, and a draft with all tokens would be right with
the same probability at each level, so that a step emits 3.82 tokens. A draft whose head lacks a token is wrong there.
A real draft is wrong about rare tokens more often than about others, and no model runs here whose alternatives the
head would learn, so more is lost than in an engine.

"no prompts" leaves out the counts of prompts: as if the target answered in a language that nobody has asked in.

The counts and exchanges are those of the engine (`vllm_longspec/proposers/glide/learned_head.py`).
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.reporting import environment, markdown
from vllm_longspec.frequent_tokens import first_tokens
from vllm_longspec.proposers.glide.learned_head import HeadLearner
from vllm_longspec.proposers.interface import Requests, Roots

LEVELS = 5
# Of a drafted token being right, with which a step emits 3.82 tokens.
RIGHT = 0.8155
# Tokens that a request emits in a step.
EMITTED = 4
SIZES = (8192, 16384, 32768, 65536)
# Steps after a change of texts, from one to the next.
WINDOWS = (0, 100, 200, 400, 800)
DOMAINS = ("code", "prose", "Russian", "Chinese", "Arabic", "code again")
LANGUAGES = {"Russian": "ru", "Chinese": "zh_Hans", "Arabic": "ar"}


def texts_of(archive: Path, domain: str) -> Iterator[str]:
    if domain.startswith("code"):
        paths = sorted((archive / "django").rglob("*.py"))
        # Other files when it comes again.
        for path in paths[1::2] if domain.endswith("again") else paths[::2]:
            yield path.read_text(errors="replace")
    elif domain == "prose":
        for path in sorted((archive / "docs").rglob("*.txt")):
            yield path.read_text(errors="replace")
    else:
        for path in sorted(archive.rglob(f"locale/{LANGUAGES[domain]}/LC_MESSAGES/*.po")):
            # The translations only.
            for entry in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', path.read_text(), re.MULTILINE):
                if text := "".join(re.findall(r'"(.*)"', entry)):
                    yield text + "\n"


def encode(archive: Path, num_tokens: int) -> tuple[dict[str, list[int]], int]:
    """Up to `num_tokens` tokens of each domain, in texts of a random order, and the size of the vocabulary."""
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder = Path(mistral_common.__file__).parent / "data"
    tokenizer = Tekkenizer.from_file(folder / "tekken_240911.json")
    encoded = {}
    for domain in DOMAINS:
        texts = list(texts_of(archive, domain))
        if not texts:
            raise SystemExit(f"{archive} has no text of {domain}: give the unpacked source archive of Django")
        random.Random(0).shuffle(texts)
        tokens: list[int] = []
        for text in texts:
            if len(tokens) >= num_tokens:
                break
            tokens += tokenizer.encode(text, bos=False, eos=False)
        encoded[domain] = tokens[:num_tokens]
    return encoded, tokenizer.n_words


class Head:
    """What a learner needs of a draft."""

    def __init__(self, size: int, vocab_size: int):
        # Special tokens have the lowest ids here.
        tokens, _ = first_tokens(size, vocab_size, ())
        self.token_ids = torch.tensor(tokens)
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64)
        self.is_in = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_in[self.token_ids] = True
        self.num_rows = 0
        # There is no target whose alternatives could be counted: the same token always, which is in the head.
        self.logits = torch.full((1, vocab_size), -100.0)
        self.logits[0, 0] = 0.0

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits

    def replace_tokens(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        self.num_rows += int((self.token_ids[slots] != tokens).sum())
        self.is_in[self.token_ids[slots]] = False
        self.token_ids[slots] = tokens
        self.is_in[tokens] = True


def expected_tokens(is_in: torch.Tensor) -> float:
    """Tokens of a step whose next tokens, bool [LEVELS or fewer], have rows or have not."""
    reached, total = 1.0, 1.0
    for has_row in is_in.tolist():
        reached *= RIGHT * has_row
        total += reached
    return total


class Walk:
    def __init__(self, head: Any, batch: int, request_tokens: int, with_prompts: bool, learns: bool):
        self.head, self.batch, self.request_tokens = head, batch, request_tokens
        self.with_prompts, self.learns = with_prompts, learns
        self.learner = HeadLearner(head, 0)

    def run(self, tokens: list[int]) -> list[tuple[float, float]]:
        """For each step: tokens with this head, and with all tokens."""
        prompt_len = self.request_tokens // 2
        requests = [
            tokens[start : start + self.request_tokens]
            for start in range(0, len(tokens) - self.request_tokens + 1, self.request_tokens)
        ]
        texts = torch.zeros(self.batch, self.request_tokens, dtype=torch.int32)
        roots = torch.full((self.batch,), self.request_tokens)
        slots = torch.arange(self.batch)
        steps: list[tuple[float, float]] = []
        waiting = iter(requests)
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
                if self.learns and self.with_prompts:
                    self.learner.add_prompts(slot, Roots(slot, roots[slot], roots[slot].int()), texts, prompt_len)
            is_running = roots < self.request_tokens
            mapping = slots.where(is_running, -1)
            got = could = 0.0
            for slot in is_running.nonzero()[:, 0].tolist():
                # The root itself is known.
                following = texts[slot, roots[slot] + 1 : roots[slot] + 1 + LEVELS].long()
                got += expected_tokens(self.head.is_in[following])
                could += expected_tokens(torch.ones(len(following)))
            steps.append((got, could))
            roots = (roots + EMITTED).clamp(max=self.request_tokens)
            if self.learns:
                num_new = torch.full((self.batch,), EMITTED, dtype=torch.int32)
                requests_now = Requests(
                    mapping, Roots(slots, roots, roots.int()), num_new, EMITTED, texts, texts, 0, None
                )
                self.learner.count_emitted(requests_now)


def lost(steps: list[tuple[float, float]]) -> float | None:
    """Share of the tokens per step that is lost."""
    got, could = (sum(column) for column in zip(*steps, strict=True)) if steps else (0.0, 0.0)
    return round(1 - got / could, 4) if could else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="Django's unpacked source archive")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tokens", type=int, default=60_000, help="of each domain, at most")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--request-tokens", type=int, default=1024, help="prompt and answer, half and half")
    parser.add_argument("--ways", nargs="+", default=["learned", "learned, no prompts", "first tokens only"])
    parser.add_argument("--commit", help="the plugin's commit, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "learned-head.json")
    arguments = parser.parse_args()
    encoded, vocab_size = encode(arguments.archive, arguments.tokens)
    records: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for way in arguments.ways:
            head = Head(size, vocab_size)
            walk = Walk(
                head, arguments.batch, arguments.request_tokens, "no prompts" not in way, way.startswith("learned")
            )
            for domain, tokens in encoded.items():
                rows = head.num_rows
                steps = walk.run(tokens)
                record = {
                    "size": size,
                    "way": way,
                    "domain": domain,
                    "tokens": len(tokens),
                    "distinct": len(set(tokens)),
                    "steps": len(steps),
                    "rows": head.num_rows - rows,
                }
                ends = (*WINDOWS[1:], len(steps))
                for start, end in zip(WINDOWS, ends, strict=True):
                    record[f"lost from step {start}"] = lost(steps[start:end])
                record["lost"] = lost(steps)
                print(json.dumps(record), flush=True)
                records.append(record)
    result = {
        "vocabulary": vocab_size,
        "batch": arguments.batch,
        "request_tokens": arguments.request_tokens,
        "environment": environment(arguments.commit),
        "records": records,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    names = list(records[0])
    print(markdown([names, *([str(record[name]) for name in names] for record in records)]))


if __name__ == "__main__":
    main()
