"""Programs that nobody trusts, run by bubblewrap: no network, no disk but a small one in memory, and limits of everything.

What a program sees: the interpreter and the system's libraries, read-only; /tmp, which is gone afterwards; its own processes.
Where this process is root it runs as a user that nobody else is, because no process limit binds root; else in a namespace of
this user's, whose processes are counted apart. Some system calls are not to be had (`recipes.rewards.seccomp`). A program that
breaks a limit is killed with all that it has started.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_ext.errors import UserError
from recipes.rewards.seccomp import syscall_filter

__all__ = ["START", "Outcome", "SandboxError", "SandboxLimits", "bubblewrap", "run_program"]

LOOK_SECONDS = 0.05  # between looks at the memory of all its processes
STARTS_SECONDS = 60.0  # for an interpreter on a machine that is busy
START = "start"
# Within the sandbox, before a program: limits that cannot be raised again, then a process for it. This one's parent alone knows
# the words that say how it ended, lets nobody look into it, and gives a text of Python when the one before it has run. The last
# one ends with a word of its own, so that it is not enough to leave with 0.
_RUNNER = """
def run(exec=exec, compile=compile):
    import ctypes, json, os, resource, select, sys
    question, settings = int(sys.argv.pop()), json.loads(sys.argv.pop())
    if settings["user"] is not None:
        os.setgroups([])
        os.setgid(settings["user"])
        os.setuid(settings["user"])
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    filter = bytes.fromhex(settings["filter"])
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
    if prctl(38, one, zero, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if prctl(22, ctypes.c_ulong(2), ctypes.byref(Filter(len(filter) // 8, filter)), zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
    if prctl(4, zero, zero, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE")
    texts, give = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for each in (question, give, told):
            os.close(each)
        os.setsid()
        prctl(4, one, zero, zero, zero)
        texts = os.fdopen(texts, encoding="utf-8")
        program = {"__name__": settings["name"]}
        for _ in range(settings["parts"]):
            os.write(tell, b"+")
            exec(compile(json.loads(texts.readline()), "program.py", "exec", dont_inherit=True), program)
        return
    os.close(texts)
    os.close(tell)
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    end = os.urandom(16).hex().encode()
    parts = asked["parts"]
    parts[-1] += f"\\n__import__('os').write({tell}, {end})\\n"
    print(asked["begun"], end="", file=sys.stderr, flush=True)
    give, gone, said = os.fdopen(give, "w", encoding="utf-8"), os.pidfd_open(child), b""
    watched = [told, gone]
    while told in (ready := select.select(watched, [], [])[0]) or gone not in ready:
        chunk = os.read(told, 64)
        said = (said + chunk)[-len(end):]
        if not chunk:
            watched.remove(told)
        elif parts:
            try:
                print(json.dumps(parts.pop(0)), file=give, flush=True)
            except OSError:  # it has ended
                parts.clear()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0 and said == end:
        print(asked["ended"], end="", file=sys.stderr, flush=True)
    os._exit(code if code >= 0 else 128 - code)
run()
"""


class SandboxError(UserError):
    """No program can be run, or the sandbox itself has failed: that says nothing of a program."""


@dataclass(frozen=True)
class SandboxLimits:
    """
    Attributes:
        seconds: of a program, by the clock; and of each of its processes on a CPU.
        memory: bytes, of all its processes together and of each one's addresses.
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
    try:
        done = _run(found, ["print(6 * 7)"], b"", SandboxLimits(), None)
    except SandboxError:
        raise
    except UserError as error:  # no filter for this machine
        raise SandboxError(str(error)) from error
    if done != Outcome(b"42\n", 0, True):
        raise SandboxError(f"bubblewrap at {found} runs no program: {done}")
    return found


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
    with _file(json.dumps(asked).encode()) as question, _file(stdin) as given:
        flags = ["-I", "-B", *([] if python else ["-S"])]
        inside = [_interpreter(python), *flags, "-c", _RUNNER, settings, str(question.fileno())]
        command = [bwrap, *_arguments(limits, python), *inside]
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                pass_fds=[question.fileno()], start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"bubblewrap does not start: {error}") from error
        with process:
            out, err, killed = _watch(process, limits, begun.encode())
    if begun.encode() not in err and killed != START:
        said = " ".join(err.decode(errors="replace").split())[-300:]
        raise SandboxError(f"bubblewrap has run nothing (exit code {process.returncode}): {said or 'without a word'}")
    code = process.returncode if killed is None and process.returncode >= 0 else None
    return Outcome(bytes(out), code, code == 0 and ended.encode() in err, killed)


def _file(content: bytes):
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


def _arguments(limits: SandboxLimits, python: str | None) -> list[str]:
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
        *apart, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox",
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


def _watch(process: subprocess.Popen, limits: SandboxLimits, begun: bytes) -> tuple[bytearray, bytearray, str | None]:
    """Read what it writes until it has ended, or kill it. Its time begins when the interpreter has started."""
    out, err = bytearray(), bytearray()
    deadline, started, killed = time.monotonic() + STARTS_SECONDS, False, None
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
            if time.monotonic() > deadline:
                killed = "seconds" if started else START
            elif len(out) + len(err) > limits.output:
                killed = "output"
            elif _memory(process.pid) > limits.memory:
                killed = "memory"
    if killed is None:
        try:  # what closes its streams has not ended
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            killed = "seconds" if started else START
    process.kill()
    process.wait()
    return out, err, killed


def _memory(pid: int) -> int:
    """Bytes that are resident, of all its processes."""
    total = 0
    try:
        for each in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:  # ended meanwhile
        pass
    return total
