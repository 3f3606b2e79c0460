"""An instance of an environment in the process that it is in: made when its conversation begins, asked by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.environments.environment import End, Environment, Messages, Observation, Talk, ToolCall, Turn

__all__ = ["Instance"]


class Instance:
    """
    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self._environment: Environment | None = None
        self._row: Mapping[str, Any] = {}

    def ask(self, method: str, argument: Any) -> Any:
        """One of the methods below."""
        return getattr(self, f"_{method}")(argument)

    def _start(self, row: Mapping[str, Any]) -> Messages | str:
        self._row, self._environment = row, self._make()
        return self._environment.start(row)

    def _step(self, turns: Sequence[Turn]) -> Observation | End:
        return self._environment.step(Talk(self._row, tuple(turns)))

    def _calls(self, text: str) -> list[ToolCall] | None:
        return self._environment.calls(text)

    def _close(self, _: None) -> None:
        self._environment.close()
        self._environment, self._row = None, {}
