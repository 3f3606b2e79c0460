"""What a run shows of itself while it goes: numbers in words, a panel on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading

import pytest

from recipes.run.metrics import METRICS
from recipes.run.progress import HEALTH, PHASES, StepLine, health, memory, phases, progress_bar, speed

STEP = {
    "timers/step": 10.0, "timers/generate": 6.0, "timers/weights": 1.0, "timers/actor_update": 2.5,
    "timers/old_and_reference_logprobs": 0.5, "timers/validation": 10.0, "train_rollouts/reward": 0.25,
    "train_optim/loss": 0.001, "train_optim/grad_norm": 1.5, "train_optim/entropy": 2.0, "train_rollouts/truncated": 0.125,
    "train_optim/tokens_per_second": 12345.6, "train_optim/skipped": 0.0, "val_rollouts/reward": 0.5,
}  # fmt: skip


class Terminal:
    """Standard error output is one, until it is closed; what has been written to it."""

    def __init__(self, monkeypatch):
        self.master, slave = os.openpty()
        self.stream, self.written = os.fdopen(slave, "w"), bytearray()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", self.stream)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(self.master, 4096):
                self.written.extend(chunk)

    def close(self) -> bytes:
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return bytes(self.written)


def test_what_is_shown_is_what_is_logged():
    assert set(HEALTH) <= set(METRICS) and set(PHASES) <= set(METRICS)


def test_shares_of_a_step_and_its_validation_add_up():
    """Twenty seconds: weights are within sampling, one second is nobody's."""
    assert phases(STEP) == "validation 50%, sampling 25%, update 12%, weights 5%, scoring 2%, the rest 5%"
    assert phases({"timers/optimizer_step": 3.0}) == "update 100%"
    assert phases({}) == ""


def test_speed_and_health_in_words():
    assert speed(STEP) == "12,346 tokens/s, 10 s a step"
    assert speed({"timers/optimizer_step": 0.5, "train_optim/mfu": 0.4132}) == "0.5 s a step, MFU 41.3%"
    said = "reward 0.250, entropy 2, gradient 1.5, cut off 12%, steps left out 0%, val_rollouts/reward 0.5"
    assert health(STEP) == said
    assert health({"train_optim/loss": 2.0}) == "loss 2.0000"


def test_memory_is_that_of_this_process():
    """To within what one allocates meanwhile."""
    (said,) = re.fullmatch(r"(\d+\.\d) GiB resident", memory()).groups()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    assert float(said) == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, abs=0.15)


def test_a_terminal_has_a_panel_and_says_no_more_when_it_is_over(monkeypatch):
    elsewhere = io.StringIO()
    monkeypatch.setattr(sys, "stdout", elsewhere)
    terminal = Terminal(monkeypatch)
    try:
        with progress_bar(4, "GRPO", "step", done=1) as bar:
            bar.update()
            bar.tell("a summary", STEP)
            print("for a file")
    finally:
        written = terminal.close()
    assert elsewhere.getvalue() == "for a file\n", "what goes elsewhere is left alone"
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    last = text.rpartition("GRPO")[2]
    assert re.search(r"2/4\s+steps", last) and "12,346 tokens/s, 10 s a step: validation 50%, sampling 25%" in last
    assert "GiB resident" in last and health(STEP) in last and "a summary" not in text
    assert written.rfind(b"\x1b[?25h") > written.rfind(b"\x1b[?25l"), "the cursor is left as it was"


def test_a_log_has_lines_with_the_summary(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(4, "GRPO", "step", done=1) as bar:
        assert isinstance(bar, StepLine)
        bar.update(3)
        bar.tell("a summary", STEP)
    assert "GRPO: 100%" in log.getvalue() and "4/4" in log.getvalue() and "\x1b[?25" not in log.getvalue()
    with progress_bar(4, "GRPO", "step", shown=False) as bar:
        bar.update(4)
    assert log.getvalue().count("GRPO") == log.getvalue().split("4/4")[0].count("GRPO")
