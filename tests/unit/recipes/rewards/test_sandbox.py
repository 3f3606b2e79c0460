"""What misbehaves in the sandbox is stopped and gets 0, and the trainer lives on."""

from __future__ import annotations

import os
import socket
import subprocess
import textwrap
from pathlib import Path

import psutil
import pytest

from recipes.rewards import resident, sandbox
from recipes.rewards.cgroup import groups_home
from recipes.rewards.registry import score
from recipes.rewards.sandbox import SandboxError, SandboxLimits, check_kernel
from tests.alive import gone
from tests.unit.recipes.rewards.sandbox_cases import LIMITS, MIB, reward, run, sandboxed


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(100)",
        "import os\nos.close(1); os.close(2)\nimport time\ntime.sleep(100)",
    ],
)
def test_loops_are_stopped(program):
    assert run(program, limits=SandboxLimits(seconds=1)).killed == "seconds"


@sandboxed
def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left():
    before = set(psutil.pids())
    done = run(
        """
        import os, time
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(100)
                made += 1
        except BlockingIOError:
            print(made)
        """
    )
    assert 1 <= int(done.output) < LIMITS.processes
    run(
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        limits=SandboxLimits(seconds=1, processes=8),
    )
    # Names with the list: a process of somebody else's may end before it is asked for its own.
    left = [p.pid for p in psutil.process_iter(["name"]) if p.pid not in before and "bwrap" in (p.info["name"] or "")]
    assert gone(*left)


@pytest.fixture(params=["by a control group", "added up"])
def bounded(request, monkeypatch):
    """Both ways in which memory is bounded, where there are both."""
    if request.param == "added up":
        monkeypatch.setattr(sandbox, "groups_home", lambda: None)
    elif groups_home() is None:
        pytest.skip("no control groups can be made here")


@sandboxed
@pytest.mark.usefixtures("bounded")
def test_memory():
    assert run(f"x = bytearray({400 * MIB})").code == 1
    many = run(
        f"""
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                x = bytearray({120 * MIB})
                x[::4096] = b"1" * len(x[::4096])
                time.sleep(100)
        time.sleep(100)
        """
    )
    assert many.killed == "memory"


@sandboxed
@pytest.mark.usefixtures("bounded")
def test_memory_of_many_processes_of_which_each_may_have_as_much():
    held = f"""
        import os, time
        for _ in range(20):
            if os.fork() == 0:
                x = bytearray(b"1" * {40 * MIB})
                time.sleep(100)
        time.sleep(100)
        """
    limits = SandboxLimits(seconds=60, memory=300 * MIB, processes=32)
    assert run(held, limits=limits).killed == "memory"
    assert score(reward(memory=300 * MIB), [textwrap.dedent(held)], [{"tests": "assert True"}]) == [0]


@sandboxed
@pytest.mark.usefixtures("bounded")
def test_memory_that_processes_share_counts_once():
    """Forked from one that holds it."""
    done = run(
        f"""
        import os, time
        x = bytearray(b"1" * {60 * MIB})
        for _ in range(6):
            if os.fork() == 0:
                time.sleep(0.5)
                os._exit(0)
        time.sleep(0.5)
        print(x[-1])
        """
    )
    assert (done.output, done.killed) == (b"49\n", None)


@sandboxed
def test_memory_is_looked_for_among_the_sandboxs_own_processes(monkeypatch, caplog):
    """What is found there is what all of the machine's processes say, and needs no look at them."""
    found = []

    def both(first, outer, limit):
        found.append(
            (resident.resident_in(first, outer, limit), sum(map(resident._resident, resident._descendants(outer))))
        )
        return found[-1][0]

    monkeypatch.setattr(sandbox, "groups_home", lambda: None)
    monkeypatch.setattr(sandbox, "resident_in", both)
    run(f"import os, time\nx = bytearray(b'1' * {40 * MIB})\nos.fork()\ntime.sleep(1.5)")
    ours, theirs = max(found)
    assert 2 * 40 * MIB < ours <= theirs + MIB < ours + 20 * MIB and not caplog.records


def test_where_its_processes_cannot_be_seen_those_of_the_machine_are(monkeypatch, caplog):
    listed = os.listdir

    def refuse(path):
        if Path(os.fsdecode(path)).parts[-2:] == ("root", "proc"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    resident._say_once.cache_clear()
    child = subprocess.Popen(["sleep", "60"])
    try:
        for _ in range(2):
            assert resident.resident_in(1, os.getpid(), 1 << 60) > psutil.Process().memory_info().rss / 2
    finally:
        child.kill()
        child.wait()
    (record,) = caplog.records
    assert "looked for among all of this machine" in record.getMessage()


def test_a_kernel_that_counts_processes_of_all_namespaces_together_is_refused():
    """Of root programs run as another user, whose processes are counted apart by any kernel."""
    for release in ("5.14.0-362.el9.x86_64", "6.1.0-18-amd64", "10.0"):
        check_kernel(release, 1000)
    for release in ("4.18.0-553.el8.x86_64", "5.13.19", "of mine"):
        check_kernel(release, 0)
        with pytest.raises(SandboxError, match=f"Linux {release} counts a user's processes in all namespaces together"):
            check_kernel(release, 1000)


@sandboxed
@pytest.mark.parametrize("place", ["/tmp/x", "/dev/shm/x", "/x", "/usr/x", "/proc/x", "/var/tmp/x", "/dev/x"])
def test_disk(place):
    done = run(
        f"""
        written = 0
        try:
            for i in range(8):
                with open("{place}" + str(i), "wb") as file:
                    for _ in range(16):
                        written += file.write(bytes(1 << 16))
        except OSError:
            print(written)
        """
    )
    assert 0 < int(done.output) <= LIMITS.disk if place.startswith("/tmp") else int(done.output) == 0


@sandboxed
def test_endless_output():
    assert run("while True:\n    print('x' * 100)").killed == "output"
    assert run("import sys\nwhile True:\n    sys.stderr.write('x' * 100)").killed == "output"


@sandboxed
def test_no_network_and_no_way_to_the_machines_own_sockets():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(
            f"""
            import socket
            for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("192.0.2.1", 80))):
                try:
                    socket.create_connection(address, timeout=1)
                except OSError as error:
                    print(type(error).__name__)
            """
        )
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.output.split() == [b"ConnectionRefusedError", b"OSError"]


@sandboxed
def test_no_file_of_the_machine_is_read_and_no_process_seen(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    secret.chmod(0o644)
    done = run(
        f"""
        import os
        for path in ({str(secret)!r}, "/etc/passwd", {str(Path.home() / ".bashrc")!r}, "/home", {__file__!r}):
            print(os.path.exists(path), end=" ")
        print(max(int(p) for p in os.listdir("/proc") if p.isdigit()) < 20, os.environ.get("PATH"), os.listdir("/tmp"))
        """
    )
    assert done.output == b"False False False False False True /usr/bin:/bin []\n"
    row = {"tests": [{"input": "", "output": "42"}]}
    assert score(reward(), [f"print(open({str(secret)!r}).read())"], [row]) == [0]


@sandboxed
def test_no_privilege_is_won():
    done = run(
        """
        import ctypes, os, resource
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.setuid(0) if os.getuid() else -1)
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
        except ValueError:
            print("bound")
        """
    )
    assert done.output == b"-1 -1\nbound\n"


@sandboxed
def test_no_namespace_and_no_disk_of_its_own():
    """As root of a namespace a program could mount memory without a limit; files in memory and segments are in no process."""
    done = run(
        """
        import ctypes, os, sys, threading
        libc = ctypes.CDLL(None, use_errno=True)
        mounted = libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)
        print(libc.unshare(0x10000000), libc.unshare(0x00020000), mounted, libc.setns(0, 0))
        print(libc.syscall(435, 0, 0), libc.ptrace(0, 0, 0, 0), ctypes.get_errno())
        print(libc.memfd_create(b"x", 0), libc.shmget(0, 1 << 20, 0o1600))
        thread = threading.Thread(target=print, args=("thread",))
        thread.start()
        thread.join()
        sys.stdout.flush()
        if os.fork() == 0:
            print("child", flush=True)
            os._exit(0)
        os.wait()
        """
    )
    assert done.output.decode().split("\n") == ["-1 -1 -1 -1", "-1 -1 1", "-1 -1", "thread", "child", ""]


@sandboxed
def test_those_beside_a_bad_one_are_scored():
    right = "print(1)"
    responses = [right, "while True: pass", right, "import os\nos.kill(0, 9)", right, "while True: print(1)"]
    values = score(
        reward(seconds=3, output=1000), responses, [{"tests": [{"input": "", "output": "1"}]}] * len(responses)
    )
    assert values == [1, 0, 1, 0, 1, 0]
