"""Things of the user's that the YAML names: ours by a name, one's own by dotted path, with options beside.

reward: exact_answer
reward: {name: regex, pattern: "^Yes"}
reward: {name: my_package.my_module.my_function, alpha: 2}
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError, build

__all__ = ["Registry", "Spec", "describe"]

T = TypeVar("T", bound=Callable)
Spec = str | Mapping[str, Any]


class Registry:
    """
    Args:
        key: of the YAML, for messages.
        kind: what is named, for messages: "reward".
        noun: what one's own are: "function", "class".
        modules: that register ours, beside those that have been imported.
    """

    def __init__(self, key: str, kind: str, noun: str, modules: Sequence[str] = ()):
        self.key, self.kind, self.noun, self.modules = key, kind, noun, modules
        self._known: dict[str, Callable] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: give one a name for the YAML."""
        if "." in name or ":" in name:
            raise UserError(
                f"a {self.kind}'s name has no '.' and no ':', which mark the path of a {self.noun}; got {name!r}"
            )
        if name in self._known:
            raise UserError(f"there is a {self.kind} {name!r} already; choose another name")

        def remember(target: T) -> T:
            self._known[name] = target
            return target

        return remember

    @property
    def names(self) -> list[str]:
        """Of ours, sorted."""
        for module in self.modules:
            importlib.import_module(module)
        return sorted(self._known)

    def name(self, spec: Spec) -> str:
        """
        Raises:
            ConfigError: it names nothing.
        """
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self.key} must be a name or a mapping with name and options, got {spec!r}")
        return name

    def find(self, spec: Spec) -> tuple[str, Callable, dict[str, Any]]:
        """(name, what it names, options).

        Args:
            spec: a name, `package.module.function` or `package.module:function`; or a mapping of `name` and options.

        Raises:
            ConfigError: an unknown name, a module that does not import.
        """
        name = self.name(spec)
        known = self.names
        options = {} if isinstance(spec, str) else {str(k): v for k, v in spec.items() if k != "name"}
        if name in self._known:
            return name, self._known[name], options
        if "." in name or ":" in name:
            return name, self._import(name), options
        close = get_close_matches(name, known, n=1)
        guess = f"; did you mean {close[0]}? There" if close else "; there"
        raise ConfigError(
            f"{self.key}: unknown {self.kind} {name}{guess} are {', '.join(known)}, and any {self.noun} by its "
            f"path, package.module.{self.noun}"
        )

    def file(self, spec: Spec) -> Path | None:
        """Where one of one's own is written, once it has been found; None for ours."""
        name = self.name(spec)
        module = sys.modules.get(name.rpartition(":" if ":" in name else ".")[0])
        written = None if name in self._known else getattr(module, "__file__", None)
        return Path(written) if written else None

    def with_options(self, name: str, target: Callable, options: dict[str, Any], takes: int = 2) -> Any:
        """A class made with its options; a function with them bound.

        Args:
            takes: with how many arguments a function is called, beside its options.

        Raises:
            ConfigError: it does not take them.
        """
        if is_dataclass(target) and isinstance(target, type):
            return build(target, options, self.key)
        is_class = isinstance(target, type)
        self._check_options(name, target, options, () if is_class else (None,) * takes)
        if not is_class:
            return partial(target, **options)
        try:
            return target(**options)
        except Exception as error:
            raise ConfigError(f"{self.key}: {name} refuses its options: {describe(error)}") from error

    def _import(self, path: str) -> Callable:
        """The function at `package.module.function` or `package.module:function`."""
        key, noun = self.key, self.noun
        module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
        if not module_name or not attribute:
            raise ConfigError(f"{key}={path} is not the path of a {noun}: write package.module.{noun}")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the module does when it is imported
            if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
                reason = f"there is no module {error.name}; is its folder on PYTHONPATH?"
            else:
                reason = f"importing {module_name} failed: {describe(error)}"
            raise ConfigError(f"{key}={path}: {reason}") from error
        if not hasattr(module, attribute):
            close = get_close_matches(attribute, [n for n, v in vars(module).items() if callable(v)], n=1)
            guess = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}={path}: module {module_name} has no {attribute}{guess}")
        target = getattr(module, attribute)
        if not callable(target):
            raise ConfigError(f"{key}={path} is not a {noun} but {type(target).__name__}")
        return target

    def _check_options(self, name: str, target: Callable, options: dict[str, Any], arguments: tuple) -> None:
        """Refuse options that `target`, called with `arguments` before them, would not take."""
        try:
            signature = inspect.signature(target)
        except ValueError:  # written in C
            return
        names = list(signature.parameters)[len(arguments) :]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for option in options:
            if option not in names and not takes_any:
                close = get_close_matches(option, names, n=1)
                guess = (
                    f"did you mean {self.key}.{close[0]}?"
                    if close
                    else f"{name} has {', '.join(names) or 'no options'}"
                )
                raise ConfigError(f"unknown key {self.key}.{option}; {guess}")
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            raise ConfigError(f"{self.key}: {name}: {error}; its options are {', '.join(names) or 'none'}") from error


def describe(error: BaseException) -> str:
    """Kind, first line and place of an error in somebody else's code."""
    text = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    if isinstance(error, SyntaxError):  # says its place itself
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"
