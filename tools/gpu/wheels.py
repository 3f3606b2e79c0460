"""Packages from wheels without pip: a wheel is a zip file, and unpacked onto the path it is installed.

Standard library only: it runs before anything else is there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import zipfile
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = ["NEEDED", "check_needed", "unpack", "version_of"]

# Module -> the package that brings it. What the sections import beside this repository.
NEEDED = {"torch": "torch", "numpy": "numpy", "packaging": "packaging", "megatron.core": "megatron-core"}


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of a folder and put them first on the path. Returns their file names.

    Raises:
        UserError: no wheel there, or one for another Python or machine.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"--wheels {folder} has no .whl file; {_how_to_carry(['megatron-core'])}")
    for wheel in wheels:
        _check_tags(wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    for inner in ("purelib", "platlib"):  # where a wheel keeps what belongs elsewhere than beside its metadata
        for found in target.glob(f"*.data/{inner}"):
            sys.path.insert(0, str(found))
    sys.path.insert(0, str(target))
    return [wheel.name for wheel in wheels]


def _check_tags(wheel: Path) -> None:
    parts = wheel.stem.split("-")
    if len(parts) < 5:
        raise UserError(f"{wheel} is not named as a wheel: name-version-python-abi-platform.whl")
    python, abi, where = (part.split(".") for part in parts[-3:])
    major, minor = sys.version_info[:2]
    fits = f"py{major}" in python or f"cp{major}{minor}" in python
    if "abi3" in abi:
        fits = any(tag.startswith(f"cp{major}") and int(tag[3:] or 0) <= minor for tag in python)
    if not fits:
        raise UserError(
            f"{wheel.name} is for {parts[-3]}, this is Python {major}.{minor}: carry the wheel for cp{major}{minor}"
        )
    machine = platform.machine().lower()
    if "any" not in where and not any(tag.endswith(machine) for tag in where):
        raise UserError(f"{wheel.name} is for {parts[-1]}, this machine is {machine}: carry its wheel")


def check_needed() -> None:
    """Refuse to begin without what every section imports.

    Raises:
        UserError: one line that says what is missing and how to carry it.
    """
    missing = [package for module, package in NEEDED.items() if not _found(module)]
    if missing:
        raise UserError(f"{', '.join(missing)} cannot be imported here; {_how_to_carry(missing)}")


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _how_to_carry(packages: list[str]) -> str:
    major, minor = sys.version_info[:2]
    return (
        f"where there is a network, run: pip download --no-deps --only-binary=:all: --python-version {major}.{minor} "
        f"--platform manylinux_2_28_{platform.machine()} -d wheels {' '.join(packages)}; then carry the folder and add "
        "--wheels wheels"
    )


def version_of(package: str) -> str | None:
    """Of an installed or unpacked package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
