"""Where memory is full, what it was too little for, and what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from megatron_ext.errors import UserError

__all__ = ["full_memory_told"]


@contextlib.contextmanager
def full_memory_told(where: Callable[[], str]) -> Iterator[None]:
    """
    Args:
        where: "at ...: lower ...", asked when it has happened.

    Raises:
        UserError: memory is full, of a GPU or of the host.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"memory is full {where()} ({str(error).splitlines()[0][:200]})") from error
