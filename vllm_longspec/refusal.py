# SPDX-License-Identifier: Apache-2.0
"""What an unsupported version of vLLM gets: a warning, and drafts of this plugin's are refused by name.

vLLM calls plugins without a guard in every process, and an unsupported version may have moved anything. So nothing of
vLLM's but its version and its arguments is imported until the user gives a draft, and a missing name is no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_longspec import proposers
from vllm_longspec.compat.versions import unsupported_version, warn_unsupported
from vllm_longspec.replacement import replace


def apply() -> None:
    """Warns, and makes vLLM refuse drafts of this plugin's, if the function to replace exists. Idempotent."""
    warn_unsupported()
    try:
        from vllm.engine.arg_utils import EngineArgs

        replace(EngineArgs, "create_speculative_config", _refuse_drafts)
    except (ImportError, KeyError):
        pass


def _refuse_drafts(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    options = getattr(self, "speculative_config", None)
    options = options if isinstance(options, dict) else {}
    method = options.get("method") or getattr(self, "spec_method", None)
    if isinstance(method, str) and method in proposers.names():
        raise ValueError(f"the method {method} is of vllm-longspec. {unsupported_version()}")
    model = options.get("model") or getattr(self, "spec_model", None)
    if isinstance(model, str) and _is_glide_draft(model, options.get("revision")):
        raise ValueError(f"draft {model} is a GLIDE draft. {unsupported_version()}")
    return original(self, *args, **kwargs)


def _is_glide_draft(model: str, revision: str | None) -> bool:
    try:
        from vllm_longspec.proposers.glide.checkpoint import inspect_draft

        return inspect_draft(model, revision) is not None
    except (ImportError, AttributeError):
        # It reads settings of vLLM's, which may have moved. Any other draft must still be served.
        return False
