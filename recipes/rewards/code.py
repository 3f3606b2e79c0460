"""The reward code: programs out of responses, run against a row's tests in a sandbox, and nowhere else."""

from __future__ import annotations

import functools
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.asking import asker
from recipes.rewards.exact_answer import without_thought
from recipes.rewards.registry import KEY, register_reward
from recipes.rewards.sandbox import START, Outcome, SandboxError, SandboxLimits, bubblewrap, run_program

__all__ = ["CodeTests"]

_FENCE = re.compile(r"^[ \t]*```(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.S | re.M | re.I)
Runner = Callable[[list[str], bytes], Outcome]


@register_reward("code")
@dataclass(frozen=True)
class CodeTests:
    """1 where the program in a response passes its row's tests, else 0; the program is the last ``` block, or all of the text.

    `tests` of a row is Python that raises where the program is wrong, such as asserts; or a list of {"input", "output"}: the
    program is run on each input, and its output compared but for white space at the ends of lines and of the text.
    """

    row_keys: ClassVar = ("tests",)
    bounds_itself: ClassVar = True

    # Seconds, bytes of memory, bytes of disk, processes and bytes of output that a program may have.
    seconds: float = SandboxLimits.seconds
    memory: int = SandboxLimits.memory
    disk: int = SandboxLimits.disk
    processes: int = SandboxLimits.processes
    output: int = SandboxLimits.output
    # Programs that run at the same time; null: this rank's share of the cores. More would wait for each other, by the clock.
    workers: int | None = None
    # The share of a list of tests that are passed, in place of all or nothing.
    partial: bool = False
    # Interpreter that programs run in, with its packages; null: this one's, without packages.
    python: str | None = None
    # Where bubblewrap cannot run: http://host:port that answers as SandboxFusion does (POST /run_code).
    url: str | None = None

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{KEY}.workers={self.workers} must be at least 1")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{KEY}.url={self.url}: give http://host:port")
        self._limits  # noqa: B018  raises on bad ones

    def check_here(self) -> None:
        """
        Raises:
            ConfigError: nothing here runs programs in a sandbox. They are never run without one.
        """
        self._runner()

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row without tests.

        Raises:
            UserError: it has none, or others.
        """
        tests = row.get("tests")
        if isinstance(tests, str) and tests.strip():
            return
        pairs = isinstance(tests, list) and tests and all(isinstance(t, dict) for t in tests)
        if not pairs or not all(isinstance(t.get(k), str) for t in tests for k in ("input", "output")):
            raise UserError(
                f'its tests are {str(tests)[:40]!r}: write Python that raises where a program is wrong, or a list of {{"input": '
                'text, "output": text}'
            )

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        waits, of_here = asker(), self._runner()

        def run(parts: list[str], stdin: bytes) -> Outcome:
            waits.check()
            return of_here(parts, stdin)

        with ThreadPoolExecutor(self.workers or _share_of_cores(), "sandbox") as pool:
            return list(pool.map(functools.partial(self._score, run), responses, rows))

    def _score(self, run: Runner, response: str, row: Mapping[str, Any]) -> float | None:
        self.check(row)
        program, tests = _program(response), row["tests"]
        if not program.strip():
            return 0.0
        if isinstance(tests, str):
            done = run([program, tests], b"")
            return float(done.reached_end) if done.killed != START else None
        passed = 0
        for test in tests:
            done = run([program], test["input"].encode())
            if done.killed == START:
                return None
            right = done.code == 0 and _lines(done.output.decode(errors="replace")) == _lines(test["output"])
            if not right and not self.partial:
                return 0.0
            passed += right
        return passed / len(tests)

    @property
    def _limits(self) -> SandboxLimits:
        try:
            return SandboxLimits(self.seconds, self.memory, self.disk, self.processes, self.output)
        except UserError as error:
            raise ConfigError(f"{KEY}: {error}") from error

    def _runner(self) -> Runner:
        """What runs programs; raises as `check_here`."""
        try:
            bubblewrap()
        except SandboxError as error:
            if self.url is None:
                raise ConfigError(
                    f"{KEY}=code runs programs in a sandbox alone, and {error}: install it and let users make namespaces, or "
                    f"name a server as SandboxFusion's in {KEY}.url"
                ) from error
            return functools.partial(_run_there, self.url.rstrip("/"), self._limits)
        return lambda parts, stdin: run_program(parts, stdin, self._limits, self.python)


def _share_of_cores() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)  # of this machine
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _program(response: str) -> str:
    said = without_thought(response)
    blocks = _FENCE.findall(said)
    return blocks[-1] if blocks else said


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _run_there(url: str, limits: SandboxLimits, parts: list[str], stdin: bytes) -> Outcome:
    """At a server as SandboxFusion's.

    Raises:
        SandboxError: it does not answer, or has failed itself.
    """
    mark = None
    if len(parts) > 1:  # sys.exit(0) before the tests is no end
        mark = secrets.token_hex(16).encode()
        parts = [*parts, f"print({mark.decode()!r}, end='', flush=True)"]
    asked = {
        "language": "python", "code": "\n".join(parts), "stdin": stdin.decode(), "run_timeout": limits.seconds,
        "memory_limit_MB": limits.memory >> 20,
    }  # fmt: skip
    try:
        # A cluster's proxy does not know its machines.
        answer = httpx.post(f"{url}/run_code", json=asked, timeout=limits.seconds + 60, trust_env=False)
        said = answer.raise_for_status().json()
        done = said.get("run_result") or {}
        if said["status"] == "SandboxError" or "status" not in done:
            raise SandboxError(f"{url} has run nothing: {str(said.get('message'))[:200]}")
    except (httpx.HTTPError, ValueError, KeyError, AttributeError) as error:
        raise SandboxError(f"{url} does not run programs: {error}") from error
    output, code = (done.get("stdout") or "").encode(), done.get("return_code")
    if done["status"] == "TimeLimitExceeded":
        return Outcome(output, None, False, "seconds")
    if len(output) > limits.output:
        return Outcome(b"", None, False, "output")
    reached = mark is None or output.endswith(mark)
    return Outcome(output, code, code == 0 and reached)
