# SPDX-License-Identifier: Apache-2.0
"""Enables Triton's interpreter for vLLM on a machine without a GPU.

vLLM disables Triton on a CPU unless Triton has a "cpu" backend with an active driver. With `TRITON_INTERPRET=1` no
driver compiles anything, so an entry in Triton's table of backends is enough.
"""

import functools
import multiprocessing
import os

from vllm import envs
from vllm.logger import init_logger

from vllm_longspec.compat.cpu_build import name_cpu_build
from vllm_longspec.interpreter import booleans, overhead

logger = init_logger(f"vllm.{__name__}")

# The names of this package's entry points, for VLLM_PLUGINS.
GENERAL_PLUGIN = "longspec"
INTERPRETER_PLUGIN = "longspec_interpreter"


class InterpreterDriver:
    """Takes the place of a Triton driver; the interpreter never calls it."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> None:
        # torch.compile takes this error for the absence of a Triton target.
        raise RuntimeError("Triton's interpreter has no target")


def enable() -> None:
    """Entry point of group `vllm.platform_plugins`; vLLM calls it in every process before it looks for Triton.

    Changes Triton only with `TRITON_INTERPRET=1`. Returns None: this is not a platform of its own.
    """
    name_cpu_build()
    _warn_alone()
    if not interpreting():
        return
    try:
        from triton.backends import Backend, backends
    except ImportError:
        return  # start-up refuses every draft of this plugin's and says that Triton is missing
    backends.setdefault("cpu", Backend(compiler=None, driver=InterpreterDriver))
    booleans.keep()
    overhead.leave_out()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def left_out(plugin: str) -> str | None:
    """The message if VLLM_PLUGINS excludes one of this package's plugins, with the way out; None if it does not."""
    given = envs.VLLM_PLUGINS
    if given is None or plugin in given:
        return None
    # vLLM splits at commas and does not strip spaces.
    names = dict.fromkeys([*filter(None, map(str.strip, given)), plugin])
    return f"VLLM_PLUGINS={','.join(given)!r} leaves the plugin {plugin} out: set VLLM_PLUGINS={','.join(names)}"


@functools.cache
def _warn_alone() -> None:
    """Warns if VLLM_PLUGINS excludes the general plugin, once, and not in the processes that vLLM starts."""
    reason = left_out(GENERAL_PLUGIN)
    if reason is not None and multiprocessing.parent_process() is None:
        logger.warning("Neither GLIDE drafts nor MagicDec nor --speculative-model are known to vLLM, as %s", reason)
