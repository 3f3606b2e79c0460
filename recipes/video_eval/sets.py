"""Rows of published sets of questions about videos, in the shape of our own.

Which column says what, and where it was looked up:

- videomme: `videoID`, `question`, `options` ("A. .."), `answer` (a letter), `task_type`, `domain`, `duration` (card of
  lmms-lab/Video-MME).
- mvbench: `video`, `question`, `candidates`, `answer` (its text); the task is the name of the file, and says in which folder of
  the set the clip lies (json/ of OpenGVLab/MVBench; lmms-eval, tasks/mvbench/utils.py). `start` and `end`, where a row has
  them, are not cut out: clips are shown whole, as lmms-eval shows them.
- longvideobench: `video_path`, `question`, `option0` .. `option4` ("N/A": none) or `candidates`, `correct_choice` (a number from
  0), `question_category`, `duration_group` (card of longvideobench/LongVideoBench-Meta; lvb_val.json).
- tempcompass: `video_id`, `question` with its options in lines, `answer` (the whole line, or yes or no), `dim` (card of
  lmms-lab/TempCompass; lmms-eval, tasks/tempcompass/utils.py).
- egoschema: `video_idx`, `question`, `option` ("A. .."), `answer` (a number from 0, or none) (lmms-eval,
  tasks/egoschema/utils.py, of lmms-lab/egoschema). In the authors' questions.json, with `q_uid` and `option 0` .., `q_uid` is the
  clip; answers are in another file, so that only what was chosen is written down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from recipes.data.errors import DataError
from recipes.data.files import Place, placed_rows
from recipes.data.shards import media_of

__all__ = ["SETS", "Question", "read_questions"]

LETTERS = "ABCDEFGHIJ"
FORMS = ("text", "letter", "number")  # of an answer: an option's text, its letter, or its number from 0
LETTERED = re.compile(r"^\(?([A-J])[.):]\s*(.*)$", re.DOTALL)
# TempCompass: "A. ..", and in caption matching "Option 1: ..", "Sentence A: ..", "Caption A: ..".
LINES = re.compile(r"^((?:Option|Sentence|Caption)\s+\w+|\(?[A-J])[.):]\s*(.+)$")
# Where the clips of an MVBench task lie.
MVBENCH = {
    "action_antonym": "ssv2_video_mp4", "action_count": "perception/videos", "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment", "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos", "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation", "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment", "object_shuffle": "perception/videos", "scene_transition": "scene_qa/video",
    "state_change": "perception/videos", "unexpected_action": "FunQA_test/test",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        media: the row's images and videos, by our keys.
        options: without letters before them.
        answer: the number of the right one; None: it is not known.
        categories: what kinds it is of, by the name of each division.
    """

    media: Mapping[str, Any]
    question: str
    options: tuple[str, ...]
    answer: int | None
    categories: Mapping[str, str] = field(default_factory=dict)
    place: Place | None = None


def read_questions(path: str | Path, name: str, videos: str | None = None) -> list[Question]:
    """The questions of a file, a folder or a pattern: JSONL, parquet, Arrow, shards with their clips, or a JSON list.

    Args:
        name: of SETS.
        videos: the folder that clips' names are relative to; None: that of their row's file.

    Raises:
        DataError: a row that is none of this set, with its place.
    """
    found = []
    for place, row, beside in _rows(path):
        try:
            question = SETS[name](row, Path(place.file).stem)
        except KeyError as error:
            raise DataError(
                f"{place}: data.set={name} reads the key {error.args[0]}, and the row has {', '.join(row) or 'nothing'}"
            ) from error
        except UserError as error:
            raise DataError(f"{place}: {error}") from error
        media = {key: _under(videos, value) for key, value in question.media.items()} or media_of(beside)
        found.append(Question(media, question.question, question.options, question.answer, question.categories, place))
    if not found:
        raise DataError(f"{path} holds no question")
    return found


def _rows(path: str | Path) -> Iterator[tuple[Place, dict[str, Any], tuple[str, ...]]]:
    """`placed_rows`, and the items of lists in .json files, which published sets have."""
    folder = Path(path)
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder] if folder.suffix == ".json" else []
    if not files:
        yield from placed_rows(path)
    for file in files:
        try:
            items = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f"{file} is no JSON list of objects")
        for number, item in enumerate(items, 1):
            yield Place(str(file), number), item, ()


def _under(folder: str | None, value: Any) -> Any:
    if folder is None or value is None:
        return value
    if isinstance(value, list):
        return [_under(folder, each) for each in value]
    return str(Path(folder).expanduser().resolve() / value) if isinstance(value, str) else value


def _without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Where each has its own before it: "J. Smith" is none of them."""
    matches = [LETTERED.match(option) for option in options]
    lettered = all(match and match[1] == letter for match, letter in zip(matches, LETTERS, strict=False))
    return tuple(match[2] for match in matches) if lettered else tuple(options)


def _number(answer: Any, options: tuple[str, ...], forms: Collection[str]) -> int | None:
    """Of an answer.

    Args:
        forms: that it may have, of FORMS.
    """
    if answer is None or answer in ("", -1, "-1", "None"):
        return None
    if isinstance(answer, str):
        text = answer.strip()
        letter = text.strip("().")
        found = {
            "text": next((number for number, option in enumerate(options) if text in (option, option.strip())), None),
            "letter": LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS[: len(options)] else None,
        }
        found = {form: number for form, number in found.items() if form in forms and number is not None}
        if len({*found.values()}) > 1:
            raise UserError(
                f"the answer {answer!r:.60} is the letter of one option and the text of another: write its number, from 0"
            )
        if found:
            return next(iter(found.values()))
        if text.isdigit() and "number" in forms:
            answer = int(text)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    raise UserError(f"the answer {answer!r:.60} is none of its {len(options)} options")


def _made(
    media: Any, question: Any, options: Any, answer: Any, forms: Collection[str] = FORMS, **categories: Any
) -> Question:
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"question must be a text, got {question!r:.60}")
    if not isinstance(options, list | tuple) or len(options) < 2 or len(options) > len(LETTERS):
        raise UserError(f"options must be a list of 2 to {len(LETTERS)} texts, got {options!r:.60}")
    if odd := [option for option in options if not isinstance(option, str)]:
        raise UserError(f"an option must be a text, got {odd[0]!r:.60}")
    texts = _without_letters(options)
    kinds = {name: str(value) for name, value in categories.items() if value is not None}
    return Question(media, question.strip(), texts, _number(answer, texts, forms), kinds)


def _ours(row: Mapping[str, Any], stem: str) -> Question:
    """{video, question, options, answer, category}; the answer is a letter, a number from 0, or an option's text. A row may
    also show nothing, or what else rows show."""
    keys = ("video", "videos", "image", "images", "features")
    media = {key: row[key] for key in keys if row.get(key) is not None}
    return _made(media, row["question"], row["options"], row.get("answer"), category=row.get("category"))


def _videomme(row: Mapping[str, Any], stem: str) -> Question:
    kinds = {key: row[key] for key in ("task_type", "domain", "duration")}
    return _made(
        {"video": f"{row['videoID']}.mp4"}, row["question"], row["options"], row["answer"], ("letter",), **kinds
    )


def _mvbench(row: Mapping[str, Any], stem: str) -> Question:
    if stem not in MVBENCH:
        raise UserError(f"the file is called {stem}, which is none of the tasks {', '.join(sorted(MVBENCH))}")
    video = f"{MVBENCH[stem]}/{row['video']}"
    return _made({"video": video}, row["question"], row["candidates"], row["answer"], ("text",), task=stem)


def _longvideobench(row: Mapping[str, Any], stem: str) -> Question:
    options = row.get("candidates") or [row[f"option{i}"] for i in range(5) if row[f"option{i}"] not in (None, "N/A")]
    kinds = {key: row[key] for key in ("question_category", "duration_group")}
    return _made({"video": row["video_path"]}, row["question"], options, row.get("correct_choice"), **kinds)


def _tempcompass(row: Mapping[str, Any], stem: str) -> Question:
    text, *lines = str(row["question"]).strip().split("\n")
    answer, media = row["answer"], {"video": f"{row['video_id']}.mp4"}
    if str(answer).strip().lower() in ("yes", "no"):
        return _made(media, row["question"], ["yes", "no"], str(answer).strip().lower(), dim=row["dim"])
    options = [match for line in lines if (match := LINES.match(line.strip()))]
    heads, texts = [match[1] for match in options], [match[2] for match in options]
    right = LINES.match(str(answer).strip())
    said = right[1] if right else str(answer).strip()
    if said not in heads and said not in texts:
        raise UserError(f"the answer {answer!r:.60} is none of the options in its question's lines")
    number = heads.index(said) if said in heads else texts.index(said)
    return _made(media, text, texts, number, dim=row["dim"])


def _egoschema(row: Mapping[str, Any], stem: str) -> Question:
    if "q_uid" in row:
        return _made({"video": f"{row['q_uid']}.mp4"}, row["question"], [row[f"option {i}"] for i in range(5)], None)
    return _made({"video": f"{row['video_idx']}.mp4"}, row["question"], row["option"], row["answer"])


SETS: dict[str, Callable[[Mapping[str, Any], str], Question]] = {
    "rows": _ours,
    "videomme": _videomme,
    "mvbench": _mvbench,
    "longvideobench": _longvideobench,
    "tempcompass": _tempcompass,
    "egoschema": _egoschema,
}
