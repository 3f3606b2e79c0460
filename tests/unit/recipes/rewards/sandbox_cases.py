"""Programs run in the sandbox where this machine has one, and limits that tests can wait for."""

from __future__ import annotations

import textwrap

import pytest

from recipes.rewards.registry import get_reward
from recipes.rewards.sandbox import SandboxError, SandboxLimits, bubblewrap, run_program

__all__ = ["LIMITS", "MIB", "reward", "run", "sandboxed"]

try:
    bubblewrap()
    WHY = ""
except SandboxError as error:
    WHY = str(error)
sandboxed = pytest.mark.skipif(bool(WHY), reason=f"no sandbox here: {WHY}")
LIMITS = SandboxLimits(seconds=60, memory=300 << 20, disk=4 << 20, processes=8, output=10_000)
MIB = 1 << 20


def run(program: str, stdin: bytes = b"", limits: SandboxLimits = LIMITS):
    return run_program([textwrap.dedent(program)], stdin, limits)


def reward(**options):
    return get_reward({"name": "code", "seconds": 60, "workers": 2, **options})
