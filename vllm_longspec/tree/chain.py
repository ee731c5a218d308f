# SPDX-License-Identifier: Apache-2.0
"""Which requests take a chain instead of a tree.

vLLM takes a request's draft tokens for a chain: the history of draft token i is draft tokens 0 to i - 1. In a tree it
is the path from the root, so whatever reads the history of a draft token would count tokens of other branches. A
request that asks for such a thing gets a chain, a tree in which every node has one child, and vLLM's own handling is
right. Everything else reads no more than a node's own logits and position, and takes a tree.
"""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import ModelConfig

# vLLM shows what loggers below its own say.
logger = init_logger(f"vllm.{__name__}")

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


def warn_of_chains(target: "ModelConfig") -> None:
    """Says once if requests to this target take a chain by default.

    Checkpoints bring sampling parameters in their generation_config.json, and vLLM's server gives them to every request
    that does not set them itself.
    """
    from vllm import SamplingParams

    defaults: dict[str, Any] = {}
    for name, value in target.get_diff_sampling_param().items():
        uses: Callable[[Any], bool] | None = _CHAIN_PARAMETERS.get(name)
        if uses is not None and uses(SimpleNamespace(**{name: value})):
            defaults[name] = value
    if not defaults:
        return
    override, given = target.override_generation_config, target.generation_config
    sources, way_out = [], "serve with"
    if defaults.keys() - override.keys():
        sources.append(f"generation_config.json of {target.model if given == 'auto' else given}")
    if defaults.keys() & override.keys():
        sources.append("--override-generation-config")
    else:
        way_out = "serve with --generation-config vllm or, to keep its other parameters, with"
    unset = SamplingParams()
    logger.warning_once(
        "%s by default (%s): a request that leaves it so takes a chain instead of a tree, with fewer accepted tokens a "
        "step. To let such requests take trees, %s --override-generation-config '%s'",
        ", ".join(f"{name}={value}" for name, value in defaults.items()),
        " and ".join(sources),
        way_out,
        json.dumps({**override, **{name: getattr(unset, name) for name in defaults}}),
    )
