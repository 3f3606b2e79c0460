"""Rewards over HTTP, from a real server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.server import URL_VARIABLE, HttpReward, reward_server
from tests.harness import ROOT


@pytest.fixture
def serve():
    servers = []

    def start(spec, port: int = 0) -> str:
        server = reward_server(get_reward(spec), str(spec), "127.0.0.1", port)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


RESPONSES = ["Answer: 4", "#### 5", 'é "quoted"\n']
ROWS = [{"answer": 4}, {"answer": "6"}, {"answer": 'é "quoted"'}]


def test_the_same_rewards_as_without_a_server(serve, monkeypatch):
    url = serve("exact_answer")
    asked = get_reward({"name": "http", "url": url})
    assert score(asked, RESPONSES, ROWS) == score(get_reward("exact_answer"), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
    monkeypatch.setenv(URL_VARIABLE, url + "/")
    assert score(get_reward("http"), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert json.loads(answer.read()) == {"reward": "exact_answer"}


def test_the_servers_error_is_the_rewards(serve):
    asked = HttpReward(serve("exact_answer"))
    with pytest.raises(RewardError, match="says 400: reward .*no answer to compare with"):
        asked(["x"], [{}])


def test_a_server_that_starts_later(serve):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    timer = threading.Timer(0.3, serve, ({"name": "length", "target": 2}, port))
    timer.start()
    assert HttpReward(f"http://127.0.0.1:{port}", patience=60)(["ab"], [{}]) == [1.0]
    timer.join()


def test_a_request_to_stop_is_not_for_the_server(tmp_path):
    """scancel --signal=USR1 reaches it, too, and the trainers still need their rewards."""
    file = tmp_path / "url"
    command = [
        sys.executable,
        "launch/serve_reward.py",
        "--reward",
        "exact_answer",
        "--name",
        "127.0.0.1",
        "--url-file",
        file,
    ]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT)
    try:
        while not file.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert score(HttpReward(file.read_text()), RESPONSES, ROWS) == [1.0, 0.0, 1.0]
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_no_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(RewardError, match=f"{url} does not answer .*is launch/serve_reward.py running"):
            HttpReward(url, patience=0)(["x"], [{}])


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b'{"responses": ["a"], "rows": []}', b'{"rows": []}', b'{"responses": [4], "rows": [{"answer": 4}]}',
        b'{"responses": ["a"], "rows": ["a"]}',
    ],
)  # fmt: skip
def test_bad_requests(serve, body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(serve("exact_answer") + "/score", body), timeout=10)
    assert refused.value.code == 400 and "expected" in json.loads(refused.value.read())["error"]


def test_settings(monkeypatch):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"url=null: give http://host:port here, or in {URL_VARIABLE}"):
        HttpReward()
    with pytest.raises(ConfigError, match="url=localhost:8000"):
        HttpReward("localhost:8000")
    with pytest.raises(ConfigError, match="timeout=0 must be positive"):
        HttpReward("http://x:1", timeout=0)
