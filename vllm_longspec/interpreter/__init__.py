# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM use Triton's interpreter on a machine without a GPU.

vLLM turns Triton off on CPU unless Triton has a "cpu" backend whose driver says it is active. With
`TRITON_INTERPRET=1` no driver is ever asked to compile anything, so a name in that table is all that is missing.
"""

import os

from vllm_longspec.compat.versions import name_cpu_build


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
    if not interpreting():
        return
    try:
        from triton.backends import Backend, backends
    except ImportError:
        # Without Triton there is nothing to interpret; start-up refuses a GLIDE draft and says what to install.
        return
    backends.setdefault("cpu", Backend(compiler=None, driver=InterpreterDriver))


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
