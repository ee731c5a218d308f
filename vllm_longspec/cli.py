# SPDX-License-Identifier: Apache-2.0
"""The plugin's options on vLLM's command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_longspec import proposers
from vllm_longspec.configure import given_config
from vllm_longspec.options import AUTO, DEFAULT_COPY_LENGTH, DEFAULT_GAMMA, DEFAULT_LEVELS, PartialAttention

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

# With its defaults.
_MAGICDEC = {
    "method": "magicdec",
    "gamma": DEFAULT_GAMMA,
    "sinks": PartialAttention.sinks,
    "budget": PartialAttention.budget,
    "selection": PartialAttention.selection,
}
_HELP_SUMMARY = (
    "Speculative decoding with a LongSpec GLIDE draft: --speculative-model MODEL "
    "[--speculative-tree-shape N [N ...]] [--speculative-copy-length N] [--speculative-frequent-tokens FILE]. "
    "Without a draft the target can draft for itself over a part of its own cache: "
    f"--speculative-config '{json.dumps(_MAGICDEC)}'. See --help=LongSpec."
)


def add_cli_args(
    original: Callable[..., argparse.ArgumentParser], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser = original(parser)
    # vLLM lists its own methods. A GLIDE draft is found by its checkpoint, whatever the method.
    method = parser._option_string_actions["--spec-method"]
    methods = sorted(proposers.names() - {proposers.GLIDE, *(method.choices or ())})
    method.choices = [*(method.choices or ()), *methods]
    group = parser.add_argument_group(title="LongSpec", description=_HELP_SUMMARY)
    group.add_argument(
        "--speculative-model",
        dest="spec_model",
        metavar="MODEL",
        help="The draft to speculate with, as --spec-model. A LongSpec GLIDE draft is recognised from its checkpoint "
        "and needs no other option; a draft of another kind is handled by vLLM.",
    )
    group.add_argument(
        "--speculative-tree-shape",
        type=_level,
        nargs="+",
        metavar="N",
        help="Nodes at each level of the tree that a GLIDE draft grows, as "
        "--speculative-config '{\"tree_shape\": [...]}'. Without it the shape is "
        f"{' '.join(map(str, DEFAULT_LEVELS))}; 1 1 1 1 drafts 4 tokens in sequence. {AUTO} chooses the "
        "number of levels together with the number of nodes, by what is accepted.",
    )
    group.add_argument(
        "--speculative-frequent-tokens",
        type=_file_or_false,
        metavar="FILE",
        help="The tokens that a GLIDE draft may draw, as --speculative-config '{\"frequent_tokens\": FILE}'; see "
        f"vllm-longspec frequent-tokens --help. {AUTO} learns them from what is served, {AUTO}:N with room for N; "
        "false drafts all tokens. A smaller head drafts faster; the output does not change.",
    )
    group.add_argument(
        "--speculative-copy-length",
        type=int,
        metavar="N",
        help="Tokens that join the tree as one path where the request's last tokens occurred before in its own text, "
        "as --speculative-config '{\"copy_length\": N}'. Without it "
        f"{DEFAULT_COPY_LENGTH}; 0 copies none.",
    )
    return parser


def _level(value: str) -> int | str:
    try:
        return value if value == AUTO else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number of nodes nor {AUTO}") from None


def _file_or_false(value: str) -> str | bool:
    return False if value.lower() == "false" else value


def from_cli_args(original: Callable[..., EngineArgs], cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
    # Only fields of EngineArgs are copied, so the plugin's options move to `speculative_config`. They move in `args`
    # itself, which further API servers receive, and read before they load plugins.
    for name in ("tree_shape", "copy_length", "frequent_tokens"):
        value = getattr(args, f"speculative_{name}", None)
        if value is None:
            continue
        given = given_config(args)
        flag = f"--speculative-{name.replace('_', '-')}"
        if name in given or name.replace("_", "-") in given:
            raise ValueError(f"{flag} and --speculative-config['{name}'] are mutually exclusive")
        if value == [AUTO]:
            value = AUTO
        args.speculative_config = {**given, name: value}
        setattr(args, f"speculative_{name}", None)
    return original(cls, args)
