# SPDX-License-Identifier: Apache-2.0
"""Replaces a function of vLLM by one that gets the original. Imports nothing of vLLM, whose version may be any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replaces a function of a module or class by one that is called with the original first; idempotent.

    Raises:
        KeyError: the owner has nothing of this name.
    """
    found = vars(owner)[name]
    descriptor = type(found) if isinstance(found, staticmethod | classmethod | property) else None
    original: Any = found.fget if isinstance(found, property) else found.__func__ if descriptor else found
    if hasattr(original, "longspec_original"):
        return

    # `wraps` keeps the qualified name, by which vLLM's configuration pickles functions.
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper.longspec_original = original  # type: ignore[attr-defined]
    setattr(owner, name, descriptor(wrapper) if descriptor else wrapper)
