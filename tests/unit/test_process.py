# SPDX-License-Identifier: Apache-2.0
"""The tests' own processes: what hangs in one ends, and says where."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.process import run_alone

SLEEP = "import time\n\ndef sleeps_below():\n    time.sleep(600)\n\nsleeps_below()"


def sleeps() -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    print(f"child {child.pid}", flush=True)
    time.sleep(600)


def test_what_hangs_ends_and_says_where():
    with pytest.raises(AssertionError, match="not done after 10 s") as error:
        run_alone(sleeps, seconds=10)
    printed = str(error.value)
    assert "in sleeps\n" in printed
    assert "in sleeps_below\n" in printed
    child = int(printed.split("child ")[1].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
