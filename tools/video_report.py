"""One HTML page about evaluations of the same questions about videos: accuracy by category, and frames with each one's answers.

    python tools/video_report.py runs/seen runs/blank --out report.html --names "shown the clips" "shown blank clips"

The folders are those of recipes/eval_video.py; the first is what others are compared with, and its clips are drawn. The page is
one file that needs nothing else and asks no other host.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from recipes.cli.errors import user_errors
from tools.reporting.filled import filled, now

MOST = 8  # that a table has room for
ANSWERED = {"row", "chosen", "scores", "media"}  # what evaluations of one question may differ in


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        found: its video_eval.json.
        answers: of its answers.jsonl.
    """

    name: str
    folder: Path
    found: dict[str, Any]
    answers: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, name: str | None) -> Evaluation:
        """
        Raises:
            UserError: it is no folder of an evaluation, or one that was made before answers said what was shown.
        """
        try:
            found = json.loads((folder / "video_eval.json").read_text(encoding="utf-8"))
            lines = (folder / "answers.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
            answers = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no folder of recipes/eval_video.py: {error}") from error
        if any("media" not in answer for answer in answers):
            raise UserError(f"{folder}/answers.jsonl does not say what was shown: evaluate again")
        return cls(name or folder.name, folder, found, answers)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What was found by category, all questions first."""
        parts = {"all": self.found} if self.found["answered"] else {}
        for division, categories in self.found.get("by", {}).items():
            parts |= {f"{division}: {category}": part for category, part in categories.items()}
        return parts


def _without(answer: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in keys}


def check_alike(evaluations: Sequence[Evaluation]) -> None:
    """
    Raises:
        UserError: they have been asked different questions.
    """
    asked = [[_without(answer, ANSWERED) for answer in each.answers] for each in evaluations]
    for other, each in zip(asked[1:], evaluations[1:], strict=True):
        if other != asked[0]:
            raise UserError(
                f"{each.folder} was asked other questions than {evaluations[0].folder}: compare evaluations of the same file, "
                "in the same order"
            )


def chosen_examples(evaluations: Sequence[Evaluation], of_each: int) -> list[int]:
    """Numbers of questions to show: of each category the first that the first evaluation has right and that it has wrong in turn,
    so that one sees both."""
    by_category: dict[tuple, dict[bool, list[int]]] = {}
    for number, answer in enumerate(evaluations[0].answers):
        if answer["answer"] is not None:
            category = tuple(_without(answer, ANSWERED | {"question", "options", "answer"}).values())
            right = answer["chosen"] == answer["answer"]
            by_category.setdefault(category, {True: [], False: []})[right].append(number)
    found = []
    for _, kinds in sorted(by_category.items()):
        mixed = [number for pair in zip(kinds[True], kinds[False], strict=False) for number in pair]
        rest = sorted({*kinds[True], *kinds[False]} - set(mixed))
        found += sorted((mixed + rest)[:of_each])
    return found


def frames_of(answer: dict[str, Any], count: int) -> list[str]:
    """Data URIs of frames, as our own reader sees them; none of features that another encoder made."""
    from recipes.data.media_rows import MARKERS
    from recipes.data.video import VideoReader
    from recipes.data.video_settings import VideoSettings

    media = answer["media"]
    if not media or "features" in media:
        return []
    how = VideoSettings(num_frames=count, max_pixels=160 * 160, patch_size=4)
    reader = VideoReader(how, how.feature_size)
    prompt = "".join(
        MARKERS[key.removesuffix("s")] * (len(value) if key in ("images", "videos") else 1)
        for key, value in media.items()
    )
    _, clips = reader.read_row(
        {"prompt": prompt, **media}, Path(answer["row"].rpartition(":")[0]).parent, answer["row"]
    )
    return [_uri(frame) for clip in clips for frame in clip.read()[: 1 if clip.kind == "image" else None]]


def _uri(frame) -> str:
    """
    Args:
        frame: uint8 [3, H, W].
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def likelihoods(scores: Sequence[float]) -> list[float]:
    """Of the options, which together are 1."""
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def render(evaluations: Sequence[Evaluation], title: str, of_each: int, frames: int) -> str:
    examples = []
    for number in chosen_examples(evaluations, of_each):
        first = evaluations[0].answers[number]
        given = [(each.answers[number]["chosen"], likelihoods(each.answers[number]["scores"])) for each in evaluations]
        letters = "ABCDEFGHIJ"[: len(first["options"])]
        examples.append(
            {
                "row": first["row"],
                "question": first["question"],
                "answer": first["answer"],
                "options": list(zip(letters, first["options"], strict=True)),
                "frames": frames_of(first, frames),
                "given": given,
            }  # fmt: skip
        )
    return filled(
        "video.html",
        ["page.css", "video.css"],
        policy="; img-src data:",
        title=title,
        kicker=f"megatron-ext report on videos of {now()}",
        evaluations=evaluations,
        categories=list(evaluations[0].rows),
        examples=examples,
    )


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of recipes/eval_video.py")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--names", nargs="+", help="what the page calls them (default: their folders' names)")
    parser.add_argument("--title", default="Questions about videos")
    parser.add_argument("--of-each", type=int, default=4, help="questions that are shown of each category")
    parser.add_argument("--frames", type=int, default=6, help="frames that are shown of a video")
    args = parser.parse_args()
    names = args.names or [None] * len(args.folders)
    if len(names) != len(args.folders):
        raise UserError(f"--names gives {len(names)} names to {len(args.folders)} folders")
    if len(args.folders) > MOST:
        raise UserError(f"{len(args.folders)} evaluations are more than a table has room for: name at most {MOST}")
    if args.of_each < 0 or args.frames < 1:
        raise UserError(f"--of-each={args.of_each} must be at least 0, --frames={args.frames} at least 1")
    evaluations = [Evaluation.read(folder, name) for folder, name in zip(args.folders, names, strict=True)]
    check_alike(evaluations)
    write_whole(args.out, render(evaluations, args.title, args.of_each, args.frames))
    print(f"{args.out}: {args.out.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
