"""Environments by name, or one's own by dotted path.

environment: calculator
environment: {name: guess_number, turns: 4}
environment: my_package.my_module.MyEnvironment
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recipes.cli.config import ConfigError
from recipes.cli.named import Registry, describe
from recipes.data.errors import DataError
from recipes.data.reader import Opening
from recipes.environments.environment import Environment, EnvironmentFailedError, Messages

__all__ = ["SINGLE_TURN", "Named", "environment_file", "get_environment", "maker", "register_environment"]

KEY = "trainer.grpo.environment"
SINGLE_TURN = "single_turn"
T = TypeVar("T", bound=Callable)
_SHIPPED = ("recipes.environments.calculator", "recipes.environments.guess_number")
REGISTRY = Registry(KEY, "environment", "class", _SHIPPED)


@dataclass(frozen=True)
class Named:
    """What makes an environment for each conversation.

    Attributes:
        kind: an instance, of which nothing but its attributes and methods without a conversation is asked.
        spec: what the configuration says, of which another process makes it again.
    """

    name: str
    make: Callable[[], Environment]
    kind: Environment
    spec: str | Mapping[str, Any]

    @property
    def bounds_itself(self) -> bool:
        """Whether its class itself says so: for what a subclass adds nobody has vouched."""
        return vars(type(self.kind)).get("bounds_itself", False)

    @property
    def opening(self) -> Opening:
        """What makes prompts of rows."""
        return Opening(self.start, self.kind.tools, self.kind.row_keys)

    def start(self, row: Mapping[str, Any]) -> Messages | str:
        """The prompt of a row, from an environment of its own.

        Raises:
            DataError: the environment refuses the row.
            EnvironmentFailedError: it fails.
        """
        try:
            return self.make().start(copy.deepcopy(row))
        except ValueError as error:
            raise DataError(f"environment {self.name}: {error}") from error
        except Exception as error:
            raise EnvironmentFailedError(f"environment {self.name}: start failed: {describe(error)}") from error


def register_environment(name: str) -> Callable[[T], T]:
    """Decorator: give a class of environments a name for the YAML; its arguments are the options."""
    return REGISTRY.register(name)


@register_environment(SINGLE_TURN)
class SingleTurn(Environment):
    """A response is all that the model says. There is nothing to answer, so nobody is asked."""


def get_environment(spec: str | Mapping[str, Any]) -> Named | None:
    """
    Returns:
        None for "single_turn": a response is all that the model says.

    Raises:
        ConfigError: an unknown name, a module that does not import, something else than an `Environment`, wrong options.
    """
    name, target, _ = REGISTRY.find(spec)
    if not (isinstance(target, type) and issubclass(target, Environment)):
        raise ConfigError(f"{KEY}: {name} is no subclass of recipes.environments.environment.Environment")
    if isinstance(target.row_keys, str) or not all(isinstance(key, str) for key in target.row_keys or ()):
        raise ConfigError(f"{KEY}: {name}.row_keys={target.row_keys!r} must be a list of keys, or None")
    make = maker(spec)
    kind = make()
    return None if target is SingleTurn else Named(name, make, kind, spec)


def maker(spec: str | Mapping[str, Any]) -> Callable[[], Environment]:
    """What makes one, of a class that `get_environment` takes.

    Raises:
        ConfigError: an unknown name, a module that does not import.
    """
    name, target, options = REGISTRY.find(spec)
    return lambda: REGISTRY.with_options(name, target, copy.deepcopy(options))


def environment_file(spec: str | Mapping[str, Any]) -> Path | None:
    """Where one of one's own is written, once it has been got; None for ours."""
    return REGISTRY.file(spec)
