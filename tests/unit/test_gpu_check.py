# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.check_gpu` runs on a GPU, which no test can."""

import re
from pathlib import Path

from benchmarks.check_gpu import ENGINE_TESTS, KERNEL_TESTS

UNIT = Path(__file__).parent
# Of what stands in for vLLM's kernels on a CPU.
ON_A_CPU = {"interpreted_sampling"}


def test_every_test_of_a_kernel_also_runs_on_a_gpu():
    """They are those that choose a device by what there is."""
    chooses = re.compile(r"^DEVICE = .*cuda", re.MULTILINE)
    found = {path.stem.removeprefix("test_") for path in UNIT.glob("test_*.py") if chooses.search(path.read_text())}
    assert {"partial_tables", "verify"} < found
    assert found - ON_A_CPU <= set(KERNEL_TESTS)


def test_what_the_gpu_check_runs_is_there():
    for names, folder in ((KERNEL_TESTS, UNIT), (ENGINE_TESTS, UNIT.parent / "integration")):
        assert len(names) == len(set(names))
        assert [name for name in names if not (folder / f"test_{name}.py").is_file()] == []
