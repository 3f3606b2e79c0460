"""Rewards over HTTP, from real servers: the same numbers as without one, whatever happens to the server meanwhile."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import psutil
import pytest
import uvicorn

from megatron_ext.ports import free_port
from recipes.cli.config import ConfigError
from recipes.rewards.asking import Asker, serving
from recipes.rewards.client import TOKEN_VARIABLE, URL_VARIABLE, HttpReward
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.server import ServerLimits, reward_app
from recipes.rewards.settings import RewardLimits
from recipes.rewards.several import rewards_for
from tests.harness import ROOT
from tests.unit.recipes.rewards.cases import prompts, served
from tests.waiting import until

OWN = "tests.programs.own_rewards"
RESPONSES = ["Answer: 4", "#### 5", 'é "quoted"\n']
ROWS = [{"answer": 4}, {"answer": "6"}, {"answer": 'é "quoted"'}]
# A server that has just been started on a busy machine may take longer than the five seconds that httpx waits.
get, post = (functools.partial(ask, timeout=600) for ask in (httpx.get, httpx.post))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (URL_VARIABLE, TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as servers:

        def start(spec, token: str | None = None, limits: ServerLimits | None = None) -> str:
            listening = socket.create_server(("127.0.0.1", 0))
            app = reward_app(get_reward(spec), token, limits or ServerLimits())
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            servers.callback(thread.join)
            servers.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


def test_the_same_rewards_as_without_a_server(serve, monkeypatch):
    url = serve("exact_answer")
    asked = get_reward({"name": "http", "url": url, "batch_size": 2})
    assert score(asked, RESPONSES, ROWS) == score(get_reward("exact_answer"), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
    monkeypatch.setenv(URL_VARIABLE, url + "/")
    assert score(get_reward("http"), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
    assert get(f"{url}/health").json() == {"status": "ok", "reward": "exact_answer"}
    counted = dict(line.split() for line in get(f"{url}/metrics").text.splitlines())
    assert counted['reward_requests_total{status="200"}'] == "3" and counted["reward_responses_total"] == "6"
    assert counted["reward_timeouts_total"] == "0" and float(counted["reward_seconds_total"]) > 0


def test_a_proxy_is_not_asked(serve, monkeypatch):
    """Nothing listens at the discard port."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = get_reward({"name": "http", "url": serve("exact_answer"), "patience": 0})
    assert score(asked, RESPONSES, ROWS) == [1.0, 0.0, 1.0]


def test_a_token_is_asked_for(serve, monkeypatch):
    asked = HttpReward(serve("exact_answer", "secret"))
    with pytest.raises(RewardError, match=f"says 401: wrong token, or none: set {TOKEN_VARIABLE} as the server has it"):
        asked(["#### 4"], [{"answer": 4}])
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert asked(["#### 4"], [{"answer": 4}]) == [1.0]
    monkeypatch.setenv(TOKEN_VARIABLE, "secret2")
    with pytest.raises(RewardError, match="says 401"):
        asked(["#### 4"], [{"answer": 4}])


def test_what_is_wrong_with_the_reward_names_the_row(serve):
    rewards = rewards_for({"name": "http", "url": serve(f"{OWN}.gives_nan"), "batch_size": 2, "requests": 1}, {})
    with pytest.raises(RewardError) as caught:
        rewards.score([["a", "b"], ["c"]], prompts({}, {"x": 1}))
    assert "reward http for the prompt of line 3: http://127.0.0.1:" in str(caught.value)
    assert f"says 422: reward {OWN}.gives_nan gave nan for response 0; it must be finite" in str(caught.value)


def test_one_that_hangs_there_is_not_scored_in_time(serve):
    url = serve(f"{OWN}.slow", limits=ServerLimits(timeout=1.0))
    spec = {"name": "http", "url": url}
    texts, rows = [["a", "bb"], ["hang", "c"], ["ddd"]], prompts({"n": 1}, {"n": 2}, {"n": 3})
    dropped = rewards_for(spec, {}, None, RewardLimits(on_timeout="drop")).score(texts, rows)
    assert dropped.lost == [[0, 0], [1, 1], [0]] and dropped.totals[0] == [1, 2] and dropped.totals[2] == [3]
    assert rewards_for(spec, {}, None, RewardLimits(on_timeout="zero")).score(texts, rows).totals == [
        [1, 2],
        [0, 0],
        [3],
    ]
    with pytest.raises(RewardError, match="reward http could not score a response in time, to the prompt of line 5"):
        rewards_for(spec, {}).score(texts, rows)
    assert "reward_timeouts_total 6" in get(f"{url}/metrics").text


def test_a_server_that_lives_and_says_nothing_is_not_waited_for(serve, tmp_path):
    url = serve({"name": f"{OWN}.Gate", "folder": str(tmp_path)})
    assert HttpReward(url, timeout=0.5)(["wait", "a"], [{}, {}]) == [None, None]
    (tmp_path / "open").touch()


def test_what_nobody_waits_for_is_not_computed(serve, tmp_path):
    """Neither the request in hand, whose process would wait for ever, nor one behind it; the next one is answered."""
    url = serve({"name": f"{OWN}.Gate", "folder": str(tmp_path)}, limits=ServerLimits(timeout=600))
    asked = [http.client.HTTPConnection(url.removeprefix("http://")) for _ in range(2)]
    for each in asked:
        each.request("POST", "/score", json.dumps({"responses": ["wait"], "rows": [{}]}))
    until((tmp_path / "asked").exists)
    for each in asked:
        each.close()
    until(lambda: 'requests_total{status="499"} 2' in get(f"{url}/metrics").text)
    assert HttpReward(url)(["abc"], [{}]) == [3]
    assert not (tmp_path / "open").exists()


@pytest.mark.parametrize("spec", [{"name": "code"}, {"name": "judge", "url": "http://127.0.0.1:9", "model": "m"}])
def test_rewards_that_bound_themselves_give_up_what_nobody_waits_for(spec, monkeypatch):
    monkeypatch.setattr("recipes.rewards.code.CodeTests._runner", lambda self: pytest.fail)
    who = Asker()
    who.left()

    def ask():
        serving(who)
        return score(get_reward(spec), ["x = 1"], [{"tests": "pass", "prompt": "?"}])

    with pytest.raises(RewardError, match="whoever has asked for this reward is gone"):
        contextvars.copy_context().run(ask)


@pytest.mark.kills
def test_a_server_that_is_killed_and_started_again(tmp_path, caplog):
    """In the middle of a batch: the run waits, and every number is right."""
    port, reward = free_port(), ["--reward", f"{{name: {OWN}.Gate, folder: {tmp_path}}}"]
    texts = ["a" * i for i in range(6)] + ["wait"] + ["b" * i for i in range(6)]
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        with served(*reward, port=port, url_file=tmp_path / "first") as (process, url):
            asked = pool.submit(HttpReward(url, batch_size=3, requests=1, outage=300), texts, [{}] * len(texts))
            until((tmp_path / "asked").exists)
            process.send_signal(signal.SIGKILL)
            process.wait()
        until(lambda: caplog.records, over=asked.done)
        (tmp_path / "open").touch()
        with served(*reward, port=port, url_file=tmp_path / "second"):
            assert asked.result() == [len(text) for text in texts]
    first, last = (record.getMessage() for record in caplog.records)
    assert f"{url} does not answer (" in first and "the run waits, up to 300 s" in first
    assert f"{url} answers again after" in last


def test_another_reward_behind_the_same_address_is_refused(tmp_path):
    port = free_port()
    asked = HttpReward(f"http://127.0.0.1:{port}")
    with served("--reward", "exact_answer", port=port, url_file=tmp_path / "first"):
        assert asked(["#### 4"], [{"answer": 4}]) == [1.0]
    with served("--reward", "choice", port=port, url_file=tmp_path / "second"):
        with pytest.raises(
            RewardError, match="serves the reward choice now, and served exact_answer before: start the server"
        ):
            asked(["B"], [{"answer": "B"}])


def test_a_request_to_stop_is_not_for_the_server(tmp_path):
    """scancel --signal=USR1 reaches it, too, and the trainers still need their rewards."""
    with served("--reward", "exact_answer", "--name", "127.0.0.1", url_file=tmp_path / "url") as (process, url):
        assert score(HttpReward(url), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
        for each in (process, *psutil.Process(process.pid).children()):
            each.send_signal(signal.SIGUSR1)
        assert score(HttpReward(url), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
        assert process.status() != psutil.STATUS_ZOMBIE


def test_without_a_token_others_may_not_ask(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != TOKEN_VARIABLE}
    command = [sys.executable, "launch/serve_reward.py", "--reward", "exact_answer", "--host", "0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"--host 0.0.0.0 lets others ask, and {TOKEN_VARIABLE} is not set" in done.stderr


def test_no_server():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=rf"{url} does not answer \(.*\), for 0 s; is launch/serve_reward.py running"):
        HttpReward(url, patience=0)(["x"], [{}])


@contextlib.contextmanager
def impostor(status: int, answers: list):
    """A server that says this to each request in turn, its last answer again and again."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers[min(len(seen), len(answers) - 1)]
            seen.append(asked)
            status_now, content = answer(asked) if callable(answer) else (status, answer)
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status_now)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"x", "gave no"),
        ([], "gave no"),
        ({"rewards": 3, "reward": "x"}, "gave no"),
        ({"id": "other", "reward": "x", "rewards": [1.0]}, "answered another question than it was asked"),
        (lambda asked: (200, {"id": asked["id"], "reward": "x", "rewards": [1.0, 2.0]}), "answered another question"),
        (
            lambda asked: (200, {"id": asked["id"], "reward": "x", "rewards": ["1"]}),
            "gave '1' for response 0, not a number",
        ),
        (
            lambda asked: (200, b'{"id": "%s", "reward": "x", "rewards": [NaN]}' % asked["id"].encode()),
            "gave nan for response 0",
        ),
        (lambda asked: (418, {"error": "no"}), "says 418: no"),
    ],
)
def test_answers_that_are_none(answer, message):
    with impostor(200, [answer]) as (url, _), pytest.raises(RewardError, match=message):
        score(get_reward({"name": "http", "url": url}), ["a"], [{}])


def test_a_server_that_is_busy_is_asked_again():
    def right(asked):
        return 200, {"id": asked["id"], "reward": "x", "rewards": [len(t) for t in asked["responses"]]}

    with impostor(200, [lambda _: (503, {}), lambda _: (429, {}), lambda _: (502, b""), right]) as (url, seen):
        assert HttpReward(url)(["ab"], [{"n": 1}]) == [2]
    assert len(seen) == 4 and len({each["id"] for each in seen}) == 1 and seen[3]["rows"] == [{"n": 1}]


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b'{"responses": ["a"], "rows": []}', b'{"rows": []}', b'{"responses": [4], "rows": [{"answer": 4}]}',
        b'{"responses": ["a"], "rows": ["a"]}',
    ],
)  # fmt: skip
def test_bad_requests(serve, body):
    answer = post(serve("exact_answer") + "/score", content=body)
    assert answer.status_code == 400 and "expected" in answer.json()["error"]


def test_requests_that_are_too_large(serve):
    url = serve("exact_answer", limits=ServerLimits(batch=2, body=300))
    asked = {"responses": ["#### 1"] * 3, "rows": [{"answer": 1}] * 3}
    answer = post(f"{url}/score", json=asked)
    assert (answer.status_code, answer.json()["error"]) == (
        413,
        "3 responses are more than 2: ask for fewer at once (batch_size)",
    )
    answer = post(f"{url}/score", json={"responses": ["x" * 400], "rows": [{}]})
    assert answer.status_code == 413 and "at most 300 bytes" in answer.json()["error"]
    assert HttpReward(url, batch_size=2)(asked["responses"], asked["rows"]) == [1.0] * 3


def test_more_requests_than_may_wait(serve, tmp_path):
    url = serve({"name": f"{OWN}.Gate", "folder": str(tmp_path)}, limits=ServerLimits(waiting=1))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, f"{url}/score", json={"responses": ["wait"], "rows": [{}]})
        until((tmp_path / "asked").exists)
        answer = post(f"{url}/score", json={"responses": ["a"], "rows": [{}]})
        assert answer.status_code == 503 and answer.json()["error"] == "1 requests wait already"
        (tmp_path / "open").touch()
        assert first.result().json()["rewards"] == [4]
        assert HttpReward(url)(["abc"], [{}]) == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": None}, f"url=null: give http://host:port here, or in {URL_VARIABLE}"),
        ({"url": "localhost:8000"}, "url=localhost:8000"),
        ({"timeout": 0}, "timeout=0 must be positive"),
        ({"outage": -1}, "outage=-1 not negative"),
        ({"batch_size": 0}, "batch_size=0 and requests=4 must be at least 1"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        HttpReward(**{"url": "http://x:1", **options})
    with pytest.raises(ConfigError, match="must be positive"):
        ServerLimits(batch=0)
