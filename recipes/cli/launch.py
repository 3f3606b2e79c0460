"""From a command line to running ranks.

A recipe is started in one of two ways, and runs the same code in both:

- `python recipes/train_x.py trainer.devices=N ...`: this process reads the configuration, starts N ranks on this machine, waits
  for them, and ends all of them when one fails. Where there is no GPU it imports what they need, and forks them;
- under torchrun: this process is one rank, and reads the configuration itself. SLURM starts one torchrun on each node.

Bad input ends in one line on stderr and exit code 2, whichever rank found it; nothing else is printed for it. (Under
torchrun every rank that finds it prints the line, and torchrun adds its own report.)
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megatron_ext.errors import UserError
from megatron_ext.runtime.install_check import check_installation
from recipes.cli.stopping import ENDING, exit_code, listen
from recipes.registry import RECIPES

__all__ = ["run", "usable_cores"]

ERROR_VARIABLE = "MEGATRON_EXT_ERROR"  # set for the ranks that this module starts
GRACE_SECONDS = 10.0
SIGNALS = (signal.SIGUSR1, *ENDING)


def run(main: Callable[..., None], script: str, beside: Callable[[], Any] | None = None) -> None:
    """Run `main(resolved configuration)` on every rank, then exit, without the second that Python takes to undo its imports.

    A script puts the repository where Python has put the script's own folder, `recipes/`, whose `data` and `run` would hide a
    user's modules of these names; those of the working directory are found behind it.

    Args:
        main: the recipe; receives the resolved YAML as plain data. Raises UserError for bad input.
        script: the entry script's path; recipes.registry knows its default YAML.
        beside: called on every rank as soon as torch is there, to begin what takes its time beside all else; what it returns is
            the recipe's second argument.
    """
    sys.path.append(str(Path.cwd()))
    # Read when CUDA starts. Megatron overlaps tensor-parallel communication with products only in this order of launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _quieten()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _fail(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks of this script, and each would start its own ranks: "
            "let srun start one torchrun per node (--ntasks-per-node=1), and torchrun this script"
        )
    config = _command_line(Path(script).stem)
    ranks, nodes = _processes(config)
    # What cannot be gone on with is ended at once.
    ending = ENDING if RECIPES[Path(script).stem].resumes else ()
    if "RANK" in os.environ or ranks == nodes == 1:
        # torchrun ends ranks by SIGTERM when one of them has failed.
        listen(*(number for number in ending if number == signal.SIGINT or "RANK" not in os.environ))
        _run_rank(main, config, beside)
        atexit._run_exitfuncs()
        _end(exit_code())
    elif nodes > 1:
        _fail(
            f"trainer.num_nodes={nodes} needs a launcher that starts the ranks on every node: run this "
            "script under torchrun on each of them"
        )
    else:
        sys.exit(_run_ranks(main, config, ranks, beside, ending))


def _quieten() -> None:
    """Libraries' warnings that no user can act upon."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|nemo|lightning|pydub|hydra|nv_one_logger)\.")
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # NeMo's telemetry, which is off and says so twice


def _command_line(name: str) -> dict:
    """The configuration that the command line asks for."""
    from recipes.cli.compose import command_line, forced
    from recipes.cli.errors import user_errors

    with user_errors():
        return command_line(forced(sys.argv[1:]), RECIPES[name].default, script=name)


def _processes(config: dict) -> tuple[int, int]:
    """(processes on this machine, machines). What is no positive integer counts as 1, and is refused by the recipe."""
    trainer = config.get("trainer")
    counts = [trainer.get(key) if isinstance(trainer, dict) else None for key in ("devices", "num_nodes")]
    ranks, nodes = (count if isinstance(count, int) and count > 0 else 1 for count in counts)
    return ranks, nodes


def _fail(error: object) -> None:
    """One line, exit code 2. A rank of ours hands the line to its parent; the first one wins."""
    line = " ".join(str(error).split())
    path = os.environ.get(ERROR_VARIABLE)
    if path is None:
        print(f"error: {line}", file=sys.stderr)
    else:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(line)
        except FileExistsError:
            pass
    _end(2)  # other threads and peers may be inside a collective that will never end


def _end(code: int) -> NoReturn:
    """At once, without waiting for anybody."""
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(code)


def _run_rank(main: Callable[..., None], config: dict, beside: Callable[[], Any] | None) -> None:
    _set_up_logging()
    try:
        check_installation()
        import torch  # noqa: F401

        begun = () if beside is None else (beside(),)
        from megatron_ext.runtime.cpu import import_megatron

        import_megatron()
        main(config, *begun)
    except Exception as error:
        from recipes.cli.errors import is_user_error, one_line

        if not is_user_error(error):
            if os.path.exists(os.environ.get(ERROR_VARIABLE, "")):
                _end(2)  # a peer has found bad input; that its connection is lost is no news
            raise
        _fail(one_line(error))
    from megatron_ext.runtime.distributed import shutdown

    shutdown()


class _CurrentErrors(logging.StreamHandler):
    """Writes to what sys.stderr is when something is said: a panel on a terminal takes its place for a while."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: object) -> None:
        """As it is made."""


def _set_up_logging() -> None:
    """Our choices from rank 0, libraries' warnings from all."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True, handlers=[_CurrentErrors()])
    if os.environ.get("RANK", "0") == "0":
        for package in ("megatron_ext", "recipes"):
            logging.getLogger(package).setLevel(logging.INFO)


def _run_ranks(
    main: Callable[..., None], config: dict, ranks: int, beside: Callable[[], Any] | None, ending: Sequence[int]
) -> int:
    """Start the ranks and wait. Returns the exit code.

    Args:
        ending: signals of which the first one asks the ranks to stop.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))  # read when torch is imported
    context = _context()
    import torch.distributed as dist

    # The ranks' rendezvous, as under torchrun: the system chooses the port, and it is taken from then on.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megatron_ext_") as folder:
        error_path = Path(folder, "error")
        shared = {
            ERROR_VARIABLE: str(error_path),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        processes: list[BaseProcess] = []
        # None is lost, and none is taken by a rank that has not chosen yet what to do about it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in range(ranks):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(context.Process(target=_rank, args=(main, config, beside, own), name=f"rank {rank}"))
                processes[-1].start()
            if signal.SIGTERM not in ending:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            listen(*ending, tell=lambda: _ask_all(processes))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            code = _wait(processes) or exit_code()
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        finally:
            _stop(processes)
        if error_path.exists():
            print(f"\nerror: {error_path.read_text(encoding='utf-8')}", file=sys.stderr)  # after a progress bar
            return 2
        return code


def _context() -> multiprocessing.context.BaseContext:
    """How ranks are made: CUDA survives no fork, and a fork has all that was imported."""
    try:
        check_installation()
    except UserError as error:
        _fail(error)
    import torch

    from megatron_ext.runtime.cpu import import_megatron

    import_megatron()
    fork = sys.platform == "linux" and not torch.cuda.is_available()
    return multiprocessing.get_context("fork" if fork else "spawn")


def _rank(main: Callable[..., None], config: dict, beside: Callable[[], Any] | None, own: dict[str, str]) -> None:
    """What a started process does. Ctrl-C reaches it, too, and its parent tells it what that means."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.update(own)
    _quieten()
    _run_rank(main, config, beside)


def _ask_all(processes: list[BaseProcess]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)


def _wait(processes: list[BaseProcess]) -> int:
    """Until all have ended well, or one has not."""
    while True:
        codes = [p.exitcode for p in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0]
            if code != 2:
                print(f"rank {rank} ended with code {code}; stopping the others", file=sys.stderr)
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        multiprocessing.connection.wait([p.sentinel for p, code in zip(processes, codes, strict=True) if code is None])


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def usable_cores() -> int:
    """Cores this process may run on, which taskset, SLURM or a container may have cut down; macOS cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
