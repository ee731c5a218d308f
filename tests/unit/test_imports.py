# SPDX-License-Identifier: Apache-2.0
"""Which room of the package may import which. The tree and attention know no proposer, proposers not each other."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_longspec

ROOT = Path(vllm_longspec.__path__[0])

# What stands at the top level, and each folder. Of proposers each has a room of its own beside what they share.
ALLOWED = {
    "version": set(),
    "compat": {"version"},
    "interpreter": {"compat"},
    "tree": {"interpreter"},
    "attention": {"interpreter"},
    "copying": {"interpreter", "tree"},
    "targets": {"interpreter"},
    "frequent_tokens": set(),
    "options": {"tree"},
    "proposers": {"attention", "tree"},
    "proposers.glide": {
        "attention",
        "compat",
        "frequent_tokens",
        "interpreter",
        "options",
        "proposers",
        "targets",
        "tree",
    },
    "proposers.magicdec": {"attention", "interpreter", "options", "proposers", "targets", "tree"},
    "proposers.capture": {"attention", "options", "proposers", "tree"},
    "bench": {"proposers.glide", "training", "version"},
    "training": {
        "compat",
        "copying",
        "frequent_tokens",
        "options",
        "proposers",
        "proposers.capture",
        "proposers.glide",
        "scheduling",
        "targets",
        "tree",
        "version",
    },
    "scheduling": {"compat", "options", "proposers", "targets", "tree"},
    "runner": {"attention", "copying", "options", "proposers", "scheduling", "targets", "tree", "version"},
    "configure": {"attention", "frequent_tokens", "options", "proposers", "scheduling", "targets", "tree"},
    "cli": {"configure", "options", "proposers"},
    # It names the modules of its commands, which are imported when they are called.
    "commands": {"version"},
    "__main__": {"commands"},
    "patches": {
        "attention",
        "cli",
        "compat",
        "configure",
        "interpreter",
        "options",
        "replacement",
        "runner",
        "scheduling",
    },
    "plugin": {"compat", "patches", "refusal", "targets"},
    "refusal": {"compat", "proposers", "proposers.glide", "replacement"},
    "replacement": set(),
    "": {"version"},
}


def room_of(module: str) -> str:
    """The room of a module, which is named without the package. Each proposer, a folder or a module, is one."""
    first, *rest = module.split(".")
    if first == "proposers" and rest and rest[0] not in ("interface", "__init__"):
        return f"proposers.{rest[0]}"
    return first


def imported(source: str) -> Iterator[str]:
    """The modules of this package that a file imports anywhere in it, named without the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            # What is imported may itself be a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("vllm_longspec.") for name in names if name.startswith("vllm_longspec."))


def wrong_imports(room: str, source: str) -> list[str]:
    return [name for name in imported(source) if room_of(name) not in {room, *ALLOWED[room]}]


FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_module_imports_only_what_its_room_may(path):
    assert wrong_imports(room_of(name_of(path)), path.read_text()) == []


def test_no_modules_import_each_other():
    """Nor within a function: what two modules need is a module of its own."""
    modules = {name_of(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph[name_of(path)] = found = set()
        for name in imported(path.read_text()):
            # What is imported of a module is no module itself.
            module = name if name in modules else name.rpartition(".")[0]
            if module != name_of(path):
                found.add(module)
    # Raises CycleError, which names them.
    graphlib.TopologicalSorter(graph).prepare()


def test_every_room_has_its_rule():
    rooms = {room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in FILES if path.parent != ROOT}
    rooms |= {path.stem for path in FILES if path.parent == ROOT and path.stem != "__init__"}
    assert rooms | {""} == ALLOWED.keys()


def test_no_two_rooms_import_each_other():
    def reachable(room: str, seen: frozenset[str] = frozenset()) -> set[str]:
        found = set()
        for other in ALLOWED[room] - seen:
            found |= {other} | reachable(other, seen | {room})
        return found

    assert [room for room in ALLOWED if room in reachable(room)] == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("tree", "from vllm_longspec.proposers.glide.beam import grow_trees"),
        ("attention", "def f():\n    from vllm_longspec.proposers.interface import Proposer"),
        ("runner", "import vllm_longspec.proposers.glide.model"),
        ("options", "from vllm_longspec import configure"),
        ("proposers.glide", "from vllm_longspec.proposers.magicdec import MagicDecProposer"),
    ],
)
def test_a_wrong_import_is_named(room, source):
    assert len(wrong_imports(room, source)) == 1
