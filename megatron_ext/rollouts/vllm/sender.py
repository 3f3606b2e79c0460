"""Weights from rank 0's host to servers by vLLM's weight transfer, its backend "nccl". Not yet run with NCCL itself.

Routes and bodies as of vLLM 0.32 (https://docs.vllm.ai/en/latest/training/weight_transfer/): the workers of a server join a
communicator of which rank 0 is the trainer, by the unique id that they are told; for each update they are told names, types and
shapes, and what rank 0 then broadcasts is these tensors, packed behind each other in chunks. Tensors are those of a Hugging Face
checkpoint; a worker takes its own part of each.

Each server has a communicator of its own, so that one which dies takes no other along.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_ext.hf.gather import HostTensors
from megatron_ext.rollouts.vllm.client import Connection
from megatron_ext.rollouts.vllm.nccl import Broadcaster, Broadcasters, NcclError
from megatron_ext.rollouts.vllm.protocol import VllmError

__all__ = ["CHUNK_BYTES", "NEEDED", "Sender"]

T = TypeVar("T")

CHUNK_BYTES = 256 << 20  # rank 0's GPU holds one for each server, and a worker's BUFFERS of them, besides the model
BUFFERS = 2
# Of a server, if it is to take weights.
NEEDED = """is it on GPUs of its own, started with --weight-transfer-config '{"backend": "nccl"}', its NCCL this run's version"""
GRACE = 30.0  # seconds for one side of a transfer to end once the other has


@dataclass
class Link:
    """A communicator with a server.

    Attributes:
        mark: the label that the server's weights had from joining to the first update: who has lost it was started again.
        is_torn: a transfer has ended in the midst.
    """

    broadcaster: Broadcaster
    mark: str
    is_torn: bool = False


class Sender:
    """
    Args:
        broadcasters: make communicators.
    """

    def __init__(self, broadcasters: Broadcasters):
        self._broadcasters = broadcasters
        self._links: dict[str, Link] = {}

    async def send(self, server: Connection, tensors: HostTensors, label: str, given: str | None) -> None:
        """Put the tensors into a server that is paused.

        Args:
            label: of the weights that it has.
            given: the label that it was given last.

        Raises:
            VllmError: it would not, or is left with a part of them.
            GivenUpError: it has died, or could not.
        """
        link = self._links.get(server.url)
        if link is None or label not in (link.mark, given):
            if link is not None:
                link.broadcaster.abort()
            link = self._links[server.url] = await self._join(server, tensors.chunk_bytes)
        if link.is_torn:
            raise VllmError(f"{server.url} has got a part of the weights and not the rest: start it again")
        link.is_torn = True
        await server.post("/start_weight_update")
        receive = server.post("/update_weights", {"update_info": update_info(tensors)})
        await _both(server, receive, lambda: _broadcast(link.broadcaster, tensors), link.broadcaster.abort)
        await server.post("/finish_weight_update")
        link.is_torn = False

    def close(self) -> None:
        for link in list(self._links.values()):
            link.broadcaster.abort()

    async def _join(self, server: Connection, chunk_bytes: int) -> Link:
        await server.post("/shutdown_weight_transfer_engine")  # a communicator of an earlier run's, if it has one
        workers = (await server.get("/get_world_size"))["world_size"]
        unique = self._broadcasters.unique_id()
        answer = server.post("/init_weight_transfer_engine", {"init_info": init_info(unique, workers, chunk_bytes)})
        broadcaster = await _both(server, answer, lambda: self._broadcasters.join(unique, 1 + workers))
        mark = f"joined.{secrets.token_hex(8)}"
        await server.post("/update_weight_version", {"new_version": mark})
        return Link(broadcaster, mark)


def init_info(unique: bytes, workers: int, chunk_bytes: int) -> dict[str, Any]:
    """NCCLWeightTransferInitInfo of vLLM's; the id in standard base64. They cut chunks as `HostTensors` does."""
    return {
        "nccl_unique_id_b64": base64.b64encode(unique).decode(), "rank_offset": 1, "world_size": 1 + workers, "packed": True,
        "packed_buffer_size_bytes": chunk_bytes, "packed_num_buffers": BUFFERS,
    }  # fmt: skip


def update_info(tensors: HostTensors) -> dict[str, Any]:
    """NCCLWeightTransferUpdateInfo of vLLM's."""
    count = len(tensors.tensors)
    return {
        "names": list(tensors.tensors),
        "dtype_names": [str(tensors.dtype).removeprefix("torch.")] * count,
        "shapes": [list(tensor.shape) for tensor in tensors.tensors.values()],
    }


def _broadcast(broadcaster: Broadcaster, tensors: HostTensors) -> None:
    for chunk in tensors.chunks:
        broadcaster.broadcast(chunk.view(torch.uint8))


async def _both(
    server: Connection, answer: Awaitable, work: Callable[[], T], give_up: Callable[[], None] = lambda: None
) -> T:
    """What `work` gives, in a thread, while a server does its part of it. If either cannot, the other is not waited for for
    ever: a thread that `give_up` does not end is left behind.

    Raises:
        Exception: what the server's part raises.
        VllmError: our part fails, and the server has nothing to say of it.
    """
    theirs, ours = asyncio.ensure_future(answer), _in_thread(work)
    try:
        await asyncio.wait({theirs, ours}, return_when=asyncio.FIRST_COMPLETED)
        if not theirs.done():
            await asyncio.wait({theirs}, timeout=None if ours.exception() is None else GRACE)
        elif theirs.exception() is None:
            await asyncio.wait({ours}, timeout=GRACE)
        if theirs.done():
            theirs.result()
        if not ours.done():
            raise VllmError(f"{server.url} has answered and taken no part: is VLLM_DISABLE_PYNCCL set there?")
        return ours.result()
    except BaseException as error:
        give_up()
        if isinstance(error, NcclError):
            raise VllmError(f"{server.url}: {error}") from error
        raise
    finally:
        theirs.cancel()
        ours.cancel()


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """asyncio's own threads are waited for when the loop ends, and one that waits for a dead peer never would."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as found:  # noqa: BLE001  whoever waits for the future raises it
            error = found
        with contextlib.suppress(RuntimeError):  # the loop has ended without it
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="weights to a server", daemon=True).start()
    return future
