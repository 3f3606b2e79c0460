"""The configuration that a command line asks for, by NeMo's `hydra_runner`.

Hydra, left alone, reports a bad command line or YAML over several lines (up to a whole traceback) and ends with code
1. Here it is one line, with the nearest known key for an unknown one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from recipes.cli.config import ConfigError, nearest_key
from recipes.cli.errors import one_line, user_errors

__all__ = ["compose", "run"]


def compose(folder: str | Path, default: str) -> dict[str, Any]:
    """The configuration that the command line asks for, resolved, as plain data.

    Exits when the command line asks for something else (--help, --cfg job) or cannot be followed.

    Args:
        folder: where the YAML files are.
        default: the file used when the command line names none.
    """
    found = []

    # Hydra takes a relative path for a module beside this one.
    with _hydra_runner() as hydra_runner:

        @hydra_runner(config_path=str(Path(folder).resolve()), config_name=default)
        def keep(cfg):
            found.append(cfg)

        run(keep)
    if not found:
        sys.exit(0)
    with user_errors():
        if len(found) > 1:
            raise ConfigError(SWEEP)
        return OmegaConf.to_container(found[0], resolve=True, throw_on_missing=True)


TELEMETRY = "nemo.lightning.callback_group"


class _NoTelemetry(types.ModuleType):
    class CallbackGroup:
        @staticmethod
        def get_instance() -> _NoTelemetry.CallbackGroup:
            return _NoTelemetry.CallbackGroup()

        def on_app_end(self) -> None:
            pass


@contextlib.contextmanager
def _hydra_runner() -> Iterator[Callable[..., Any]]:
    """NeMo's hydra_runner without the rest of NeMo, whose import takes ten times as long as all else that a command line
    needs: taken from its own file, and while inside, the telemetry that it tells of the end is not there to be told."""
    package = importlib.util.find_spec("nemo").submodule_search_locations[0]
    file = Path(package, "core", "config", "hydra_runner.py")
    spec = importlib.util.spec_from_file_location("nemo_hydra_runner", file)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = _NoTelemetry(TELEMETRY)
    try:
        OmegaConf.clear_resolver(
            "gpu_name"
        )  # it may be registered only once in a process, by this file or NeMo's import of it
        spec.loader.exec_module(module)
        yield module.hydra_runner
    finally:
        if "nemo.core.config.hydra_runner" not in sys.modules:
            OmegaConf.clear_resolver("gpu_name")
        del sys.modules[TELEMETRY]
        if before is not None:
            sys.modules[TELEMETRY] = before


def run(main: Callable[[], Any]) -> Any:
    """Call `main`, decorated with NeMo's `hydra_runner`; bad command lines and YAML files end in one line, too."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"hydra\.")
    with user_errors():
        _check_arguments()
        with _full_hydra_errors():
            try:
                return main()
            except HydraException as error:
                if not isinstance(error.__cause__, (ConfigAttributeError, ConfigKeyError)):
                    raise
                raise _unknown_override(main, error) from None


SWEEP = "a sweep (--multirun) is not supported: start one run per configuration"


def _check_arguments() -> None:
    """Refuse what argparse would refuse, without its usage lines, and sweeps."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str):
        raise ConfigError(f"{message}; keys are set by key=value, without dashes, and --help lists the options")

    parser = get_args_parser()
    parser.error = refuse
    if parser.parse_args().multirun:
        raise ConfigError(SWEEP)


@contextlib.contextmanager
def _full_hydra_errors() -> Iterator[None]:
    """Hydra raises instead of printing and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _unknown_override(main: Callable[[], Any], error: HydraException) -> ConfigError:
    override = _bad_override(error)
    if override is None:
        return ConfigError(one_line(error))
    key = _key(override)
    nearest = nearest_key(key, _known_keys(main, override))
    guess = f"; did you mean {nearest}? The" if nearest else ": the"
    return ConfigError(f"unknown key {key}{guess} YAML does not list it; to set it all the same, write +{override}")


def _bad_override(error: HydraException) -> str | None:
    """The argument that Hydra could not follow."""
    quoted = re.search(r"'([^']+)'", str(error))
    return next((a for a in sys.argv[1:] if quoted and _key(a) == quoted[1]), None)


def _known_keys(main: Callable[[], Any], bad: str | None) -> list[str]:
    """The keys of the same command line without its unknown keys, by way of Hydra's --cfg."""
    before, arguments = sys.argv, list(sys.argv)
    try:
        while bad in arguments:
            arguments.remove(bad)
            sys.argv = [*arguments, "--cfg", "job"]
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    main()
                return list(_dotted(yaml.safe_load(out.getvalue())))
            except HydraException as error:  # another unknown key
                bad = _bad_override(error)
        return []
    finally:
        sys.argv = before


def _dotted(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            key = f"{path}.{name}" if path else str(name)
            yield key
            yield from _dotted(value, key)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]
