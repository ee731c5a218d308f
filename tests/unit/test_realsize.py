# SPDX-License-Identifier: Apache-2.0
"""The prompts of the pair of a real size: from the middle of held-out files, with what comes before them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# In a process of its own, since the module's siblings have names such as `target`.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from train import choose_prompts
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
print(json.dumps(list(choose_prompts(json.load(sys.stdin), tokenizer, 256, 6, after=64))))
"""


@pytest.fixture(scope="module")
def held_out():
    """Files of different lengths, one behind the other, each with an end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BENCHMARKS / "pair" / "target" / "tokenizer.json"))
    lines = (BENCHMARKS / "pair" / "prompts.jsonl").read_text().splitlines()[:24]
    ids = []
    for number, line in enumerate(lines):
        ids += [*tokenizer.encode(json.loads(line)["text"]).ids[: 40 + 50 * number], 0]
    return ids


def test_prompts(held_out):
    tokenizer = BENCHMARKS / "pair" / "target" / "tokenizer.json"
    command = [sys.executable, "-c", SCRIPT, str(BENCHMARKS / "realsize"), str(tokenizer)]
    finished = subprocess.run(command, input=json.dumps(held_out), capture_output=True, text=True, check=True)
    prompts = json.loads(finished.stdout)

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer))
    places = set()
    for prompt in prompts:
        place = int(prompt["path"].removeprefix("held-out token "))
        places.add(place)
        ids = tokenizer.encode(prompt["text"]).ids
        assert ids == held_out[place - 256 : place]
        # An eighth of the prompt is of the file that goes on.
        assert 0 not in ids[-32:] and 0 not in held_out[place : place + 64]
    assert len(places) == 6
    # From all over the text.
    assert min(places) < len(held_out) / 3 and max(places) > len(held_out) * 2 / 3
