# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_longspec.commands import main
from vllm_longspec.frequent_tokens import most_frequent, read_frequent_tokens

TARGET = Path(__file__).parents[2] / "benchmarks" / "pair" / "target"


def test_most_frequent_first_and_ties_by_id():
    assert most_frequent(Counter([7, 3, 3, 9, 9, 5, 9, 7]), 3) == [9, 3, 7]
    assert most_frequent(Counter([7, 3]), 5) == [3, 7]


def test_reads_what_it_wrote(tmp_path):
    text = tmp_path / "text.py"
    text.write_text(Path(__file__).read_text() * 3)
    out = tmp_path / "tokens.json"
    command = [sys.executable, "-m", "vllm_longspec.frequent_tokens", "--model", str(TARGET)]
    finished = subprocess.run(
        [*command, "--size", "40", "--out", str(out), str(text)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "40 of 4096 tokens" in finished.stdout
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    expected = most_frequent(Counter(tokenizer.encode(text.read_text())), 39)
    assert read_frequent_tokens(out, 4096) == [*expected, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2", "cannot be read"),
        ('{"tokens": [1]}', "must be a JSON list"),
        ("[]", "must be a JSON list"),
        ("[1, 64]", "holds 64"),
        ("[1, -1]", "holds -1"),
        ("[1, true]", "holds True"),
        ("[1, 2.0]", "holds 2.0"),
        ("[5, 1, 5]", "names a token twice"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_frequent_tokens(path, 64)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert "vllm-longspec frequent-tokens" in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no_file.json cannot be read \(FileNotFoundError\)"):
        read_frequent_tokens(tmp_path / "no_file.json", 64)


def test_any_order_is_kept(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([5, 1, 3]))
    assert read_frequent_tokens(path, 64) == [5, 1, 3]


def test_the_command_counts_and_refuses_texts_without_tokens(tmp_path):
    text, empty, out = tmp_path / "text.py", tmp_path / "empty.py", tmp_path / "tokens.json"
    text.write_text("def f(x): return x + 1; " * 2000)
    empty.touch()
    command = ["frequent-tokens", "--model", str(TARGET), "--size", "4", "--out", str(out)]
    with pytest.raises(SystemExit, match="the texts have no tokens: give files of what the target usually writes"):
        main([*command, str(empty)])
    assert not out.exists()
    done = subprocess.run(
        [sys.executable, "-m", "vllm_longspec", *command, str(empty), str(text)], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(read_frequent_tokens(out, 4096)) == 4
    # More tokens at once than the model would take are no mistake.
    assert "sequence length" not in done.stderr
