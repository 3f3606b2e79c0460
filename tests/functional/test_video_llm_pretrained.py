"""A Video-LLM of a language model that is there, `tools/video_llm.py --model`: a few steps of each stage, with stops."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.errors import UserError
from recipes.data.tokenizer import load_tokenizer
from tests.conftest import fresh_generator
from tests.hf_folders import imported
from tests.hf_models import make_hf_model
from tests.recipe_runs import metrics, run
from tests.saved_weights import saved_weights
from tools import video_llm

pytestmark = pytest.mark.functional

STAGES = [
    "clips, questions, a tokenizer", "the connector alone", "the language model, too", "questions about held-out clips",
    "and about a blank clip", "a page about both",
]  # fmt: skip


class Stopped(Exception):
    """What stops the tool."""


@pytest.fixture(scope="module")
def llama(video_task, tmp_path_factory) -> Path:
    """A random Llama with a tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("hf") / "llama", video_task.data / "tokenizer"
    sizes = {"max_position_embeddings": 256, "initializer_range": 0.05}
    make_hf_model(folder, "llama 3", fresh_generator(), vocab_size=load_tokenizer(tokenizer).vocab_size, **sizes)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def make(out: Path, llama: Path, stop: str | None = None, *fewer: str, **changes) -> tuple[list[str], dict | None]:
    """Titles of the stages that ran, and the result.

    Args:
        stop: the stage that is stopped, before it counts as ended.
        fewer: settings with which it does less until then.
    """
    titles = []

    def forked(title: str, parts: list[str]) -> float:
        titles.append(title)
        done = run(*parts[1:], *(fewer if title == stop else ()))
        assert done.code == 0, f"{title}: {done.err}"
        if title == stop:
            raise Stopped
        return 2.0

    settings = {
        "model": llama, "placeholder": "<video>", "seed": 3, "scheme": "vrope", "devices": 1, "short": True,
        "resume": out.exists() and any(out.iterdir()),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_llm, "run", forked)
        try:
            return titles, video_llm.make(out, argparse.Namespace(**(settings | changes)))
        except Stopped:
            return titles, None


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """(folder, result, stages of three runs): the first stopped in the language model's stage, the next one while it asks."""
    out = tmp_path_factory.mktemp("video_llm")
    runs = [make(out, llama, STAGES[2], "trainer.max_time_per_run=00:00:00:00")]
    checkpoints = out / "video_llm/checkpoints"
    assert (checkpoints / "latest").exists() and not (checkpoints / "final").exists()
    runs += [make(out, llama, STAGES[3]), make(out, llama)]
    return out, runs[-1][1], [titles for titles, _ in runs]


def test_a_stage_that_has_ended_is_not_run_again_and_one_that_was_stopped_goes_on(made):
    out, result, ran = made
    assert ran == [STAGES[:3], STAGES[2:4], STAGES[3:]]
    assert [row["step"] for row in metrics(out / "video_llm")] == [1, 2, 3]
    assert list(json.loads((out / "stages.json").read_text())["ended"]) == STAGES and result["seconds"] == 12.0


def test_each_stage_trains_its_part(made, llama, world):
    """The tower, whose weights were random, in the second stage."""
    out, result, _ = made
    assert Path(result["model"]).absolute().samefile(out / "video_llm/checkpoints/final")  # as seen from here
    start = dict(imported(llama, world).named_parameters())
    connector, final = (saved_weights(out / name / "checkpoints/final", world) for name in ("connector", "video_llm"))
    eyes = {name for name in connector if name.startswith(("media_projector.", "vision_tower."))}
    assert connector.keys() - eyes == start.keys()
    for name, value in start.items():
        assert torch.equal(connector[name], value) and not torch.equal(final[name], value), name
    tower = load_file(next((out / "tower").glob("*.safetensors")))
    (embedding,) = (name for name in eyes if name.endswith("patch_embedding.weight"))
    (theirs,) = (value for name, value in tower.items() if name.endswith("patch_embedding.weight"))
    assert theirs.shape[-1] == 24 and torch.equal(connector[embedding], theirs)
    assert not torch.equal(final[embedding], theirs)


def test_the_report_is_of_both(made, llama):
    out, result, _ = made
    for name in ("seen", "blank"):
        answers = [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()]
        assert len(answers) == 12 and result[name] == sum(a["chosen"] == a["answer"] for a in answers) / 12
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{llama.name} with a tiny tower" in page and page.count("data:image/png;base64,") % 4 == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resume": False}, "is not empty, or no folder; choose another, or go on there with --resume"),
        ({"seed": 4}, "was begun with seed=3, and now it is 4"),
        ({"model": None}, "was begun with language_model="),
        ({"resume": True, "out": "nowhere"}, "nowhere/stages.json: No such file or directory: --out names no run"),
    ],
)
def test_another_run_is_not_gone_on_with(made, llama, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make(made[0].parent / changes.pop("out", made[0].name), llama, **changes)


def test_a_damaged_record_is_one_line(llama, tmp_path):
    for text in ("", "[]", "{}"):
        (tmp_path / "stages.json").write_text(text)
        with pytest.raises(UserError, match=r"stages.json is damaged \(.*\): begin anew"):
            make(tmp_path, llama)


def test_a_placeholder_without_a_model_is_refused():
    done = run("tools/video_llm.py", "--placeholder", "<video>")
    assert done.code == 2 and "--placeholder is of a --model" in done.err


def test_what_is_no_language_model_is_one_line_and_makes_nothing(made, llama, tmp_path):
    out = tmp_path / "out"
    for model, placeholder, words in (
        (tmp_path / "nowhere", "<video>", "nowhere/config.json (No such file or directory): name the folder of"),
        (made[0] / "tower", "<video>", "model_type='siglip_vision_model' is not read here"),
        (llama, "<empty_output>", "has no token '<empty_output>' (--placeholder)"),
    ):
        done = run("tools/video_llm.py", "--model", model, "--placeholder", placeholder, "--out", out)
        assert done.code == 2 and len(done.error_lines) == 1 and words in done.error_lines[0], done.err
    assert not out.exists()
