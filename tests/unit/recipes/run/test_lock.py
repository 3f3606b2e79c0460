"""One run in a folder at a time, and none is kept out by a run that is dead."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from recipes.run import lock
from recipes.run.holder import Holder
from recipes.run.lock import DEAD, LOCK_FOLDER, FolderLock
from recipes.run.run_folder import check_run_folder, claim_run_folder, held_run_folder
from tests.harness import ROOT
from tests.waiting import until


def leave(folder: Path, holder: Holder | None, age: float = 0.0, number: int = 1) -> Path:
    """A lock as its holder would leave it that was heard of so many seconds ago; None: killed before it said its name."""
    path = folder / LOCK_FOLDER / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)) if holder else "")
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def elsewhere(**changes) -> Holder:
    """On another machine, where a process of this number is alive as far as one can see from here."""
    host = f"node{random.randrange(10**6)}"
    return replace(Holder.this_process(), host=host, boot="another", **changes)


def can_be_taken(folder: Path) -> bool:
    try:
        FolderLock.take(folder).release()
    except UserError:
        return False
    return True


def test_a_folder_that_is_held_is_refused_with_who_and_since_when(tmp_path):
    with FolderLock.take(tmp_path / "run"):
        (path,) = (tmp_path / "run" / LOCK_FOLDER).iterdir()
        holder = json.loads(path.read_text())
        with pytest.raises(UserError, match="is held by another run") as refused:
            FolderLock.take(tmp_path / "run")
        said = str(refused.value)
        for part in (
            f"process {os.getpid()} on {socket.gethostname()}",
            holder["since"],
            "last sign of life",
            str(path),
        ):
            assert part in said
        assert [path] == list(path.parent.iterdir()), "a refused process leaves nothing"
    assert can_be_taken(tmp_path / "run")


def test_what_was_made_for_a_lock_goes_with_it_and_nothing_else(tmp_path):
    with FolderLock.take(tmp_path / "new/er/run"):
        assert check_run_folder(str(tmp_path / "new/er/run")), "a folder that holds a lock alone is new"
    assert not (tmp_path / "new").exists()
    with FolderLock.take(tmp_path / "new/run"):
        (tmp_path / "new/run/bias.json").touch()
    assert [p.name for p in (tmp_path / "new/run").iterdir()] == ["bias.json"]
    (tmp_path / "empty").mkdir()
    FolderLock.take(tmp_path / "empty").release()
    assert (tmp_path / "empty").is_dir(), "it was there before"


def test_a_folder_that_is_reached_by_a_link_is_the_same_folder(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs", target_is_directory=True)
    with FolderLock.take(tmp_path / "runs/mine"):
        assert not can_be_taken(tmp_path / "link/mine")


def test_a_folder_with_files_is_refused_by_who_writes_them(tmp_path):
    leave(tmp_path, holder := elsewhere())
    (tmp_path / "bias.json").touch()
    with pytest.raises(UserError, match=f"process {holder.pid} on {holder.host} since"):
        check_run_folder(str(tmp_path))
    leave(tmp_path, holder, DEAD + 1)
    with pytest.raises(UserError, match="holds another run or other files; nothing is overwritten"):
        check_run_folder(str(tmp_path))


def test_a_folder_that_another_run_has_filled_meanwhile_is_refused(tmp_path):
    """Both have found it new; this one has read its data for longer."""
    folder = tmp_path / "run"
    check_run_folder(str(folder))
    with held_run_folder(str(folder)):
        claim_run_folder(folder, {"model": {}})
        (folder / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds another run or other files"), held_run_folder(str(folder)):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_link_to_nowhere_is_no_run_folder(tmp_path):
    (tmp_path / "run").symlink_to("gone")
    with pytest.raises(UserError, match="cannot be made"):
        check_run_folder(str(tmp_path / "run"))


def test_a_killed_process_holds_nothing_and_a_living_one_does(tmp_path):
    """The second one's parent has not asked for its end: it stays in the table of processes."""
    for reaped in (True, False):
        command = [sys.executable, "-m", "tests.programs.hold_folder", tmp_path]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {child.pid} on"):
            FolderLock.take(tmp_path)
        child.send_signal(signal.SIGKILL)
        if reaped:
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert can_be_taken(tmp_path)
        child.wait()
        child.stdout.close()


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path):
    me = Holder.this_process()
    leave(tmp_path, me)
    assert not can_be_taken(tmp_path)
    leave(tmp_path, replace(me, started=me.started - 1))
    assert can_be_taken(tmp_path)


@pytest.mark.parametrize("there", [{"host": "other"}, {"boot": "before"}, {"namespace": "pid:[1]"}, {"boot": None}])
def test_where_a_process_cannot_be_seen_its_sign_of_life_counts(tmp_path, there):
    """On another machine, or in a container of this one, which has the same name and may have the same numbers."""
    gone = replace(Holder.this_process(), pid=2**22 + 1, **there)
    leave(tmp_path, gone, DEAD - 10)
    assert not can_be_taken(tmp_path)
    leave(tmp_path, gone, DEAD + 1)
    assert can_be_taken(tmp_path)


def test_a_lock_without_a_name_is_dead_when_it_is_old(tmp_path):
    leave(tmp_path, None, DEAD - 10)
    with pytest.raises(UserError, match="a process that does not say its name, last sign of life 1"):
        FolderLock.take(tmp_path)
    leave(tmp_path, None, DEAD + 1)
    assert can_be_taken(tmp_path)


def test_a_job_that_is_queued_again_starts_at_once(tmp_path, monkeypatch):
    """On whatever node; nobody else does, nor another start of the recipe within the same start of the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "north")
    first = elsewhere()
    assert (first.job, first.restarts) == ("71", 0)
    leave(tmp_path, first)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on {first.host}, Slurm job 71 since"):
        FolderLock.take(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, replace(first, cluster="south"))
    assert not can_be_taken(tmp_path), "a job of the same number on another cluster"
    leave(tmp_path, first)
    assert can_be_taken(tmp_path)
    leave(tmp_path, elsewhere())
    with pytest.raises(UserError, match=r"Slurm job 71 \(start 2\) since"):
        FolderLock.take(tmp_path)


def test_of_many_that_find_a_dead_lock_one_takes_the_folder(tmp_path):
    """Round after round: where there is nothing, and behind the dead."""
    for number in range(12):
        folder, taken, refused = tmp_path / str(number), [], []
        if number % 2:
            leave(folder, replace(elsewhere(), restarts=number), DEAD + 1, number)
        start = threading.Barrier(6)

        def contend(folder=folder, start=start, taken=taken, refused=refused):
            start.wait()
            try:
                taken.append(FolderLock.take(folder))
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1 and len(refused) == 5
        assert all("is held by another run" in line for line in refused)
        taken[0].release()


def test_who_was_slow_to_take_a_dead_lock_steps_back(tmp_path, monkeypatch):
    """Between its look and its file another has taken the folder over and left, and a third has taken it: numbers come again."""
    leave(tmp_path, elsewhere(), DEAD + 1, number=5)
    write, held = lock._write_new, []

    def slow(path, text):
        monkeypatch.setattr(lock, "_write_new", write)
        FolderLock.take(tmp_path).release()
        held.append(FolderLock.take(tmp_path))
        write(path, text)

    monkeypatch.setattr(lock, "_write_new", slow)
    with pytest.raises(UserError, match="is held by another run"):
        FolderLock.take(tmp_path)
    assert [p.name for p in (tmp_path / LOCK_FOLDER).iterdir()] == ["1"]
    held[0].check()
    held[0].release()


def test_a_process_that_was_taken_for_dead_learns_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    sleeper = FolderLock.take(tmp_path)
    sleeper.check()
    (path,) = (tmp_path / LOCK_FOLDER).iterdir()
    path.unlink()
    with FolderLock.take(tmp_path) as taker:
        with pytest.raises(UserError, match=rf"is no longer this run's: process {os.getpid()} on"):
            sleeper.check()
        until(lambda: sleeper.taken_away)
        sleeper.release()
        taker.check()
        assert path.exists(), "the other's lock stays"


def test_a_living_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with FolderLock.take(tmp_path):
        (path,) = (tmp_path / LOCK_FOLDER).iterdir()
        os.utime(path, (0, 0))
        until(lambda: path.stat().st_mtime)
