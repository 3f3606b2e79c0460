"""Write short clips with questions about them: coloured shapes that move, are counted, and appear one after the other.

Every row is a real JSONL row, `{"video", "prompt", "response", "answer", "category"}`, its clip a real .mp4 beside it: SFT reads
prompt and response, GRPO prompt and answer. A question asks for one of a clip's colour, shape, motion, place, count or order; a
clip alone answers it, and no clip is in two files. Beside them

    questions.jsonl   the held-out rows with their options, as recipes/eval_video.py reads them
    blank.jsonl       the same questions, all about a clip that shows nothing
    told.jsonl        the same kinds of questions about scenes told in words, for the language model before it sees
    tokenizer/        a byte-level BPE tokenizer with a `<video>` token, trained on the text

    python tools/make_video_problems.py --out runs/video_data --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from tools.make_word_problems import train_tokenizer

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (235, 220, 50)}
SHAPES = ("square", "disc", "cross", "ring")
# Direction -> rows and columns that an object moves over the whole clip, as shares of the room it has.
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
COUNTS = ("one", "two", "three", "four")
CORNERS = {f"{v} {h}": (i, j) for i, v in enumerate(("top", "bottom")) for j, h in enumerate(("left", "right"))}
SIZE, SIDE, FRAMES, RATE = 48, 14, 12, 8
VIDEO = "<video>"
BLANK = "clips/blank.mp4"


@dataclass(frozen=True)
class Thing:
    """
    Attributes:
        start, step: of its upper left corner, and how far it moves over the clip; rows and columns, in shares of the room.
        shown: from which to which share of the clip.
    """

    colour: str
    shape: str
    start: tuple[float, float]
    step: tuple[int, int] = (0, 0)
    shown: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        told: what the clip shows, in words.
    """

    category: str
    things: tuple[Thing, ...]
    told: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


def one_moves(rng: random.Random, category: str) -> Problem:
    """An object moves from one side to the other, along the edge of the picture."""
    colour, shape, move = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(MOVES))
    step = MOVES[move]
    # It starts at the far side of where it moves to, and at either end of the other axis.
    start = tuple(0.0 if s > 0 else 1.0 if s < 0 else float(rng.randint(0, 1)) for s in step)
    corner = next(name for name, place in CORNERS.items() if place == start)
    told = f"A {colour} {shape} starts in the {corner} and moves {move}."
    question, options, answer = {
        "colour": (f"What colour is the {shape}?", tuple(COLOURS), colour),
        "shape": (f"What shape is the {colour} object?", SHAPES, shape),
        "motion": (f"Where does the {shape} move?", tuple(MOVES), move),
        "place": (f"In which corner does the {shape} start?", tuple(CORNERS), corner),
    }[category]
    return Problem(category, (Thing(colour, shape, start, step),), told, question, options, answer)


def some_stand(rng: random.Random, category: str) -> Problem:
    """One to four objects of one colour stand in corners."""
    count, colour = rng.randrange(len(COUNTS)), rng.choice(list(COLOURS))
    corners = rng.sample(list(CORNERS.values()), count + 1)
    things = tuple(Thing(colour, rng.choice(SHAPES), tuple(map(float, corner))) for corner in corners)
    told = f"There {'is' if count == 0 else 'are'} {COUNTS[count]} {colour} object{'s' * (count > 0)}."
    return Problem(category, things, told, f"How many {colour} objects are there?", COUNTS, COUNTS[count])


def two_appear(rng: random.Random, category: str) -> Problem:
    """One object, and when it is gone another one of another colour."""
    (first, second), shapes = rng.sample(list(COLOURS), 2), [rng.choice(SHAPES) for _ in range(2)]
    places = [tuple(map(float, rng.choice(list(CORNERS.values())))) for _ in range(2)]
    things = (
        Thing(first, shapes[0], places[0], shown=(0.0, 0.5)),
        Thing(second, shapes[1], places[1], shown=(0.5, 1.0)),
    )
    told = f"First there is a {first} {shapes[0]}, then a {second} {shapes[1]}."
    which, answer = rng.choice([("first", first), ("last", second)])
    return Problem(category, things, told, f"Which colour comes {which}?", tuple(COLOURS), answer)


CATEGORIES: dict[str, Callable[[random.Random, str], Problem]] = {
    "colour": one_moves, "shape": one_moves, "motion": one_moves, "place": one_moves, "count": some_stand, "order": two_appear,
}  # fmt: skip


def draw_problem(rng: random.Random) -> Problem:
    category = rng.choice(list(CATEGORIES))
    return CATEGORIES[category](rng, category)


def pictures(things: tuple[Thing, ...], seed: int):
    """uint8 [FRAMES, SIZE, SIZE, 3]: the things over a dark, noisy ground."""
    import numpy as np

    noise, room = np.random.default_rng(seed), SIZE - SIDE
    away = np.abs(np.indices((SIDE, SIDE)) - (SIDE - 1) / 2)  # from the middle, along rows and columns
    distance = np.hypot(*away) / (SIDE / 2)
    masks = {
        "square": np.ones((SIDE, SIDE), dtype=bool), "disc": distance <= 1, "cross": (away <= 2).any(0),
        "ring": (distance <= 1) & (distance > 0.55),
    }  # fmt: skip
    found = noise.integers(0, 40, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for number, picture in enumerate(found):
        for thing in things:
            if thing.shown[0] <= number / FRAMES < thing.shown[1]:
                shift = number / (FRAMES - 1)
                row, column = (round((s + d * shift) * room) for s, d in zip(thing.start, thing.step, strict=True))
                picture[row : row + SIDE, column : column + SIDE][masks[thing.shape]] = COLOURS[thing.colour]
    return found


def write_clip(path: Path, frames) -> None:
    """
    Args:
        frames: uint8 [n, SIZE, SIZE, 3].
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "preset": "veryfast"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_problems(out: Path, name: str, count: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Clips and rows of one file; the rows, and the same as questions with options."""
    folder = out / "clips" / name
    folder.mkdir(parents=True)
    rows, questions = [], []
    for number in range(count):
        problem = draw_problem(rng)
        clip = folder / f"{number:05d}.mp4"
        write_clip(clip, pictures(problem.things, rng.randrange(2**31)))
        video, category = str(clip.relative_to(out)), problem.category
        rows.append(
            {"video": video, "prompt": VIDEO + problem.prompt, "response": f" {problem.answer}", "answer": problem.answer,
             "category": category}
        )  # fmt: skip
        questions.append(
            {"video": video, "question": problem.question, "options": list(problem.options), "answer": problem.answer,
             "category": category}
        )  # fmt: skip
    write_rows(out / f"{name}.jsonl", rows)
    return rows, questions


def tell(rng: random.Random) -> dict:
    """A row for a model that reads what others see."""
    problem = draw_problem(rng)
    return {
        "prompt": f"{problem.told}\n{problem.prompt}",
        "response": f" {problem.answer}",
        "category": problem.category,
    }


def main() -> None:
    from recipes.cli.errors import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSONL files, clips/ and tokenizer/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sft", type=int, default=1000, help="rows for the warm start")
    parser.add_argument("--train", type=int, default=1000, help="rows for GRPO")
    parser.add_argument("--test", type=int, default=200, help="held-out rows")
    parser.add_argument("--told", type=int, default=4000, help="rows that are told in words, without a clip")
    parser.add_argument("--vocab-size", type=int, default=400)
    args = parser.parse_args()
    if min(args.sft, args.train, args.test, args.told) < 1:
        parser.error("row counts must be at least 1")
    with user_errors():
        make(args)


def make(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} is not empty, or no folder; choose another")
    rng = random.Random(args.seed)
    rows, questions = {}, []
    for name in ("sft", "train", "test"):
        rows[name], questions = write_problems(args.out, name, getattr(args, name), rng)
    write_rows(args.out / "questions.jsonl", questions)
    write_clip(args.out / BLANK, pictures((), rng.randrange(2**31)) * 0)
    write_rows(args.out / "blank.jsonl", [question | {"video": BLANK} for question in questions])
    told = [tell(rng) for _ in range(args.told)]
    write_rows(args.out / "told.jsonl", told)
    texts = {name: [r["prompt"].removeprefix(VIDEO) + r["response"] for r in part] for name, part in rows.items()}
    also = texts["train"] + texts["test"]
    read = texts["sft"] + [r["prompt"] + r["response"] for r in told]
    train_tokenizer(args.out / "tokenizer", read, args.vocab_size, special=(VIDEO,), also=also)
    clips = f"{args.sft} SFT, {args.train} GRPO and {args.test} held-out clips"
    print(f"{clips}, {args.told} scenes in words and a tokenizer in {args.out}")


if __name__ == "__main__":
    main()
