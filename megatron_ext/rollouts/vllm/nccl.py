"""NCCL between a trainer and servers, through the library that torch has loaded. **Not yet run**: it needs GPUs.

torch's own process groups hand their unique id over a store of theirs, and end no communicator in which a peer has died; both
are needed here. Functions and types are those of nccl.h (https://github.com/NVIDIA/nccl/blob/master/src/nccl.h.in).
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["Broadcaster", "Broadcasters", "NcclBroadcasters", "NcclError", "NcclLibrary"]

LIBRARY = "libnccl.so.2"
UINT8, FLOAT32, SUM = 1, 7, 0  # of ncclDataType_t and ncclRedOp_t
PAUSE = 5e-4  # seconds between looks at a broadcast


class NcclError(Exception):
    """What NCCL says when it cannot."""


class UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = [("internal", ctypes.c_byte * 128)]


POINTER = ctypes.c_void_p
FUNCTIONS = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(POINTER), ctypes.c_int, UniqueId, ctypes.c_int],
    "ncclAllReduce": [POINTER, POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, POINTER, POINTER],
    "ncclBroadcast": [POINTER, POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, POINTER, POINTER],
    "ncclCommAbort": [POINTER],
}  # fmt: skip


class NcclLibrary:
    """The functions that are needed. Calls let other threads run.

    Args:
        path: of the library; by its name alone it is the one that is loaded already.

    Raises:
        OSError: it is not there.
        AttributeError: it is another.
    """

    def __init__(self, path: str = LIBRARY):
        self._library = ctypes.CDLL(path)
        for name, types in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, ctypes.c_int
        self._library.ncclGetErrorString.argtypes = [ctypes.c_int]
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def unique_id(self) -> bytes:
        """128 bytes that name a new communicator."""
        unique = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique))
        return bytes(unique)

    def join(self, unique: bytes, size: int, rank: int) -> int:
        """A communicator on the current device, once all its ranks have joined."""
        communicator = POINTER()
        self._call("ncclCommInitRank", ctypes.byref(communicator), size, UniqueId.from_buffer_copy(unique), rank)
        return communicator.value

    def sum_one(self, address: int, communicator: int, stream: int) -> None:
        """The sum over ranks of one number in fp32, in place."""
        self._call("ncclAllReduce", address, address, 1, FLOAT32, SUM, communicator, stream)

    def broadcast(self, address: int, size: int, communicator: int, stream: int) -> None:
        """Rank 0's bytes to all."""
        self._call("ncclBroadcast", address, address, size, UINT8, 0, communicator, stream)

    def abort(self, communicator: int) -> None:
        """End whatever it does, and itself."""
        self._call("ncclCommAbort", communicator)

    def _call(self, name: str, *arguments) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            raise NcclError(f"{name}: {self._library.ncclGetErrorString(result).decode()}")


class Broadcaster(Protocol):
    """The trainer's end of a communicator with the workers of one server."""

    def broadcast(self, data: Tensor) -> None:
        """Send uint8 [bytes] of the host to all; when it returns they are on their way no more.

        Raises:
            NcclError: it was aborted, or fails.
        """

    def abort(self) -> None:
        """End it, whatever another thread does with it. More than once is as good as once."""


class Broadcasters(Protocol):
    """Makes them."""

    def unique_id(self) -> bytes:
        """128 bytes by which the workers join."""

    def join(self, unique: bytes, size: int) -> Broadcaster:
        """Wait until `size` ranks are there, of which this is rank 0.

        Raises:
            NcclError: it fails.
        """


class NcclBroadcasters:
    """
    Raises:
        UserError: there is no GPU here, or no NCCL.
    """

    def __init__(self):
        if not torch.cuda.is_available() or torch.version.cuda is None:
            raise UserError(
                "trainer.grpo.rollout.weights=nccl sends weights from one GPU of NVIDIA's to another, and this run trains on "
                "none: set weights=folder"
            )
        try:
            self._library = NcclLibrary()
        except (OSError, AttributeError) as error:
            raise UserError(
                f"trainer.grpo.rollout.weights=nccl needs {LIBRARY}, which torch has not loaded ({error}): install a torch that "
                "brings it, as PyPI's for CUDA does, or set weights=folder"
            ) from error
        self._device = torch.device("cuda", torch.cuda.current_device())  # other threads have another

    def unique_id(self) -> bytes:
        return self._library.unique_id()

    def join(self, unique: bytes, size: int) -> Broadcaster:
        return NcclBroadcaster(self._library, unique, size, self._device)


class NcclBroadcaster:
    """See `Broadcaster`; on one device, in a stream of its own."""

    def __init__(self, library: NcclLibrary, unique: bytes, size: int, device: torch.device):
        self._library, self._device = library, device
        self._aborted = threading.Event()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._communicator = library.join(unique, size, 0)
            with torch.cuda.stream(self._stream):
                # Each of vLLM's workers begins with this sum, so every rank must.
                one = torch.zeros(1, device=device)
                library.sum_one(one.data_ptr(), self._communicator, self._stream.cuda_stream)
            self._wait()

    def broadcast(self, data: Tensor) -> None:
        if self._aborted.is_set():
            raise NcclError("it was aborted")
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            sent = data.to(self._device)
            self._library.broadcast(sent.data_ptr(), sent.numel(), self._communicator, self._stream.cuda_stream)
        self._wait()

    def abort(self) -> None:
        if not self._aborted.is_set():
            self._aborted.set()
            self._library.abort(self._communicator)

    def _wait(self) -> None:
        """For the stream, but not for ever: where a peer has died, only `abort` ends what the stream does."""
        done = torch.cuda.Event()
        done.record(self._stream)
        while not done.query():
            time.sleep(PAUSE)
        if self._aborted.is_set():
            raise NcclError("it was aborted")
