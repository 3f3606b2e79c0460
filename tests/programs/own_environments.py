"""Environments of a user's own: what they keep, how they fail, and all the ways of never coming back."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy

from recipes.environments.calculator import Calculator
from recipes.environments.environment import End, Environment, Observation, ToolCall

HOME = os.getpid()  # of whoever has imported it


def hear(text: str, reward: float = 0.0) -> Observation:
    return Observation([{"role": "user", "content": text}], reward)


class Insisting(Calculator):
    """Takes a first turn for a call of the calculator, whatever it is, and the second for the answer."""

    def calls(self, text):
        return [ToolCall("calculator", {"expression": f"{len(text)} * 3"}, "call00000")]

    def step(self, talk):
        return super().step(talk) if len(talk.turns) == 1 else End()


class Paying(Environment):
    """Pays for every turn, by its number, and goes on."""

    row_keys = ("pay",)
    gives_reward = True

    def step(self, talk):
        return hear("on", talk.row["pay"] * len(talk.turns))


class Failing(Environment):
    row_keys = ("how",)
    gives_reward = True

    def start(self, row):
        return [{"role": "user", "content": f"what is {random.getrandbits(64) if row['how'] == 'draws' else 2} ?"}]

    def step(self, talk):
        answers = {
            "exit": lambda: sys.exit(0), "number": lambda: Observation(5), "large": lambda: End(10**400),
            "raises": lambda: 1 / 0, "text": lambda: "on", "nan": lambda: End(float("nan")), "none": End,
            "plain": lambda: Observation("on"),
        }  # fmt: skip
        return answers[talk.row["how"]]()


class FailingHere(Failing):
    bounds_itself = True


class Closing(Environment):
    """Writes a line when it is closed, and changes its row."""

    row_keys = ("file",)

    def step(self, talk):
        talk.row["messages"].append(1)
        return End()

    def close(self):
        self.folder = tempfile.TemporaryDirectory()  # goes with the instance
        with open(self.file, "a") as file:
            file.write(f"{os.getpid()} {self.folder.name}\n")

    def start(self, row):
        self.file = row["file"]
        return super().start(row)


class ClosingHere(Closing):
    bounds_itself = True


class StuckIn(Environment):
    """In one of its methods, once rows have been read."""

    def __init__(self, method: str = "step", home: int = HOME):
        self.method, self.home = method, home

    def _maybe(self, method):
        if self.method == method and os.getpid() != self.home:
            threading.Event().wait()

    def start(self, row):
        self._maybe("start")
        return super().start(row)

    def calls(self, text):
        self._maybe("calls")
        return []

    def step(self, talk):
        self._maybe("step")
        return End(1.0)

    def close(self):
        self._maybe("close")


class Meeting(Environment):
    """Reads a turn when so many conversations are asked to, and not before."""

    row_keys = ("folder", "of")

    def start(self, row):
        self.row = row
        return super().start(row)

    def calls(self, text):
        open(f"{self.row['folder']}/{os.getpid()}", "x").close()
        while len(os.listdir(self.row["folder"])) < self.row["of"]:
            time.sleep(0.01)
        return []


class Stuck(Environment):
    """Counts its turns, with things that no pickle holds, until it is told how not to come back."""

    row_keys = None

    def __init__(self):
        self.lock, self.count = threading.Lock(), iter(range(1, 100))

    def start(self, row):
        return "go"

    def step(self, talk):
        with self.lock:
            heard = f"{next(self.count)} {talk.row['number']} {os.getpid()}"
        if talk.said in ("sleeps", "loops in C", "holds on", "sleeps in C"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as what wants to stay does
            started = subprocess.Popen(["sleep", "1000"])
            with open(talk.row["file"], "a") as file:
                file.write(f"{os.getpid()} {started.pid}\n")
        match talk.said:
            case "sleeps":
                threading.Event().wait()
            case "loops in C":
                re.match(r"(a+)+$", "a" * 80 + "b")
            case "sleeps in C":
                ctypes.PyDLL(None).sleep(1000)
            case "holds on":
                while True:
                    try:
                        time.sleep(1000)
                    except BaseException:  # noqa: BLE001
                        pass
            case "exits":
                os._exit(7)
            case "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "starts":
                process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
                process.start()
                process.join()
                return Observation(f"{process.exitcode}")
            case "gives":
                return lambda: None
            case "long":
                return Observation("x" * 3_000_000)
        return Observation(heard)


class Drawing(Environment):
    """Says what it has drawn."""

    def start(self, row):
        return "go"

    def step(self, talk):
        return Observation(f"{random.random()} {numpy.random.random()}")  # noqa: NPY002  what is seeded


class Unmade(Environment):
    """There is none in a process that has not read rows."""

    def __init__(self, home: int):
        if os.getpid() != home:
            raise ValueError("not here")

    def start(self, row):
        return "go"
