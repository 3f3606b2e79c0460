"""Of what kind a key of a configuration is: whether a checkpoint must agree, and whether it may change when a run goes on.

    hidden_size: Architecture[int]
    devices: Layout[int] = 1
    data: Training[SFTData]     # all keys of the section that do not say another

A key without a kind is an error: what nobody has thought about would be compared with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

__all__ = [
    "FREE", "Architecture", "Duration", "Kind", "Layout", "Limit", "Record", "Speed", "Start", "Training", "kind_of", "kinds",
    "names",
]  # fmt: skip

T = TypeVar("T")


class Kind(StrEnum):
    # Shapes a tensor or the function that is computed: a checkpoint must agree, and says it where the configuration does not.
    ARCHITECTURE = "architecture"
    # How long sequences may be: a checkpoint says it where the configuration does not, and may differ.
    LIMIT = "limit"
    # How the weights of a new model are drawn.
    START = "start"
    # What a run computes, the same from its first step to its last.
    TRAINING = "training"
    # How long a run is, which may change where its learning rate does not ask.
    DURATION = "duration"
    # On which ranks it runs.
    LAYOUT = "layout"
    # How fast, and in how much memory.
    SPEED = "speed"
    # What is written down and when, and when a run stops to go on later.
    RECORD = "record"


Architecture = Annotated[T, Kind.ARCHITECTURE]
Limit = Annotated[T, Kind.LIMIT]
Start = Annotated[T, Kind.START]
Training = Annotated[T, Kind.TRAINING]
Duration = Annotated[T, Kind.DURATION]
Layout = Annotated[T, Kind.LAYOUT]
Speed = Annotated[T, Kind.SPEED]
Record = Annotated[T, Kind.RECORD]

# What may change whenever a run goes on.
FREE = frozenset({Kind.LAYOUT, Kind.SPEED, Kind.RECORD})


def kinds(cls: type, path: str = "", around: Kind | None = None) -> dict[str, Kind]:
    """The kind of every key of a configuration's dataclass, by its dotted name; sections and what may be null included.

    Args:
        path: dotted name of the section that `cls` is.
        around: kind of the section, for keys that do not say their own.

    Raises:
        TypeError: a key without a kind.
    """
    return dict(_kinds(cls, path, around))


def _kinds(cls: type, path: str, around: Kind | None) -> Iterator[tuple[str, Kind]]:
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        key, hint, kind = f"{path}.{field.name}" if path else field.name, hints[field.name], around
        if get_origin(hint) is Annotated:
            hint, kind = get_args(hint)
        sections = [t for t in (hint, *get_args(hint)) if is_dataclass(t)]
        if kind is not None:
            yield key, kind
        elif sections != [hint]:
            raise TypeError(f"{cls.__name__}.{field.name} ({key}) has no kind: see megatron_ext/kinds.py")
        for section in sections:
            yield from _kinds(section, key, kind)


def kind_of(known: Mapping[str, Kind], key: str) -> Kind:
    """The kind of a dotted key, or of the value that it is within, such as a mapping's."""
    while key not in known:
        key, _, within = key.rpartition(".")
        assert within, "no key of this configuration"
    return known[key]


def names(cls: type, *wanted: Kind) -> tuple[str, ...]:
    """The fields of a dataclass that are of these kinds.

    Raises:
        TypeError: a field without a kind.
    """
    return tuple(key for key, kind in kinds(cls).items() if kind in wanted and "." not in key)
