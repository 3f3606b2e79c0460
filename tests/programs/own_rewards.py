"""Rewards of a user's own, by dotted path."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


def plain(responses, rows):
    return [len(r) for r in responses]


def scaled(responses, rows, alpha, beta=0):
    return [alpha * len(r) + beta for r in responses]


def of_a_third(responses, rows):
    """The length, for a third of the prompts; nothing for the others."""
    return [len(r) * (sum(map(ord, row["prompt"])) % 3 == 0) for r, row in zip(responses, rows, strict=True)]


def nothing(responses, rows):
    return [0.0] * len(responses)


@dataclass
class Typed:
    alpha: float

    def __call__(self, responses, rows):
        return [self.alpha] * len(responses)


@dataclass
class Noted:
    """As `length` with a target of 12 characters; says in a file how often it is asked."""

    file: str

    def __call__(self, responses, rows):
        with Path(self.file).open("a") as file:
            file.write("asked\n" * len(responses))
        return [max(0.0, 1 - abs(len(r) - 12) / 12) for r in responses]


class Untyped:
    def __init__(self, alpha):
        self.alpha = alpha / 2

    def __call__(self, responses, rows):
        return [self.alpha] * len(responses)


constant = 3


def gives_nan(responses, rows):
    return [float("nan")] * len(responses)


# Those that go wrong where a response says so.


def slow(responses, rows):
    """Its length, or never anything where it says "hang"."""
    while "hang" in responses:
        time.sleep(0.01)
    return plain(responses, rows)


def stubborn(responses, rows):
    """Not even SIGTERM ends it."""
    if "hang" in responses:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    return slow(responses, rows)


def starts(responses, rows):
    """What it starts says so in a file, and outlives it; then as `mortal` and `slow`."""
    started = subprocess.Popen(["sleep", "600"])
    with Path(rows[0]["file"]).open("a") as file:
        print(started.pid, file=file)
    mortal(responses, rows)
    return slow(responses, rows)


def mortal(responses, rows):
    if "die" in responses:
        os._exit(7)
    if "kill" in responses:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in responses:
        sys.exit("enough")
    return plain(responses, rows)


def own_process(responses, rows):
    return [os.getpid()] * len(responses)


async def awaited(responses, rows):
    """As `slow`, and all that are asked at once have to meet."""
    global together
    together += 1
    for _ in range(3):
        await asyncio.sleep(0)
    met = together
    while "hang" in responses:
        await asyncio.sleep(0.01)
    while "block" in responses:
        time.sleep(0.01)
    return [met] * len(responses)


together = 0


class Awaited:
    async def __call__(self, responses, rows):
        return [2.0 if row.get("answer") == text else 1 for text, row in zip(responses, rows, strict=True)]


def wrong_count(responses, rows):
    return [1.0]


def says_and_hangs(responses, rows):
    print(os.getpid(), flush=True)
    if "in C" in responses:
        re.match(r"(a+)+$", "a" * 80 + "b")
    time.sleep(600)


@dataclass
class Gate:
    """Its length; where it says "wait", or behind so many calls, says so in `folder`/asked, and waits for `folder`/open."""

    folder: str
    calls: int = 1000

    def __call__(self, responses, rows):
        self.calls -= 1
        if "wait" in responses or self.calls < 0:
            Path(self.folder, "asked").touch()
            while not Path(self.folder, "open").exists():
                time.sleep(0.01)
        return plain(responses, rows)


def hangs_on_row(responses, rows):
    while rows[0].get("hang"):
        time.sleep(0.01)
    return [len(r) / 10 for r in responses]
