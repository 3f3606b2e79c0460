"""Each conversation's environment in a process of its own: it keeps what it likes, and whatever it does there ends with it."""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from recipes.environments import processes
from recipes.environments.environment import EnvironmentFailedError, EnvironmentLostError, Turn
from recipes.environments.processes import Environments
from recipes.environments.registry import get_environment
from tests.alive import alive, gone
from tests.harness import ROOT
from tests.programs.hanging_environment import WAYS

OWN = "tests.programs.own_environments"
LONG = 600.0


@pytest.fixture
def made():
    """Environments that are closed again."""
    found: list[Environments] = []

    def make(spec: str | dict, limit: float = LONG) -> Environments:
        found.append(Environments(get_environment(spec), limit))
        return found[-1]

    yield make
    for each in found:
        each.close()


def begin(environments: Environments, number: int = 0, **row):
    begun = environments.begin(f"rows.jsonl:{number}", (number,))
    assert begun.ask("start", {"number": number, **row}) == "go"
    return begun


def said(begun, text: str = "") -> str:
    return begun.ask("step", [Turn(text)]).answer


def test_each_keeps_its_own_from_turn_to_turn(made):
    """A lock and an iterator, which no pickle would hold; asked from several threads."""
    environments, threads = made(f"{OWN}.Stuck"), threading.active_count()
    begun = [begin(environments, number) for number in range(6)]
    order = random.sample([*range(6)] * 5, 30)
    with ThreadPoolExecutor(4) as pool:
        heard = [[] for _ in begun]
        for start in range(0, 30, 6):  # turns of one conversation come one after the other
            rest = dict.fromkeys(order[start : start + 6])
            for number, answer in zip(rest, pool.map(lambda n: said(begun[n]).split(), rest), strict=True):
                heard[number].append(answer)
    pids = {answer[2] for answers in heard for answer in answers}
    assert len(pids) == len([answers for answers in heard if answers]) and str(os.getpid()) not in pids
    for number, answers in enumerate(heard):
        assert [answer[:2] for answer in answers] == [[str(i + 1), str(number)] for i in range(len(answers))]
        assert len({answer[2] for answer in answers}) <= 1
    for each in begun:
        each.end()
    assert gone(*map(int, pids)) and threading.active_count() <= threads
    assert said(begin(environments, 7)).startswith("1 7 ")


@pytest.mark.parametrize("way", WAYS)
def test_one_that_hangs_is_killed_with_what_it_has_started_and_no_other(way, made, tmp_path):
    environments, threads, file = made(f"{OWN}.Stuck"), threading.active_count(), tmp_path / "pids"
    other = begin(environments, 1)
    for limit in (1, 10, 100):  # it needs time to start something, more on a busy machine
        environments.limit = LONG
        begun = begin(environments, 2, file=str(file))
        environments.limit = limit
        with pytest.raises(EnvironmentLostError) as caught:
            said(begun, way)
        if file.exists() and file.read_text():
            break
    assert str(caught.value) == (
        f"environment {OWN}.Stuck: step has not come back within trainer.grpo.environment_timeout={limit} s, for the prompt of "
        "rows.jsonl:2: mend it, raise the limit, or set trainer.grpo.on_reward_timeout to zero or drop"
    )
    pids = [int(pid) for pid in file.read_text().split()]
    assert len(pids) == 2 and gone(*pids) and threading.active_count() <= threads
    environments.limit = LONG
    assert said(other).startswith("1 1 ")
    begun.end()
    with pytest.raises(EnvironmentLostError):
        said(begun)


@pytest.mark.parametrize(("way", "ending"), [("exits", "exit code 7"), ("dies", "SIGSEGV")])
def test_one_that_ends_its_process_is_told_of(way, ending, made):
    environments = made(f"{OWN}.Stuck")
    other, begun = begin(environments, 1), begin(environments, 2)
    with pytest.raises(EnvironmentLostError, match=rf"step has ended its process \({ending}\), for the prompt of rows"):
        said(begun, way)
    assert said(other).startswith("1 1 ")


def test_what_an_environment_may_do_in_its_process(made):
    environments = made(f"{OWN}.Stuck")
    begun = begin(environments)
    assert said(begun, "starts") == "0", "a process of its own"
    assert said(begun, "long") == "x" * 3_000_000
    with pytest.raises(EnvironmentFailedError, match="step failed: .*local object"):
        said(begun, "gives")
    assert said(begun).startswith("4 0 ")


def test_random_numbers_are_a_conversations_own_and_come_again(made):
    first, again = made(f"{OWN}.Drawing"), made(f"{OWN}.Drawing")
    numbers = [said(begin(first, key)) for key in (1, 2, 1)]
    assert numbers[0] == numbers[2] == said(begin(again, 1))
    assert not {*numbers[0].split()} & {*numbers[1].split()}


def test_no_process_is_left_when_all_are_closed(made, tmp_path):
    environments = made(f"{OWN}.Stuck")
    begun = [begin(environments, number, file=str(tmp_path / "pids")) for number in range(3)]
    pids = [int(said(each).split()[2]) for each in begun]
    waits = threading.Thread(target=lambda: pytest.raises(EnvironmentLostError, said, begun[0], "loops in C"))
    waits.start()
    while not (tmp_path / "pids").exists() or len(started := (tmp_path / "pids").read_text().split()) < 2:
        time.sleep(0.01)
    server = environments._server.pid
    assert all(map(alive, (*pids, server, *map(int, started))))
    environments.close()
    assert gone(*pids, server, *map(int, started))
    waits.join()


@pytest.mark.kills
@pytest.mark.parametrize("whom", ["the run", "who begins conversations"])
def test_no_process_is_left_when_one_is_killed(whom, tmp_path):
    """While environments hang, some of which would notice nothing."""
    command = [sys.executable, "-m", "tests.programs.hanging_environment", str(tmp_path / "pids")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        server = int(run.stdout.readline())
        pids = [[int(pid) for pid in line.split()] for line in (tmp_path / "pids").read_text().splitlines()]
        assert len(pids) == len(WAYS) and {psutil.Process(pid).ppid() for pid, _ in pids} == {server}
        if whom == "the run":
            run.kill()
            assert gone(server, *(pid for pair in pids for pid in pair))
        else:
            psutil.Process(server).kill()
            assert gone(server, *(pid for pid, _ in pids))
    finally:
        run.kill()
        run.wait()
        for _, started in pids:
            if alive(started):
                psutil.Process(started).kill()


def test_what_keeps_a_conversation_from_beginning_is_told(made, monkeypatch):
    unmade = made({"name": f"{OWN}.Unmade", "home": os.getpid()})
    begun = unmade.begin("rows.jsonl:1", (1,))
    with pytest.raises(
        EnvironmentFailedError, match="start failed: ConfigError: .* refuses its options: ValueError: not here"
    ):
        begun.ask("start", {})
    environments = made(f"{OWN}.Stuck")
    begin(environments)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # or a file of other tests may be closed behind the next line, and its number be free
    lowest = os.dup(0)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with pytest.raises(
            EnvironmentFailedError, match=f"no file can be opened for one more .*, of {lowest}: raise ulimit"
        ):
            begin(environments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert said(begin(environments)).startswith("1 0 ")
    psutil.Process(environments._server.pid).kill()
    with pytest.raises(EnvironmentFailedError, match=r"the process that begins conversations has ended \(SIGKILL, is"):
        begin(environments)


def test_a_module_that_does_not_import_there_is_told(made, tmp_path, monkeypatch):
    (tmp_path / "sometimes.py").write_text(
        "import os\nfrom recipes.environments.environment import Environment\n"
        f"if os.getpid() != {os.getpid()}:\n    raise ImportError('no licence')\nclass Rare(Environment): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentFailedError, match="environment sometimes.Rare: in a process of its own it cannot be made: "
                       "ImportError: no licence"):  # fmt: skip
        made("sometimes.Rare").begin("rows.jsonl:1", (1,))


def test_one_that_is_waited_for_is_named(made, monkeypatch, caplog, tmp_path):
    environments = made(f"{OWN}.Stuck")
    begun = begin(environments, 5, file=str(tmp_path / "pids"))
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    environments.limit = 0.5
    with pytest.raises(EnvironmentLostError):
        said(begun, "sleeps")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"environment {OWN}.Stuck: step has not come back for 0 s, for the prompt of rows.jsonl:5"
    )


def test_one_that_bounds_itself_is_asked_here(made):
    game = made("guess_number")
    begun, row = game.begin("rows.jsonl:1", (1,)), {"secret": 3, "highest": 9}
    assert begun.ask("start", row)[0]["content"] == "Guess my number, from 1 to 9."
    assert begun.ask("step", [Turn("3")]).reward == 1.0 and game._server is None
    assert not get_environment(f"{OWN}.Insisting").bounds_itself, "its class has not said so"


def test_an_environment_that_is_asked_here_ends_without_a_search_of_all_memory(made):
    """Which a process of a conversation can afford, and a trainer with its model and its 512 conversations cannot."""
    environments = made("guess_number")
    before = gc.get_stats()[2]["collections"]
    gc.disable()
    try:
        for sample in range(3):
            one = environments.begin("here:1", (sample,))
            one.ask("start", {"secret": 5, "highest": 16})
            one.ask("close", None)
            one.end()
    finally:
        gc.enable()
    assert gc.get_stats()[2]["collections"] == before
