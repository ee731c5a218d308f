# SPDX-License-Identifier: Apache-2.0
"""Which requests take a chain instead of a tree.

vLLM fills the grammar's bitmask of draft token i from the request's draft tokens 0 to i - 1. In a tree draft token i
follows the path from the root, so its mask would include tokens of other branches. Requests with a grammar get a chain,
a tree in which every node has one child.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import SamplingParams

# Sampling parameter -> whether a request uses it.
_CHAIN_PARAMETERS: dict[str, Callable[["SamplingParams"], bool]] = {
    "presence_penalty": lambda params: params.presence_penalty != 0.0,
    "frequency_penalty": lambda params: params.frequency_penalty != 0.0,
    "repetition_penalty": lambda params: params.repetition_penalty != 1.0,
    "bad_words": lambda params: bool(params.bad_words),
    "thinking_token_budget": lambda params: params.thinking_token_budget is not None,
}

CHAIN_PARAMETERS = tuple(_CHAIN_PARAMETERS)


def needs_chain(params: "SamplingParams") -> bool:
    """Whether the request's draft tokens must follow each other."""
    return any(used(params) for used in _CHAIN_PARAMETERS.values())
