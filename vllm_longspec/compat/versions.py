# SPDX-License-Identifier: Apache-2.0
"""Which version of vLLM this is, and the messages for an unsupported one."""

import functools
import logging
import multiprocessing

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from vllm.version import __version__ as VLLM_VERSION

from vllm_longspec.compat.supported import SUPPORTED
from vllm_longspec.version import __version__

# Below vLLM's logger, whose handlers it uses.
logger = logging.getLogger(f"vllm.{__name__}")


def minor_version(version: str = VLLM_VERSION) -> tuple[int, int] | None:
    """Major and minor number of a version, such as (0, 32); None if it is no version."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    return parsed.major, parsed.minor


def is_supported(version: str = VLLM_VERSION) -> bool:
    """Whether the plugin supports this version of vLLM.

    Only the minor version counts: a candidate, a development build or a local suffix such as `+cpu` changes nothing.
    """
    minor = minor_version(version)
    return minor is not None and SpecifierSet(SUPPORTED).contains("{}.{}".format(*minor))


# The only question about the version that code asks, in `vllm_longspec/compat/differences.py`.
IS_0_32 = minor_version() == (0, 32)


def unsupported_version(version: str = VLLM_VERSION) -> str:
    """The message for this version of vLLM, with the way out, in one line."""
    return (
        f"vllm-longspec {__version__} supports vLLM {SUPPORTED}, this is vLLM {version}: "
        f"install a supported vLLM (pip install 'vllm{SUPPORTED}') or another release of vllm-longspec"
    )


@functools.cache
def warn_unsupported() -> None:
    """Warns once that the plugin is inactive, and not in the processes that vLLM starts."""
    if multiprocessing.parent_process() is None:
        logger.warning("%s. GLIDE drafts and MagicDec are off, everything else is untouched.", unsupported_version())
