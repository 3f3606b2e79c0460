"""An environment that never answers. As a program: conversations that hang in every way, and nobody to end them.

python -m tests.programs.hanging_environment FILE
"""

import contextlib
import os
import re
import sys
import threading
import time
from pathlib import Path

from recipes.environments.environment import End, Environment, Turn
from recipes.environments.processes import Environments
from recipes.environments.registry import get_environment

WAYS = ("sleeps", "loops in C", "sleeps in C", "holds on")


class Hanging(Environment):
    def step(self, talk):
        threading.Event().wait()


class Sometimes(Environment):
    """The first two that are asked loop in C; all write down who they are."""

    def __init__(self, file: str):
        self.file = file

    def calls(self, text):
        with open(self.file, "a") as file:
            file.write(f"{os.getpid()}\n")
        for number in range(2):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{self.file}-{number}")
                re.match(r"(a+)+$", "a" * 80 + "b")
        return []

    def step(self, talk):
        return End()


if __name__ == "__main__":
    file = Path(sys.argv[1])
    environments = Environments(get_environment("tests.programs.own_environments.Stuck"), 1000.0)
    for number, way in enumerate(WAYS):
        begun = environments.begin("line 1", (number,))
        begun.ask("start", {"number": number, "file": str(file)})
        threading.Thread(target=begun.ask, args=("step", [Turn(way)]), daemon=True).start()
    while not file.exists() or len(file.read_text().splitlines()) < len(WAYS):
        time.sleep(0.01)
    print(environments._server.pid, flush=True)
    time.sleep(1000)
