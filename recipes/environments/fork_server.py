"""A process that imports an environment's module once and is forked for each conversation, by which it costs milliseconds.

`recipes.environments.processes` starts it and asks it over a socket to begin a conversation or to end one. It has no threads and
runs none of an environment's code but its module's import. It ends with whoever has started it, and with it all conversations
and what they have started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from recipes.cli.children import die_with_parent, leave_signals
from recipes.cli.named import describe
from recipes.environments.environment import Environment
from recipes.environments.instance import Instance
from recipes.environments.registry import maker

__all__ = ["receive", "send", "serve"]

DIES_SECONDS = 5.0  # in which a process that was killed is gone, unless its disk or driver keeps it


def send(link: socket.socket, value: Any, seconds: float | None = None) -> None:
    """
    Raises:
        TimeoutError: the other side takes nothing.
        OSError: it is gone.
    """
    _send_bytes(link, pickle.dumps(value), seconds)


def _send_bytes(link: socket.socket, data: bytes, seconds: float | None) -> None:
    link.settimeout(seconds)
    link.sendall(len(data).to_bytes(8, "big") + data)


def receive(link: socket.socket, seconds: float | None = None) -> Any:
    """
    Raises:
        TimeoutError: not all of it has come.
        EOFError, OSError: the other side is gone.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    size = int.from_bytes(_exactly(link, 8, deadline), "big")
    return pickle.loads(_exactly(link, size, deadline))


def _exactly(link: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is None:
            link.settimeout(None)
        elif (left := deadline - time.monotonic()) > 0:
            link.settimeout(left)
        else:
            raise TimeoutError
        chunk = link.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def serve(descriptor: int) -> None:
    """
    Args:
        descriptor: of a socket. First the environment comes over it, as (module, spec); then ("begin", key), which is answered
            with the number of a process, and a socket to it; or ("end", number), answered with its exit code. Errors are texts.
    """
    leave_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = _Server(socket.socket(fileno=descriptor))
    try:
        server.run()
    finally:
        server.end_all()


class _Server:
    def __init__(self, control: socket.socket):
        self._control, self._running = control, set()
        self._make: Callable[[], Environment] | None = None

    def run(self) -> None:
        """Until the other side is gone."""
        with contextlib.suppress(EOFError, ConnectionError):
            failure = self._prepare(*receive(self._control))
            while True:
                what, argument = receive(self._control)
                if what == "end":
                    send(self._control, self._end(argument))
                elif failure is not None:
                    send(self._control, failure)
                else:
                    self._begin(argument)

    def _prepare(self, module: str, spec: Any) -> str | None:
        """Why it cannot be made; None: it can."""
        try:
            importlib.import_module(module)  # which may give it its name
            self._make = maker(spec)
        except (Exception, SystemExit) as error:  # noqa: BLE001  it must be told when a conversation begins
            return f"in a process of its own it cannot be made: {describe(error)}"
        if "numpy" in sys.modules:
            importlib.import_module("numpy.random")  # which numpy itself puts off
        gc.collect()
        gc.freeze()  # what all processes share stays shared
        return None

    def _begin(self, key: tuple[int, ...]) -> None:
        theirs, ours = socket.socketpair()
        with theirs, ours:
            try:
                number = os.fork()
            except OSError as error:
                send(self._control, f"there is no process for one more beside {len(self._running)}: {error}")
                return
            if number == 0:
                self._become(ours, (theirs, self._control), key)
            self._running.add(number)
            with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself
                os.setpgid(number, number)
            send(self._control, number)
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])

    def _become(self, link: socket.socket, others: tuple[socket.socket, ...], key: tuple[int, ...]) -> None:
        """The process of a conversation."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            die_with_parent()
            for each in others:
                each.close()
            _seed(key)
            _play(link, Instance(self._make))
            code = 0
        except BaseException:  # noqa: BLE001  nothing of it may go on in the server's place
            traceback.print_exc()
        finally:
            os._exit(code)

    def _end(self, number: int) -> int | None:
        """With what it has started; its exit code, None: it does not die."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(number, signal.SIGKILL)
        deadline = time.monotonic() + DIES_SECONDS
        while True:
            done, status = os.waitpid(number, os.WNOHANG)  # nobody else takes the number before
            if done:
                self._running.discard(number)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)

    def end_all(self) -> None:
        for number in self._running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(number, signal.SIGKILL)
        for number in [*self._running]:
            self._end(number)


def _seed(key: tuple[int, ...]) -> None:
    """What it draws is this conversation's own, and the same in a run that is repeated."""
    random.seed(repr(key))
    number = random.getrandbits(32)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


def _play(link: socket.socket, instance: Instance) -> None:
    """Answer, until nobody asks any more: (whether it came back, what it gave or how it failed)."""
    while True:
        try:
            method, argument = receive(link)
        except (EOFError, ConnectionError):
            return
        try:
            answer = pickle.dumps((True, instance.ask(method, argument)))
        except BaseException as error:  # noqa: BLE001  whatever it was, somebody waits
            answer = pickle.dumps((False, describe(error)))
        if method == "close":
            gc.collect()  # and what it has left to finalizers, such as a temporary folder, before the process is killed
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _send_bytes(link, answer, None)
