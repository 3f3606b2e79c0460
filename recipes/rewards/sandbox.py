"""Programs that nobody trusts, run by bubblewrap: no network, no disk but a small one in memory, and limits of everything.

What a program sees: the interpreter and the system's libraries, read-only; /tmp, which is gone afterwards; its own processes.
Where this process is root it runs as a user that nobody else is, because no process limit binds root; else in a namespace of
this user's, whose processes are counted apart. What they hold together is bounded by a control group (`recipes.rewards.cgroup`),
or added up where none can be made (`recipes.rewards.resident`). Some system calls are not to be had (`recipes.rewards.seccomp`).
A program that breaks a limit is killed with all that it has started.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import UserError
from recipes.rewards.cgroup import ControlGroup, groups_home
from recipes.rewards.resident import resident_in
from recipes.rewards.seccomp import syscall_filter

__all__ = ["START", "Outcome", "SandboxError", "SandboxLimits", "bubblewrap", "check_kernel", "run_program"]

COUNTS_APART = (5, 14)  # since then RLIMIT_NPROC counts each user namespace's processes alone
LOOK_SECONDS = 0.05  # between looks at the memory of all its processes
STARTS_SECONDS = 60.0  # for an interpreter on a machine that is busy
STARTERS = 3  # processes that are not the program's: two of bubblewrap's, and its parent
START = "start"
RUNNER = Path(__file__).parent / "inside" / "runner.py"


class SandboxError(UserError):
    """No program can be run, or the sandbox itself has failed: that says nothing of a program."""


@dataclass(frozen=True)
class SandboxLimits:
    """
    Attributes:
        seconds: of a program, by the clock; and of each of its processes on a CPU.
        memory: bytes, of all its processes together and of each one's addresses. A control group holds memory and disk together.
        disk: bytes in /tmp, which are memory.
        processes: and threads.
        output: bytes that it writes to both streams.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 1 << 26
    processes: int = 32
    output: int = 1 << 20

    def __post_init__(self):
        if min(self.seconds, self.memory, self.disk, self.processes, self.output) <= 0:
            raise UserError(f"limits of a sandbox must be positive, got {self}")


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        output: what it wrote to its standard output.
        code: its exit code; None: it was killed, or stopped by a limit.
        reached_end: whether its last line was run: `sys.exit(0)` before that is no end.
        killed: which limit it broke; None: none. START: it has not begun in time, twice, which says nothing of it.
    """

    output: bytes
    code: int | None
    reached_end: bool
    killed: str | None = None


@functools.cache
def bubblewrap() -> str:
    """Where bubblewrap is, once it has run a program.

    Raises:
        SandboxError: there is none, or it cannot make what it needs here.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("bubblewrap is not installed (no bwrap on PATH; the Debian package is bubblewrap)")
    check_kernel(platform.release(), os.geteuid())
    try:
        done = _run(found, ["print(6 * 7)"], b"", SandboxLimits(), None)
    except SandboxError:
        raise
    except UserError as error:  # no filter for this machine
        raise SandboxError(str(error)) from error
    if done != Outcome(b"42\n", 0, True):
        raise SandboxError(f"bubblewrap at {found} runs no program: {done}")
    return found


def check_kernel(release: str, user: int) -> None:
    """
    Args:
        release: of Linux, such as "5.10.0-8-amd64".
        user: who starts programs; 0 is root.

    Raises:
        SandboxError: a limit of processes would count those of others, and programs would fail for what they have not done.
    """
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if user != 0 and (numbers is None or tuple(map(int, numbers.groups())) < COUNTS_APART):
        raise SandboxError(
            f"Linux {release} counts a user's processes in all namespaces together, which it does before "
            f"{'.'.join(map(str, COUNTS_APART))}: a program's limit would count this user's own. Run as root, as in a container"
        )


def run_program(parts: list[str], stdin: bytes, limits: SandboxLimits, python: str | None = None) -> Outcome:
    """Run Python texts one after the other in one namespace; what stands alone is `__main__`.

    Args:
        python: the interpreter, with its environment's packages; None: this one, without packages.

    Raises:
        SandboxError: it cannot be run.
    """
    return _run(bubblewrap(), parts, stdin, limits, python)


def _run(bwrap: str, parts: list[str], stdin: bytes, limits: SandboxLimits, python: str | None) -> Outcome:
    first = _run_once(bwrap, parts, stdin, limits, python)
    return first if first.killed != START else _run_once(bwrap, parts, stdin, limits, python)


def _run_once(bwrap: str, parts: list[str], stdin: bytes, limits: SandboxLimits, python: str | None) -> Outcome:
    begun, ended = secrets.token_hex(16), secrets.token_hex(16)
    name = "__main__" if len(parts) == 1 else "program"
    settings = json.dumps({
        "name": name, "parts": len(parts), "user": _user(), "limits": _rlimits(limits), "filter": syscall_filter().hex(),
    })  # fmt: skip
    asked = {"parts": parts, "begun": begun, "ended": ended}
    with (
        _file(json.dumps(asked).encode()) as question,
        _file(stdin) as given,
        _file(b"") as info,
        _group(limits) as group,
    ):
        flags = ["-I", "-B", *([] if python else ["-S"])]
        inside = [_interpreter(python), *flags, "-c", _runner(), settings, str(question.fileno())]
        command = [bwrap, *_arguments(limits, python, info.fileno()), *inside]
        if group is not None:
            command = group.entering(command)
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                pass_fds=[question.fileno(), info.fileno()], start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"bubblewrap does not start: {error}") from error
        with process:
            out, err, killed = _watch(process, info if group is None else None, limits, begun.encode())
        if group is not None and group.was_full:
            killed = "memory"
    if begun.encode() not in err and killed != START:
        said = " ".join(err.decode(errors="replace").split())[-300:]
        raise SandboxError(f"bubblewrap has run nothing (exit code {process.returncode}): {said or 'without a word'}")
    code = process.returncode if killed is None and process.returncode >= 0 else None
    return Outcome(bytes(out), code, code == 0 and ended.encode() in err, killed)


@contextlib.contextmanager
def _group(limits: SandboxLimits) -> Iterator[ControlGroup | None]:
    """None where none can be made."""
    home = groups_home()
    with contextlib.ExitStack() as stack:
        try:
            most = limits.memory + limits.disk, limits.processes + STARTERS
            group = None if home is None else stack.enter_context(ControlGroup.made(home, *most))
        except OSError as error:
            raise SandboxError(f"a sandbox has no control group: {error}") from error
        yield group


@functools.cache
def _runner() -> str:
    return RUNNER.read_text(encoding="utf-8")


def _file(content: bytes) -> BinaryIO:
    """One without a name, to be read from its beginning; nobody may read it."""
    file = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


def _user() -> int | None:
    """For one program, which has its processes counted alone; None: who is not root cannot be another user."""
    if os.geteuid() != 0:
        return None
    known = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    return secrets.choice(range(1 << 30, 1 << 31) if known >= 1 << 31 else range(60_000, 65_000))


def _rlimits(limits: SandboxLimits) -> dict[str, int]:
    cpu = int(limits.seconds) + 1
    return {
        "RLIMIT_CPU": cpu,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_NPROC": limits.processes + 1,
        "RLIMIT_FSIZE": limits.disk,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 256,
    }  # fmt: skip  one process is the program's parent


def _interpreter(python: str | None) -> str:
    return python or str(Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}"))


def _arguments(limits: SandboxLimits, python: str | None, info: int) -> list[str]:
    folders = [sys.base_prefix, "/usr"]
    if python:
        folders += _folders_of(python)
    seen = [p for p in dict.fromkeys(map(os.path.realpath, folders)) if Path(p).is_dir()]
    # Whatever the folders around them are to others outside: nothing else is in them here.
    around = {str(each): None for path in seen for each in reversed(Path(path).parents[:-1])}
    binds = [word for path in around for word in ("--perms", "0755", "--dir", path)]
    binds += [word for path in seen for word in ("--ro-bind", path, path)]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            binds += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            binds += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        binds += ["--ro-bind-try", name, name]
    apart = [
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--cap-drop",
        "ALL",
    ]
    if os.geteuid() == 0:
        apart += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # gone when it has become another user
    else:
        apart += ["--unshare-user"]
    return [
        "--info-fd", str(info), *apart, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox",
        "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8",
        "--setenv", "OPENBLAS_NUM_THREADS", "1",
        *binds, "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(limits.disk), "--tmpfs", "/tmp",
        "--chdir", "/tmp",
        "--remount-ro", "/dev", "--remount-ro", "/",
    ]  # fmt: skip


@functools.cache
def _folders_of(python: str) -> list[str]:
    """Where an interpreter's environment and its standard library lie."""
    program = "import sys; print(sys.prefix); print(sys.base_prefix)"
    try:
        done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {python} does not run: {error}") from error
    return done.stdout.split("\n")[:2]


def _watch(
    process: subprocess.Popen, info: BinaryIO | None, limits: SandboxLimits, begun: bytes
) -> tuple[bytearray, bytearray, str | None]:
    """Read what it writes until it has ended, or kill it. Its time begins when the interpreter has started.

    Args:
        info: what bubblewrap says of the sandbox, to look at its memory; None: that is bounded.
    """
    out, err = bytearray(), bytearray()
    deadline, started, first, killed = time.monotonic() + STARTS_SECONDS, False, None, None
    with selectors.DefaultSelector() as streams:
        streams.register(process.stdout, selectors.EVENT_READ, out)
        streams.register(process.stderr, selectors.EVENT_READ, err)
        while streams.get_map() and killed is None:
            for key, _ in streams.select(LOOK_SECONDS):
                chunk = os.read(key.fd, 1 << 16)
                key.data.extend(chunk)
                if not chunk:
                    streams.unregister(key.fileobj)
            if not started and begun in err:
                started, deadline = True, time.monotonic() + limits.seconds
                if info is not None:
                    info.seek(0)
                    first = json.load(info)["child-pid"]
            if time.monotonic() > deadline:
                killed = "seconds" if started else START
            elif len(out) + len(err) > limits.output:
                killed = "output"
            elif first is not None and resident_in(first, process.pid, limits.memory) > limits.memory:
                killed = "memory"
    if killed is None:
        try:  # what closes its streams has not ended
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            killed = "seconds" if started else START
    process.kill()
    process.wait()
    return out, err, killed
