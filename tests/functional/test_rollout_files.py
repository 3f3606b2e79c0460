"""What the model said: written to disk, shown on the console and in TensorBoard, read again."""

from __future__ import annotations

import math

import pytest

from recipes.data.tokenizer import load_tokenizer
from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import metrics, run

pytestmark = pytest.mark.functional

STEPS = 4


@pytest.fixture(scope="module")
def dumped(task, tmp_path_factory):
    """A run with all of it, and what it printed."""
    out = tmp_path_factory.mktemp("dumped") / "run"
    done = task.grpo(
        out, f"trainer.grpo.max_steps={STEPS}", "trainer.grpo.rollout_dump={}", "trainer.grpo.log_samples=3"
    )
    assert done.code == 0, done.err
    return out, done.out


def test_the_files_hold_what_the_steps_were_trained_on(task, dumped):
    out, _ = dumped
    tokenizer = load_tokenizer(task.checkpoint / "tokenizer")
    files, rows, versions = step_files(out / "rollouts"), metrics(out), {}
    assert list(files) == list(range(1, STEPS + 1))
    for row in rows:
        dump = read_step(files[row["step"]])
        assert dump.full and dump.header["step"] == row["step"] and dump.header["samples_per_prompt"] == 4
        groups = [group for _, group in dump.groups]
        assert [g["number"] for g in groups] == [0, 1, 2, 3], "of both ranks, in order"
        answers = [(g, a) for g in groups for a in g["responses"]]
        tokens = [[t for p in a["passages"] for t in p["tokens"]] for _, a in answers]
        rewards = [a["reward"] for _, a in answers]
        assert math.fsum(rewards) / 16 == pytest.approx(row["train_rollouts/reward"], rel=1e-12)
        assert sum(map(len, tokens)) / 16 == row["train_rollouts/response_length"]
        assert sum(a["finish_reason"] == "length" for _, a in answers) / 16 == row["train_rollouts/truncated"]
        for (group, answer), ids in zip(answers, tokens, strict=True):
            assert answer["text"] == tokenizer.decode_response(group["prompt_tokens"], ids)
            assert tokenizer.decode_whole(group["prompt_tokens"]) == group["prompt_text"]
            (passage,) = answer["passages"]
            versions.setdefault(row["step"], set()).add(passage["weight_version"])
            apart = [abs(a - b) for a, b in zip(answer["old_logprobs"], passage["logprobs"], strict=True)]
            assert answer["mismatch"]["max"] == pytest.approx(max(apart), abs=1e-12) and max(apart) < 1e-4
            assert all(x < 0 for x in answer["old_logprobs"])
        for group in groups:
            gains = [a["advantage"] for a in group["responses"]]
            assert sum(gains) == pytest.approx(0, abs=1e-9)
        assert any(a["advantage"] for _, a in answers), "all rewards alike: the test could not fail"
    ((first,), *_) = versions.values()
    assert list(versions.values()) == [{first + i} for i in range(STEPS)], "an update for each step"


def test_a_few_responses_are_shown_at_the_first_step_and_every_third(dumped):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, said = dumped
    assert [f"step {step}, a few responses:" in said for step in (1, 2, 3, 4)] == [True, False, True, False]
    events = EventAccumulator(str(out))
    events.Reload()
    texts = events.Tensors("train_rollouts/samples/text_summary")
    assert [e.step for e in texts] == [1, 3]
    (first,) = texts[0].tensor_proto.string_val
    assert first.decode().startswith("| reward | ended by | tokens | prompt | response |")


def test_the_tool_prints_them_and_says_what_is_not_there(dumped, tmp_path):
    out, _ = dumped
    done = run("tools/show_rollouts.py", out, "--step", 2, "--worst", 2)
    assert done.code == 0, done.err
    groups = [group for _, group in read_step(step_files(out / "rollouts")[2]).groups]
    worst = sorted(a["reward"] for g in groups for a in g["responses"])[:2]
    assert [f"reward {reward:g}," in done.out for reward in worst] == [True, True] and done.out.count("--- sample") == 2
    assert run("tools/show_rollouts.py", out, "--prompt", 3).out.count("--- sample") == 4
    for arguments, message in (
        ([tmp_path], f"{tmp_path} has no rollouts: the run was not told to write them"),
        ([out, "--step", 9], f"{out} has no rollouts of step 9; it has step 1, 2, 3, 4"),
        ([out, "--prompt", 9], "has no prompt 9; it has 0 to 3"),
    ):
        bad = run("tools/show_rollouts.py", *arguments)
        assert bad.code == 2 and message in bad.error_lines[0]
