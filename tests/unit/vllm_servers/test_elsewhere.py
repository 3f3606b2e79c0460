"""Machines that serve and a run find each other in a folder, and each hears of the other's end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_ext.errors import UserError
from megatron_ext.vllm_servers import ServersElsewhere, VllmOptions, elsewhere
from megatron_ext.vllm_servers.elsewhere import MACHINES
from tests.harness import ROOT
from tests.waiting import until

PATIENCE = 300.0
# What a machine starts in place of an interpreter with vLLM: it says what it was told, and stays.
STAYS = """#!/bin/sh
echo "$@" "runner $VLLM_USE_V2_MODEL_RUNNER" "$VLLM_API_KEY"
exec sleep 600
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "meet"
    folder.mkdir(mode=0o700)
    (folder / MACHINES).write_text("a1\na2\n")
    return folder


@pytest.fixture
def machine(folder: Path):
    """Starts `launch/serve_vllm.py` as a machine of that name, without any package; all are ended."""
    started = []

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-S", "launch/serve_vllm.py", "--rendezvous", folder, "--name", name]
        more = more or ("--address", "127.0.0.1")
        started.append(
            subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def program(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def options(folder: Path, python: str, **changes) -> VllmOptions:
    return VllmOptions(**{"start": 2, "python": python, "rendezvous": str(folder), "patience": PATIENCE} | changes)


def logs(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}.logs/vllm-{i}.log").read_text() for i in range(2)]


def test_a_run_has_servers_started_on_every_machine(folder, machine):
    processes = [machine("a1"), machine("a2", "--addresses", "a1=10.0.0.1\na2=localhost")]
    given = options(folder, program(folder, STAYS), weights="nccl", routes=True)
    servers = ServersElsewhere(given, Path("/shared/v0"), "float32", 77)
    assert [url.rpartition(":")[0] for url in servers.urls] == ["http://127.0.0.1"] * 2 + ["http://localhost"] * 2
    assert len(set(servers.urls)) == 4
    until(lambda: all(all(logs(folder, name)) for name in ("a1", "a2")))
    said = [*logs(folder, "a1"), *logs(folder, "a2")]
    for line, url in zip(said, servers.urls, strict=True):
        assert "--model /shared/v0 " in line and "--max-model-len 77 " in line and "--dtype float32 " in line
        assert (
            '--load-format dummy --weight-transfer-config {"backend": "nccl"} --enable-return-routed-experts runner 1 '
            in line
        )
        assert f"--port {url.rpartition(':')[2]} " in line and line.endswith(f" {servers.key}\n")
    servers.have_answered = True
    servers.newest = Path("/shared/v3")
    until(lambda: json.loads((folder / "a1.json").read_text())["model"] == "/shared/v3")
    port = f"--port {servers.urls[0].rpartition(':')[2]} "
    (victim,) = [p for p in psutil.Process(processes[0].pid).children() if port in " ".join(p.cmdline())]
    victim.kill()
    until(lambda: "--model /shared/v3 " in logs(folder, "a1")[0])
    assert servers.hopeless() is None
    children = [p for process in processes for p in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) >= 4
    servers.close()
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


def test_a_run_after_another_is_served_anew(folder, machine):
    """Also after one that was killed and has left its order, and machines that were ended and have left their answers."""
    (folder / MACHINES).write_text("a1\n")
    first = machine("a1")
    killed = ServersElsewhere(options(folder, program(folder, STAYS), start=1), Path("/shared/v0"), "float32", 77)
    with socket.create_server(("127.0.0.1", int(killed.urls[0].rpartition(":")[2]))):  # or it may be drawn again
        again = ServersElsewhere(options(folder, program(folder, STAYS)), Path("/shared/w0"), "float32", 99)
    assert len(again.urls) == 2 and not set(again.urls) & set(killed.urls) and again.key != killed.key
    until(lambda: "--model /shared/w0 " in logs(folder, "a1")[1] and logs(folder, "a1")[1].endswith(f" {again.key}\n"))
    first.terminate()
    assert first.wait(PATIENCE) == 0
    assert again.hopeless() == "a1: its servers were ended by somebody" and killed.hopeless() is None
    again.close()
    with pytest.raises(UserError, match="^a1: no vLLM server was started there in 2 s"):
        ServersElsewhere(options(folder, program(folder, STAYS), patience=2.0), Path("/shared/v0"), "float32", 77)


def test_a_machine_that_cannot_serve_says_why(folder, machine):
    first, second = machine("a1"), machine("a2")
    ends = program(folder, "#!/bin/sh\necho 'ImportError: no vLLM here'\nexit 1\n")
    with pytest.raises(
        UserError, match=r"a[12]: vLLM server 0 has ended before it answered: ImportError: no vLLM here"
    ):
        servers = ServersElsewhere(options(folder, ends, start=1), Path("/shared/v0"), "float32", 77)
        until(servers.hopeless)
        raise UserError(servers.hopeless())
    said = [process.communicate(timeout=PATIENCE)[1] for process in (first, second)]
    failed = [text for text, process in zip(said, (first, second), strict=True) if process.returncode]
    assert failed, "one of them may see before it fails that the run has ended, not both"
    assert all("error: vLLM server 0 has ended before it answered" in text for text in failed)


def test_a_program_that_is_none_is_told_to_the_run(folder, machine):
    machine("a1"), machine("a2")
    with pytest.raises(UserError, match=r"a[12]: trainer.grpo.rollout.python=/nosuch/python is no program"):
        ServersElsewhere(options(folder, "/nosuch/python"), Path("/shared/v0"), "float32", 77)
    assert not (folder / "serve.json").exists()


def test_a_machine_that_is_not_there_is_named(folder, machine, monkeypatch):
    """However long the other takes to answer: time stands still until the run has seen that it has."""
    machine("a1")
    seen = [False]

    def monotonic() -> float:
        seen.append((folder / "a1.json").exists())
        return float("inf") if seen[-2] else 0.0

    monkeypatch.setattr(elsewhere, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    with pytest.raises(
        UserError, match=r"^a2: no vLLM server was started there in 3 s .*launch/serve_vllm.py run there"
    ):
        ServersElsewhere(options(folder, program(folder, STAYS), patience=3.0), Path("/shared/v0"), "float32", 77)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder.chmod(0o750), "can be read by others, and the servers' key stands in it: chmod 700"),
        (lambda folder: (folder / MACHINES).write_text(""), "names no machine"),
        (lambda folder: (folder / MACHINES).unlink(), "names no machine"),
    ],
)
def test_a_folder_in_which_nobody_can_meet_is_refused(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        ServersElsewhere(options(folder, "python"), Path("/shared/v0"), "float32", 77)
    assert not (folder / "serve.json").exists()
    with pytest.raises(UserError, match="is no folder: make it on a disk that all machines share"):
        ServersElsewhere(options(folder / "nosuch", "python"), Path("/shared/v0"), "float32", 77)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("b9", ("--address", "127.0.0.1"), "does not name b9: a run would not wait for it"),
        ("a1", ("--addresses", "a2=10.0.0.1"), "no address of a1: give --address"),
    ],
)
def test_a_machine_that_nobody_waits_for(machine, name, more, words):
    process = machine(name, *more)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2 and words in said
    (line,) = said.splitlines()
    assert line.startswith("error: ")
