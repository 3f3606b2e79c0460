"""What ranks tell each other beside tensors of the model: that one has failed, everybody's values, one rank's value.

Every rank of a group calls. Groups are arguments; None is all ranks.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from megatron_ext.errors import UserError, of_system

__all__ = [
    "LastValues",
    "broadcast",
    "broadcast_object",
    "from_last",
    "gather_objects",
    "gather_rows",
    "met_by_all",
    "sum_of_all",
    "together",
]

MEETING = "megatron_ext/meeting/"
PIECE = datetime.timedelta(seconds=60)


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What one rank cannot do inside, none has done: all of them raise. Nothing inside may be a collective.

    Raises:
        Exception: a rank's own, where it has one. The others raise the first rank's if it is bad input or of the system, which
            is worth one line, and else a RuntimeError.
    """
    error = None
    try:
        yield
    except Exception as found:  # noqa: BLE001  whatever it was, the others must not wait for ever
        error = found
    told: UserError | str | None = None
    if error is not None:
        expected = isinstance(error, (UserError, OSError))
        told = _as_user_error(error) if expected else f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
    failures = gather_objects(told, group)
    if error is not None:
        raise error
    if first := next(filter(None, failures), None):
        raise first if isinstance(first, UserError) else RuntimeError(first)


@contextlib.contextmanager
def met_by_all() -> Iterator[None]:
    """At its end every rank of the run waits for the slowest, however long that is: in pieces, through the store by which they
    met, and in no collective, which would give up after half an hour. For what may wait for something outside of the run. A rank
    that has failed inside is there, too."""
    try:
        yield
    finally:
        if (ranks := dist.get_world_size()) > 1:
            _meet(_get_default_store(), dist.get_rank(), ranks)


def _meet(store: dist.Store, rank: int, ranks: int) -> None:
    number = store.add(f"{MEETING}of/{rank}", 1)
    if store.add(f"{MEETING}{number}", 1) == ranks:
        store.set(f"{MEETING}{number}/all", b"")
        for key in (f"{MEETING}{number - 1}", f"{MEETING}{number - 1}/all"):  # which all have left
            store.delete_key(key)
    while True:
        try:
            store.wait([f"{MEETING}{number}/all"], PIECE)
            return
        except dist.DistStoreError:  # not yet
            pass


def _as_user_error(error: UserError | OSError) -> UserError:
    return error if isinstance(error, UserError) else UserError(of_system(error))


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the order of ranks."""
    values: list[Any] = [None] * _size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_rows(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, as many of each, in the order of ranks."""
    if group.size() == 1:
        return values
    found = values.new_empty(group.size() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(found, values.contiguous(), group=group)
    return found


def sum_of_all(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's added up, in place."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def broadcast_object(value: Any, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The value of the group's rank `source` on every rank; -1 is the last."""
    held = [value]
    if _size(group) > 1:
        dist.broadcast_object_list(held, src=_global(source, group), group=group)
    return held[0]


def broadcast(values: Tensor, source: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same for a tensor, contiguous, which is filled in place on the other ranks."""
    if _size(group) > 1:
        dist.broadcast(values, src=_global(source, group), group=group)
    return values


def from_last(
    values: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    group: dist.ProcessGroup,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values that the group's last rank has, such as those of the last pipeline stage, on every rank; None elsewhere."""
    if values is None:
        values = torch.empty(shape, dtype=dtype, device=device)
    # The other ranks have made room for just this.
    assert (values.shape, values.dtype) == (shape, dtype), f"{values.dtype} {tuple(values.shape)}, not {dtype} {shape}"
    values = values.contiguous()
    return broadcast(values, -1, group)


class LastValues:
    """Values that the group's last rank has, on their way to the others. All ranks make theirs in one order.

    Args:
        values: contiguous, of one shape and type; overwritten on the other ranks.
    """

    def __init__(self, values: Tensor, group: dist.ProcessGroup):
        self._values = values.contiguous()
        self._work = None
        if group.size() > 1:
            self._work = dist.broadcast(self._values, src=_global(-1, group), group=group, async_op=True)

    def values(self) -> Tensor:
        """Once they are there."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._values


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size() if group is None else group.size()


def _global(source: int, group: dist.ProcessGroup | None) -> int:
    rank = source % _size(group)
    return rank if group is None else dist.get_global_rank(group, rank)
