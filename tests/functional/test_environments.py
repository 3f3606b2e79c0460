"""Runs of several turns, from a command line to the files: what was said is trained, what was answered is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.data.tokenizer import load_tokenizer
from recipes.environments.environment import End, Environment, Observation
from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import SMALL, metrics, run

pytestmark = pytest.mark.functional

EOS = "<|endoftext|>"
TIMES = ("timers/", "train_optim/tokens_per_second")


class Echo(Environment):
    """Says what it has heard, three times, in plain text, and lets the reward judge the last turn."""

    def step(self, talk):
        return Observation(f" Higher. {talk.said[:8]}") if len(talk.turns) < 3 else End()


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """Folder with games, and a model that has seen some."""
    folder = tmp_path_factory.mktemp("games")
    made = run("tools/make_guessing_games.py", "--out", folder / "data", "--seed", 3, "--sft", 400, "--train", 48,
               "--highest", 6)  # fmt: skip
    assert made.code == 0, made.err
    done = run(
        "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={folder / 'data/sft.jsonl'}", *SMALL,
        f"model.tokenizer={folder / 'data/tokenizer'}", f"exp_manager.explicit_log_dir={folder / 'sft'}",
        "model.loss_on_prompt=false", "data.train_on_turns=all", "trainer.sft.max_steps=40", "trainer.devices=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def play(games: Path, out: Path, *overrides: str):
    return run(
        "recipes/train_grpo.py", "--config-name", "grpo_guess_tiny", *SMALL, f"exp_manager.explicit_log_dir={out}",
        f"data.train_path={games / 'data/train.jsonl'}", "trainer.grpo.max_steps=2", "trainer.grpo.val_check_interval=0",
        f"pretrained_checkpoint.restore_from_path={games / 'sft/checkpoints/final'}",
        "trainer.grpo.num_prompts_per_grpo_step=8", "trainer.grpo.samples_per_prompt=4", "model.global_batch_size=32",
        "trainer.grpo.rollout_dump={}", "trainer.devices=1", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def played(games, tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    out, held_out = folder / "run", folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"secret": n, "highest": 6}) + "\n" for n in range(1, 7)))
    done = play(games, out, f"data.validation_path={held_out}", "trainer.grpo.val_check_interval=2")
    assert done.code == 0, done.err
    return out


def responses(out: Path, step: int):
    """(row, prompt tokens, response) of a step."""
    for _, group in read_step(step_files(out / "rollouts")[step]).groups:
        for response in group["responses"]:
            yield group["row"], group["prompt_tokens"], response


def test_games_are_played_by_their_rules(games, played):
    tokenizer = load_tokenizer(games / "data/tokenizer")
    several = 0
    for row in metrics(played):
        if "train_rollouts/turns" not in row:
            continue
        turns, rewards, observed = [], [], 0
        for game, prompt, response in responses(played, row["step"]):
            passages, context, guess = response["passages"], list(prompt), None
            for said, heard in zip(passages[::2], [*passages[1::2], None], strict=True):
                assert "logprobs" in said and said["tokens"]
                found = re.search(r"\d{1,9}", tokenizer.decode_response(context, said["tokens"]))
                guess = int(found[0]) if found else None
                context += said["tokens"]
                if heard is None:
                    continue
                assert set(heard) == {"tokens", "observed"} and said["tokens"][-1] == tokenizer.eos_id
                hint = (
                    "A number, please."
                    if guess is None
                    else f"{'Higher' if guess < game['secret'] else 'Lower'} than {guess}."
                )
                assert guess != game["secret"]
                assert tokenizer.decode_whole(heard["tokens"]) == f"user: {hint}{EOS}assistant:"
                context += heard["tokens"]
                observed += len(heard["tokens"])
            ended = response["finish_reason"] == "stop"
            assert ended or len(context) - len(prompt) <= 64
            assert response["reward"] == float(ended and guess == game["secret"])
            assert not ended or guess == game["secret"] or len(passages) == 7
            assert len(response["old_logprobs"]) == len(context) - len(prompt) and response["mismatch"]["max"] < 1e-4
            turns.append(len(passages[::2]))
            rewards.append(response["reward"])
        several += sum(n > 1 for n in turns)
        assert row["train_rollouts/turns"] == pytest.approx(sum(turns) / len(turns))
        assert row["train_rollouts/observed_length"] == pytest.approx(observed / len(turns))
        assert row["train_rollouts/reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert several >= 16
    validated = [row["val_rollouts/reward"] for row in metrics(played) if "val_rollouts/reward" in row]
    assert len(validated) == 2 and all(0 <= x <= 1 for x in validated)


def test_the_run_is_replayed_bitwise_and_on_other_ranks(games, played, tmp_path):
    """Trees where they pay in both; with tensor-parallel ranks within rounding."""
    for name, overrides, exact in (
        ("again", (), True), ("tp2", ("trainer.devices=2", "model.tensor_model_parallel_size=2"), False),
    ):  # fmt: skip
        done = play(
            games, tmp_path / name, "data.train_path=null", f"+trainer.grpo.rollout={{source: file, path: {played}}}",
            *overrides,
        )  # fmt: skip
        assert done.code == 0, done.err
        for a, b in zip(trained(played), trained(tmp_path / name), strict=True):
            if exact:
                assert a == b
            assert b["train_optim/loss"] == pytest.approx(a["train_optim/loss"], rel=1e-4, abs=1e-6)
            assert b["train_optim/grad_norm"] == pytest.approx(a["train_optim/grad_norm"], rel=1e-4)


def trained(out: Path) -> list[dict]:
    rows = [r for r in metrics(out) if "train_optim/loss" in r]
    return [{k: v for k, v in row.items() if not k.startswith((*TIMES, "val_"))} for row in rows]


def test_ranks_and_stages_play_the_same_games(games, played, tmp_path):
    """Tensor, pipeline and context parallel: the first step says, token by token, what one rank has said."""
    first = [[p["tokens"] for p in response["passages"]] for _, _, response in responses(played, 1)]
    for name, layout in (
        ("tp2", ["model.tensor_model_parallel_size=2"]), ("pp2", ["model.pipeline_model_parallel_size=2"]),
        ("cp2", ["model.context_parallel_size=2"]),
    ):  # fmt: skip
        done = play(games, tmp_path / name, "trainer.devices=2", "trainer.grpo.max_steps=1", *layout)
        assert done.code == 0, done.err
        found = [[p["tokens"] for p in response["passages"]] for _, _, response in responses(tmp_path / name, 1)]
        differ = sum(a != b for a, b in zip(first, found, strict=True))
        assert differ <= 1, f"{name}: a draw may lie on a boundary, {differ} of {len(first)} do not"


def test_one_of_ones_own_in_plain_text_is_scored_by_the_reward(games, tmp_path):
    rows = [{"prompt": f"user: Guess my number, from 1 to {n}.{EOS}assistant:"} for n in [*range(1, 7), 1, 2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = play(
        games, tmp_path / "run", f"data.train_path={tmp_path / 'rows.jsonl'}", "trainer.grpo.max_steps=1",
        f"trainer.grpo.environment={Echo.__module__}.Echo", "trainer.grpo.reward={name:length,target:3}",
        "trainer.grpo.max_turns=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    tokenizer = load_tokenizer(games / "data/tokenizer")
    turns = []
    for _, prompt, response in responses(tmp_path / "run", 1):
        passages, context, text = response["passages"], list(prompt), ""
        for passage in passages:
            if "logprobs" in passage:
                text = tokenizer.decode_response(context, passage["tokens"])
            else:
                assert tokenizer.decode_whole(passage["tokens"]) == f" Higher. {text[:8]}"
            context += passage["tokens"]
        assert response["reward"] == pytest.approx(max(0.0, 1 - abs(len(text) - 3) / 3))
        turns.append(len(passages[::2]))
    assert set(turns) <= {1, 2} and turns.count(2) > 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.grpo.environment=guess_numbers"], "unknown environment guess_numbers; did you mean guess_number?"),
        (["trainer.grpo.reward=exact_answer"], "environment=guess_number gives rewards itself: set trainer.grpo.reward=null"),
        (["trainer.grpo.environment=calculator"], "trainer.grpo.reward is not set"),
        (["trainer.grpo.environment=single_turn", "trainer.grpo.max_turns=3"], "max_turns=3 is for environments"),
        (["trainer.grpo.environment={name:guess_number,turns:4,hast:1}"], "trainer.grpo.environment.hast"),
        (["trainer.grpo.environment=single_turn", "trainer.grpo.reward=exact_answer"], "neither prompt nor messages"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(games, tmp_path, overrides, message):
    done = play(games, tmp_path / "run", *overrides)
    (line,) = done.error_lines
    assert message in line, line


def test_a_row_of_another_game_is_refused_with_its_line(games, tmp_path):
    rows = [{"secret": 3, "highest": 6}, {"secret": 9, "highest": 6}, {"secret": 1, "highest": 6, "hint": "x"}]
    for count, message in (
        (2, "rows.jsonl:2: environment guess_number: secret=9 must be"),
        (3, ":3: nothing reads the key hint"),
    ):
        kept = rows[:1] + rows[count - 1 : count]
        (tmp_path / "rows.jsonl").write_text("\n" * (count - 2) + "".join(json.dumps(row) + "\n" for row in kept))
        done = play(games, tmp_path / "run", f"data.train_path={tmp_path / 'rows.jsonl'}")
        (line,) = done.error_lines
        assert message in line, line


def test_environments_of_answers_that_are_cut_off_are_asked_at_once(games, tmp_path):
    """Each waits for all of the others."""
    rows, met = tmp_path / "rows.jsonl", tmp_path / "met"
    met.mkdir()
    rows.write_text(2 * (json.dumps({"prompt": "go", "folder": str(met), "of": 4}) + "\n"))
    done = play(
        games, tmp_path / "run", f"data.train_path={rows}", "trainer.grpo.max_steps=1", "trainer.grpo.samples_per_prompt=2",
        "trainer.grpo.num_prompts_per_grpo_step=2", "model.global_batch_size=4", "trainer.grpo.length_params.max_length=4",
        "+trainer.grpo.sampling_params.ignore_eos=true", "trainer.grpo.reward={name: length, target: 3}",
        "trainer.grpo.environment=tests.programs.own_environments.Meeting",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(list(met.iterdir())) == 4
