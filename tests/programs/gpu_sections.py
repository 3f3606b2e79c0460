"""Sections of a check that end in every way there is."""

from __future__ import annotations

import os
import signal
import time

from tools.gpu.runner import Findings, Settings, Skip


def describe(settings: Settings) -> dict:
    return {"device": settings.device, "pid": os.getpid()}


def cannot_describe(settings: Settings) -> dict:
    raise RuntimeError("no such machine")


def good(findings: Findings) -> None:
    findings.row("numbers", name="pid", value=os.getpid())
    findings.check("less", 1.0, 2.0)
    findings.note("all is well")


def over_its_limit(findings: Findings) -> None:
    findings.check("less", 1.0, 2.0)
    findings.check("more", 3.0, 2.0)
    findings.check("no number", float("nan"), 2.0)


def goes_on_after_an_attempt(findings: Findings) -> None:
    with findings.attempt("the first"):
        raise ValueError("two\nlines")
    with findings.attempt("the second"):
        raise SystemExit("a tool's word")
    findings.equal("words", "a", "a")
    findings.row("numbers", after=True)


def raises(findings: Findings) -> None:
    findings.row("numbers", found=1)
    raise KeyError("missing")


def skips(findings: Findings) -> None:
    raise Skip("needs another machine")


def dies(findings: Findings) -> None:
    findings.row("numbers", found=2)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(findings: Findings) -> None:
    findings.row("numbers", found=3)
    time.sleep(600)


def has_little_time(findings: Findings) -> None:
    assert findings.enough_time(0.0, "what is quick")
    assert not findings.enough_time(1e6, "what takes days")
