"""Strict typed configuration: YAML in, dataclasses out; a misspelt key, a missing one or a wrong type is an error.

Only the standard library and OmegaConf are imported here, so that a command line can be checked without Megatron.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from megatron_ext.errors import UserError

__all__ = ["ConfigError", "at_least", "build", "nearest_key", "show"]

T = TypeVar("T")
ABSENT = "???"  # OmegaConf's mark for a value that must be given
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ConfigError(UserError):
    """Bad configuration."""


def build(cls: type[T], node: Any, path: str = "") -> T:
    """Fill the dataclass `cls` from a mapping, and the dataclasses within it from the mappings within.

    Values are taken as they are, except that a float may be written as an integer or as text (YAML reads 1e-4 as
    text) and a string as a number (precision: 32). `cls.GONE` names keys of earlier versions, with what to say of each;
    `cls.of_earlier_keys` turns a section that has some into one of today.

    Args:
        node: an OmegaConf `DictConfig` or plain data.
        path: the dotted key of `node`, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, a value of another type.
        UserError: whatever a dataclass' own `__post_init__` raises.
    """
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    return _section(cls, node, path, list(_all_keys(cls, path)))


def at_least(section: str, settings: object, least: int, *names: str) -> None:
    """Refuse fields of the dataclass `settings`, at the dotted key `section`, below `least`; None passes.

    Raises:
        UserError: a field that is less.
    """
    for name in names:
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"{section}.{name}={value} must be at least {least}")


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The dotted key of `known` that was probably meant: a close name in the same section, else the same name in
    another section, else a close name anywhere."""
    known = list(known)
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    if close := get_close_matches(name, siblings, n=1):
        return siblings[close[0]]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    return (elsewhere or get_close_matches(key, known, n=1, cutoff=0.8) or [None])[0]


def _section(cls: type, node: Any, path: str, known: list[str]) -> Any:
    if isinstance(node, cls):
        return node
    if not isinstance(node, Mapping):
        raise _wrong(path or "the configuration", node, cls)
    hints = _hints(cls)
    if hasattr(cls, "of_earlier_keys"):
        node = cls.of_earlier_keys(node)
    for key in node:
        if key in getattr(cls, "GONE", {}):  # a key of an earlier version, and what has taken its place
            raise ConfigError(f"{_join(path, key)} is no more: {cls.GONE[key]}")
        if key not in hints:
            raise _unknown(_join(path, key), [_join(path, name) for name in hints], known)
    given = {key: value for key, value in node.items() if not (isinstance(value, str) and value == ABSENT)}
    missing = [f.name for f in fields(cls) if f.init and f.name not in given and _is_required(f)]
    # A key written as ??? asks for a value even where the dataclass has a default.
    missing += [key for key in node if key not in given and key not in missing]
    if missing:
        names = ", ".join(f"{_join(path, key)} ({_name(hints[key])})" for key in missing)
        many = len(missing) > 1
        raise ConfigError(
            f"missing key{'s' * many} {names}: set {'them' if many else 'it'} in the YAML or on the command line"
        )
    return cls(**{key: _value(hints[key], value, _join(path, key), known) for key, value in given.items()})


def _value(hint: Any, value: Any, key: str, known: list[str]) -> Any:
    """`value` as `hint` asks for it."""
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(args, hint, value, key, known)
    if is_dataclass(hint):
        return _section(hint, value, key, known)
    kind = origin or hint
    if kind in (list, tuple):
        return _sequence(kind, args, hint, value, key, known)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, hint)
        key_hint, value_hint = args or (Any, Any)
        return {
            _value(key_hint, k, f"the key {k!r} of {key}", known): _value(value_hint, v, _join(key, k), known)
            for k, v in value.items()
        }
    return _scalar(kind, hint, value, key)


def _union(args: tuple, hint: Any, value: Any, key: str, known: list[str]) -> Any:
    if value is None and types.NoneType in args:
        return None
    kinds = [a for a in args if a is not types.NoneType]
    if len(kinds) == 1 and is_dataclass(kinds[0]) and isinstance(value, Mapping):
        return _section(kinds[0], value, key, known)
    # The value's own type first: of `int | str`, "32" is a str and 32 an int.
    for kind in sorted(kinds, key=lambda kind: type(value) is not (get_origin(kind) or kind)):
        try:
            return _value(kind, value, key, known)
        except ConfigError:
            continue
    raise _wrong(key, value, hint)


def _sequence(kind: type, args: tuple, hint: Any, value: Any, key: str, known: list[str]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, hint)
    if not args:
        hints = [Any] * len(value)
    elif kind is list or args[1:] == (...,):
        hints = [args[0]] * len(value)
    else:
        hints = args
    if len(hints) != len(value):
        raise ConfigError(f"{key} must have {len(hints)} values, got {len(value)}: {show(value)}")
    return kind(_value(h, v, f"{key}[{i}]", known) for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _scalar(kind: type, hint: Any, value: Any, key: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and number and isinstance(value, int):
        return value
    if kind is float and (number or (isinstance(value, str) and NUMBER.fullmatch(value))):
        try:
            result = float(value)
        except OverflowError:
            raise _wrong(key, value, hint) from None
        if math.isfinite(result):
            return result
    if kind is str and (number or isinstance(value, str)):
        return str(value)
    if kind not in (bool, int, float, str, types.NoneType):
        raise TypeError(f"{key}: configuration fields of type {hint} are not supported")
    if kind is types.NoneType and value is None:
        return None
    raise _wrong(key, value, hint)


def _unknown(key: str, names: list[str], known: list[str]) -> ConfigError:
    nearest = nearest_key(key, names) or nearest_key(key, known)
    if nearest:
        return ConfigError(f"unknown key {key}; did you mean {nearest}?")
    return ConfigError(f"unknown key {key}; known here: {', '.join(names)}")


def _wrong(key: str, value: Any, hint: Any) -> ConfigError:
    remedy = "; put it in quotes" if isinstance(value, bool) and hint in (str, str | None) else ""
    return ConfigError(f"{key} must be {_name(hint)}, got {show(value)}{remedy}")


def _all_keys(cls: type, path: str) -> Iterator[str]:
    """Every dotted key that `cls` knows, sections included."""
    for name, hint in _hints(cls).items():
        yield _join(path, name)
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                yield from _all_keys(kind, _join(path, name))


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _is_required(f) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _name(hint: Any) -> str:
    """A type in the words of a message."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if is_dataclass(hint):
        return "a section"
    if origin is tuple and args and args[-1] is not ...:
        return f"a list of {len(args)} ({', '.join(_name(a) for a in args)})"
    if (origin or hint) in (list, tuple):
        return f"a list of {_name(args[0])}" if args else "a list"
    if (origin or hint) is dict:
        return "a mapping"
    return {types.NoneType: "null", bool: "true or false", Any: "any value"}.get(hint) or hint.__name__


def show(value: Any) -> str:
    """A value as YAML would have it, cut to fit a line."""
    text = repr(value)
    if value is None or isinstance(value, bool):
        text = {"None": "null", "True": "true", "False": "false"}[text]
    return text if len(text) <= 80 else text[:77] + "..."
