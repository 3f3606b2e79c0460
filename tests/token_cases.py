"""Ranks of a machine that load one file, as processes of their own."""

from __future__ import annotations

import os
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from recipes.data.once import made_once
from recipes.data.rows import PromptReading
from recipes.data.token_cache import TokenCache
from recipes.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["hold", "load_as_ranks", "started"]


def load_as_ranks(ranks: int, path: Path, folder: Path, tokenizer: Path, processes: int = 2) -> tuple[int, list]:
    """How many texts became tokens, in all processes together; and of each rank (rows, digest), or what it was refused with."""
    from tests.harness import forking

    context = forking()
    count = context.Value("q", 0)
    ready = context.Barrier(ranks)
    answers = context.Queue()
    given = (count, ready, answers, path, folder, tokenizer, processes)
    started = [context.Process(target=_load, args=(rank, *given)) for rank in range(ranks)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=600) for _ in started)
    for process in started:
        process.join(300)
    return count.value, [found[rank] for rank in range(ranks)]


def _load(rank, count: Synchronized, ready, answers, path, folder, tokenizer, processes) -> None:
    os.environ["RANK"] = str(rank)
    encode = Tokenizer.encode_prompt

    def counted(self, text):
        with count.get_lock():
            count.value += 1
        return encode(self, text)

    Tokenizer.encode_prompt = counted
    reading = PromptReading(load_tokenizer(tokenizer), 1000, reward_keys=("answer",))
    ready.wait(600)
    try:
        rows = TokenCache(folder, processes).load(path, reading)
        answers.put((rank, (len(rows), rows.digest)))
    except Exception as error:  # noqa: BLE001  for the test to see
        answers.put((rank, f"{type(error).__name__}: {error}"))


def started(function, *arguments):
    """A process that runs it."""
    from tests.harness import forking

    process = forking().Process(target=function, args=arguments)
    process.start()
    return process


def hold(place: Path, temporary: Path | None = None) -> None:
    """Begin to make something, and never end.

    Args:
        temporary: the process's folder of temporary files; None: the machine's.
    """
    tempfile.tempdir = None if temporary is None else str(temporary)

    def make(folder: Path, tell) -> None:
        (folder / "half").touch()
        tell("half of it")
        time.sleep(600)

    made_once(place, lambda folder: None, make, "it")
