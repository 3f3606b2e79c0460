"""Who holds a run folder, and whether that process or its Slurm job has ended."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

__all__ = ["Holder"]

ANSWER_SECONDS = 10.0  # for Slurm's answer
# In which a job's processes may be running.
ACTIVE_STATES = {
    "RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED",
}  # fmt: skip


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder.

    Attributes:
        token: tells it from any other, also where a file's number comes back.
        host: its name.
        boot, namespace: where they agree, too, processes have the same numbers; None on a system without /proc.
        pid, started: its number, and the clock ticks from boot to its start, which tell it from a later process of that number.
        cluster, job, restarts: in Slurm; None, None, 0 elsewhere.
        since: when it took the folder, by its own clock.
    """

    token: str
    host: str
    boot: str | None
    namespace: str | None
    pid: int
    started: int | None
    cluster: str | None
    job: str | None
    restarts: int
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        boot = namespace = started = None
        with contextlib.suppress(OSError):
            # A container may see the /proc of its host, where processes have other numbers than in it.
            if os.readlink("/proc/self") == str(os.getpid()):
                boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                namespace = os.readlink("/proc/self/ns/pid")
                started = _state_and_start(os.getpid())[1]
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=boot,
            namespace=namespace,
            pid=os.getpid(),
            started=started,
            cluster=os.environ.get("SLURM_CLUSTER_NAME"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )

    @property
    def name(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        start = f" (start {self.restarts + 1})" if self.job and self.restarts else ""
        return f"process {self.pid} on {self.host}{job}{start}"

    @property
    def _machine(self) -> tuple:
        return self.host, self.boot, self.namespace

    def is_same_process(self, other: Holder) -> bool:
        return (*self._machine, self.pid, self.started) == (*other._machine, other.pid, other.started)

    def has_ended(self, here: Holder) -> bool:
        """Whether that can be known at once from the process `here`; False: it lives, or nothing can be said."""
        same_job = self.job is not None and (self.cluster, self.job) == (here.cluster, here.job)
        if same_job and self.restarts < here.restarts:  # Slurm has ended it before it queued the job again
            return True
        if self.boot and self.namespace and self._machine == here._machine:
            return _process_has_ended(self.pid, self.started)
        return self.job is not None and not same_job and _job_has_ended(self.cluster, self.job, self.restarts)


def _process_has_ended(pid: int, started: int | None) -> bool:
    """Whether a process of this machine has; False also where that cannot be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        pass
    try:
        state, began = _state_and_start(pid)
    except OSError:  # hidden, as /proc can be mounted
        return False
    return state in "ZX" or began != started


def _state_and_start(pid: int) -> tuple[str, int]:
    """A process's state (proc(5): Z and X have ended), and clock ticks from boot to its start."""
    # Its name stands in brackets and may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _job_has_ended(cluster: str | None, job: str, restarts: int) -> bool:
    """Whether Slurm says so of that start of a job; False also where there is no Slurm, or no answer."""
    if cluster is not None:
        here = re.search(r"^ClusterName\s*=\s*(\S+)", _ask("scontrol", "show", "config"), re.M)
        if here is None or here[1] != cluster:  # another cluster's job may have the number
            return False
    answer = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=State:30,RestartCnt:10")
    if "Invalid job id" in answer:  # Slurm forgets jobs some minutes after their end
        return True
    said = re.search(r"^([A-Z_]+)\s+(\d+)\s*$", answer, re.M)
    if said is None:
        return False
    state, now = said[1], int(said[2])
    # A job that is queued again is counted as another start while processes of the last one still come to their end.
    return state not in ACTIVE_STATES or (now > restarts and state != "COMPLETING")


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
