"""Problems of reasoning-gym: written as rows, scored by their own verifiers."""

from __future__ import annotations

import json

import pytest

from recipes.data.tokenizer import load_tokenizer
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.several import rewards_for
from tests.data_cases import EOS, TEMPLATE, write_tokenizer
from tests.recipe_runs import run

pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
from recipes.data.rows import load_prompts


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "chat"
    return load_tokenizer(write_tokenizer(folder, eos_token=EOS, chat_template=TEMPLATE))


def make(out, *arguments):
    return run("tools/make_reasoning_gym.py", "--out", out, "--train", 30, "--test", 10, *arguments)


def test_rows_are_scored_by_the_tasks_verifier(tmp_path, rng, chat):
    seed = int(rng.initial_seed()) % 10_000
    done = make(tmp_path / "sums", "--task", "chain_sum", "--options", "{min_terms: 2, max_terms: 2}", "--seed", seed)
    assert done.code == 0, done.err
    reward = get_reward("reasoning_gym")
    train, test = (
        load_prompts(tmp_path / f"sums/{name}.jsonl", chat, 4000, reward_keys=reward.row_keys)
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (30, 10) and not {p.tokens for p in train} & {p.tokens for p in test}
    rewards_for("reasoning_gym", {}).check_rows(train, "train.jsonl")
    rows, answers = [p.row for p in train], []
    for prompt in train:
        first, sign, second = prompt.row["messages"][1]["content"].removesuffix(" =").split()[-3:]
        answers.append(int(first) + int(second) * {"+": 1, "-": -1}[sign])
        assert EOS in chat.decode_whole(prompt.tokens)
    for text, right in (("so <answer>{}</answer>", 1), ("{}", 0), ("<answer>x</answer>", 0)):
        assert score(reward, [text.format(a) for a in answers], rows) == [right] * 30
    assert max(score(reward, [f"<answer>1{abs(a)}</answer>" for a in answers], rows)) < 1
    assert score(get_reward({"name": "reasoning_gym", "tag": None}), [f" {a}\n" for a in answers], rows) == [1] * 30


def test_what_is_no_task_is_refused(tmp_path, chat):
    for arguments, message in (
        (("--task", "chain_summ"), "reasoning-gym makes no chain_summ"),
        (
            ("--task", "chain_sum", "--options", "{min_terms: 0}"),
            "reasoning-gym makes no chain_sum with {'min_terms': 0}",
        ),
        (
            ("--task", "chain_sum", "--options", "{min_digits: 1, max_digits: 1, min_terms: 1, max_terms: 1}"),
            "different questions",
        ),
    ):
        done = make(tmp_path / "none", *arguments)
        assert done.code != 0 and done.err.startswith("error: ") and message in done.err, done.err
        assert not (tmp_path / "none").exists()
    entry = {"task": "chain_summ", "answer": "1", "metadata": {}}
    for bad, message in (
        (entry, "chain_summ"),
        ({"task": "chain_sum"}, "task, answer and metadata"),
        ("x", "must be an object"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "the quick", "reasoning_gym": bad}) + "\n")
        reward = get_reward("reasoning_gym")
        prompts = load_prompts(path, chat, 100, reward_keys=reward.row_keys)
        with pytest.raises(RewardError, match=f"rows.jsonl:1: .*{message}"):
            rewards_for("reasoning_gym", {}).check_rows(prompts, str(path))
