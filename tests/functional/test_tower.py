"""SFT and GRPO with a vision tower, end to end: it trains, and frozen it sees each clip once, however a step is run."""

import pytest

from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional

TOWER = "model=tiny_tower"


@pytest.fixture(scope="module")
def checkpoint(video_task):
    out = video_task.folder / "tower"
    done = video_task.sft(out, TOWER)
    assert done.code == 0, done.err
    rows = metrics(out)
    assert rows[-1]["train_optim/loss"] < rows[0]["train_optim/loss"]
    return out / "checkpoints" / "final"


def test_a_frozen_tower_sees_a_clip_once(video_task, checkpoint, tmp_path):
    """Two steps on four prompts each; then on two data-parallel ranks, by what the first run has kept."""
    kept, rows, files = tmp_path / "kept", {}, {}
    for name in ("1", "2"):
        done = video_task.grpo(
            tmp_path / name, checkpoint, TOWER, "model.freeze_vision_model=true", f"model.vision.cache_folder={kept}",
            f"trainer.devices={name}",
        )  # fmt: skip
        assert done.code == 0, done.err
        rows[name] = metrics(tmp_path / name)[0]
        files[name] = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert len(files["1"]) == 8 and files["1"] == files["2"]
    for key in ("train_rollouts/reward", "train_optim/grad_norm", "train_optim/loss"):
        assert rows["2"][key] == pytest.approx(rows["1"][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vision.tower_config.image_size=24"], "makes pictures of 48 x 48 pixels, the tower takes 24 x 24"),
        (
            ["model.vision.tower=no/such/folder", "model.vision.tower_config=null"],
            "cannot read no/such/folder/config.json",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(video_task, tmp_path, overrides, words):
    done = video_task.sft(tmp_path / "run", TOWER, *overrides)
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert len(done.error_lines) == 1 and words in done.error_lines[0]
