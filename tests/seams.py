# SPDX-License-Identifier: Apache-2.0
"""Finds every place where this package touches vLLM, from its own source, and what of it is not where it was.

A seam is written as a dotted name. Each function returns one line for every seam that an upstream release has moved;
none when all is well. Types are followed as far as annotations and constructors tell them, no further: what is left is
listed by hand in tests/unit/test_seams.py.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import Any

import typing_extensions
from vllm.version import __version__ as VLLM_VERSION

import vllm_longspec
from vllm_longspec.compat.versions import IS_0_32

UPSTREAM = "vllm."
ROOT = Path(vllm_longspec.__path__[0])


def modules() -> list[ModuleType]:
    """Every module of the package, without the CUDA half of what only a GPU has."""
    names = [module.name for module in pkgutil.walk_packages(vllm_longspec.__path__, "vllm_longspec.")]
    # vLLM's Flash backend does not define the kernel's function on other platforms, so this one is read, not imported.
    return [importlib.import_module(name) for name in names if name != "vllm_longspec.attention.flash"]


def trees() -> list[tuple[str, ast.Module]]:
    """Module name and syntax tree of every file of the package, without what is for another version of vLLM."""
    return [
        (
            ".".join(("vllm_longspec", *path.relative_to(ROOT).with_suffix("").parts)),
            living(ast.parse(path.read_text())),
        )
        for path in sorted(ROOT.rglob("*.py"))
    ]


class _LivingBranch(ast.NodeTransformer):
    """Leaves the branch that is taken where code asks for the version of vLLM."""

    def _choose(self, node: Any) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "IS_0_32":
            return node.body if IS_0_32 else node.orelse
        return node

    visit_If = visit_IfExp = _choose


def living(tree: ast.Module) -> ast.Module:
    return _LivingBranch().visit(tree)


def imports(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> dotted name in vLLM, wherever in the file the import stands."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(UPSTREAM):
            found.update({each.asname or each.name: f"{node.module}.{each.name}" for each in node.names})
        if isinstance(node, ast.Import):
            for each in node.names:
                if f"{each.name}.".startswith(UPSTREAM):
                    found[each.asname or "vllm"] = each.name if each.asname else "vllm"
    return found


def find(dotted: str) -> Any:
    """The object of that name.

    Raises:
        LookupError: nothing has that name, with the part of it that is missing.
    """
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for index, part in enumerate(parts[length:], start=length + 1):
            if isinstance(found, ModuleType) and not hasattr(found, part) and part in bound_names(found):
                # Another platform's: there is nothing to hold here.
                return None
            if not (hasattr(found, part) or (isinstance(found, type) and part in attributes(found))):
                raise LookupError(".".join(parts[:index]))
            found = getattr(found, part, None)
        return found
    raise LookupError(dotted)


@functools.cache
def bound_names(module: ModuleType) -> set[str]:
    """Names that a module's source binds anywhere, whatever the platform."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@functools.cache
def _assigned(cls: type) -> dict[str, tuple[ast.expr | None, ast.expr | None, dict[str, ast.expr | None]]]:
    """Attributes that a class's own methods set on `self`: value, annotation, annotations of the method's arguments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    found: dict[str, tuple[ast.expr | None, ast.expr | None, dict[str, ast.expr | None]]] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = {each.arg: each.annotation for each in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            targets: list[Any]
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.withitem):
                targets = [node.optional_vars]
            else:
                targets = [getattr(node, "target", None)]
            for target in (part for each in targets for part in (each.elts if isinstance(each, ast.Tuple) else [each])):
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    value = getattr(node, "value", None) if not isinstance(node, ast.For) else None
                    found.setdefault(target.attr, (value, getattr(node, "annotation", None), arguments))
    return found


@functools.cache
def attributes(cls: type) -> frozenset[str]:
    """All that an instance of a class has."""
    found = set(dir(cls))
    for base in cls.__mro__:
        # `dir` leaves out the methods of an enumeration.
        found |= set(vars(base)) | set(vars(base).get("__annotations__", ())) | set(_assigned(base))
    return frozenset(found)


def attribute_type(cls: type, name: str) -> type | None:
    """The class of an instance's attribute, where the source says so."""
    for base in cls.__mro__:
        scope = vars(sys.modules[base.__module__])
        member = vars(base).get(name)
        if isinstance(member, property) and member.fget is not None:
            return _class_of(member.fget.__annotations__.get("return"), scope)
        if name in vars(base).get("__annotations__", ()):
            return _class_of(base.__annotations__[name], scope)
        if name in _assigned(base):
            value, annotation, arguments = _assigned(base)[name]
            if annotation is None and isinstance(value, ast.Name):
                annotation = arguments.get(value.id)
            if annotation is None and isinstance(value, ast.Call):
                annotation = value.func
            return _class_of(annotation, scope)
    return None


def _class_of(annotation: Any, scope: dict[str, Any]) -> type | None:
    """A class, or the only one beside None in a union; None for all else."""
    if isinstance(annotation, ast.expr):
        annotation = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, scope)
        except Exception:  # imported for type checkers only, or not an annotation at all
            return None
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [each for each in typing.get_args(annotation) if each is not type(None)]
        annotation = members[0] if len(members) == 1 else None
    return annotation if isinstance(annotation, type) else None


# What is read.


def moved_imports() -> list[str]:
    moved = []
    for module, tree in trees():
        for dotted in imports(tree).values():
            try:
                find(dotted)
            except LookupError as error:
                moved.append(f"{error.args[0]}: imported by {module}, not there")
    return moved


def moved_calls() -> list[str]:
    """Calls of what is imported from vLLM with arguments that it does not take."""
    moved = []
    for module, tree in trees():
        names = imports(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            root, *rest = _dotted(node.func)
            # Triton's language comes by way of vLLM, but is not its own.
            if root not in names or root in ("tl", "triton"):
                continue
            dotted = ".".join((names[root], *rest))
            try:
                function = find(dotted)
                if inspect.isroutine(function) or isinstance(function, type) or hasattr(function, "fn"):
                    _bind(function, node)
            except (LookupError, TypeError) as error:
                moved.append(f"{dotted}: called by {module}, {error}")
    return moved


def moved_attributes() -> list[str]:
    """Attributes read from, or set on, arguments and attributes whose class is vLLM's."""
    moved = []
    for module_name, tree in trees():
        if module_name == "vllm_longspec.attention.flash":
            continue
        scope = _scope(module_name, tree)
        for owner, function in _functions(tree):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            types = {each.arg: _class_of(each.annotation, scope) for each in arguments}
            if owner is not None and "self" in types and types["self"] is None:
                types["self"] = scope.get(owner)
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    # A short name for something of vLLM's.
                    root, *chain = _dotted(node.value)
                    types.setdefault(node.targets[0].id, _type_of(types.get(root), chain))
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute):
                    root, *chain = _dotted(node)
                    seam = _missing(types.get(root), chain)
                    if seam is not None:
                        moved.append(f"{seam}: used by {module_name}.{function.name}, not there")
    # A chain contains all chains that it begins with.
    return list(dict.fromkeys(moved))


def _type_of(cls: type | None, chain: list[str]) -> type | None:
    for name in chain:
        cls = attribute_type(cls, name) if cls is not None else None
    return cls


def _missing(cls: type | None, chain: list[str]) -> str | None:
    for name in chain:
        if cls is None or not f"{cls.__module__}.".startswith((UPSTREAM, "vllm_longspec.")):
            return None
        if name not in attributes(cls):
            # A mixin of ours has what it does not define from the class that it is mixed into.
            return None if cls.__name__.endswith("Mixin") else f"{cls.__module__}.{cls.__qualname__}.{name}"
        cls = attribute_type(cls, name)
    return None


def _scope(module_name: str, tree: ast.Module) -> dict[str, Any]:
    """A module's names, with those that only type checkers import."""
    scope = dict(vars(importlib.import_module(module_name.removesuffix(".__init__"))))
    for name, dotted in imports(tree).items():
        with suppress(LookupError):  # reported by moved_imports
            scope.setdefault(name, find(dotted))
    return scope


def _functions(tree: ast.Module) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, each) for each in node.body if isinstance(each, ast.FunctionDef))


def _dotted(node: ast.expr) -> list[str]:
    """["a", "b", "c"] for a.b.c; the first is empty where the chain does not start with a name."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *chain]


def signature(function: Any) -> inspect.Signature:
    """The parameters of a function as vLLM has it: under our replacement, in a Triton kernel, in a cache."""
    for name in ("longspec_original", "fn"):
        function = getattr(function, name, function)
    return inspect.signature(function)


def _bind(function: Any, call: ast.Call) -> None:
    keywords = {each.arg: None for each in call.keywords if each.arg is not None}
    positional = [None for each in call.args if not isinstance(each, ast.Starred)]
    if inspect.isbuiltin(function):
        return
    if typing_extensions.is_typeddict(function):
        if unknown := keywords.keys() - function.__annotations__.keys():
            raise TypeError(f"it has no {', '.join(sorted(unknown))}")
        return
    is_open = len(positional) < len(call.args) or len(keywords) < len(call.keywords)
    parameters = signature(function)
    (parameters.bind_partial if is_open else parameters.bind)(*positional, **keywords)


# What is overridden and replaced.


def subclasses() -> list[type]:
    """Classes of this package that inherit from one of vLLM's."""
    return [
        each
        for module in modules()
        for each in vars(module).values()
        if isinstance(each, type)
        and each.__module__ == module.__name__
        and any(f"{base.__module__}.".startswith(UPSTREAM) for base in each.__mro__)
    ]


def overrides(cls: type) -> dict[str, tuple[Any, Any]]:
    """Name of each of vLLM's members that this package's classes override -> (ours, vLLM's)."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in cls.__mro__:
        for name, member in vars(base).items():
            # Under Python's own names only the constructor and the call are anybody's seam.
            if name.startswith("__") and name != "__call__":
                continue
            if base.__module__.startswith("vllm_longspec."):
                theirs = _upstream_member(cls, name)
                if theirs is not None and name not in found and not name.startswith("_abc_"):
                    found[name] = member, theirs
    return found


def _upstream_member(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        if f"{base.__module__}.".startswith(UPSTREAM) and name in vars(base):
            return vars(base)[name]
    return None


def moved_overrides() -> list[str]:
    """Methods of ours that vLLM cannot call the way it calls its own."""
    moved = []
    for cls in subclasses():
        for name, (ours, theirs) in overrides(cls).items():
            if not callable(_function(ours)):
                continue
            problem = mismatch(inspect.signature(_function(ours)), signature(_function(theirs)))
            if problem:
                moved.append(f"{_upstream_name(cls, name)}: overridden by {cls.__qualname__}, {problem}")
    return moved


def _upstream_name(cls: type, name: str) -> str:
    base = next(base for base in cls.__mro__ if f"{base.__module__}.".startswith(UPSTREAM) and name in vars(base))
    return f"{base.__module__}.{base.__qualname__}.{name}"


def _function(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def mismatch(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Why a call made for `theirs` would not reach `ours` unchanged; None when it does.

    A parameter of ours that vLLM has not must be optional; one of vLLM's that we have not is only taken by `*args` and
    `**kwargs`.
    """
    open_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in ours.parameters.values()):
        # What is optional reaches us by name.
        theirs = theirs.replace(parameters=[each for each in theirs.parameters.values() if each.default is each.empty])
    plain = [name for name, each in ours.parameters.items() if each.kind not in open_kinds]
    expected = [name for name, each in theirs.parameters.items() if each.kind not in open_kinds]
    shared = plain[: len(expected)]
    if shared != expected[: len(shared)]:
        return f"its parameters are ({', '.join(expected)}), ours ({', '.join(plain)})"
    if len(shared) < len(expected) and len(plain) == len(ours.parameters):
        return f"it has new parameters ({', '.join(expected[len(shared) :])})"
    required = [name for name in plain[len(expected) :] if ours.parameters[name].default is inspect.Parameter.empty]
    return f"it has lost the parameters ({', '.join(required)})" if required else None


def replaced() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of everything that the patches replace on any machine."""
    from vllm_longspec import patches

    found: list[tuple[Any, str, Any]] = []
    fake = SimpleNamespace(
        _replace=lambda owner, name, replacement: found.append((owner, name, replacement)),
        interpreting=lambda: True,
    )
    real = {name: getattr(patches, name) for name in vars(fake)}
    try:
        vars(patches).update(vars(fake))
        patches.apply()
    finally:
        vars(patches).update(real)
    return found


def moved_replacements() -> list[str]:
    moved = []
    for owner, name, replacement in replaced():
        dotted = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
        if name not in vars(owner):
            moved.append(f"{dotted}.{name}: replaced by {replacement.__name__}, not there")
            continue
        # The first parameter of a replacement is the original.
        ours = inspect.signature(replacement)
        ours = ours.replace(parameters=list(ours.parameters.values())[1:])
        problem = mismatch(ours, signature(_function(vars(owner)[name])))
        if problem:
            moved.append(f"{dotted}.{name}: replaced by {replacement.__name__}, {problem}")
    return moved


def main() -> None:
    """Prints what this vLLM has moved of all that is imported and called; exits with 1 if there is anything.

    Reads this package's source only, so that it answers for a vLLM that the package cannot be imported with.
    """
    moved = [*moved_imports(), *moved_calls()]
    print(f"vLLM {VLLM_VERSION}: {len(moved)} imports and calls have moved", *moved, sep="\n")
    sys.exit(bool(moved))


if __name__ == "__main__":
    main()
