# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM use Triton's interpreter on a machine without a GPU.

vLLM turns Triton off on CPU unless Triton has a "cpu" backend whose driver says it is active. With
`TRITON_INTERPRET=1` no driver is ever asked to compile anything, so a name in that table is all that is missing.
"""

import functools
import multiprocessing
import os

from vllm import envs
from vllm.logger import init_logger

from vllm_longspec.compat.cpu_build import name_cpu_build

logger = init_logger(f"vllm.{__name__}")

# The names of this package's entry points, by which VLLM_PLUGINS lets vLLM load them.
GENERAL_PLUGIN = "longspec"
INTERPRETER_PLUGIN = "longspec_interpreter"


class InterpreterDriver:
    """Stands where a Triton driver would; the interpreter never calls it."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> None:
        # torch.compile asks what it could generate code for, and takes this error for "nothing".
        raise RuntimeError("Triton's interpreter has no target")


def enable() -> None:
    """Entry point of group `vllm.platform_plugins`; vLLM calls it in every process before it looks for Triton.

    Does nothing for Triton unless `TRITON_INTERPRET=1`. Returns None: this is not a platform of its own.
    """
    name_cpu_build()
    _warn_alone()
    if not interpreting():
        return
    try:
        from triton.backends import Backend, backends
    except ImportError:
        # Without Triton there is nothing to interpret; start-up refuses a GLIDE draft and says what is missing.
        return
    backends.setdefault("cpu", Backend(compiler=None, driver=InterpreterDriver))


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def left_out(plugin: str) -> str | None:
    """How VLLM_PLUGINS keeps vLLM from loading one of this package's plugins, and the way out; None if it does not."""
    given = envs.VLLM_PLUGINS
    if given is None or plugin in given:
        return None
    # vLLM splits at commas and takes spaces for part of a name.
    names = dict.fromkeys([*filter(None, map(str.strip, given)), plugin])
    return f"VLLM_PLUGINS={','.join(given)!r} leaves the plugin {plugin} out: set VLLM_PLUGINS={','.join(names)}"


@functools.cache
def _warn_alone() -> None:
    """Says once that GLIDE drafts are left out: once a process, and not in the processes that vLLM starts."""
    reason = left_out(GENERAL_PLUGIN)
    if reason is not None and multiprocessing.parent_process() is None:
        logger.warning("No --speculative-model and no GLIDE draft is known to vLLM, as %s", reason)
