# SPDX-License-Identifier: Apache-2.0
"""Which requests take a chain instead of a tree.

vLLM takes a request's draft tokens for a chain: the history of draft token i is draft tokens 0 to i - 1. In a tree it
is the path from the root, so whatever reads the history of a draft token would count tokens of other branches. A
request that asks for such a thing gets a chain, a tree in which every node has one child, and vLLM's own handling is
right. Everything else reads no more than a node's own logits and position, and takes a tree.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import SamplingParams

# Name of the parameter, and whether a request uses it.
_CHAIN_PARAMETERS: dict[str, Callable[["SamplingParams"], bool]] = {
    "presence_penalty": lambda params: params.presence_penalty != 0.0,
    "frequency_penalty": lambda params: params.frequency_penalty != 0.0,
    "repetition_penalty": lambda params: params.repetition_penalty != 1.0,
    "bad_words": lambda params: bool(params.bad_words),
    "structured_outputs": lambda params: params.structured_outputs is not None,
    "thinking_token_budget": lambda params: params.thinking_token_budget is not None,
}

CHAIN_PARAMETERS = tuple(_CHAIN_PARAMETERS)


def needs_chain(params: "SamplingParams") -> bool:
    """Whether the request reads the history of its draft tokens."""
    return any(used(params) for used in _CHAIN_PARAMETERS.values())
