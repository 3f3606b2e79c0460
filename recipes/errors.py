"""Bad input ends in one line on stderr and exit code 2; a bug keeps its traceback.

Hydra, left alone, reports a bad command line or YAML over several lines (up to a whole traceback) and ends with code
1. `compose` and `run` turn that into the one line, with the nearest known key for an unknown one. NeMo is imported only
when they are called: it takes seconds.
"""

from __future__ import annotations

import contextlib
import dis
import importlib.util
import io
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from recipes.config import ConfigError, UserError, nearest_key

__all__ = ["compose", "is_user_error", "one_line", "run", "user_errors"]

EXIT_CODE = 2
# Packages whose own `raise ValueError` is about the input.
SPEAKERS = {"megatron_ext", "recipes", "launch", "tools", "__main__", "hydra", "omegaconf"}
CONFIGURATION_ERRORS = (
    HydraException,
    yaml.YAMLError,
    MissingMandatoryValue,
    InterpolationResolutionError,
    GrammarParseError,
)
RAISE = dis.opmap["RAISE_VARARGS"]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Context manager or decorator: bad input prints `error: <one line>` and exits with code 2.

    Under NeMo's `hydra_runner` put it next to the function, so that Hydra does not add a line of its own:

        @hydra_runner(config_path="conf", config_name="mine")
        @user_errors()
        def main(cfg): ...
    """
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def is_user_error(error: BaseException) -> bool:
    """Whether the message is for the user: bad input that was recognised as such, and not a bug.

    That is a `UserError`, whatever Hydra, OmegaConf and YAML say about a configuration, a ValueError (or OSError, or
    FloatingPointError) that our own code raised by a `raise` statement, and a file that our code could not open. A
    ValueError out of a computation, such as int("x") or zip(strict=True), is a bug.
    """
    if isinstance(error, (UserError, *CONFIGURATION_ERRORS)):
        return True
    if not isinstance(error, (ValueError, OSError, FloatingPointError)):
        return False
    frames = list(_frames(error))
    if isinstance(error, OSError) and error.filename is not None:
        # pathlib, shutil and the like only carry the request out.
        frames = [f for f in frames if _package(f[0]) not in sys.stdlib_module_names]
        return bool(frames) and _package(frames[-1][0]) in SPEAKERS
    if not frames:
        return False
    frame, position = frames[-1]
    return _package(frame) in SPEAKERS and frame.f_code.co_code[position] == RAISE


def one_line(error: BaseException) -> str:
    """The error's message on one line, with the file, key or override that it is about."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=... on the command line or set it in the YAML"
    if isinstance(error, OmegaConfBaseException):
        where = f"{error.full_key}: " if error.full_key else ""
        return where + str(error).split("\n", 1)[0]
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: {_flat(error.problem)}"
    if isinstance(error, OverrideParseException):
        reason = error.message.split("\n", 1)[0]
        return f"cannot read the override {error.override}: {reason}; put a value with special characters in quotes"
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # Hydra ends one message with an offer to sweep, which a recipe refuses.
    return _flat(str(error).split("\n3. To sweep")[0]) or type(error).__name__


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


def _missing_config(error: MissingConfigException) -> str:
    name, text = error.missing_cfg_file, str(error)
    if name is None:
        return _flat(text)
    folders = [Path(f) for f in re.findall(r"provider=(?:main|command-line), path=file://(.*)", text)]
    group, _, stem = name.removesuffix(".yaml").rpartition("/")
    options = error.options or sorted(path.stem for f in folders for path in f.glob("*.yaml"))
    close = get_close_matches(stem, options, n=1)
    guess = f"did you mean {close[0]}? There" if close else "there"
    where = f" in {', '.join(str(f / group) for f in folders)}" if folders else ""
    return f"no configuration {name}{where}; {guess} are: {', '.join(options) or 'none'}"


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _flat(text: str) -> str:
    return " ".join(text.split())


def _frames(error: BaseException) -> Iterator[tuple[Any, int]]:
    """The frames that the error came through with the position in their code, the one that raised it last."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lasti
        traceback = traceback.tb_next


def _package(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
