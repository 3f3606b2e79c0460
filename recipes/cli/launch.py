"""From a command line to running ranks.

A recipe is started in one of two ways, and runs the same code in both:

- `python recipes/train_x.py trainer.devices=N ...`: this process reads the configuration, starts N ranks on this machine, waits
  for them, and ends all of them when one fails;
- under torchrun: this process is one rank, and reads the configuration itself. SLURM starts one torchrun on each node.

Bad input ends in one line on stderr and exit code 2, whichever rank found it; nothing else is printed for it. (Under
torchrun every rank that finds it prints the line, and torchrun adds its own report.)
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_ext.runtime.install_check import check_installation
from recipes.cli.stopping import listen
from recipes.registry import RECIPES

__all__ = ["run"]

# Set for the ranks that this module starts.
CONFIG_VARIABLE, ERROR_VARIABLE = "MEGATRON_EXT_CONFIG", "MEGATRON_EXT_ERROR"
GRACE_SECONDS = 10.0


def run(main: Callable[[dict], None], script: str) -> None:
    """Run `main(resolved configuration)` on every rank, then exit.

    A script puts the repository where Python has put the script's own folder, `recipes/`, whose `data` and `run` would hide a
    user's modules of these names; those of the working directory are found behind it.

    Args:
        main: the recipe; receives the resolved YAML as plain data. Raises UserError for bad input.
        script: the entry script's path, started again for each rank; recipes.registry knows its default YAML.
    """
    sys.path.append(str(Path.cwd()))
    # Read when CUDA starts. Megatron overlaps tensor-parallel communication with products only in this order of launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|nemo|lightning|pydub|hydra|nv_one_logger)\.")
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # NeMo's telemetry, which is off and says so twice
    if CONFIG_VARIABLE in os.environ:
        config = json.loads(Path(os.environ[CONFIG_VARIABLE]).read_text(encoding="utf-8"))
        _run_rank(main, config)
        return
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _fail(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks of this script, and each would start its own ranks: "
            "let srun start one torchrun per node (--ntasks-per-node=1), and torchrun this script"
        )
    config = _command_line(Path(script).stem)
    ranks, nodes = _processes(config)
    if "RANK" in os.environ or ranks == nodes == 1:
        _run_rank(main, config)
    elif nodes > 1:
        _fail(
            f"trainer.num_nodes={nodes} needs a launcher that starts the ranks on every node: run this "
            "script under torchrun on each of them"
        )
    else:
        sys.exit(_run_ranks(script, config, ranks))


def _command_line(name: str) -> dict:
    """The configuration that the command line asks for. Ranks that are handed theirs need no Hydra."""
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
    sys.stdout.flush()
    sys.stderr.flush()
    _end(2)  # other threads and peers may be inside a collective that will never end


def _end(code: int) -> NoReturn:
    """At once, without waiting for anybody."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(code)


def _run_rank(main: Callable[[dict], None], config: dict) -> None:
    _set_up_logging()
    listen()
    try:
        check_installation()
        from megatron_ext.runtime.cpu import import_megatron

        import_megatron()
        main(config)
    except Exception as error:
        from recipes.cli.errors import is_user_error, one_line

        if not is_user_error(error):
            if os.path.exists(os.environ.get(ERROR_VARIABLE, "")):
                _end(2)  # a peer has found bad input; that its connection is lost is no news
            raise
        _fail(one_line(error))
    from megatron_ext.runtime.distributed import shutdown

    shutdown()


def _set_up_logging() -> None:
    """Our choices from rank 0, libraries' warnings from all."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    if os.environ.get("RANK", "0") == "0":
        for package in ("megatron_ext", "recipes"):
            logging.getLogger(package).setLevel(logging.INFO)


def _run_ranks(script: str, config: dict, ranks: int) -> int:
    """Start the ranks and wait. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="megatron_ext_") as folder:
        config_path, error_path = Path(folder, "config.json"), Path(folder, "error")
        config_path.write_text(json.dumps(config), encoding="utf-8")
        environment = {
            **os.environ,
            CONFIG_VARIABLE: str(config_path),
            ERROR_VARIABLE: str(error_path),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _usable_cores() // ranks)))
        processes = []
        signal.signal(signal.SIGUSR1, lambda *_: [p.send_signal(signal.SIGUSR1) for p in processes])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for rank in range(ranks):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen([sys.executable, script], env=own))
            code = _wait(processes)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        finally:
            _stop(processes)
        if error_path.exists():
            print(f"\nerror: {error_path.read_text(encoding='utf-8')}", file=sys.stderr)  # after a progress bar
            return 2
        return code


def _wait(processes: list[subprocess.Popen]) -> int:
    """Until all have ended well, or one has not."""
    while True:
        codes = [p.poll() for p in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0]
            if code != 2:
                print(f"rank {rank} ended with code {code}; stopping the others", file=sys.stderr)
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _usable_cores() -> int:
    """Cores this process may run on, which taskset, SLURM or a container may have cut down; macOS cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
