"""A Video-LLM in two stages, from clips to a report: what `make video` runs, a few steps of each stage."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from markupsafe import escape
from safetensors.torch import load_file

from recipes.data.tokenizer import load_tokenizer
from recipes.data.visible import visible
from tests.recipe_runs import run
from tests.saved_weights import saved_weights
from tools import video_llm

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, result) of the tool's own commands, in processes that have imported what they need."""

    def forked(title: str, parts: list[str]) -> float:
        done = run(*parts[1:])
        assert done.code == 0, f"{title}: {done.err}"
        return 0.0

    out = tmp_path_factory.mktemp("video_llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_llm, "run", forked)
        args = argparse.Namespace(model=None, seed=3, scheme="vrope", devices=1, short=True, resume=False)
        return out, video_llm.make(out, args)


def test_each_stage_trains_its_part_and_begins_where_the_one_before_ended(made, world):
    out, _ = made
    read, connector, final = (
        saved_weights(out / name / "checkpoints" / "final", world) for name in ("read", "connector", "video_llm")
    )
    folder = load_file(next((out / "tower").glob("*.safetensors")))
    tower = {name: value for name, value in connector.items() if name.startswith("vision_tower.")}
    eyes = {name for name in connector if name.startswith("media_projector.")}
    assert len(tower) == len(folder) and connector.keys() - tower.keys() - eyes == read.keys()
    for name, value in tower.items():
        bare = name.removeprefix("vision_tower.model.").removeprefix("vision_model.")
        theirs = next(v for k, v in folder.items() if k.removeprefix("vision_model.") == bare)
        assert torch.equal(value, theirs) and torch.equal(final[name], theirs), name
    tokens = load_tokenizer(str(out / "data" / "tokenizer")).vocab_size
    for (
        name,
        value,
    ) in read.items():  # as it was, bit for bit, behind a connector that trained; without rows that only pad
        kept = slice(tokens) if name.startswith("embedding.") else slice(None)
        assert torch.equal(connector[name][kept], value[kept]), name
        assert not torch.equal(final[name][kept], value[kept]), name
    # Adam moves a weight by about the learning rate, which warms up over 20 steps of at most 4e-3; fresh weights differ by 0.02.
    reach = 4e-3 * (1 + 2 + 3 + 1) / 20
    for name in eyes:
        assert 0 < (final[name] - connector[name]).abs().max() < reach, name


def test_the_report_says_what_was_answered(made):
    out, result = made
    page = (out / "report.html").read_text(encoding="utf-8")
    answers = {
        name: [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()]
        for name in ("seen", "blank")
    }
    for name, given in answers.items():
        assert len(given) == 12 and result[name] == sum(a["chosen"] == a["answer"] for a in given) / 12
        assert f"{100 * result[name]:.1f} %" in page
    assert {a["media"]["video"] for a in answers["blank"]} == {"clips/blank.mp4"}
    assert [a["media"]["video"] for a in answers["seen"]] == [f"clips/test/{i:05d}.mp4" for i in range(12)]
    categories = {a["category"] for a in answers["seen"]}
    assert all(f"category: {category}</th>" in page for category in categories)
    shown = [a for a in answers["seen"] if f">{a['row']}<" in page]
    assert {a["category"] for a in shown} == categories
    assert page.count("data:image/png;base64,") == 6 * len(shown)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_what_would_turn_the_page_around_is_made_visible(made, tmp_path):
    out, _ = made
    question, folders = "What \u202e <b>colour</b>?", [tmp_path / name for name in ("seen", "blank")]
    for folder in folders:
        folder.mkdir()
        (folder / "video_eval.json").write_text((out / folder.name / "video_eval.json").read_text())
        answers = map(json.loads, (out / folder.name / "answers.jsonl").read_text().splitlines())
        whole = [a | {"question": question} for a in answers]
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in whole))
    done = run("tools/video_report.py", *folders, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\u202e" not in page and str(escape(visible(question))) in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "Which?"}, "was asked other questions than"),
        ({"media": None}, "does not say what was shown: evaluate again"),
    ],
)
def test_what_cannot_be_compared_is_one_line(made, tmp_path, change, words):
    out, _ = made
    other = tmp_path / "other"
    other.mkdir()
    (other / "video_eval.json").write_text((out / "blank" / "video_eval.json").read_text())
    answers = [json.loads(line) | change for line in (out / "blank" / "answers.jsonl").read_text().splitlines()]
    answers = [{key: value for key, value in answer.items() if value is not None} for answer in answers]
    (other / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    done = run("tools/video_report.py", out / "seen", other, "--out", tmp_path / "page.html")
    assert done.code == 2 and len(done.error_lines) == 1 and words in done.error_lines[0]
    assert not (tmp_path / "page.html").exists()


def test_a_clip_shows_what_its_row_says(made):
    """Of every category: the colours of the first and the last frame, and where they are, are those of the answer."""
    from recipes.data.frames import read_frames
    from tools.make_video_problems import COLOURS, CORNERS, COUNTS, SIDE, SIZE

    out, _ = made
    rows = [json.loads(line) for line in (out / "data" / "sft.jsonl").read_text().splitlines()]
    assert {row["category"] for row in rows} == {"colour", "shape", "motion", "place", "count", "order"}
    palette = torch.tensor(list(COLOURS.values())).float()
    for row in rows:
        frames = read_frames(str(out / "data" / row["video"]), 6, SIZE, SIZE, "here").float().permute(0, 2, 3, 1)
        nearest = (frames[..., None, :] - palette).norm(dim=-1).min(-1)
        seen = torch.where(nearest.values < 90, nearest.indices, -1)  # [6, H, W], the ground is dark
        answer, category = row["answer"], row["category"]
        names = [[list(COLOURS)[i] for i in frame.unique().tolist() if i >= 0] for frame in seen]
        middle = [(frame >= 0).nonzero().float().mean(0) for frame in seen]
        if category == "colour":
            assert all(answer in found for found in names)
        elif category == "order":
            assert answer in names[-1 if " last" in row["prompt"] else 0]
        elif category == "motion":
            down, right = (middle[-1] - middle[0]).tolist()
            found = ("up", "down")[down > 0] if abs(down) > abs(right) else ("left", "right")[right > 0]
            assert found == answer
        elif category == "place":
            assert tuple((middle[0] > SIZE / 2).int().tolist()) == CORNERS[answer]
        elif category == "count":
            corners = [seen[0, r : r + SIDE, c : c + SIDE] for r in (0, SIZE - SIDE) for c in (0, SIZE - SIDE)]
            assert COUNTS[sum(bool((part >= 0).float().mean() > 0.1) for part in corners) - 1] == answer


def test_scenes_in_words_and_the_tokenizer(made):
    """The language model reads about the same kinds of scenes, without clips; every text comes back from its tokens."""
    out, _ = made
    told = [json.loads(line) for line in (out / "data" / "told.jsonl").read_text().splitlines()]
    assert len(told) == 64 and all("video" not in row for row in told)
    tokenizer = load_tokenizer(str(out / "data" / "tokenizer"))
    for row in told:
        text = row["prompt"] + row["response"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if row["category"] not in ("count", "order"):
            assert row["response"].strip() in row["prompt"].splitlines()[0]
