# SPDX-License-Identifier: Apache-2.0
"""Proposers of candidate trees, each in a folder or module of its own. They do not import each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from vllm_longspec.proposers.interface import DraftSetup

# Recognised by its checkpoint; other proposers are named by `"method"` in the speculative configuration.
GLIDE = "glide"
MAGICDEC = "magicdec"
# Drafts nothing: the engine of a teacher (`vllm_longspec/training/teachers/vllm.py`).
CAPTURE = "capture"

# name -> qualified name of its `DraftSetup`
_SETUPS = {
    GLIDE: "vllm_longspec.proposers.glide.setup.GlideSetup",
    MAGICDEC: "vllm_longspec.proposers.magicdec.setup.MagicDecSetup",
    CAPTURE: "vllm_longspec.proposers.capture.setup.CaptureSetup",
}


def register(name: str, setup: str) -> None:
    """Registers the qualified name of a `DraftSetup`; needed in every process that builds or runs an engine with it.

    Raises:
        ValueError: another one has this name, or one of vLLM's own methods.
    """
    from vllm.config.speculative import SpeculativeMethod

    if name in _literals(SpeculativeMethod):
        raise ValueError(f"{name!r} is a speculative method of vLLM's: register {setup} under another name")
    if _SETUPS.setdefault(name, setup) != setup:
        raise ValueError(f"proposer {name!r} is {_SETUPS[name]}: register {setup} under another name")


def _literals(annotation: Any) -> Iterator[Any]:
    """The values of a Literal, of which some may be Literals."""
    for value in get_args(annotation):
        yield from _literals(value) if get_args(value) else (value,)


def setup_of(name: str) -> "type[DraftSetup]":
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(_SETUPS[name])


def names() -> frozenset[str]:
    return frozenset(_SETUPS)


def others_with(option: str, name: str) -> list[str]:
    """The proposers that have this option of the plugin, without the one of this name."""
    return sorted(other for other in _SETUPS if other != name and option in setup_of(other).option_names)


def ask_for(methods: list[str]) -> str:
    """What a user gives to choose one of these proposers, in messages."""
    return " or ".join(f'"method": "{method}"' for method in methods)
