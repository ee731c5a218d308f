# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before vLLM, Triton or NumPy is imported."""

import os

# Models and kernels are so small that more threads would only wait for each other, and burn a core each while they do.
# vLLM would bind the threads of its workers: each rank's to a NUMA node of its own, which few machines have, and those
# of all tests that run side by side to the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# Each process of pytest-xdist begins with another GPU of those that it may use, as processes are dealt round. Before
# torch counts them, since it reads the variable once.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (devices := os.environ.get("CUDA_VISIBLE_DEVICES")):
    visible = devices.split(",")
    first = int(worker.removeprefix("gw")) % len(visible)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:] + visible[:first])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that more threads would only wait, beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
