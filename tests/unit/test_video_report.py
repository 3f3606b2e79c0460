"""What `tools/video_report.py` reads of an evaluation's folder."""

from __future__ import annotations

import json

import pytest

from megatron_ext.files import write_whole
from tools.video_report import Evaluation


def test_a_text_may_hold_what_some_take_for_the_end_of_a_line(tmp_path):
    """As `recipes/eval_video.py` writes them: a question with a line separator, and one with a form feed."""
    answers = [{"question": f"Where is it?{mark}Say.", "media": ["a.mp4"]} for mark in ("\u2028", "\x85", "\x0c", " ")]
    (tmp_path / "video_eval.json").write_text("{}")
    write_whole(tmp_path / "answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
    assert Evaluation.read(tmp_path, None).answers == answers


def test_a_folder_of_another_kind_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder of recipes/eval_video\.py"):
        Evaluation.read(tmp_path, None)
