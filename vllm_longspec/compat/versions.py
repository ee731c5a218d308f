# SPDX-License-Identifier: Apache-2.0
"""Check of the version of vLLM, and the messages for an unsupported one."""

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
    """Whether the plugin supports this version of vLLM; a local suffix such as `+cpu` is ignored."""
    try:
        return SpecifierSet(f"=={SUPPORTED}").contains(version, prereleases=True)
    except InvalidVersion:
        return False


def unsupported_version(version: str = VLLM_VERSION) -> str:
    """The message for this version of vLLM, with the way out, in one line."""
    return (
        f"vllm-longspec {__version__} supports vLLM {SUPPORTED}, this is vLLM {version}: "
        f"install a supported vLLM (pip install 'vllm=={SUPPORTED}') or another release of vllm-longspec"
    )


@functools.cache
def warn_unsupported() -> None:
    """Warns once that the plugin is inactive, and not in the processes that vLLM starts."""
    if multiprocessing.parent_process() is None:
        logger.warning("%s. GLIDE drafts are off, everything else is untouched.", unsupported_version())
