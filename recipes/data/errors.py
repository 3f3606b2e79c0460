"""What is wrong with a user's data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_ext.errors import UserError

__all__ = ["DataError", "VideoError", "at"]


class DataError(UserError):
    """A tokenizer or data file that cannot be used."""


class VideoError(UserError):
    """A video or feature file that cannot be used."""


@contextmanager
def at(where: str) -> Iterator[None]:
    """Say of a `DataError` from within where the row stands."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
