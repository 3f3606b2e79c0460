"""Write short clips with questions about them: a coloured square moves over a dark, noisy ground.

Every row is a real JSONL row, `{"video", "prompt", "response", "answer"}`, its clip a real .mp4 beside it: SFT reads
prompt and response, GRPO prompt and answer. Three kinds of questions: the square's colour, where it moves, and in
which corner it starts. No clip is in two files. A byte-level BPE tokenizer with a `<video>` token is trained on the text.

    python tools/make_video_problems.py --out runs/video_data --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from tools.make_word_problems import train_tokenizer

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (235, 220, 50)}
# Direction -> rows and columns that the square moves over the whole clip, as shares of the room it has.
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SIZE, SQUARE, FRAMES, RATE = 48, 14, 12, 8
VIDEO = "<video>"


def draw_problem(rng: random.Random) -> tuple[dict, str, str]:
    """(what the clip shows, question, answer)."""
    move = rng.choice(list(MOVES))
    rows, columns = MOVES[move]
    # The square starts at the far side of where it moves to, and anywhere along the other axis.
    start = [0.0 if step > 0 else 1.0 if step < 0 else float(rng.randint(0, 1)) for step in (rows, columns)]
    scene = {"colour": rng.choice(list(COLOURS)), "start": start, "step": (rows, columns), "seed": rng.randrange(2**31)}
    corner = f"{'top' if start[0] < 0.5 else 'bottom'} {'left' if start[1] < 0.5 else 'right'}"
    question, answer = rng.choice(
        [
            ("What colour is the square?", scene["colour"]),
            ("Where does the square move?", move),
            ("In which corner does the square start?", corner),
        ]
    )
    return scene, f"{VIDEO}Question: {question}\nAnswer:", answer


def write_clip(path: Path, scene: dict) -> None:
    import av
    import numpy as np

    noise = np.random.default_rng(scene["seed"])
    room = SIZE - SQUARE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            picture = noise.integers(0, 40, (SIZE, SIZE, 3), dtype=np.uint8)
            shift = number / (FRAMES - 1)
            row, column = (round((s + d * shift) * room) for s, d in zip(scene["start"], scene["step"], strict=True))
            picture[row : row + SQUARE, column : column + SQUARE] = COLOURS[scene["colour"]]
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_rows(out: Path, name: str, count: int, rng: random.Random) -> list[dict]:
    folder = out / "clips" / name
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        scene, prompt, answer = draw_problem(rng)
        clip = folder / f"{number:05d}.mp4"
        write_clip(clip, scene)
        video = str(clip.relative_to(out))
        rows.append({"video": video, "prompt": prompt, "response": f" {answer}", "answer": answer})
    (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return rows


def main() -> None:
    from recipes.cli.errors import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSONL files, clips/ and tokenizer/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sft", type=int, default=1000, help="rows for the warm start")
    parser.add_argument("--train", type=int, default=1000, help="rows for GRPO")
    parser.add_argument("--test", type=int, default=200, help="held-out rows")
    parser.add_argument("--vocab-size", type=int, default=400)
    args = parser.parse_args()
    if min(args.sft, args.train, args.test) < 1:
        parser.error("row counts must be at least 1")
    with user_errors():
        make(args)


def make(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} is not empty, or no folder; choose another")
    rng = random.Random(args.seed)
    rows = {name: write_rows(args.out, name, getattr(args, name), rng) for name in ("sft", "train", "test")}
    texts = {name: [r["prompt"].removeprefix(VIDEO) + r["response"] for r in part] for name, part in rows.items()}
    also = texts["train"] + texts["test"]
    train_tokenizer(args.out / "tokenizer", texts["sft"], args.vocab_size, special=(VIDEO,), also=also)
    print(f"{args.sft} SFT, {args.train} GRPO and {args.test} held-out clips and a tokenizer in {args.out}")


if __name__ == "__main__":
    main()
