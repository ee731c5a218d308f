# SPDX-License-Identifier: Apache-2.0
"""What is said of versions of vLLM that this plugin does not support."""

import functools
import multiprocessing

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion
from vllm.logger import init_logger
from vllm.version import __version__ as VLLM_VERSION

from vllm_longspec.compat.supported import SUPPORTED
from vllm_longspec.version import __version__

logger = init_logger(f"vllm.{__name__}")


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
