"""The haystack recipe end to end, at the smallest size: on one rank and on two the same, and bad settings in one line."""

import json

import pytest

from tests.recipe_runs import run

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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.niah.schemes=[vrop]", "unknown position scheme 'vrop': choose one of rope, mrope"),
        ("trainer.niah.train_frames=[1,4]", "with 2 frames or more: the two needles stand in different ones"),
        ("trainer.niah.height=9", "9 x 3 have no answer tokens; 8 x 8 is the most"),
        ("trainer.niah.videos_per_step=6", "videos_per_step=6 is not divisible"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, override, words):
    done = niah(tmp_path / "run", override)
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert len(done.error_lines) == 1 and words in done.error_lines[0]
