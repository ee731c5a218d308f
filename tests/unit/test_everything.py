# SPDX-License-Identifier: Apache-2.0
"""The commands that measure all that is quoted, and the chains that they run in."""

import subprocess
import sys
from pathlib import Path
from queue import Queue

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import everything
import speed
from systems import ROOT


def plan(tmp_path, has_data):
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" if has_data else tmp_path / "nothing"
    return [step for chain in everything.chains(tmp_path / "out", data, "abc") for step in chain]


@pytest.mark.parametrize("has_data", [False, True])
def test_commands_are_those_of_the_scripts(tmp_path, monkeypatch, has_data):
    steps = plan(tmp_path, has_data)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert ("realsize" in names) == has_data
    for step in steps:
        script, *arguments = step.command
        assert (ROOT / script).is_file()
        if script == "benchmarks/speed.py":
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            parsed = speed.parse_arguments()
            assert parsed.again and parsed.commit == "abc"
            # A folder of its own: chains run side by side.
            assert parsed.out == tmp_path / "out" / f"{step.name}.jsonl"
        elif script != "benchmarks/realsize/train.py":
            options = {argument for argument in arguments if argument.startswith("--")}
            shown = subprocess.run(
                [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
            ).stdout
            assert all(option in shown for option in options)


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
