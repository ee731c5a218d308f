# SPDX-License-Identifier: Apache-2.0
"""The documents name what exists: links, anchors, files, commands with their options, and targets of the Makefile."""

import functools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README_LINES = 130
# Written by builds and tools, not part of the repository.
GENERATED = {"build", "dist", "__pycache__"}

FENCE = re.compile(r"^ *(```+|~~~+)")
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
CODE_SPAN = re.compile(r"(`+)(.+?)\1")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
MAKE = re.compile(r"^make +([a-z-]+)\b")


@dataclass
class Document:
    path: Path  # relative to the repository
    # lines outside code blocks, and the same as paragraphs
    prose: list[str]
    paragraphs: list[str]
    # of fenced and indented blocks, with continued lines joined
    commands: list[str]
    code_spans: list[str]

    @classmethod
    def read(cls, root: Path, path: Path) -> "Document":
        prose, code = split_code((root / path).read_text().splitlines())
        commands = "\n".join(code).replace("\\\n", " ").splitlines()
        # A link or a span of code may go on in the next line.
        paragraphs = [" ".join(text.split("\n")) for text in re.split(r"\n{2,}", "\n".join(prose))]
        spans = [match[2].strip() for text in paragraphs for match in CODE_SPAN.finditer(text)]
        return cls(path, prose, paragraphs, [command.strip() for command in commands], spans)

    def anchors(self) -> set[str]:
        """The anchors of all headings, as GitHub makes them."""
        seen: Counter[str] = Counter()
        anchors = set()
        for heading in (match[1] for line in self.prose if (match := HEADING.match(line))):
            text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return anchors


def split_code(lines: list[str]) -> tuple[list[str], list[str]]:
    """The lines of a document outside and inside its code blocks."""
    prose, code = [], []
    fence = None
    after_blank = True
    for line in lines:
        if (match := FENCE.match(line)) and (fence is None or match[1].startswith(fence)):
            fence = match[1] if fence is None else None
        elif fence is not None or (line.startswith("    ") and after_blank):
            code.append(line)
            continue
        else:
            prose.append(line)
        # An indented block begins after an empty line and goes on over empty lines.
        after_blank = not line.strip()
    return prose, code


def documents(root: Path = ROOT) -> list[Document]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in GENERATED]
        found += [Path(folder, name).relative_to(root) for name in files if name.endswith(".md")]
    return [Document.read(root, path) for path in sorted(found)]


def broken_links(document: Document, root: Path = ROOT) -> Iterator[str]:
    for text in document.paragraphs:
        # A link's text may be code; code itself is no link.
        for target in LINK.findall(CODE_SPAN.sub("code", text)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (root / document.path.parent / name).resolve() if name else root.resolve() / document.path
            if not path.is_relative_to(root.resolve()) or not path.exists():
                yield f"{document.path}: there is no {target}"
            elif anchor and anchor not in Document.read(root, path.relative_to(root.resolve())).anchors():
                yield f"{document.path}: {target} is no heading"


def missing_files(document: Document, root: Path = ROOT) -> Iterator[str]:
    """Paths in code that begin with a folder of the repository, or end in .py, and are not there."""
    words = [*document.code_spans, *(word for command in document.commands for word in read_words(command))]
    for word in words:
        path = word.split("::")[0].rstrip("/,")
        if re.search(r"[^\w./*{},-]", path):  # not a path, or one with a <placeholder>
            continue
        first, slash, _ = path.partition("/")
        if slash and first in top_folders(root):
            exists = any(any(root.glob(each)) for each in alternatives(path))
        elif path.endswith(".py") and not path.startswith("vllm/"):
            exists = (root / document.path.parent / path).is_file() or path in python_files(root)
        else:
            continue
        if not exists:
            yield f"{document.path}: there is no {word}"


def read_words(command: str) -> list[str]:
    """The words of a shell command without what it writes to."""
    words = words_of(command)
    outputs = {index + 1 for index, word in enumerate(words) if word in ("--out", "--plots", ">", ">>")}
    return [word for index, word in enumerate(words) if index not in outputs]


def words_of(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # a figure, or a quotation over several lines
        return command.split()


@functools.cache
def top_folders(root: Path) -> set[str]:
    hidden = {".ci", ".github"}
    return {path.name for path in root.iterdir() if path.is_dir() and (path.name[0] != "." or path.name in hidden)}


@functools.cache
def python_files(root: Path) -> set[str]:
    """Their names, without folders."""
    return {path.name for folder in top_folders(root) - GENERATED for path in (root / folder).rglob("*.py")}


def alternatives(path: str) -> list[str]:
    """a/{b,c}.py -> a/b.py, a/c.py"""
    if (braces := re.search(r"\{([^{}]*)\}", path)) is None:
        return [path]
    return [path[: braces.start()] + each + path[braces.end() :] for each in braces[1].split(",")]


def wrong_commands(document: Document, root: Path = ROOT) -> Iterator[str]:
    """Targets that the Makefile lacks, and modules and options of this repository that are not there."""
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for command in [*document.code_spans, *document.commands]:
        if (make := MAKE.match(command)) and make[1] not in targets:
            yield f"{document.path}: the Makefile has no {make[1]}"
        words = words_of(command)
        names = [Path(word).name for word in words]
        if "python" not in names:
            continue
        module, *arguments = [word for word in words[names.index("python") + 1 :] if word != "-m"] or [""]
        source = script(module, root)
        if source is None:
            if module.split(".")[0] in ("vllm_longspec", "benchmarks", "examples", "tests"):
                yield f"{document.path}: there is no {module}"
            continue
        # Modules of a folder share the code that parses arguments.
        known = "".join(path.read_text() for path in source.parent.glob("*.py"))
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            if f'"{option}"' not in known:
                yield f"{document.path}: {module} has no {option}"


def script(module: str, root: Path) -> Path | None:
    """The file that `python -m MODULE` or `python FILE` runs, if it belongs to the repository."""
    if not module:
        return None
    places = (
        [module] if module.endswith(".py") else [f"{module.replace('.', '/')}{end}.py" for end in ("", "/__main__")]
    )
    return next((root / place for place in places if (root / place).is_file()), None)


CHECKS = [broken_links, missing_files, wrong_commands]


@pytest.mark.parametrize("check", CHECKS)
def test_documents_name_what_exists(check):
    assert [wrong for document in documents() for wrong in check(document)] == []


def test_documents_are_read():
    names = {str(document.path) for document in documents()}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/support.md", "benchmarks/README.md"} <= names
    # No check passes because a document looks empty.
    readme = Document.read(ROOT, Path("README.md"))
    assert any(command.startswith("make demo") for command in readme.commands)
    assert len(readme.anchors()) > 5


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - linked == set()


# Each check must be able to fail.


@pytest.fixture
def repository(tmp_path):
    """A small repository with one document."""
    (tmp_path / "Makefile").write_text("demo:\n\t@true\n")
    folder = tmp_path / "benchmarks" / "speed"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text('parser.add_argument("--models")\n')
    (tmp_path / "benchmarks" / "soak.py").write_text('parser.add_argument("--clients")\n')
    (tmp_path / "OTHER.md").write_text("# The title\n\n## What `this` is, [linked](OTHER.md)\n\n## Again\n\n## Again\n")

    def write(text):
        (tmp_path / "README.md").write_text(text)
        return Document.read(tmp_path, Path("README.md"))

    return write


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[one](OTHER.md), [two](OTHER.md#the-title), [three](https://example.org/none)", []),
        ("[one](OTHER.md#what-this-is-linked), [two](OTHER.md#again-1), `[three](NONE.md)`", []),
        ("# Here\n\n[one](#here)", []),
        ("[one](NONE.md)", ["there is no NONE.md"]),
        ("Text [of two\nlines](NONE.md)", ["there is no NONE.md"]),
        ("[`one`](docs/none.md#title)", ["there is no docs/none.md#title"]),
        ("![one](../README.md)", ["there is no ../README.md"]),
        ("[one](OTHER.md#again-2), [two](#nowhere)", ["OTHER.md#again-2 is no heading", "#nowhere is no heading"]),
        ("# Text\n\n```\n# no heading\n```\n[one](#no-heading)", ["#no-heading is no heading"]),
    ],
)
def test_a_broken_link_is_named(repository, tmp_path, text, wrong):
    assert list(broken_links(repository(text), tmp_path)) == [f"README.md: {each}" for each in wrong]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`benchmarks/soak.py`, `benchmarks/speed/`, `benchmarks/*.py`, `benchmarks/{soak,none}.py`, `soak.py`", []),
        ("`benchmarks/<name>.py`, `org/repository`, `vllm/none.py`, `a == b`, `benchmarks`", []),
        ("    cat benchmarks/soak.py > benchmarks/new.txt\n    run --out benchmarks/new.json", []),
        ("`benchmarks/none.py`", ["benchmarks/none.py"]),
        ("`benchmarks/none/`", ["benchmarks/none/"]),
        ("`benchmarks/none-*.json`", ["benchmarks/none-*.json"]),
        ("`benchmarks/none.py::test_it`", ["benchmarks/none.py::test_it"]),
        ("`none.py`", ["none.py"]),
        ("```bash\ncat \\\n    benchmarks/none.txt\n```", ["benchmarks/none.txt"]),
    ],
)
def test_a_missing_file_is_named(repository, tmp_path, text, wrong):
    assert list(missing_files(repository(text), tmp_path)) == [f"README.md: there is no {each}" for each in wrong]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`make demo` and `make`", []),
        ("    make demo  # runs\n    TOKEN=1 .venv/bin/python -m benchmarks.speed --models x\n", []),
        ("    python benchmarks/soak.py --clients=2\n    python -m pip install --upgrade pip", []),
        ("`make tea`", ["the Makefile has no tea"]),
        ("Text `make\ntea`", ["the Makefile has no tea"]),
        ("```\nmake tea\n```", ["the Makefile has no tea"]),
        ("`python -m benchmarks.none --models x`", ["there is no benchmarks.none"]),
        ("    python -m benchmarks.speed \\\n        --models x --model y", ["benchmarks.speed has no --model"]),
        ("    python -m benchmarks.soak --client 2", ["benchmarks.soak has no --client"]),
    ],
)
def test_a_wrong_command_is_named(repository, tmp_path, text, wrong):
    assert list(wrong_commands(repository(text), tmp_path)) == [f"README.md: {each}" for each in wrong]
