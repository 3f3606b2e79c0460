"""Programs that nobody trusts: what is right is found, whatever they claim; rows, settings, and where there is no sandbox."""

from __future__ import annotations

import json
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.sandbox import bubblewrap, run_program
from recipes.rewards.several import rewards_for
from tests.unit.recipes.rewards.cases import prompts
from tests.unit.recipes.rewards.sandbox_cases import LIMITS, reward, run, sandboxed

# What is right


@sandboxed
def test_asserts():
    right, wrong = "def f(x):\n    return 2 * x\n", "def f(x):\n    return x\n"
    responses = [
        right, f"So:\n```python\n{right}```\nThat is it.", f"```\n{wrong}```\n```py\n{right}```",
        f"<think>```\n{wrong}```</think>\n{right}",
        wrong, f"```python\n{right}```\n```python\n{wrong}```", "def f(x:", "", "no program at all",
        f"import sys\nsys.exit(0)\n{right}", f"{right}\nimport os\nos._exit(0)", "raise SystemExit",
    ]  # fmt: skip
    values = score(reward(), responses, [{"tests": "assert f(2) == 4\nassert f(-1) == -2"}] * len(responses))
    assert values == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


FRAME = """
    import os, sys
    frame = sys._getframe()
    while frame is not None:
        for value in [*frame.f_locals.values()]:
            if isinstance(value, dict) and "ended" in value:
                found = value
        frame = frame.f_back
"""
WORDS = """
    import os
    for fd in range(3, 50):
        try:
            os.write(fd, b"+" * 32)
        except OSError:
            pass
    os._exit(0)
"""


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        FRAME + "    os.write(2, found['ended'].encode())\n    os._exit(0)",
        FRAME + "    found['parts'][1] = 'pass'",
        "import builtins\nbuiltins.exec = lambda *_: None",
        "import builtins\nbuiltins.compile = lambda *_, **__: 'pass'",
        WORDS,
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(0)",
        "import os\nos.kill(os.getppid(), 9)",
        "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)",
    ],
)
def test_a_program_that_claims_to_have_passed(program):
    assert score(reward(), [textwrap.dedent(program)], [{"tests": "assert False"}]) == [0]


@sandboxed
def test_the_tests_are_not_there_before_the_program_has_run():
    """Nor can it look into the process that has them."""
    found = run_program(
        [
            textwrap.dedent(
                """
                import gc, os, sys
                known = [x for x in gc.get_objects() if isinstance(x, (dict, list)) and chr(64) * 7 in str(x)]
                print(len(known))
                for path in (f"/proc/{os.getppid()}/mem", f"/proc/{os.getppid()}/fd"):
                    try:
                        print(open(path, "rb") if path.endswith("mem") else os.listdir(path))
                    except OSError as error:
                        print(type(error).__name__)
                """
            ),
            "print('@@@@@@@')",
        ],
        b"",
        LIMITS,
    )
    assert found.output.split() == [b"0", b"PermissionError", b"PermissionError", b"@" * 7] and found.reached_end


@sandboxed
def test_what_a_program_has_left_running_keeps_nobody_waiting():
    leaves = "import os, time\nif os.fork() == 0:\n    time.sleep(100)\n"
    assert run_program([leaves, "x = 1\n" * 100_000 + "assert x"], b"", LIMITS).reached_end
    assert run(leaves + "os._exit(3)").code == 3


@sandboxed
def test_one_that_does_not_begin_is_started_again_and_is_then_lost(monkeypatch):
    starts = []

    def slow(*_):
        starts.append(1)
        return ["-c", "import time; time.sleep(100)"]

    found = reward()
    monkeypatch.setattr("recipes.rewards.sandbox.STARTS_SECONDS", 0.2)
    monkeypatch.setattr("recipes.rewards.sandbox._arguments", slow)
    monkeypatch.setattr("recipes.rewards.code.bubblewrap", lambda: None)
    monkeypatch.setattr("recipes.rewards.sandbox.bubblewrap", lambda: sys.executable)
    assert score(found, ["x = 1"], [{"tests": "assert True"}]) == [None] and len(starts) == 2
    assert score(found, ["x = 1"], [{"tests": [{"input": "", "output": ""}]}]) == [None] and len(starts) == 4


@sandboxed
def test_inputs_and_outputs():
    program = "import sys\nnumbers = [int(x) for x in sys.stdin.read().split()]\nprint(sum(numbers))\nsys.exit()\n"
    tests = [{"input": "1 2\n3", "output": "6\n"}, {"input": "", "output": "0"}, {"input": "-4 1", "output": "-3"}]
    off = tests[:2] + [{"input": "1", "output": "2"}]
    rows = [{"tests": tests}, {"tests": off}, {"tests": tests}]
    assert score(reward(), [program, program, program + "x"], rows) == [1, 0, 1]  # what follows an exit is not run
    assert score(reward(partial=True), [program, program], rows[:2]) == [1, pytest.approx(2 / 3)]
    assert run("if __name__ == '__main__':\n    print('é', end='')").output == "é".encode()


@sandboxed
def test_the_standard_library_and_what_there_is_of_a_machine():
    done = run(
        """
        import collections, dataclasses, decimal, json, math, os, random, re, sqlite3, subprocess, tempfile
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 1000)
        print(os.getcwd(), os.getuid() != 0, subprocess.run(["echo", "hi"], capture_output=True).stdout)
        """
    )
    assert (done.output, done.code) == (b"/tmp True b'hi\\n'\n", 0)


# Rows, settings, and where there is no sandbox


def test_rows():
    rewards = rewards_for("code", {})
    rewards.check_rows(prompts({"tests": "assert True"}, {"tests": [{"input": "", "output": ""}]}), "rows.jsonl")
    for tests in (None, "", [], [{"input": "x"}], [{"input": 1, "output": "1"}], {"input": "", "output": ""}):
        with pytest.raises(RewardError, match=r"rows\.jsonl:3: its tests are .*: write Python that raises"):
            rewards.check_rows(prompts({"tests": tests}), "rows.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"seconds": 0}, "limits of a sandbox must be positive"),
        ({"url": "x"}, "url=x"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        get_reward({"name": "code", **options})


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No bubblewrap on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    bubblewrap.cache_clear()
    yield tmp_path
    bubblewrap.cache_clear()


def test_without_a_sandbox_it_is_refused(nowhere):
    with pytest.raises(ConfigError) as caught:
        rewards_for("code", {}).check_here()
    with pytest.raises(RewardError, match="reward code: trainer.grpo.reward=code runs programs in a sandbox alone"):
        score(get_reward("code"), ["x = 1"], [{"tests": "assert x"}])
    assert str(caught.value) == (
        "trainer.grpo.reward=code runs programs in a sandbox alone, and bubblewrap is not installed (no bwrap on PATH; the "
        "Debian package is bubblewrap): install it and let users make namespaces, or name a server as SandboxFusion's in "
        "trainer.grpo.reward.url"
    )


@pytest.mark.parametrize(
    ("text", "words"), [("exit 1", "has run nothing (exit code 1): without a word"), ("echo no >&2; exit 1", ": no")]
)
def test_a_bubblewrap_that_does_not_run_is_none(nowhere, text, words):
    file = nowhere / "bwrap"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    nowhere.chmod(0o755)
    with pytest.raises(ConfigError) as caught:
        get_reward("code").check_here()
    assert words in str(caught.value) or "bubblewrap does not start" in str(caught.value)


def test_a_server_in_its_place(nowhere, monkeypatch):
    """As SandboxFusion's documentation has requests and answers; its own server is not run here. A proxy is not asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    seen = []

    def finished(asked, output="", code=0, status="Finished"):
        return {
            "status": "Success" if code == 0 else "Failed",
            "run_result": {"status": status, "return_code": code, "stdout": output},
        }

    def answer(asked):
        code = asked["code"]
        if "hang" in code:
            return finished(asked, code=None, status="TimeLimitExceeded")
        if "broken" in code:
            return {"status": "SandboxError", "message": "out of workers"}
        if "exit" in code:
            return finished(asked)
        return finished(asked, "7\n" if "print(7)" in code else code.rpartition("print('")[2].partition("'")[0])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = json.dumps(answer(seen[-1][1])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = reward(url=f"http://127.0.0.1:{server.server_address[1]}/", workers=1)
        rows = [
            {"tests": [{"input": "a", "output": "7"}]},
            {"tests": [{"input": "a", "output": "8"}]},
            {"tests": "assert x"},
        ]
        assert score(found, ["print(7)", "print(7)", "x = 1"], rows) == [1, 0, 1]
        assert score(found, ["hang", "exit"], [rows[0], rows[2]]) == [0, 0]
        with pytest.raises(RewardError, match="has run nothing: out of workers"):
            score(found, ["broken"], rows[:1])
        server.shutdown()
    path, first = seen[0]
    assert path == "/run_code" and first == {
        "language": "python", "code": "print(7)", "stdin": "a", "run_timeout": 60.0, "memory_limit_MB": 1024,
    }  # fmt: skip
