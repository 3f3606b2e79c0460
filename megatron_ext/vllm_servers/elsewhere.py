"""vLLM servers on machines of their own, which a run meets in a folder that all of them see.

    machines        their names, one a line: whoever starts `serve` there writes it
    serve.json      an `Order`: by the run when it begins and with each update of its weights; gone: the run has ended
    NAME.json       a machine's answer to the order of that number: {"number": ..., "urls": [...], "model": what servers that are
                    started again begin with}, or {"number": ..., "gone": why}

Nothing of the training environment is needed where `serve` runs, and nothing but the folder joins both sides, so either may
live in a container. The folder is the user's alone: the servers' key stands in it.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from megatron_ext.vllm_servers.options import VllmOptions
from megatron_ext.vllm_servers.process import ServerProcesses

__all__ = ["MACHINES", "Order", "ServersElsewhere", "serve"]

logger = logging.getLogger(__name__)

MACHINES = "machines"
ORDER = "serve.json"
PAUSE = 0.5  # seconds between looks
LOOKS = 3  # for a file that is not there
SAY = 60.0  # seconds after which waiting is told


@dataclass(frozen=True)
class Order:
    """What a run wants served.

    Attributes:
        number: of the run's own, which no other run's order has.
        model, dtype, max_length, key: see `ServerProcesses`.
        have_answered: see there.
        start, python, cuda_devices, arguments, weights, max_restarts, routes: see `VllmOptions`.
    """

    number: str
    model: str
    dtype: str
    max_length: int
    key: str
    have_answered: bool
    start: int
    python: str
    cuda_devices: tuple[str, ...]
    arguments: tuple[str, ...]
    weights: str
    max_restarts: int
    routes: bool

    def options(self, host: str) -> VllmOptions:
        """Of the servers on one machine, listening on `host`."""
        return VllmOptions(
            start=self.start, python=self.python, host=host, cuda_devices=tuple(self.cuda_devices),
            arguments=tuple(self.arguments), weights=self.weights, max_restarts=self.max_restarts,
            routes=self.routes,
        )  # fmt: skip


class ServersElsewhere:
    """The run's side: has servers started on every machine of the folder, and waits until they are.

    Args:
        options: with `rendezvous`.
        model, dtype, max_length: see `ServerProcesses`.

    Attributes:
        urls: of all servers.
        key: for them.

    Raises:
        UserError: no such folder, others can read it, a machine does not answer, or says that it cannot.
    """

    def __init__(self, options: VllmOptions, model: Path, dtype: str, max_length: int):
        self._folder, self.key = Path(options.rendezvous), secrets.token_hex(32)
        self._names = _machines(self._folder)
        self._order = Order(
            secrets.token_hex(8), str(model), dtype, max_length, self.key, False, options.start, options.python,
            options.cuda_devices, options.arguments, options.weights, options.max_restarts,
            options.routes,
        )  # fmt: skip
        self._write(self._order)
        try:
            self.urls = self._meet(options.patience)
        except BaseException:
            self.close()
            raise

    @property
    def newest(self) -> Path:
        """What servers begin with that are started again."""
        return Path(self._order.model)

    @newest.setter
    def newest(self, model: Path) -> None:
        self._write(replace(self._order, model=str(model)))

    @property
    def have_answered(self) -> bool:
        return self._order.have_answered

    @have_answered.setter
    def have_answered(self, answered: bool) -> None:
        if answered != self._order.have_answered:
            self._write(replace(self._order, have_answered=answered))

    def hopeless(self) -> str | None:
        """Why no server will answer any more; None: one may."""
        answers = {name: self._answer(name) for name in self._names}
        gone = [f"{name}: {answer['gone']}" for name, answer in answers.items() if "gone" in answer]
        return "; ".join(gone) if len(gone) == len(self._names) else None

    def close(self) -> None:
        """Every machine ends its servers when it sees this."""
        (self._folder / ORDER).unlink(missing_ok=True)

    def _answer(self, name: str) -> dict:
        """To this run's order; empty: none yet, or one to an earlier run's."""
        found = _read(self._folder, name) or {}
        return found if found.get("number") == self._order.number else {}

    def _write(self, order: Order) -> None:
        self._order = order
        write_whole(self._folder / ORDER, json.dumps(asdict(order)))

    def _meet(self, patience: float) -> list[str]:
        deadline, found = time.monotonic() + patience, {}
        while True:
            for name in self._names:
                found[name] = self._answer(name)
                if "gone" in found[name]:
                    raise UserError(f"{name}: {found[name]['gone']}")
            if missing := [name for name in self._names if "urls" not in found[name]]:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{', '.join(missing)}: no vLLM server was started there in {patience:g} s "
                        f"(trainer.grpo.rollout.patience); does launch/serve_vllm.py run there, and see {self._folder}?"
                    )
                time.sleep(PAUSE)
                continue
            return [url for name in self._names for url in found[name]["urls"]]


def serve(folder: Path, name: str, address: str, logs: Path, asked_to_end: Callable[[], bool] = lambda: False) -> None:
    """A machine's side: wait for a run, serve what it wants, and end with it.

    Args:
        folder: where they meet.
        name: of this machine, as `MACHINES` has it.
        address: by which the run reaches it; the servers listen there alone.
        logs: folder for what they say.
        asked_to_end: whether somebody has asked this machine to.

    Raises:
        UserError: servers cannot be started, or have ended too often; the run is told.
    """
    if name not in _machines(folder):
        raise UserError(f"{folder / MACHINES} does not name {name}: a run would not wait for it")
    order = _wait_for_order(folder, asked_to_end)
    while order is not None:
        order = _serve_one(order, folder, name, address, logs, asked_to_end)


def _serve_one(
    order: Order, folder: Path, name: str, address: str, logs: Path, asked_to_end: Callable[[], bool]
) -> Order | None:
    """Serve a run until it ends, or another takes its place: then that one's order."""

    def answer(**what: object) -> None:
        write_whole(folder / f"{name}.json", json.dumps({"number": order.number, **what}))

    try:
        logs.mkdir(parents=True, exist_ok=True)
        with ServerProcesses(
            order.options(address), Path(order.model), order.dtype, order.max_length, logs, key=order.key
        ) as processes:
            answer(urls=processes.urls, model=order.model)
            print(f"{name} serves {order.model} at {', '.join(processes.urls)}", flush=True)
            while not asked_to_end():
                newest = _read_order(folder)
                if newest is None or newest.number != order.number:
                    return newest
                if newest != order:
                    order = newest
                    processes.newest, processes.have_answered = Path(order.model), order.have_answered
                    answer(urls=processes.urls, model=order.model)
                if reason := processes.hopeless():
                    raise UserError(reason)
                time.sleep(PAUSE)
            answer(gone="its servers were ended by somebody")
    except (UserError, OSError) as error:
        answer(gone=str(error))
        raise
    return None


def _wait_for_order(folder: Path, asked_to_end: Callable[[], bool]) -> Order | None:
    said = time.monotonic()
    while (order := _read_order(folder)) is None and not asked_to_end():
        if time.monotonic() - said > SAY:
            logger.warning("no run has come to %s yet", folder)
            said = time.monotonic()
        time.sleep(PAUSE)
    return order


def _machines(folder: Path) -> list[str]:
    """
    Raises:
        UserError: not the user's own folder, or nobody serves.
    """
    if not folder.is_dir():
        raise UserError(f"rendezvous={folder} is no folder: make it on a disk that all machines share, with mode 700")
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise UserError(
            f"rendezvous={folder} can be read by others, and the servers' key stands in it: chmod 700 {folder}"
        )
    names = (folder / MACHINES).read_text(encoding="utf-8").split() if (folder / MACHINES).exists() else []
    if not names:
        raise UserError(
            f"{folder / MACHINES} names no machine: write one a line, each with a launch/serve_vllm.py running"
        )
    return names


def _read(folder: Path, name: str) -> dict | None:
    """None: it has not been written. What is renamed over at this moment may be missing, or stale on NFS, for a moment."""
    for _ in range(LOOKS):
        try:
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            time.sleep(PAUSE / LOOKS)
    return None


def _read_order(folder: Path) -> Order | None:
    found = _read(folder, ORDER.removesuffix(".json"))
    return None if found is None else Order(**found)
