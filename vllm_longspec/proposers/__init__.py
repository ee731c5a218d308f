# SPDX-License-Identifier: Apache-2.0
"""What draws candidate trees. Each proposer has a folder or module of its own; they do not import each other."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_longspec.proposers.interface import DraftSetup

# Recognised from its checkpoint; the others by `"method"` in the speculative configuration.
GLIDE = "glide"

# Name -> qualified name of its `DraftSetup` (`vllm_longspec/proposers/interface.py`).
_SETUPS = {GLIDE: "vllm_longspec.proposers.glide.setup.GlideSetup"}


def register(name: str, setup: str) -> None:
    """Makes a proposer known, in every process that is to build or run an engine with it.

    Raises:
        ValueError: another one has this name.
    """
    if _SETUPS.setdefault(name, setup) != setup:
        raise ValueError(f"proposer {name!r} is {_SETUPS[name]}: register {setup} under another name")


def setup_of(name: str) -> "type[DraftSetup]":
    """The setup of one of `names`."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(_SETUPS[name])


def names() -> frozenset[str]:
    return frozenset(_SETUPS)
