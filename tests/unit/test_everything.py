# SPDX-License-Identifier: Apache-2.0
"""The commands that measure all that is quoted, and the chains that they run in."""

import argparse
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from threading import Thread

import pytest

from benchmarks import ROOT, everything
from benchmarks.shapes import SHAPES
from benchmarks.speed.__main__ import parse_arguments
from vllm_longspec.bench.command import add_arguments


@cache
def usage(module):
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def chains_of(tmp_path, has_data, **limits):
    (tmp_path / "data").mkdir(exist_ok=True)
    data = tmp_path / "data" if has_data else tmp_path / "nothing"
    return everything.chains(tmp_path / "out", data, "abc", **limits)


@pytest.mark.parametrize("has_data", [False, True])
def test_commands_are_those_of_the_modules(tmp_path, monkeypatch, has_data):
    steps = [step for chain in chains_of(tmp_path, has_data, minutes=7) for step in chain.steps]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert ("realsize" in names) == ("bench-242m-b4" in names) == has_data
    for step in steps:
        option, module, *arguments = step.command
        assert option == "-m" and find_spec(module) is not None
        if module == "benchmarks.speed":
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            parsed = parse_arguments()
            assert parsed.again and parsed.commit == "abc" and parsed.minutes == 7
            # A folder of its own: chains run side by side.
            assert parsed.out == tmp_path / "out" / f"{step.name}.jsonl"
        elif module == "vllm_longspec":
            assert arguments[0] == "bench"
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            parser.parse_args(arguments[1:])
        # The package that it trains with need not be there.
        elif module != "benchmarks.training.eagle3" or find_spec("speculators"):
            options = {argument for argument in arguments if argument.startswith("--")}
            assert all(option in usage(module) for option in options)


def test_every_shape_is_measured_and_one_on_two_gpus(tmp_path):
    found = {}
    for chain in chains_of(tmp_path, False):
        for step in chain.steps:
            if step.command[1] == "benchmarks.speed":
                found[step.name] = (chain.num_gpus, step.command)
    assert set(SHAPES) - {"toy"} <= set(found)
    num_gpus, command = found["qwq-32b-2-gpus"]
    assert num_gpus == 2 and '{"tensor_parallel_size": 2}' in command


def test_a_chain_goes_on_after_a_failure(tmp_path, capfd):
    gpus = everything.Gpus(2)
    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], len(os.sched_getaffinity(0)))"
    steps = [
        everything.Step("broken", ["-c", "raise SystemExit(3)"]),
        everything.Step("sound", ["-c", say]),
    ]
    with gpus.take(1) as taken:
        assert taken == [0]
        assert everything.run_chain(everything.Chain(steps), gpus, 2, tmp_path) == ["broken"]
    gpu, num_cores = (tmp_path / "sound.log").read_text().split()
    assert gpu == "1" and int(num_cores) >= 1
    # Both are free for the next chain.
    assert everything.run_chain(everything.Chain(steps[1:], num_gpus=2), gpus, 2, tmp_path) == []
    assert (tmp_path / "sound.log").read_text().split()[0] == "0,1"
    assert "broken" in capfd.readouterr().out


def test_a_chain_waits_for_as_many_gpus_as_it_needs(tmp_path):
    gpus = everything.Gpus(2)
    order = []
    step = everything.Step("sound", ["-c", "pass"])

    def run():
        everything.run_chain(everything.Chain([step], num_gpus=2), gpus, 2, tmp_path)
        order.append("chain")

    with gpus.take(1):
        thread = Thread(target=run)
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive() and not (tmp_path / "sound.log").exists()
        order.append("given back")
    thread.join(timeout=60)
    assert order == ["given back", "chain"]


def test_some_of_the_commands(capsys, monkeypatch, tmp_path):
    without_data = ["--data", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["everything.py", "--list", "--only", "kernels,pair", *without_data])
    everything.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["0 pair", "1 kernels"]
    monkeypatch.setattr(sys, "argv", ["everything.py", "--only", "kernels,pairs", *without_data])
    with pytest.raises(SystemExit):
        everything.main()
    assert "there is no pairs: give some of cross, gpu_check, kernels," in capsys.readouterr().err
    arguments = ["everything.py", "--gpus", "1", "--out", str(tmp_path), "--only", "qwq-32b-2-gpus"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        everything.main()
    assert ended.value.code == 0
    assert "left out, more than 1 GPUs are needed: qwq-32b-2-gpus" in capsys.readouterr().out
