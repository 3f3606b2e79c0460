"""The transfer of weights with gloo in NCCL's place, on both sides: a CPU server's own code receives what ours sends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_ext.rollouts.vllm.nccl import NcclError
from megatron_ext.vllm_servers import ServerProcesses
from tests.harness import ROOT
from tests.inside_vllm.gloo_group import GlooGroup, make_store
from tests.vllm_cases import QUICK

__all__ = ["GlooBroadcasters", "gloo_options", "gloo_servers"]


@dataclass
class GlooBroadcasters:
    """See `megatron_ext.rollouts.vllm.nccl.Broadcasters`.

    Attributes:
        before: is called with the number of each chunk of a transfer before it is sent.
        joined: how many communicators there have been.
        sent: sizes of what was sent, in bytes.
    """

    before: Callable[[int], None] = lambda number: None
    joined: int = 0
    sent: list[int] = field(default_factory=list)
    stores: list = field(default_factory=list)

    def unique_id(self) -> bytes:
        store, unique = make_store()
        self.stores.append(store)
        return unique

    def join(self, unique: bytes, size: int) -> GlooBroadcaster:
        self.joined += 1
        return GlooBroadcaster(self, GlooGroup(unique, 0, size))


class GlooBroadcaster:
    def __init__(self, home: GlooBroadcasters, group: GlooGroup):
        self.home, self.group, self.aborted = home, group, False

    def broadcast(self, data: torch.Tensor) -> None:
        assert data.dtype == torch.uint8 and data.dim() == 1
        self.home.before(len(self.home.sent))
        try:
            self.group.broadcast(data)
        except RuntimeError as error:  # what gloo's errors are
            raise NcclError(str(error)) from error
        if self.aborted:
            raise NcclError("it was aborted")
        self.home.sent.append(data.numel())

    def abort(self) -> None:
        self.aborted = True


def gloo_options(**more) -> dict[str, Any]:
    """Of a source whose servers are those of `gloo_servers`."""
    arguments = (*QUICK, "--worker-extension-cls", "gloo_for_nccl.Extension")
    return {"weights": "nccl", "cuda_devices": ("",), "arguments": arguments} | more


@contextlib.contextmanager
def gloo_servers() -> Iterator[None]:
    """Servers that are started inside find gloo_for_nccl."""
    own = ServerProcesses._environment

    def with_gloo(self, number: int) -> dict[str, str]:
        environment = own(self, number)
        path = os.pathsep.join([environment["PYTHONPATH"], str(ROOT / "tests/inside_vllm")])
        return environment | {"PYTHONPATH": path}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcesses, "_environment", with_gloo)
        yield
