"""The reward json_schema: whether a response is JSON of a form (https://json-schema.org), by the package jsonschema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.exact_answer import without_thought
from recipes.rewards.registry import KEY, register_reward

__all__ = ["JsonSchema"]

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n```\s*", re.S | re.I)


@register_reward("json_schema")
@dataclass(frozen=True)
class JsonSchema:
    """1 where the response is JSON that the schema allows, by itself or in a fence ```json; else 0.

    A schema refers to nothing outside it. Numbers are JSON's: NaN is none, and no key stands twice.
    """

    # The schema: a mapping, or the path of a file. null: each row has its own, in `schema`.
    schema: Any = None
    _validator: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.schema is not None:
            try:
                object.__setattr__(self, "_validator", _validator(_written(self.schema)))
            except UserError as error:
                raise ConfigError(f"{KEY}.schema: {error}") from error

    @property
    def row_keys(self) -> Sequence[str]:
        return ("schema",) if self.schema is None else ()

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row without a schema.

        Raises:
            UserError: it has none, or what is no schema.
        """
        self._of(row)

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(self._allows(r, row)) for r, row in zip(responses, rows, strict=True)]

    def _allows(self, response: str, row: Mapping[str, Any]) -> bool:
        validator, text = self._of(row), without_thought(response)
        fenced = _FENCE.fullmatch(text)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse, object_pairs_hook=_object)
            return validator.is_valid(value)
        except (ValueError, RecursionError):  # deeper than Python reads
            return False

    def _of(self, row: Mapping[str, Any]) -> Any:
        if self._validator is not None:
            return self._validator
        schema = row.get("schema")
        if not isinstance(schema, (dict, bool)):
            raise UserError(
                f"its schema is {str(schema)[:40]!r}: a row needs a JSON schema in schema, or {KEY}.schema has it"
            )
        return _cached(json.dumps(schema, sort_keys=True))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _written(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(Path(schema).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {schema} as JSON: {error}") from error


@functools.lru_cache(1024)
def _cached(text: str) -> Any:
    return _validator(json.loads(text))


def _validator(schema: Any) -> Any:
    """
    Raises:
        UserError: it is no schema.
    """
    import jsonschema
    import referencing

    if not isinstance(schema, (dict, bool)):
        raise UserError(f"{str(schema)[:40]!r} is no JSON schema, which is an object")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
        found = kind(schema, registry=referencing.Registry())  # or a $ref would be fetched
        found.is_valid(None)
    except jsonschema.SchemaError as error:
        raise UserError(f"no JSON schema: {error.message}") from error
    except referencing.exceptions.Unresolvable as error:
        raise UserError(f"its $ref {error.ref} leads nowhere: what it names must stand in the schema itself") from error
    return found
