# SPDX-License-Identifier: Apache-2.0
import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs in the interpreter only.
INTERPRETED = {"_gumbel_sample_rows_kernel", "_noise_kernel"}


def kernels() -> set[str]:
    """The names of all kernels of the package; functions that kernels call have other names."""
    return {
        node.name
        for path in (ROOT / "vllm_longspec").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


def test_every_kernel_compiles_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert set(finished.stdout.split()) == kernels() - INTERPRETED
