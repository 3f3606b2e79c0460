"""Bad input ends in one line on stderr and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from megatron_ext.errors import UserError, of_system

__all__ = ["is_user_error", "one_line", "user_errors"]

EXIT_CODE = 2
# What opens the files that a user names.
OURS = {"megatron_ext", "recipes", "launch", "tools", "__main__", "hydra", "omegaconf"}
CONFIGURATION_ERRORS = (
    HydraException,
    yaml.YAMLError,
    MissingMandatoryValue,
    InterpolationResolutionError,
    GrammarParseError,
)


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

    That is a `UserError`, whatever Hydra, OmegaConf and YAML say about a configuration, and a file that our own code could not
    open. Any other ValueError, such as that of int("x") or zip(strict=True), is a bug.
    """
    if isinstance(error, (UserError, *CONFIGURATION_ERRORS)):
        return True
    if not isinstance(error, OSError) or error.filename is None:
        return False
    # pathlib, shutil and the like only carry the request out.
    packages = [name for name in map(_package, _frames(error)) if name not in sys.stdlib_module_names]
    return bool(packages) and packages[-1] in OURS


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
        return of_system(error)
    # Hydra ends one message with an offer to sweep, which a recipe refuses.
    return _flat(str(error).split("\n3. To sweep")[0]) or type(error).__name__


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


def _flat(text: str) -> str:
    return " ".join(text.split())


def _frames(error: BaseException) -> Iterator[Any]:
    """The frames that the error came through, the one that raised it last."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _package(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
