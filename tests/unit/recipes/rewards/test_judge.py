"""A judge behind a chat endpoint: what it is asked, what counts as its verdict, and what is done without one."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_ext.ports import free_port
from recipes.cli.config import ConfigError
from recipes.rewards.judge import KEY_VARIABLE
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.settings import RewardLimits
from recipes.rewards.several import rewards_for
from tests.unit.recipes.rewards.cases import prompts


@contextlib.contextmanager
def judging(answer, port=0):
    """A chat endpoint: `answer(question, how often it was asked)` gives what it says, or (status, body)."""
    seen: list[tuple[dict, dict]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = asked["messages"][0]["content"]
            with lock:
                times = sum(question == before["messages"][0]["content"] for before, _ in seen)
                seen.append((asked, dict(self.headers)))
            said = answer(question, times)
            status, body = (
                said
                if isinstance(said, tuple)
                else (200, {"choices": [{"message": {"role": "assistant", "content": said}}]})
            )
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def judge(url: str, **options) -> dict:
    return {"name": "judge", "url": url, "model": "m", **options}


def test_each_response_is_asked_about_and_its_verdict_scaled(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    texts = ["a 3", "<think>10</think>b 7.5", "c 0", "d 10"]
    rows = [
        {"prompt": "Why?"},
        {"messages": [{"role": "user", "content": "How?"}]},
        {"prompt": "{response}"},
        {"prompt": "x"},
    ]

    def answer(question, times):
        return f"Score: 1, no.\n**Score:** x\nScore: **{question.split('# Response')[1].split()[1]}**"

    with judging(answer) as (url, seen):
        assert score(get_reward(judge(url)), texts, rows) == [0.3, 0.75, 0.0, 1.0]
    questions = {asked["messages"][0]["content"] for asked, _ in seen}
    assert any("# Question\nWhy?\n" in q and "# Response\na 3\n" in q and "from 0 to 10" in q for q in questions)
    assert any("user: How?" in q and "think" not in q.split("# Response")[1].split("Think about")[0] for q in questions)
    assert any("# Question\n{response}\n" in q for q in questions)
    assert all(h["Authorization"] == "Bearer secret" and a["model"] == "m" and a["temperature"] == 0 for a, h in seen)


def test_a_rubric_of_ones_own():
    options = {"rubric": "{answer}|{response}|{low}", "low": -1, "high": 1, "verdict": r"(yes|no|-?\d)"}
    with judging(lambda question, _: question.split("|")[1]) as (url, seen):
        rewards = rewards_for(judge(url, **options), {})
        assert rewards.row_keys == {"answer"}
        assert rewards.score([["1", "0"], ["-1"]], prompts({"answer": "x"}, {"answer": 4})).totals == [
            [1.0, 0.5],
            [0.0],
        ]
        with pytest.raises(
            RewardError, match=r"rows\.jsonl:5: the rubric of the judge asks for answer, and the row has none"
        ):
            rewards.check_rows(prompts({"answer": 1}, {}), "rows.jsonl")
    assert sorted(a["messages"][0]["content"] for a, _ in seen) == ["4|-1|-1", "x|0|-1", "x|1|-1"]


def test_what_is_no_verdict_is_asked_for_again():
    said = ["Hm.", "Score: 11", "Score: 5"]
    with judging(lambda _, times: said[times]) as (url, seen):
        assert score(get_reward(judge(url, tries=3)), ["a"], [{"prompt": "x"}]) == [0.5]
        assert [asked["seed"] for asked, _ in seen] == [0, 1, 2]
    with judging(lambda *_: "I will not say.") as (url, seen):
        spec = judge(url, tries=2)
        scores = rewards_for(spec, {}, None, RewardLimits(on_timeout="drop")).score([["a"]], prompts({"prompt": "x"}))
        assert scores.lost == [[1]] and len(seen) == 2
        with pytest.raises(
            RewardError, match="reward judge could not score a response in time, to the prompt of line 3"
        ):
            rewards_for(spec, {}).score([["a"]], prompts({"prompt": "x"}))


def test_an_endpoint_that_is_busy_slow_or_wrong():
    with judging(lambda _, times: (503, {}) if times < 2 else "Score: 10") as (url, seen):
        assert score(get_reward(judge(url, tries=1)), ["a"], [{"prompt": "x"}]) == [1.0] and len(seen) == 3
    with (
        judging(lambda *_: (401, {"error": "no key"})) as (url, _),
        pytest.raises(RewardError, match="says 401: .*no key"),
    ):
        score(get_reward(judge(url)), ["a"], [{"prompt": "x"}])
    with (
        judging(lambda *_: (200, {"choices": []})) as (url, _),
        pytest.raises(RewardError, match="gave no chat completion"),
    ):
        score(get_reward(judge(url)), ["a"], [{"prompt": "x"}])
    done = threading.Event()
    with judging(lambda *_: done.wait(30) and "Score: 1") as (url, _):
        assert score(get_reward(judge(url, timeout=0.3)), ["a"], [{"prompt": "x"}]) == [None]
        done.set()


def test_a_question_that_is_refused_is_one_response():
    def answer(question, _):
        return (400, {"error": "too long"}) if "long" in question else "Score: 10"

    rows = [{"prompt": "x"}] * 3
    with judging(answer) as (url, seen):
        assert score(get_reward(judge(url)), ["a", "long", "b"], rows) == [1.0, None, 1.0] and len(seen) == 3
        with pytest.raises(RewardError, match="says 400: .*too long"):
            score(get_reward(judge(url)), ["long", "long"], rows[:2])


def test_a_server_that_is_away_is_waited_for_until_the_time_is_over():
    port = free_port()
    spec = judge(f"http://127.0.0.1:{port}/v1", timeout=300)
    starting = threading.Timer(0.3, lambda: started.enter_context(judging(lambda *_: "Score: 10", port)))
    with contextlib.ExitStack() as started:
        starting.start()
        assert score(get_reward(spec), ["a"], [{"prompt": "x"}]) == [1.0]
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:\d+/v1 does not answer \(.+\), for 2 s"):
        score(get_reward(spec | {"timeout": 2.0}), ["a"], [{"prompt": "x"}])


def test_the_time_is_for_all_questions_together():
    """One request at a time, and none is answered: each would have had two seconds of its own."""
    done = threading.Event()
    with judging(lambda *_: done.wait(30) and "Score: 1") as (url, seen):
        found = score(get_reward(judge(url, timeout=2.0, requests=1)), ["a", "b", "c"], [{"prompt": "x"}] * 3)
        done.set()
    assert found == [None] * 3 and len(seen) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "x"}, "url=x: give http://host:port/v1"),
        ({"low": 1, "high": 1}, "low=1.0 must be less than trainer.grpo.reward.high=1.0"),
        ({"verdict": "("}, "is not a regular expression"),
        ({"verdict": "x"}, "needs a group"),
        ({"rubric": "good?"}, "does not say where the response stands: write {response}"),
        ({"tries": 0}, "must be positive"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ConfigError) as caught:
        get_reward(judge("http://x/v1") | options)
    assert message in str(caught.value)
