"""The multi-rank harness: run one function on N processes and get every rank's result.

    results = run_ranks(scenario, 4, argument, sizes=ParallelSizes(tensor=2, pipeline=2))

`scenario(device, argument)` is a module-level function. Every rank calls `initialize(sizes)` first, as a recipe does,
through the environment variables of torchrun. The parent holds the rendezvous store, as torchrun does, so no port is
ever guessed. With `cuda=True` the same function runs on NCCL, one GPU per rank; otherwise on gloo.

Ranks on the CPU are forked from a process that has done nothing but imports: most of the time of a fresh process would be those.
Ranks on GPUs are fresh ones: CUDA does not survive a fork.

A rank that raises, crashes or hangs ends the run with a `RankError` that carries its output, traceback included.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.context
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, shutdown

__all__ = ["RankError", "cuda_devices", "end", "forking", "hide_gpus", "run_ranks"]

ROOT = Path(__file__).parents[1]
KEPT_DEVICES = "TEST_CUDA_VISIBLE_DEVICES"  # what hide_gpus() hid, for the ranks that want GPUs
ALL_DEVICES = "all"
PRELOADED = ["tests.preloaded"]
OUTPUT_LIMIT = 6000
GRACE_SECONDS = 3.0  # for the other ranks to say what they saw when one has failed


class RankError(AssertionError):
    """A rank failed, or the run took too long."""


def hide_gpus() -> None:
    """Make this process, and what it starts, run on the CPU; `cuda_devices` and `run_ranks(cuda=True)` still see GPUs.

    Without a GPU in sight, unit tests mean the same on every machine. Call it before CUDA is first used.
    """
    if KEPT_DEVICES not in os.environ:
        os.environ[KEPT_DEVICES] = os.environ.get("CUDA_VISIBLE_DEVICES", ALL_DEVICES)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _with_gpus(env: dict[str, str]) -> dict[str, str]:
    kept = env.get(KEPT_DEVICES)
    if kept == ALL_DEVICES:
        env.pop("CUDA_VISIBLE_DEVICES")
    elif kept is not None:
        env["CUDA_VISIBLE_DEVICES"] = kept
    return env


@functools.cache
def cuda_devices() -> int:
    """GPUs that `run_ranks(cuda=True)` can use."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    out = subprocess.run(command, env=_with_gpus(dict(os.environ)), capture_output=True, text=True, timeout=300)
    return int(out.stdout) if out.returncode == 0 else 0


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    sizes: ParallelSizes | None = None,
    timeout: float = 900.0,
    cuda: bool = False,
) -> list[Any]:
    """Run `function(device, *args)` on `ranks` processes; returns the results in rank order.

    Args:
        function: found by module and name in the ranks, so a module-level function of an importable module.
        sizes: parallel sizes of the run, 1 x 1 by default.
        timeout: seconds after which the ranks are ended; by default more than a machine with much else to do needs.
        cuda: NCCL on GPUs instead of gloo on CPUs.

    Raises:
        RankError: a rank failed or the run took too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"module": function.__module__, "name": function.__qualname__, "args": args, "timeout": timeout}
        torch.save(job | {"sizes": sizes or ParallelSizes()}, folder / "job.pt")
        # Port 0: the system chooses. The ranks connect as clients, rank 0 included.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [_start(rank, ranks, store.port, folder, cuda) for rank in range(ranks)]
        try:
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                end(process)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _start(rank: int, ranks: int, port: int, folder: Path, cuda: bool) -> BaseProcess:
    env = dict(os.environ)
    if cuda:
        env = _with_gpus(env)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
        if sys.platform == "linux":  # gloo otherwise looks up the host's name, which need not resolve
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }
    context = multiprocessing.get_context("spawn") if cuda else forking()
    process = context.Process(target=_rank_main, args=(folder, rank, env))
    process.start()
    return process


def forking() -> multiprocessing.context.ForkServerContext:
    """Makes processes that have imported what `tests.preloaded` imports, and share nothing else with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def end(process: BaseProcess) -> None:
    """End a process that has not ended well, with the processes it started."""
    if process.exitcode != 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    process.close()


def _wait(processes: list[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(p.exitcode is None for p in processes):
        if any(p.exitcode for p in processes):
            time.sleep(GRACE_SECONDS)
            break
        if time.monotonic() > deadline:
            raise RankError(f"the ranks did not finish within {timeout} s\n{_outputs(processes, folder)}")
        time.sleep(0.05)
    if any(p.exitcode for p in processes):
        raise RankError(_outputs(processes, folder))


def _outputs(processes: list[BaseProcess], folder: Path) -> str:
    """The output of every rank; those that raised by themselves, not for losing a peer, usually come first in time."""
    parts = []
    for rank, process in enumerate(processes):
        code = process.exitcode
        state = "still running" if code is None else f"exit status {code}"
        text = (folder / f"{rank}.log").read_text(errors="replace")[-OUTPUT_LIMIT:]
        parts.append(f"--- rank {rank} of {len(processes)}: {state}\n{text}")
    return "\n".join(parts)


def _rank_main(folder: Path, rank: int, env: dict[str, str]) -> None:
    """What a rank does. It ends without Python's shutdown, which could wait for a lost peer."""
    os.setsid()
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("ignore")
    status = 1
    try:
        job = torch.load(folder / "job.pt", weights_only=False)
        signal.alarm(int(job["timeout"]) + 30)  # the rank ends even where the parent could not end it
        torch.set_num_threads(1)
        function = getattr(importlib.import_module(job["module"]), job["name"])
        device = initialize(job["sizes"], timeout_minutes=job["timeout"] / 60)
        set_seed(1)
        result = function(device, *job["args"])
        torch.save(result, folder / f"{rank}.pt")
        dist.barrier()
        shutdown()
        status = 0
    finally:
        if status:
            traceback.print_exc()
        for child in multiprocessing.active_children():  # Megatron keeps one for its checkpoints
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
