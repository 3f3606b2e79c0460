"""Published sets' rows, as their cards describe them; what they become, and what is refused with its place."""

from __future__ import annotations

import json
import tarfile

import pytest

from recipes.data.errors import DataError
from recipes.video_eval.sets import SETS, read_questions

VIDEOMME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity", "url": "https://x.org/v",
    "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting", "question": "How many?",
    "options": ["A. Three.", "B. Four.", "C. Five.", "D. Six."], "answer": "C",
}  # fmt: skip
LONG = {
    "video_id": "86C", "id": "86C_0", "video_path": "86C.mp4", "subtitle_path": "86C_en.json", "correct_choice": 1,
    "question": "What changes?", "option0": "the hat", "option1": "the door", "option2": "the sky", "option3": "N/A",
    "option4": "N/A", "duration": 190.1, "duration_group": 600, "question_category": "SSS", "topic_category": "KH",
    "starting_timestamp_for_subtitles": 0.0,
}  # fmt: skip
CASES = {
    "rows": (
        "a.jsonl",
        {"video": "c.mp4", "question": "Which?", "options": ["left", "right"], "answer": "right", "category": "motion"},
        ({"video": "c.mp4"}, "Which?", ("left", "right"), 1, {"category": "motion"}),
    ),
    "videomme": (
        "test.jsonl", VIDEOMME,
        (
            {"video": "fFjv93ACGo8.mp4"}, "How many?", ("Three.", "Four.", "Five.", "Six."), 2,
            {"task_type": "Counting", "domain": "Knowledge", "duration": "short"},
        ),
    ),
    "mvbench": (
        "action_count.json", {"video": "v_1.mp4", "question": "How often?", "candidates": ["3", "2", "4"], "answer": "2"},
        ({"video": "perception/videos/v_1.mp4"}, "How often?", ("3", "2", "4"), 1, {"task": "action_count"}),
    ),
    "longvideobench": (
        "validation.jsonl", LONG,
        (
            {"video": "86C.mp4"}, "What changes?", ("the hat", "the door", "the sky"), 1,
            {"question_category": "SSS", "duration_group": "600"},
        ),
    ),
    "tempcompass": (
        "test.jsonl",
        {"video_id": "10", "question": "Where to?\nA. left\nB. right\nC. up", "answer": "B. right", "dim": "direction"},
        ({"video": "10.mp4"}, "Where to?", ("left", "right", "up"), 1, {"dim": "direction"}),
    ),
    "egoschema": (
        "test.jsonl",
        {"question_idx": "1", "question": "Why?", "video_idx": "0a-b", "option": ["A. hunger", "B. joy"], "answer": "1"},
        ({"video": "0a-b.mp4"}, "Why?", ("hunger", "joy"), 1, {}),
    ),
}  # fmt: skip


def write(folder, name: str, row: dict) -> str:
    text = json.dumps([row]) if name.endswith(".json") else json.dumps(row) + "\n"
    (folder / name).write_text(text)
    return str(folder / name)


def test_questions_of_a_shard_show_what_stands_beside_them(tmp_path):
    row = {key: value for key, value in CASES["rows"][1].items() if key != "video"}
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in (
            ("q.json", json.dumps(row)),
            ("q.mp4", "no film"),
            ("r.json", json.dumps(row | {"video": "q.mp4"})),
        ):
            (tmp_path / name).write_text(data)
            shard.add(tmp_path / name, name)
    first, second = read_questions(tmp_path / "a.tar", "rows")
    assert first.media == {"videos": ["q.mp4"]} and second.media == {"video": "q.mp4"}
    assert str(first.place) == f"{tmp_path}/a.tar, q" and first.place.folder == tmp_path / "a.tar"


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_each_set_becomes_a_question(name, tmp_path):
    file, row, expected = CASES[name]
    (found,) = read_questions(write(tmp_path, file, row), name)
    assert (found.media, found.question, found.options, found.answer, found.categories) == expected
    (moved,) = read_questions(tmp_path / file, name, str(tmp_path / "clips"))
    assert moved.media == {"video": f"{tmp_path / 'clips'}/{expected[0]['video']}"}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "tempcompass",
            {"video_id": "1", "question": "Is it falling?", "answer": "no", "dim": "action"},
            ("Is it falling?", ("yes", "no"), 1),
        ),
        (
            "tempcompass",
            {
                "video_id": "1",
                "question": "Which fits?\nOption 1: it falls.\nOption 2: it: rises.",
                "answer": "Option 2: it: rises.",
                "dim": "order",
            },  # fmt: skip
            ("Which fits?", ("it falls.", "it: rises."), 1),
        ),
        (
            "longvideobench",
            {
                "video_path": "a.mp4",
                "question": "What?",
                "candidates": ["a hat", "a door"],
                "question_category": "SSS",
                "duration_group": 15,
            },  # fmt: skip
            ("What?", ("a hat", "a door"), None),
        ),
        (
            "egoschema",
            {"q_uid": "u", "question": "Why?", **{f"option {i}": str(i) * 3 for i in range(5)}},
            ("Why?", ("000", "111", "222", "333", "444"), None),
        ),
        ("rows", {"question": "1 + 1 ?", "options": ["1", "2"], "answer": 1}, ("1 + 1 ?", ("1", "2"), 1)),
        ("rows", {"question": "1 + 1 ?", "options": ["1", "2"], "answer": "1"}, ("1 + 1 ?", ("1", "2"), 0)),
        ("rows", {"question": "Who?", "options": ["A. Li", "C. Li"], "answer": "(B)"}, ("Who?", ("A. Li", "C. Li"), 1)),
        (
            "rows",
            {"question": "Who?", "options": ["J. Li", "B. Li"], "answer": "B. Li"},
            ("Who?", ("J. Li", "B. Li"), 1),
        ),
        ("rows", {"question": "Which?", "options": ["C", "A", "B"], "answer": 1}, ("Which?", ("C", "A", "B"), 1)),
        ("rows", {"question": "Which?", "options": ["A", "B", "C"], "answer": "B"}, ("Which?", ("A", "B", "C"), 1)),
        ("videomme", VIDEOMME | {"options": ["A. C", "B. A", "C. B", "D. D"]}, ("How many?", ("C", "A", "B", "D"), 2)),
    ],
)
def test_other_files_of_these_sets(name, row, expected, tmp_path):
    (found,) = read_questions(write(tmp_path, "a.jsonl", row), name)
    assert (found.question, found.options, found.answer) == expected


def test_an_answer_of_mvbench_is_the_text_of_an_option(tmp_path):
    """Also where that is another one's letter."""
    row = {"video": "v.mp4", "question": "Which letter?", "candidates": ["C", "A", "B"], "answer": "A"}
    (found,) = read_questions(write(tmp_path, "character_order.json", row), "mvbench")
    assert (found.options, found.answer) == (("C", "A", "B"), 1)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("videomme", {"videoID": ...}, "data.set=videomme reads the key videoID, and the row has video_id, duration"),
        ("videomme", {"answer": "E"}, "the answer 'E' is none of its 4 options"),
        ("videomme", {"options": ["A. x"]}, "options must be a list of 2 to 10 texts"),
        ("videomme", {"options": ["A. x", 3]}, "an option must be a text, got 3"),
        (
            "rows",
            {"options": ["C", "A", "B"], "answer": "A"},
            "'A' is the letter of one option and the text of another",
        ),
        ("videomme", {"question": None}, "question must be a text, got None"),
        ("longvideobench", {"correct_choice": 3}, "the answer 3 is none of its 3 options"),
        ("tempcompass", {"answer": "D. down"}, "the answer 'D. down' is none of the options in its question's lines"),
    ],
)
def test_a_row_of_another_shape_is_one_line(name, change, words, tmp_path):
    _, row, _ = CASES[name]
    row = {key: value for key, value in (row | change).items() if value is not ...}
    path = write(tmp_path, "a.jsonl", row)
    with pytest.raises(DataError) as caught:
        read_questions(path, name)
    assert str(caught.value).startswith(f"{path}:1: ") and words in str(caught.value)


def test_files_that_are_no_such_set(tmp_path):
    path = write(tmp_path, "other.json", CASES["mvbench"][1])
    with pytest.raises(
        DataError, match=r"other.json:1: the file is called other, which is none of the tasks action_antonym"
    ):
        read_questions(path, "mvbench")
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="b.json is no JSON list of objects"):
        read_questions(tmp_path / "b.json", "mvbench")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(DataError, match="c.json holds no question"):
        read_questions(tmp_path / "c.json", "mvbench")
