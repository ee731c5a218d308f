# SPDX-License-Identifier: Apache-2.0
"""The console command `vllm-longspec`, also `python -m vllm_longspec`: what the package offers beside serving.

A command is a module with `add_arguments(parser)` and `run(arguments)`, which is imported only when it is called.
Both raise ValueErrors of one line with the way out. OSErrors, which name the file, need not be caught.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_longspec.version import __version__

# Command -> module, what it does.
COMMANDS = {
    "bench": (
        "vllm_longspec.bench.command",
        "measure methods side by side on real prompts",
    ),
    "convert": (
        "vllm_longspec.proposers.glide.convert",
        "make a draft that vLLM loads of what LongSpec's training code wrote",
    ),
    "evaluate": (
        "vllm_longspec.training.evaluate",
        "predict from stored answers what a draft's steps accept, by context, and check it in an engine",
    ),
    "frequent-tokens": (
        "vllm_longspec.frequent_tokens",
        "count the tokens that texts consist of most, for a smaller head of the draft",
    ),
    "generate": (
        "vllm_longspec.training.generate",
        "let a target answer prompts, as data to train its draft with",
    ),
    "train": (
        "vllm_longspec.training.train",
        "train a GLIDE draft for a target",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="vllm-longspec", description="Tools for LongSpec drafts.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if list(argv[:1]) == [name]:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (OSError, ValueError) as error:
        # Those of libraries have several lines.
        sys.exit(f"vllm-longspec {arguments.command}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"vllm-longspec {arguments.command}: stopped", file=sys.stderr)
        # As shells say it of a program that Ctrl-C has ended.
        sys.exit(128 + signal.SIGINT)
