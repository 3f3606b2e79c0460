"""Environments in processes of their own: one for each conversation, which is killed when it does not come back.

What an environment keeps is in its process from a conversation's first word to its last. Whatever it does there, sleep for ever,
loop in C or end the process, is that conversation's alone.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import resource
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from typing import Any, Protocol

from recipes.cli.children import ending
from recipes.cli.named import describe
from recipes.environments.environment import EnvironmentFailedError, EnvironmentLostError
from recipes.environments.fork_server import receive, send
from recipes.environments.instance import Instance
from recipes.environments.registry import Named

__all__ = ["Begun", "Environments"]

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds, for one call of an environment, before the log says that it is waited for
START_SECONDS = 600.0  # in which the environment's module must have been imported
ENDS_SECONDS = 30.0  # in which the process that begins conversations ends them all
PROGRAM = """
import sys
descriptor, *sys.path = sys.argv[1:]
from recipes.environments.fork_server import serve
serve(int(descriptor))
"""


class Begun(Protocol):
    """The environment of one conversation."""

    def ask(self, method: str, argument: Any) -> Any:
        """
        Args:
            method: start of a row, step of turns, calls of a text, or close.

        Raises:
            EnvironmentLostError: it has not come back in time, or has ended its process.
            EnvironmentFailedError: it failed.
        """
        ...

    def end(self) -> None:
        """The conversation is over."""
        ...


class Environments:
    """Those of a run's conversations, on a rank.

    Args:
        named: what makes them. One that bounds itself is asked in this process.
        limit: seconds for a call of any other.
    """

    def __init__(self, named: Named, limit: float):
        self.named, self.limit = named, limit
        self._lock = threading.Lock()
        self._server: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    def begin(self, where: str, key: tuple[int, ...]) -> Begun:
        """
        Args:
            where: the file and line of the conversation's row, for messages.
            key: what its random numbers are drawn from.

        Raises:
            EnvironmentFailedError: there is no process for it.
        """
        if self.named.bounds_itself:
            return _Here(self.named)
        with self._lock:
            if self._server is None:
                self._start()
            number = self._asked(("begin", key))
            if isinstance(number, str):
                raise EnvironmentFailedError(f"environment {self.named.name}: {number}")
            _, descriptors, *_ = socket.recv_fds(self._control, 1, 1)
        if not descriptors:
            self.end(number)
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise EnvironmentFailedError(
                f"environment {self.named.name}: no file can be opened for one more conversation, of {soft}: raise ulimit -n"
            )
        return _There(self, number, socket.socket(fileno=descriptors[0]), where)

    def end(self, number: int) -> int | None:
        """Kill a process and what it has started.

        Returns:
            Its exit code; None: it does not die, or nobody can tell.
        """
        with self._lock:
            return None if self._server is None else self._asked(("end", number))

    def close(self) -> None:
        """End all conversations."""
        with self._lock:
            if self._server is None:
                return
            self._control.close()
            try:
                self._server.wait(ENDS_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = self._control = None

    def _start(self) -> None:
        # There is a socket to each conversation.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._control, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        send(self._control, (type(self.named.kind).__module__, self.named.spec))

    def _asked(self, request: tuple) -> Any:
        """What the process that begins conversations answers; the first answer takes as long as the import of a module."""
        said = f"environment {self.named.name}: the process that begins conversations"
        try:
            send(self._control, request, START_SECONDS)
            return receive(self._control, START_SECONDS)
        except TimeoutError as error:
            raise EnvironmentFailedError(
                f"{said} has not imported its module in {START_SECONDS:g} s: see what it does on import"
            ) from error
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(ENDS_SECONDS)
            code = self._server.returncode
            raise EnvironmentFailedError(f"{said} has ended ({_ending(code)})") from error


def _ending(code: int | None) -> str:
    return "nobody knows how" if code is None else ending(code)


class _Here:
    """In this process."""

    def __init__(self, named: Named):
        self._name, self._instance = named.name, Instance(named.make)

    def ask(self, method: str, argument: Any) -> Any:
        try:
            return self._instance.ask(method, copy.deepcopy(argument) if method == "start" else argument)
        except (Exception, SystemExit) as error:
            raise EnvironmentFailedError(f"environment {self._name}: {method} failed: {describe(error)}") from error

    def end(self) -> None:
        pass


class _There:
    """In a process of its own.

    Args:
        number: of its process.
        link: to it.
        where: the file and line of its row.
    """

    def __init__(self, environments: Environments, number: int, link: socket.socket, where: str):
        self._environments, self._number, self._link, self._where = environments, number, link, where

    def ask(self, method: str, argument: Any) -> Any:
        name, limit = self._environments.named.name, self._environments.limit
        try:
            came_back, answer = self._answer(method, argument)
        except TimeoutError as error:
            self.end()
            raise self._lost(
                f"{method} has not come back within trainer.grpo.environment_timeout={limit:g} s", "raise the limit, "
            ) from error
        except (EOFError, OSError) as error:
            code = self.end()
            raise self._lost(f"{method} has ended its process ({_ending(code)})") from error
        except Exception as error:
            raise EnvironmentFailedError(
                f"environment {name}: {method} gave what cannot be read outside of its process: {describe(error)}"
            ) from error
        if not came_back:
            raise EnvironmentFailedError(f"environment {name}: {method} failed: {answer}")
        return answer

    def _answer(self, method: str, argument: Any) -> tuple[bool, Any]:
        limit = self._environments.limit
        deadline = time.monotonic() + limit
        send(self._link, (method, argument), limit)
        if limit > PATIENCE and not wait([self._link], PATIENCE):
            logger.warning(
                "environment %s: %s has not come back for %.0f s, for the prompt of %s",
                self._environments.named.name, method, PATIENCE, self._where,
            )  # fmt: skip
        return receive(self._link, deadline - time.monotonic())

    def _lost(self, reason: str, remedy: str = "") -> EnvironmentLostError:
        return EnvironmentLostError(
            f"environment {self._environments.named.name}: {reason}, for the prompt of {self._where}: mend it, {remedy}or set "
            "trainer.grpo.on_reward_timeout to zero or drop"
        )

    def end(self) -> int | None:
        """Kill it and what it has started; its exit code."""
        if self._link.fileno() < 0:
            return None
        self._link.close()
        with contextlib.suppress(EnvironmentFailedError):  # who cannot begin another says so
            return self._environments.end(self._number)
        return None
