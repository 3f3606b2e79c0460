"""Refuses an installation that would crash `import megatron.core` or leave the GPU idle; one line says why.

Call `check_installation()` before anything imports Megatron. This file imports neither Megatron nor
Transformer Engine nor apex, because in most of the cases below that import is what fails.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = ["InstallationError", "check_installation", "megatron_package_info", "nvidia_gpu_present"]

# The same ranges as in setup.py; a test compares them.
TORCH_RANGE = ">=2.9"
MEGATRON_CORE_RANGE = ">=0.16.1,<0.20"
TRANSFORMER_ENGINE = "transformer-engine[pytorch]>=2.9,<2.21"
TRANSFORMER_ENGINE_OF_0_16 = "transformer-engine[pytorch]>=2.9,<2.12"  # megatron-core 0.16's own range

_TE_CORES = ("transformer-engine-cu12", "transformer-engine-cu13")
_TE_TORCH = "transformer-engine-torch"
_CRASH = "`import megatron.core` would crash"


class InstallationError(UserError):
    """The installed packages cannot work together, or not on this machine."""


def nvidia_gpu_present() -> bool:
    """True where the NVIDIA driver's device node is and CUDA_VISIBLE_DEVICES does not hide the GPUs.

    The node, not /proc/driver/nvidia: a container started without GPUs still sees the host's /proc/driver.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return not hidden and os.path.exists("/dev/nvidiactl")


def check_installation(gpu_present: bool | None = None) -> None:
    """Raises InstallationError, with one line, for the first thing found wrong; returns None if all is well.

    Args:
        gpu_present: whether this machine has an NVIDIA GPU to use; None asks `nvidia_gpu_present()`.
    """
    has_gpu = nvidia_gpu_present() if gpu_present is None else gpu_present
    cuda_build = _check_torch(has_gpu)
    _check_transformer_engine(cuda_build)
    _check_apex(cuda_build)
    _check_megatron_core()
    _check_pair()


def _check_torch(has_gpu: bool) -> bool:
    """Returns whether torch was built with CUDA."""
    if importlib.util.find_spec("torch") is None:
        raise InstallationError(f"PyTorch is not installed: pip install 'torch{TORCH_RANGE}'")
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of the build is missing
        reason = " ".join(str(error).split())
        raise InstallationError(f"PyTorch does not import ({reason}): reinstall torch") from error
    if _numbers(torch.__version__)[:2] < _numbers(TORCH_RANGE):
        raise InstallationError(
            f"torch {torch.__version__} is not {TORCH_RANGE}: before, its attention on the CPU reads wrong heads where there are "
            f"fewer keys' and values' than queries': pip install 'torch{TORCH_RANGE}'"
        )
    if has_gpu and torch.version.cuda is None:
        raise InstallationError(
            f"this machine has an NVIDIA GPU but torch {torch.__version__} is built without CUDA: install a "
            "CUDA build (https://pytorch.org/get-started), or set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return torch.version.cuda is not None


def _check_transformer_engine(cuda_build: bool) -> None:
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:  # no origin: a mere folder, which Megatron's imports pass over
        return
    installed = [name for name in ("transformer-engine", *_TE_CORES, _TE_TORCH) if _distribution(name)]
    uninstall = f"pip uninstall {' '.join(installed)}" if installed else f"remove {spec.origin}"
    if not cuda_build:
        raise InstallationError(f"transformer-engine is installed, torch has no CUDA, {_CRASH}: {uninstall}")
    if not _from_pure_wheel("transformer-engine"):  # source build or container: the libraries are inside
        return
    missing = []
    if not set(_TE_CORES) & set(installed):
        missing.append("its compiled core (transformer-engine-cu12 or -cu13)")
    if _TE_TORCH not in installed:
        missing.append(f"its torch bindings ({_TE_TORCH})")
    if missing:
        raise InstallationError(
            f"transformer-engine is installed without {' and '.join(missing)}, {_CRASH}: "
            f"pip install --no-build-isolation '{_wanted_transformer_engine()}', or {uninstall}"
        )


def _check_apex(cuda_build: bool) -> None:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    where = spec.origin or folders[0]
    if not any((folder / "normalization" / "fused_layer_norm.py").is_file() for folder in folders):
        raise InstallationError(
            f"the importable module apex ({where}) is not NVIDIA's (PyPI's is an unrelated web toolkit), yet "
            "Megatron would use it and break: pip uninstall apex, or take its folder off the Python path"
        )
    if not cuda_build:
        raise InstallationError(
            f"NVIDIA's apex ({where}) is installed, torch has no CUDA, yet Megatron would use apex's "
            "optimizers and norms and break: pip uninstall apex"
        )


def _check_megatron_core() -> None:
    remedy = f"pip install 'megatron-core{MEGATRON_CORE_RANGE}'"
    info = megatron_package_info()
    if info is None:
        raise InstallationError(f"megatron-core is not installed: {remedy}")
    release, pre_release = info["VERSION"][:3], info["VERSION"][3]
    lowest, above = (_numbers(bound) for bound in MEGATRON_CORE_RANGE.split(","))
    if not lowest <= release < above or (release == lowest and pre_release):
        raise InstallationError(
            f"megatron-core {info['__version__']} ({info['__file__']}) is outside {MEGATRON_CORE_RANGE}, the "
            f"range that megatron-ext is tested with: {remedy}"
        )


def _check_pair() -> None:
    """Whether the installed Transformer Engine goes with the installed megatron-core."""
    spec, found = importlib.util.find_spec("transformer_engine"), _distribution("transformer-engine")
    if spec is None or spec.origin is None or found is None:
        return
    wanted = _wanted_transformer_engine()
    if not _is_within(found.version, wanted):
        newer = ", or take megatron-core 0.17 or newer, which needs Python 3.12" * _is_within(
            found.version, TRANSFORMER_ENGINE
        )
        raise InstallationError(
            f"transformer-engine {found.version} does not go with megatron-core {megatron_package_info()['__version__']}: "
            f"pip install --no-build-isolation '{wanted}'{newer}"
        )


def _is_within(version: str, requirement: str) -> bool:
    lowest, above = (_numbers(bound) for bound in requirement.partition("]")[2].split(","))
    return lowest <= _numbers(version)[:2] < above


def _wanted_transformer_engine() -> str:
    info = megatron_package_info()
    return TRANSFORMER_ENGINE if info is None or info["VERSION"][:2] >= (0, 17) else TRANSFORMER_ENGINE_OF_0_16


def megatron_package_info() -> dict | None:
    """The constants of the megatron/core/package_info.py that `import megatron.core` would load, or None.

    Not pip's metadata: a Megatron-LM checkout on the Python path has none, and hides an installed one.
    """
    spec = importlib.util.find_spec("megatron")  # a namespace package: finding it runs nothing
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "core" / "package_info.py"
        if path.is_file():
            return runpy.run_path(str(path)) | {"__file__": str(path)}
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _from_pure_wheel(name: str) -> bool:
    """Whether it came as a wheel without compiled parts: Transformer Engine's own test for 'from PyPI'."""
    distribution = _distribution(name)
    wheel = distribution.read_text("WHEEL") if distribution else None
    return "root-is-purelib: true" in (wheel or "").lower()
