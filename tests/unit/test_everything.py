# SPDX-License-Identifier: Apache-2.0
"""The commands that measure all that is quoted, and the chains that they run in."""

import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from queue import Queue

import pytest

from benchmarks import ROOT, everything
from benchmarks.speed.__main__ import parse_arguments


@cache
def usage(module):
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def plan(tmp_path, has_data):
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" if has_data else tmp_path / "nothing"
    return [step for chain in everything.chains(tmp_path / "out", data, "abc") for step in chain]


@pytest.mark.parametrize("has_data", [False, True])
def test_commands_are_those_of_the_modules(tmp_path, monkeypatch, has_data):
    steps = plan(tmp_path, has_data)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert ("realsize" in names) == has_data
    for step in steps:
        option, module, *arguments = step.command
        assert option == "-m" and find_spec(module) is not None
        if module == "benchmarks.speed":
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            parsed = parse_arguments()
            assert parsed.again and parsed.commit == "abc"
            # A folder of its own: chains run side by side.
            assert parsed.out == tmp_path / "out" / f"{step.name}.jsonl"
        else:
            options = {argument for argument in arguments if argument.startswith("--")}
            assert all(option in usage(module) for option in options)


def test_a_chain_goes_on_after_a_failure(tmp_path, capfd):
    gpus: Queue[int] = Queue()
    gpus.put(1)
    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], len(os.sched_getaffinity(0)))"
    steps = [
        everything.Step("broken", ["-c", "raise SystemExit(3)"]),
        everything.Step("sound", ["-c", say]),
    ]
    assert list(everything.run_chain(steps, gpus, 2, tmp_path)) == ["broken"]
    gpu, num_cores = (tmp_path / "sound.log").read_text().split()
    assert gpu == "1" and int(num_cores) >= 1
    # The GPU is free for the next chain.
    assert gpus.get_nowait() == 1
    assert "broken" in capfd.readouterr().out


def test_some_of_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["everything.py", "--list", "--only", "kernels,pair"])
    everything.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["0 kernels", "1 pair"]
    monkeypatch.setattr(sys, "argv", ["everything.py", "--only", "kernels,pairs"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "there is no pairs: give some of gpu_check, kernels," in capsys.readouterr().err
