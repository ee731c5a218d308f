# SPDX-License-Identifier: Apache-2.0
"""Leaves out work that Triton's interpreter does in vain, which is most of the time of small operations.

- Integer additions, subtractions and multiplications are done again in 64 bits, to find overflows. What is found is
  reported only with the option `debug`, which the interpreter does not set.
- Every call of a device function replaces all functions of the language, although the launch has done so.
- A table of all types is built for every operation, and the shape of every result is validated, wrapped and printed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def leave_out() -> None:
    """Changes the interpreter in this process; idempotent. No result of any kernel changes."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "longspec_original"):
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, interpreter._LangPatchScope, tl)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    tl.block_type.__init__ = _block_types_by_shape(tl.block_type.__init__, tl.constexpr)
    tl.tensor.__init__ = _tensors_by_shape(tl.tensor.__init__)


def _once_a_launch(original: Callable[..., Any], nothing: Callable[[], Any], tl: Any) -> Callable[..., Any]:
    @functools.cache
    def languages(function: Callable[..., Any]) -> list[ModuleType]:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [module for module in modules if module in (tl, tl.core)]

    def is_builtin(function: Callable[..., Any]) -> bool:
        # What the interpreter puts in its place is none.
        return tl.core.is_builtin(function)

    def patch(function: Callable[..., Any]) -> Any:
        """Returns what restores the language when a launch ends: a device function restores nothing."""
        modules = languages(function)
        # A launch restores the class of tensors, but not the modules of the device functions that it called.
        if modules and not any(is_builtin(module.load) or is_builtin(module.tensor.__add__) for module in modules):
            return nothing()
        return original(function)

    patch.longspec_original = original  # type: ignore[attr-defined]
    return patch


def _by_name(original: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        # Types of blocks and of pointers have no hash, and their names have all that counts.
        name = dtype.name
        if name not in found:
            found[name] = original(dtype)
        return found[name]

    get.longspec_original = original  # type: ignore[attr-defined]
    return get


def _block_types_by_shape(original: Callable[..., None], constexpr: Any) -> Callable[..., None]:
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([each.value if isinstance(each, constexpr) else each for each in shape])
        if key in found:
            self.__dict__.update(found[key], element_ty=element_ty)
            return
        original(self, element_ty, shape)
        found[key] = dict(self.__dict__)

    init.longspec_original = original  # type: ignore[attr-defined]
    return init


def _tensors_by_shape(original: Callable[..., None]) -> Callable[..., None]:
    found: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in found:
            self.__dict__.update(found[shape], handle=handle, type=type, dtype=type.scalar)
            return
        original(self, handle, type)
        found[shape] = {name: value for name, value in self.__dict__.items() if name not in ("handle", "type", "dtype")}

    init.longspec_original = original  # type: ignore[attr-defined]
    return init
