"""The haystack recipe end to end, at the smallest size: on one rank and on two the same, and bad settings in one line."""

import json
import os
import signal

import pytest

from tests.recipe_runs import Running, run

pytestmark = pytest.mark.functional

TINY = [
    "trainer.niah.max_steps=2", "trainer.niah.videos_per_step=8", "trainer.niah.test_frames=[2,4]",
    "trainer.niah.train_frames=[2,3]", "trainer.niah.test_videos=4", "trainer.niah.test_depths=2",
    "trainer.niah.schemes=[vrope,mrope]", "trainer.niah.seeds=[5]", "trainer.niah.height=2", "trainer.niah.width=3",
    "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=1",
]  # fmt: skip


def niah(out, *overrides):
    return run(
        "recipes/train_video_niah.py",
        "--config-name",
        "video_niah",
        f"exp_manager.explicit_log_dir={out}",
        *TINY,
        *overrides,
    )


def results(out) -> list[dict]:
    return [json.loads((out / f"result-{scheme}-5.json").read_text()) for scheme in ("vrope", "mrope")]


def test_one_rank_and_two_train_and_test_the_same(tmp_path):
    for ranks in (1, 2):
        done = niah(tmp_path / str(ranks), f"trainer.devices={ranks}")
        assert done.code == 0, done.err
        assert "| vrope | " in done.out + done.err and (tmp_path / str(ranks) / "niah.png").is_file()
    for one, two in zip(results(tmp_path / "1"), results(tmp_path / "2"), strict=True):
        assert one["last_loss"] == pytest.approx(two["last_loss"], rel=1e-5)
        assert one["cells"] == two["cells"] and len(one["cells"]) == 4
    first, second = results(tmp_path / "1")
    assert first["last_loss"] != second["last_loss"], "only the positions differ, and they do"


def test_distractors_are_trained_on_and_tested_with(tmp_path):
    done = niah(tmp_path / "run", "trainer.niah.distractor_period=2", "trainer.niah.schemes=[vrope,mrope]")
    assert done.code == 0, done.err
    assert all(found["settings"]["distractor_period"] == 2 for found in results(tmp_path / "run"))


@pytest.mark.parametrize("transfer", ["null", "{scheme: rope, max_steps: 2}"])
def test_a_folder_is_a_queue_that_goes_on(transfer, tmp_path):
    """With what has no result in it, also with more schemes than before; each result is that of a run that did not stop."""
    options = [f"trainer.niah.transfer={transfer}"]
    straight = niah(tmp_path / "straight", *options)
    assert straight.code == 0, straight.err
    first = niah(tmp_path / "queue", *options, "trainer.niah.schemes=[vrope]")
    assert first.code == 0, first.err
    written = (tmp_path / "queue" / "result-vrope-5.json").stat().st_mtime_ns
    done = niah(tmp_path / "queue", *options)
    assert done.code == 2 and "exp_manager.resume_if_exists=true" in done.error_lines[0]
    done = niah(tmp_path / "queue", *options, "exp_manager.resume_if_exists=true")
    assert done.code == 0 and "1 of 2 results are there, 1 are to come" in done.out + done.err, done.err
    assert (tmp_path / "queue" / "result-vrope-5.json").stat().st_mtime_ns == written
    for one, other in zip(results(tmp_path / "queue"), results(tmp_path / "straight"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    said = (tmp_path / "queue" / "report.md").read_text()
    assert said.startswith("First 2 steps with rope, then each scheme from these weights. ") == (transfer != "null")
    done = niah(tmp_path / "queue", *options, "exp_manager.resume_if_exists=true", "model.num_layers=2")
    assert done.code == 2 and "model.num_layers=1, this one has model.num_layers=2" in done.error_lines[0]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_run_that_is_asked_to_stop_loses_the_model_in_hand_alone(number, ranks, tmp_path):
    """Which would take hours."""
    arguments = (
        "recipes/train_video_niah.py",
        "--config-name",
        "video_niah",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    )
    schemes = ("trainer.niah.schemes=[vrope,mrope]", f"trainer.devices={ranks}")
    with Running(*arguments, *TINY, *schemes, "trainer.niah.max_steps=1000000") as running:
        running.until(lambda: "vrope, seed 5: loss" in running.said()[1])
        os.kill(running.pid, number)
        done = running.wait(120)
    assert done.code == 128 + number and "asked to stop: vrope with seed 5 is not trained to its end" in done.out, (
        done.err
    )
    assert not list((tmp_path / "run").glob("result-*"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.niah.schemes=[vrop]", "unknown position scheme 'vrop': choose one of rope, mrope"),
        ("trainer.niah.train_frames=[1,4]", "with 2 frames or more: the two needles stand in different ones"),
        ("trainer.niah.distractor_period=4", "distractor_period=4 puts no distractor into videos of up to 4 frames"),
        ("trainer.niah.transfer={scheme: rop}", "unknown position scheme 'rop': choose one of rope"),
        ("trainer.niah.transfer={max_steps: 0}", "trainer.niah.transfer.max_steps=0 must be at least 1"),
        ("trainer.niah.height=9", "9 x 3 have no answer tokens; 8 x 8 is the most"),
        ("trainer.niah.videos_per_step=6", "videos_per_step=6 is not divisible"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, override, words):
    done = niah(tmp_path / "run", override)
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert len(done.error_lines) == 1 and words in done.error_lines[0]
