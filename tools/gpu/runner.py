"""Runs sections one after the other in a process of its own, so that a crash, a hang or a broken GPU ends one section only.

One process runs all of them, because starting one takes long; it is replaced when a section raises, is out of time or takes the
process with it. What a section finds is sent at once: what was found before the end stands.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tools.gpu.report import Check, Section, Value

__all__ = ["Findings", "Plan", "Settings", "Skip", "run_plans"]


@dataclass(frozen=True)
class Plan:
    """A section: `run(findings)` of a module, and the seconds after which it is ended."""

    name: str
    module: str
    budget: float
    function: str = "run"


@dataclass(frozen=True)
class Settings:
    """device: "cuda", or "cpu" for every section at tiny sizes. seed: of all random numbers."""

    device: str
    seed: int = 1

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"


class Skip(Exception):
    """What a section needs is not here; its text says what."""


class BrokenDevice(Exception):
    """The GPU answers no more in this process."""


class Findings:
    """What a section tells. Every call is sent at once."""

    def __init__(self, connection: Connection, settings: Settings, budget: float):
        self._connection = connection
        self.settings = settings
        self._end = time.monotonic() + budget

    @property
    def tiny(self) -> bool:
        return self.settings.tiny

    def row(self, table: str, **values) -> None:
        """A row of numbers and words in a table of the section."""
        for name, value in values.items():
            assert isinstance(value, Value), f"{name}={value!r} cannot be written as JSON"
        self._connection.send(("row", table, values))

    def check(self, name: str, value: float, limit: float) -> None:
        """`value` must be at most `limit`."""
        self._connection.send(("check", Check(name, float(value), float(limit))))

    def equal(self, name: str, found, expected) -> None:
        """Must be the same."""
        error = None if found == expected else f"{found} is not {expected}"
        self._connection.send(("check", Check(name, float(found != expected), 0.0, error)))

    def note(self, text: str) -> None:
        self._connection.send(("note", text))

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def enough_time(self, seconds: float, what: str) -> bool:
        """Whether that many seconds are left; else it is noted what was left out."""
        if self.seconds_left() >= seconds:
            return True
        self.note(f"no time left for {what}")
        return False

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What raises inside is a failed check, and the section goes on.

        Raises:
            BrokenDevice: it cannot, because the GPU answers no more.
        """
        try:
            yield
        except Skip:
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = _one_line(error)
            self._connection.send(("check", Check(name, None, 0.0, text)))
            if not _device_works():
                raise BrokenDevice(f"{name}: {text}; the GPU answers this process no more") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _device_works() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return float(torch.ones(2, device="cuda").sum()) == 2.0
    except RuntimeError:  # what CUDA's errors are in torch
        return False


def _work(connection: Connection, plans: Sequence[Plan], settings: Settings, describe: str | None) -> None:
    """A worker: sections until one raises."""
    os.setsid()
    os.dup2(2, 1)  # tables stand on stdout alone
    try:
        if describe is not None:
            connection.send(("machine", _described(describe, settings)))
        for plan in plans:
            connection.send(("begin", plan.name))
            try:
                run = getattr(importlib.import_module(plan.module), plan.function)
                run(Findings(connection, settings, plan.budget))
            except Skip as skip:
                connection.send(("end", "skipped", str(skip)))
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the others run
                traceback.print_exc()
                connection.send(("end", "failed", _one_line(error)))
                break
            else:
                connection.send(("end", "ok", None))
            _clear_memory()
    finally:
        connection.close()
        sys.stderr.flush()
        os._exit(0)  # neither Megatron's processes nor CUDA's threads are waited for


def _described(describe: str, settings: Settings) -> dict:
    module, function = describe.split(":")
    try:
        return getattr(importlib.import_module(module), function)(settings)
    except Exception as error:  # noqa: BLE001  whatever it is, the sections say what they lack
        traceback.print_exc()
        return {"error": _one_line(error)}


def _clear_memory() -> None:
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Runner:
    """One call of `run_plans`."""

    def __init__(self, plans: Sequence[Plan], settings: Settings, save: Callable, show: Callable, describe: str | None):
        self.plans = list(plans)
        self.settings = settings
        self.save, self.show = save, show
        self.describe = describe
        self.sections: list[Section] = []
        self.machine: dict | None = None
        # CUDA does not survive a fork; without it a fork has imported what this process has.
        self.context = multiprocessing.get_context("fork" if settings.device == "cpu" else "spawn")

    def run(self) -> list[Section]:
        self.save(self.machine, self.sections)
        while self.plans:
            ours, theirs = self.context.Pipe()
            describe = self.describe if self.machine is None else None
            process = self.context.Process(target=_work, args=(theirs, self.plans, self.settings, describe))
            process.start()
            theirs.close()
            try:
                self._listen(process, ours)
            finally:
                _end(process)
        return self.sections

    def _listen(self, process: BaseProcess, connection: Connection) -> None:
        """Until the worker ends or a section is out of time. The first section's time begins with the worker's start."""
        begun = time.monotonic()
        ended = len(self.sections)
        current: Section | None = None
        try:
            while True:
                plan = self.plans[0] if self.plans else None
                budget = plan.budget if plan else 5.0
                if not connection.poll(max(0.0, begun + budget - time.monotonic())):
                    if plan is None:
                        return
                    reason = f"ended after its {budget:.0f} seconds; what it had found stands"
                    self._finish(current or Section(plan.name, plan.budget), "failed", reason, begun)
                    return
                kind, *values = connection.recv()
                if kind == "machine":
                    (self.machine,) = values
                elif kind == "begin":
                    current = Section(values[0], plan.budget)
                elif kind == "end":
                    self._finish(current, *values, begun)
                    current, begun = None, time.monotonic()
                else:
                    _add(current, kind, values)
                    self.save(self.machine, [*self.sections, current])
        except EOFError:
            process.join()
            if current is not None or (self.plans and len(self.sections) == ended):
                section = current or Section(self.plans[0].name, self.plans[0].budget)
                self._finish(section, "failed", f"its process ended {_how(process.exitcode)}", begun)

    def _finish(self, section: Section, status: str, reason: str | None, begun: float) -> None:
        section.end(status, reason, time.monotonic() - begun)
        self.plans.pop(0)
        self.sections.append(section)
        self.save(self.machine, self.sections)
        self.show(section)


def _add(section: Section, kind: str, values: list) -> None:
    if kind == "row":
        table, row = values
        section.numbers.setdefault(table, []).append(row)
    elif kind == "check":
        section.checks.append(values[0])
    else:
        section.notes.append(values[0])


def _how(code: int) -> str:
    if code is not None and code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with code {code}"


def _end(process: BaseProcess) -> None:
    """With what it has started."""
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    process.close()


def run_plans(
    plans: Sequence[Plan],
    settings: Settings,
    save: Callable[[dict | None, Sequence[Section]], None],
    show: Callable[[Section], None] = lambda section: None,
    describe: str | None = None,
) -> list[Section]:
    """Run sections in order; none stops another.

    Args:
        save: called with the machine and all sections after everything that is found.
        show: called with every section that has ended.
        describe: "module:function" that tells what machine this is, asked once, in the worker.
    """
    return Runner(plans, settings, save, show, describe).run()
