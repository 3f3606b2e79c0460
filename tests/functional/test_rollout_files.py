"""What the model said: written to disk, shown on the console and in TensorBoard, read again."""

from __future__ import annotations

import math

import pytest

from recipes.data.tokenizer import load_tokenizer
from recipes.grpo.dump_files import read_step, step_files, write_step
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


def replay(task, out, path, *overrides):
    return task.grpo(
        out, f"trainer.grpo.max_steps={STEPS}", "data.train_path=null",
        f"++trainer.grpo.rollout={{source: file, path: {path}}}", *overrides,
    )  # fmt: skip


TIMES = ("timers/", "train_optim/tokens_per_second")


def test_a_run_replayed_from_its_files_is_the_run_bitwise(task, dumped, tmp_path):
    """Every number that is no time, and what is written down again."""
    out, _ = dumped
    done = replay(task, tmp_path / "again", out, "trainer.grpo.rollout_dump={}")
    assert done.code == 0, done.err
    first, second = (
        [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in metrics(f)] for f in (out, tmp_path / "again")
    )
    assert len(second) == STEPS and first == second
    assert len({r["train_optim/grad_norm"] for r in second}) == STEPS, "nothing changes: the test could not fail"
    for step, path in step_files(out / "rollouts").items():
        there = read_step(step_files(tmp_path / "again" / "rollouts")[step])
        for (_, group), (_, copy) in zip(read_step(path).groups, there.groups, strict=True):
            assert group["responses"] == copy["responses"] and group["prompt_tokens"] == copy["prompt_tokens"]


def test_a_pass_before_the_update_changes_no_bit_of_the_run(task, dumped, tmp_path):
    """With a bound that no response passes there is one: the same numbers at every step, and the same is written down."""
    found = {}
    for name, off_policy, said in (
        ("without", "{}", "old log-probabilities are those of the update's own forward pass"),
        (
            "with",
            "{reject_above: 100}",
            "before the update: trainer.grpo.off_policy.reject_above=100.0 leaves out responses",
        ),
    ):
        out = tmp_path / name
        done = replay(task, out, dumped[0], f"++trainer.grpo.off_policy={off_policy}", "trainer.grpo.rollout_dump={}")
        assert done.code == 0 and said in done.out, done.err
        steps = [read_step(path).groups for path in step_files(out / "rollouts").values()]
        found[name] = metrics(out), [[group["responses"] for _, group in groups] for groups in steps]
    (rows, answers), (asked, same) = found.values()
    assert answers == same and len(rows) == STEPS
    counted = (*TIMES, "train_optim/tokens_executed", "train_optim/tokens_repeated", "train_rollouts/rejected")
    for row, other in zip(rows, asked, strict=True):
        assert row["train_optim/tokens_executed"] * 3 == other["train_optim/tokens_executed"] * 2
        assert other["train_rollouts/rejected"] == 0 and row["train_optim/ratio"] == pytest.approx(1, abs=1e-6)
        assert {k: v for k, v in row.items() if not k.startswith(counted)} == {
            k: v for k, v in other.items() if not k.startswith(counted)
        }


LAYOUTS = {
    "tp2": ["model.tensor_model_parallel_size=2", "++model.sequence_parallel=true", "model.micro_batch_tokens=420"],
    "pp2, trees": [
        "model.pipeline_model_parallel_size=2", "model.min_shared_tokens=1", "trainer.grpo.sampling_params.top_k=2",
    ],
    "cp2": ["model.context_parallel_size=2", "model.micro_batch_tokens=420"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_replays_itself_bitwise_and_one_rank_replays_it_to_rounding(layout, task, tmp_path):
    keys, steps = [f"++{key.lstrip('+')}" for key in LAYOUTS[layout]], ["trainer.grpo.max_steps=2"]
    out, again, alone = (tmp_path / name for name in ("out", "again", "alone"))
    done = task.grpo(out, *steps, *keys, "trainer.grpo.rollout_dump={}")
    assert done.code == 0, done.err
    for folder, changes in (again, ["trainer.grpo.rollout_dump={}", *keys]), (alone, ["trainer.devices=1"]):
        done = replay(task, folder, out, *steps, *changes)
        assert done.code == 0, done.err
    rows, same = ([{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in metrics(f)] for f in (out, again))
    assert len(rows) == 2 and rows == same and all(row["train_optim/grad_norm"] for row in rows)
    for row, one in zip(rows, metrics(alone), strict=True):
        for key in ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/reward", "train_optim/kl"):
            assert one[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key
    for step, path in step_files(out / "rollouts").items():
        there = read_step(step_files(again / "rollouts")[step])
        for (_, group), (_, copy) in zip(read_step(path).groups, there.groups, strict=True):
            assert group["responses"] == copy["responses"]
            first = {}
            for answer in group["responses"]:
                (passage,), old = answer["passages"], answer["old_logprobs"]
                assert all(type(x) is float and x <= 0 for x in old) and len(old) == len(passage["tokens"])
                for end in range(1, len(old) + 1):  # tokens behind the same ones have the same log-probability
                    begin = tuple(passage["tokens"][:end])
                    assert first.setdefault(begin, old[end - 1]) == pytest.approx(old[end - 1], abs=1e-5)


def test_it_is_replayed_on_another_number_of_ranks(task, dumped, tmp_path):
    out, _ = dumped
    done = replay(task, tmp_path / "again", out / "rollouts", "trainer.devices=1", "model.micro_batch_size=4")
    assert done.code == 0, done.err
    for a, b in zip(metrics(out), metrics(tmp_path / "again"), strict=True):
        for key in ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/reward", "train_optim/kl"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
        assert a["train_rollouts/response_length"] == b["train_rollouts/response_length"]


def told_otherwise(dumped, folder, change):
    """The first step's file, with other log-probabilities of the sampler: change(number of the response, logprob)."""
    dump = read_step(step_files(dumped[0] / "rollouts")[1])
    groups = [group for _, group in dump.groups]
    for number, answer in enumerate(a for group in groups for a in group["responses"]):
        for passage in answer["passages"]:
            passage["logprobs"] = [change(number, x) for x in passage["logprobs"]]
    write_step(folder, {k: v for k, v in dump.header.items() if k not in ("format", "version")}, groups)
    return step_files(folder)[1]


def first_step(task, out, path, off_policy, *overrides):
    done = replay(task, out, path, "trainer.grpo.max_steps=1", f"++trainer.grpo.off_policy={off_policy}", *overrides)
    assert done.code == 0, done.err
    (row,) = metrics(out)
    return row


def test_tokens_of_another_sampler_are_weighed(task, dumped, tmp_path):
    """A sampler that gave every token 1.25 times the probability: each weighs 0.8, and so does the gradient."""
    path = told_otherwise(dumped, tmp_path / "told", lambda _, x: x + math.log(1.25))
    plain = first_step(task, tmp_path / "plain", path, "null")
    assert plain["train_optim/sampler_logprob_diff"] == pytest.approx(math.log(1.25), rel=1e-3)
    assert plain["train_optim/sampler_logprob_diff_max"] == pytest.approx(math.log(1.25), rel=1e-3)
    row = first_step(task, tmp_path / "weighed", path, "{form: mask, low: 0.5, high: 2, reject_above: 0.5}")
    assert row["train_optim/importance"] == pytest.approx(0.8, rel=1e-4)
    assert row["train_optim/effective_samples"] == pytest.approx(1, rel=1e-4)
    assert row["train_optim/importance_bounded"] == row["train_rollouts/rejected"] == 0
    assert row["train_optim/grad_norm"] == pytest.approx(0.8 * plain["train_optim/grad_norm"], rel=1e-4)
    none = first_step(task, tmp_path / "none", path, "{form: mask, low: 0.9, high: 2}")
    assert none["train_optim/importance_bounded"] == pytest.approx(1) and none["train_optim/grad_norm"] == 0


def test_of_two_updates_the_largest_distance_is_told_and_the_mean_of_means(task, dumped, tmp_path):
    """The first two prompts are the first update's."""
    path = told_otherwise(dumped, tmp_path / "told", lambda number, x: x + math.log(1.25) * (number < 8))
    row = first_step(task, tmp_path / "two", path, "null", "model.global_batch_size=8", "trainer.devices=1")
    assert row["train_optim/sampler_logprob_diff_max"] == pytest.approx(math.log(1.25), rel=1e-3)
    assert row["train_optim/sampler_logprob_diff"] == pytest.approx(math.log(1.25) / 2, rel=1e-3)


def test_responses_of_a_sampler_far_off_are_left_out(task, dumped, tmp_path):
    """Three of sixteen; the rest weigh as much as all did."""
    path = told_otherwise(dumped, tmp_path / "told", lambda number, x: x - 4 * (number in (0, 5, 6)))
    row = first_step(task, tmp_path / "left", path, "{reject_above: 2}")
    assert row["train_rollouts/rejected"] == pytest.approx(3 / 16)
    assert row["train_optim/ratio"] == pytest.approx(1, abs=1e-4) and row["train_optim/importance_bounded"] == 0
    assert row["train_optim/sampler_logprob_diff_max"] < 1e-3


def test_what_cannot_be_replayed_is_refused(task, dumped, tmp_path):
    out, _ = dumped
    part = tmp_path / "part"
    for step, path in step_files(out / "rollouts").items():
        dump = read_step(path)
        header = {key: value for key, value in dump.header.items() if key not in ("format", "version")}
        write_step(part, {**header, "written": 2}, [group for _, group in dump.groups[:2]]) if step > 1 else None
    for path, overrides, message in (
        (part, [], "has no rollouts of step 1: a replay needs every step from the first to trainer.grpo.max_steps=4"),
        (
            step_files(part)[2],
            ["trainer.grpo.max_steps=1"],
            "is a sample, 2 of the step's 4 prompts: a replay needs all",
        ),
        (out, ["trainer.grpo.samples_per_prompt=8"], "was made with trainer.grpo.samples_per_prompt=4, this run has 8"),
    ):
        done = replay(task, tmp_path / "no", path, *overrides)
        assert done.code == 2 and message in done.error_lines[0], done.err


def test_a_replay_that_is_stopped_or_made_longer_is_the_one_that_was_not(task, dumped, tmp_path):
    """Only the steps of trainer.grpo.max_steps are read of the folder: more of them do not make it another run."""
    keep, resume = ["trainer.grpo.save_interval=2", "trainer.grpo.rollout_dump={}"], "exp_manager.resume_if_exists=true"
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    for out, more in (straight, []), (longer, ["trainer.grpo.max_steps=2"]), (longer, [resume]):
        done = replay(task, out, dumped[0], *keep, *more)
        assert done.code == 0, done.err
    assert "going on after step 2 from" in done.out
    rows, same = (
        [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in metrics(f)] for f in (straight, longer)
    )
    assert len(rows) == STEPS and rows == same
    assert list(step_files(longer / "rollouts")) == [1, 2, 3, 4]
    done = replay(task, longer, dumped[0], *keep, resume, "trainer.grpo.max_steps=3")
    assert (
        done.code == 2 and "holds other rows than when the run began: it has 12 rows, and had 16" in done.error_lines[0]
    )
