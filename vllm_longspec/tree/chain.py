# SPDX-License-Identifier: Apache-2.0
"""Which requests take a chain instead of a tree.

vLLM assumes that draft token i of a request follows its draft tokens 0 to i - 1. In a tree it follows the path from the
root, so sampling that reads the history of a draft token would include tokens of other branches. Requests that ask for
it get a chain, a tree in which every node has one child. All others depend on a node's own logits and position only.
"""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import ModelConfig

# A child of vLLM's logger, so that vLLM's logging configuration applies.
logger = init_logger(f"vllm.{__name__}")

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
    """Whether sampling reads the history of the draft tokens."""
    return any(used(params) for used in _CHAIN_PARAMETERS.values())


def warn_of_chains(target: "ModelConfig") -> None:
    """Logs once if requests to this target take a chain by default.

    vLLM's server applies a checkpoint's generation_config.json to all requests that do not set its parameters.
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
