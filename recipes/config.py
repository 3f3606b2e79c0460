"""Strict typed configuration: plain data from YAML into dataclasses.

A misspelt key is an error that names the nearest known one; a wrong type is an error that names the key, the value and
what was expected. Defaults live in the dataclasses and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["ConfigError", "build", "unknown_key"]

T = TypeVar("T")


class ConfigError(ValueError):
    """One line: what is wrong, at which key, and what to do."""


def build(cls: type[T], node: Mapping[str, Any], path: str = "") -> T:
    """Fill the dataclass `cls` from `node`, recursively.

    Args:
        node: a mapping of plain data (an OmegaConf container already resolved).
        path: where `node` stands in the whole configuration, for messages.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong type.
        ValueError: whatever the dataclasses' own checks raise.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a section of keys, got {node!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in node.items():
        if key not in fields:
            raise unknown_key(_join(path, key), [_join(path, name) for name in fields])
        values[key] = _convert(hints[key], value, _join(path, key))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{_join(path, name)} is not set: it needs a value of type {_describe(hints[name])}")
    return cls(**values)


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for a key that is not there, with the nearest one that is."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return ConfigError(f"unknown key {key}{hint}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as a value of type `hint`."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(hint, value, path)
        item = arguments[0] if arguments else Any
        return origin(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, path)
        return dict(value)
    return _convert_scalar(hint, value, path)


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is bool or isinstance(value, bool):  # a bool is an int to Python, and never meant as one
        if hint is not bool or not isinstance(value, bool):
            raise _wrong_type(hint, value, path)
        return value
    if hint is float and isinstance(value, (int, float, str)):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            raise _wrong_type(hint, value, path) from None
    if hint is str and isinstance(value, (int, float)):
        return str(value)  # precision: 32
    if not isinstance(value, hint):
        raise _wrong_type(hint, value, path)
    return value


def _wrong_type(hint: Any, value: Any, path: str) -> ConfigError:
    return ConfigError(f"{path}={value!r} has the wrong type: expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "section"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
