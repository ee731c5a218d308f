# SPDX-License-Identifier: Apache-2.0
"""Keeps booleans what they are where Triton's interpreter makes blocks of them.

The interpreter types the result of a comparison as the numbers that were compared, and gives a block that repeats a
scalar that type. So a scalar comparison makes a mask of integers, which the interpreter's own loads refuse. vLLM's
n-gram speculator has such a mask. A GPU has no part in this.
"""

import functools
from typing import Any

import numpy as np


def keep() -> None:
    """Changes the interpreter in this process; idempotent."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_splat
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype != np.bool_:
            return original(self, ret_ty, arg)
        return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data, dtype=np.bool_), tl.int1)

    builder.create_splat = create_splat
