"""NeMo's exp_manager and its loggers in a process of their own.

Importing NeMo and Lightning takes as long as everything else that a short run needs, and on rank 0 alone it would make all ranks
wait: here it happens beside the reading of data and the building of the model, and numbers and tables are written beside the
next step.

Only the standard library is imported by this module itself.
"""

from __future__ import annotations

import contextlib
import html
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_ext.errors import UserError

__all__ = ["LoggedTable", "LogProcess"]

logger = logging.getLogger(__name__)

GONE = (EOFError, BrokenPipeError, ConnectionResetError)
PATIENCE_SECONDS = 120  # with loggers that send over a network, when the run is over


@dataclass(frozen=True)
class LoggedTable:
    """What is to be read rather than drawn.

    Attributes:
        rows: numbers and texts, as many as there are columns.
    """

    name: str
    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """Whatever the texts hold, they are shown and not followed."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = html.escape(f"{value:.6g}" if isinstance(value, float) else str(value)).replace("\n", "<br>")
    return "".join(f"&#{ord(c)};" if c in "|\\`*_[]" else c for c in text if c.isprintable())


class LogProcess:
    """Loggers of one run, as `megatron_ext.runtime.metrics.MetricsLog` wants one. See `start`."""

    def __init__(self, process: multiprocessing.process.BaseProcess | None = None, pipe: Connection | None = None):
        self._process, self._pipe = process, pipe

    @classmethod
    def start(cls) -> LogProcess:
        """Begin to import what loggers need, on rank 0; other ranks get one that does nothing. Call it early: after torch is
        imported, which a fork then has, before Megatron, which it need not have, and before CUDA is used."""
        if os.environ.get("RANK", "0") != "0":
            return cls()
        # A fork has torch already; where there is none, or it is not safe, a new process imports it, too.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, ours), name="loggers", daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def open(self, manager: Mapping[str, Any], mlflow: Mapping[str, Any] | None) -> None:
        """Let exp_manager make the run's folder, and start the loggers.

        Args:
            manager: its keys, see NeMo.
            mlflow: arguments of Lightning's MLFlowLogger; None: no such logger.

        Raises:
            UserError: a logger that cannot be started.
        """
        try:
            self._pipe.send((dict(manager), mlflow))
            error = self._pipe.recv()
        except GONE:
            error = f"their process ended with code {self._code()}"
        if error is not None:
            raise UserError(f"exp_manager: the loggers cannot be started: {error}")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Hand over the numbers of a step; they are written beside the next one."""
        self._send(metrics, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """The same for a table of numbers and texts."""
        self._send(LoggedTable(name, list(columns), [list(row) for row in rows]), step)

    def _send(self, what: dict[str, float] | LoggedTable, step: int) -> None:
        if self._pipe is None:
            return
        try:
            self._pipe.send((what, step))
        except GONE:
            logger.warning(
                "the process of TensorBoard and other loggers has ended with code %s: they get no more; metrics.jsonl does",
                self._code(),
            )
            self._pipe = None

    def finalize(self, status: str) -> None:
        """Write all that has been handed over, and end the process.

        Args:
            status: "success" or "failed", for loggers that tell.
        """
        if self._process is None:
            return
        with contextlib.suppress(*GONE):
            if self._pipe is not None:
                self._pipe.send(status)  # a process that was forked since may hold our end, too
        self._process.join(PATIENCE_SECONDS)
        if self._process.is_alive():
            logger.warning(
                "loggers have not written all within %d s and are left: see their own pages", PATIENCE_SECONDS
            )
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _code(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _serve(pipe: Connection, parents: Connection) -> None:
    """The process: import, open, write until it is told how the run ended, or the run is gone."""
    parents.close()  # or its end would never be seen
    for number in (signal.SIGINT, signal.SIGUSR1):  # they go to all processes of a job; this one ends with its run
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    # A run that is killed meanwhile must not leave this one with its terminal or pipe for the seconds that imports take.
    opened = threading.Event()
    threading.Thread(target=_end_with_parent, args=(opened,), daemon=True).start()
    from megatron_ext.runtime.cpu import imports_without

    with imports_without("triton", "wandb", "megatron", "scipy"):  # uses that are not ours
        import lightning.pytorch  # noqa: F401
        import nemo.utils.exp_manager  # noqa: F401

    loggers: list = []
    status = "failed"  # of a run that is gone without a word
    try:
        asked = pipe.recv()
        if isinstance(asked, str):
            return
        opened.set()
        try:
            loggers += _loggers(*asked)
        except Exception as error:  # noqa: BLE001  whatever a logger's library raises
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return
        pipe.send(None)
        while not isinstance(asked := pipe.recv(), str):
            _write(loggers, *asked)
        status = asked
    except GONE:
        pass
    finally:
        for each in loggers:
            with contextlib.suppress(Exception):
                each.finalize(status)
        # It finishes, and waits for a process of its own, when Python exits: a fork does not.
        if wandb := sys.modules.get("wandb"):
            wandb.finish(exit_code=0 if status == "success" else 1)
            wandb.teardown()


def _end_with_parent(opened: threading.Event) -> None:
    """Until the run's folder is opened there is nothing to be lost."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    if not opened.is_set():
        os._exit(1)


def _write(loggers: list, what: dict[str, float] | LoggedTable, step: int) -> None:
    """One that fails is left out from then on."""
    for each in list(loggers):
        try:
            if isinstance(what, LoggedTable):
                _write_table(each, what, step)
            else:
                each.log_metrics(what, step=step)
        except Exception as error:  # noqa: BLE001  whatever a logger's library raises
            loggers.remove(each)
            print(
                f"{type(each).__name__} gets no more numbers after step {step}: {' '.join(str(error).split())[:300]}; "
                "metrics.jsonl does",
                file=sys.stderr,
                flush=True,
            )


def _write_table(to: Any, table: LoggedTable, step: int) -> None:
    """As each logger has it: text in TensorBoard, a table in W&B, a file of the run in MLflow."""
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    if isinstance(to, TensorBoardLogger):
        to.experiment.add_text(table.name, table.markdown(), step)
    elif isinstance(to, WandbLogger):
        to.log_table(table.name, columns=table.columns, data=table.rows, step=step)
    elif isinstance(to, MLFlowLogger):
        to.experiment.log_text(to.run_id, table.markdown(), f"{table.name}/step-{step:06d}.md")


def _loggers(manager: dict[str, Any], mlflow: dict[str, Any] | None) -> list:
    """Lightning's, by exp_manager, which makes the run's folder."""
    from lightning.pytorch import Trainer
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    nemo_logging.setLevel(nemo_logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    exp_manager(trainer, manager)
    found = list(trainer.loggers)
    if mlflow is not None:  # exp_manager of NeMo 3.0 cannot: it names the run twice
        from lightning.pytorch.loggers import MLFlowLogger

        found.append(MLFlowLogger(**mlflow))
    return found
