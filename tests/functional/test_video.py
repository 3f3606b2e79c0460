"""SFT and GRPO on real clips, end to end: what is seen matters, and layouts and grouping change nothing."""

import pytest

from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def checkpoint(video_task):
    out = video_task.folder / "sft"
    done = video_task.sft(out)
    assert done.code == 0, done.err
    rows = metrics(out)
    assert rows[-1]["train_optim/loss"] < rows[0]["train_optim/loss"]
    return out / "checkpoints" / "final"


def first_step(video_task, checkpoint, out, *overrides):
    done = video_task.grpo(out, checkpoint, *overrides)
    assert done.code == 0, done.err
    return metrics(out)[0]


def test_grpo_is_the_same_however_it_is_run(video_task, checkpoint, tmp_path):
    """The prompt's clip once for all answers, on two data-parallel ranks, on context-parallel ones, and repeated."""
    grouped = first_step(video_task, checkpoint, tmp_path / "grouped")
    assert grouped["train_optim/tokens_saved"] > 0.6
    for name, overrides in {
        "repeated": ["model.prefix_grouping=false"],
        "context-tokens": ["model.context_parallel_size=2", "model.micro_batch_tokens=400"],
    }.items():
        other = first_step(video_task, checkpoint, tmp_path / name, "trainer.grpo.max_steps=1", *overrides)
        for key in ("train_rollouts/reward", "train_optim/grad_norm", "train_optim/loss"):
            assert other[key] == pytest.approx(grouped[key], rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_broken_clip_is_one_line(video_task, tmp_path, devices):
    """Whichever rank meets it."""
    clips = video_task.data / "clips" / "sft"
    kept = (clips / "00003.mp4").read_bytes()
    try:
        (clips / "00003.mp4").write_bytes(kept[: len(kept) // 2])
        done = video_task.sft(tmp_path / "run", "model.global_batch_size=32", f"trainer.devices={devices}")
    finally:
        (clips / "00003.mp4").write_bytes(kept)
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if "error: " in line]
    assert "sft.jsonl:4: " in line and "00003.mp4" in line
    assert line.startswith("error: ") and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.video.patch_size=16"], "data.video makes 768 numbers of a token"),
        (["model.vision=null"], "data.video is set, but the model has no eyes: set model.vision.feature_size=432"),
        (["model.position_embedding.scheme=vrop"], "unknown position scheme 'vrop': choose one of rope, mrope"),
        (["data.video=null"], "sft.jsonl:1: the row has a video, but data.video is not set"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(video_task, tmp_path, overrides, words):
    done = video_task.sft(tmp_path / "run", *overrides)
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert len(done.error_lines) == 1 and words in done.error_lines[0]
