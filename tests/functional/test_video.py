"""SFT and GRPO on real clips, end to end: what is seen matters, and layouts and grouping change nothing."""

import io
import json
import shutil
import tarfile

import pytest

from tests.recipe_runs import metrics, run

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
        "repeated": ["model.prefix_grouping=false", "data.video.workers=1"],
        "context-tokens": ["model.context_parallel_size=2", "model.micro_batch_tokens=400"],
    }.items():
        other = first_step(video_task, checkpoint, tmp_path / name, "trainer.grpo.max_steps=1", *overrides)
        for key in ("train_rollouts/reward", "train_optim/grad_norm", "train_optim/loss"):
            assert other[key] == pytest.approx(grouped[key], rel=1e-4, abs=1e-6), (name, key)


def test_sft_on_shards_goes_on_at_the_exact_sample(video_task, tmp_path):
    """With its clips beside the rows; after a step on one rank the next on two."""
    rows = [json.loads(line) for line in (video_task.data / "sft.jsonl").read_text().splitlines()]
    (tmp_path / "shards").mkdir()
    parts = {"shards/train-0": rows[::2], "shards/train-1": rows[1::2], "held-out": rows[:8]}
    for name, held in parts.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i, row in enumerate(map(dict, held)):
                clip = video_task.data / row.pop("video")
                for end, data in (("json", json.dumps(row).encode()), ("mp4", clip.read_bytes())):
                    info = tarfile.TarInfo(f"{i:04}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    options = [
        f"data.train_path={tmp_path}/shards", "data.streaming=true", "trainer.sft.max_steps=2", "trainer.sft.save_interval=1",
        "exp_manager.checkpoint_callback_params.save_top_k=2", f"data.validation_path={tmp_path}/held-out.tar",
        "trainer.sft.val_check_interval=1",
    ]  # fmt: skip
    done = video_task.sft(tmp_path / "straight", *options, "trainer.devices=1")
    assert done.code == 0, done.err
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped", symlinks=True)
    (tmp_path / "stopped/checkpoints/final").unlink()
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-2")
    lines = (tmp_path / "stopped/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped/metrics.jsonl").write_text(lines[0])
    more = ["trainer.devices=2", "data.video.workers=1", "exp_manager.resume_if_exists=true"]
    done = video_task.sft(tmp_path / "stopped", *options, *more)
    assert done.code == 0 and "going on after step 1" in done.out + done.err, done.err
    expected, found = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert [row["step"] for row in found] == [1, 2]
    for key in ("train_optim/loss", "train_optim/grad_norm", "val/loss"):
        assert found[1][key] == pytest.approx(expected[1][key], rel=1e-4, abs=1e-6), key
        assert found[1][key] != pytest.approx(expected[0][key], rel=1e-4), key


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


def test_questions_about_clips_are_answered_alike_on_any_layout(video_task, checkpoint, tmp_path):
    """One rank, tensor- and pipeline-parallel ones, and with clips decoded ahead: the same scores, and a report."""
    rows = [json.loads(line) for line in (video_task.data / "test.jsonl").read_text().splitlines()]
    answers = sorted({row["answer"] for row in rows})
    questions = [
        {"video": row["video"], "question": row["prompt"].removeprefix("<video>"), "options": answers, "answer": row["answer"],
         "category": row["prompt"].split()[1]}
        for row in rows
    ]  # fmt: skip
    path = video_task.data / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    found = {}
    for name, overrides in {
        "one": ["data.video.workers=1"],
        "tensor": ["trainer.devices=2", "model.tensor_model_parallel_size=2", "data.video.workers=0"],
        "stages": ["trainer.devices=2", "model.pipeline_model_parallel_size=2", "data.video.workers=0"],
    }.items():
        out = tmp_path / name
        done = run(
            "recipes/eval_video.py", f"pretrained_checkpoint.restore_from_path={checkpoint}", f"data.path={path}",
            f"exp_manager.explicit_log_dir={out}", "data.scoring=text", "++data.prompt='<video>{question}'",
            "data.video.num_frames=6", "data.video.height=48", "data.video.width=48", "data.video.patch_size=12", *overrides,
        )  # fmt: skip
        assert done.code == 0, done.err
        found[name] = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for other in ("tensor", "stages"):
        for mine, theirs in zip(found["one"], found[other], strict=True):
            assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-4) and mine["row"] == theirs["row"]
    result = json.loads((tmp_path / "one" / "video_eval.json").read_text())
    right = sum(answer["chosen"] == answer["answer"] for answer in found["one"])
    assert result["accuracy"] == right / len(rows) and result["answered"] == len(rows)
    kinds = result["by"]["category"]
    assert sum(part["count"] for part in kinds.values()) == len(rows)
    assert "| all |" in (tmp_path / "one" / "video_eval.md").read_text()
