"""What NCCL does in the transfer of weights, done by gloo. The trainer imports it, and vLLM's workers (gloo_for_nccl.py)."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

__all__ = ["GlooGroup", "make_store"]

HOST, TIMEOUT = "127.0.0.1", timedelta(seconds=120)


def make_store() -> tuple[TCPStore, bytes]:
    """A store, and the 128 bytes by which its clients find it."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    return store, str(store.port).encode().ljust(128, b"\0")


class GlooGroup:
    """
    Args:
        unique: of `make_store`.
    """

    def __init__(self, unique: bytes, rank: int, size: int):
        port = int(unique.rstrip(b"\0"))
        store = TCPStore(HOST, port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        self._group = ProcessGroupGloo(PrefixStore("weights", store), rank, size, TIMEOUT)
        self.broadcast(torch.zeros(1))

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream=None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self._group = None
