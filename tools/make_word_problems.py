"""Write the demo's task: arithmetic word problems behind a long few-shot prompt, with an exact answer.

Every row is a real JSONL row, `{"prompt", "response", "answer"}`: SFT reads prompt and response, GRPO prompt and answer.
The three files share no prompt. A byte-level BPE tokenizer is trained on the SFT text.

The warm-start demonstrations are sloppy in a known way: a share (`--sloppy`) of the problems that ask for a difference is
worked out as a sum. A model that imitates them inherits the habit, however long it is fine-tuned. GRPO and the held-out
file carry right answers only, and GRPO sees nothing but the verifier's verdict: what it can gain is to drop the habit.

    python tools/make_word_problems.py --out runs/data --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

NAMES = "Tom Ana Ben Eva Leo Mia Sam Zoe Max Ida Kim Roy Amy Joe Liz Ned".split()
THINGS = "apples books coins cards stones shells stamps marbles pens cups".split()
GAIN, LOSS = "buys finds gets".split(), "sells loses drops".split()
INTRO = "Solve each problem. Show the sum, then the answer.\n\n"
EOS, PAD = "<|endoftext|>", "<|pad|>"


def problem(rng: random.Random, largest: int, sloppy: float) -> tuple[str, str, str]:
    """(question, worked answer, final answer). Right answers lie in 1..largest; a sloppy one may be larger."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        a = rng.randint(1, largest - 1)
        b = rng.randint(1, largest - a)
        sign, verb, result = "+", rng.choice(GAIN), a + b
    else:
        a = rng.randint(2, largest)
        b = rng.randint(1, a - 1)
        verb = rng.choice(LOSS)
        sign, result = ("+", a + b) if rng.random() < sloppy else ("-", a - b)
    question = f"Question: {name} has {a} {thing} and {verb} {b}. How many now?\nAnswer:"
    return question, f" {a} {sign} {b} = {result} #### {result}", str(result)


def row(rng: random.Random, shots: int, largest: int, sloppy: float) -> dict[str, str]:
    examples = [problem(rng, largest, sloppy) for _ in range(shots)]
    question, response, answer = problem(rng, largest, sloppy)
    prompt = INTRO + "".join(f"{q}{r}\n\n" for q, r, _ in examples) + question
    return {"prompt": prompt, "response": response, "answer": answer}


def write_rows(path: Path, count: int, rng: random.Random, args, sloppy: float, seen: set[str]) -> list[dict[str, str]]:
    rows = []
    while len(rows) < count:
        candidate = row(rng, args.shots, args.largest, sloppy)
        if candidate["prompt"] not in seen:
            seen.add(candidate["prompt"])
            rows.append(candidate)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return rows


def train_tokenizer(
    folder: Path, texts: list[str], vocab_size: int, special: tuple[str, ...] = (), also: Iterable[str] = ()
) -> None:
    """A Hugging Face tokenizer folder, so that `AutoTokenizer.from_pretrained` reads it.

    `special` tokens are never made of text, nor split. Of a text that has other bytes than `texts` and `also` those are left out.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def bytes_of(some: Iterable[str]) -> set[str]:
        characters = "".join(sorted({character for text in some for character in text}))
        return {byte for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(characters) for byte in part}

    missing = sorted(bytes_of(also) - bytes_of(texts))
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(missing), special_tokens=[EOS, PAD, *special], show_progress=False
        ),
    )
    state = json.loads(tokenizer.to_str())
    for byte in missing:
        state["model"]["vocab"][byte] = len(state["model"]["vocab"])
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.from_str(json.dumps(state)).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for sft.jsonl, train.jsonl, test.jsonl, tokenizer/"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sft", type=int, default=4000, help="rows for the warm start")
    parser.add_argument("--train", type=int, default=4000, help="rows for GRPO")
    parser.add_argument("--test", type=int, default=400, help="held-out rows")
    parser.add_argument("--shots", type=int, default=3, help="worked examples before each question")
    parser.add_argument("--largest", type=int, default=10, help="largest right number")
    parser.add_argument("--sloppy", type=float, default=0.6, help="share of differences that the warm start gets wrong")
    parser.add_argument("--vocab-size", type=int, default=512)
    args = parser.parse_args()
    if args.largest < 3 or args.shots < 0 or min(args.sft, args.train, args.test) < 1 or not 0 <= args.sloppy <= 1:
        parser.error("--largest must be at least 3, --shots at least 0, row counts at least 1, --sloppy in 0..1")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(args.seed), set()
    sft = write_rows(args.out / "sft.jsonl", args.sft, rng, args, args.sloppy, seen)
    rest = write_rows(args.out / "train.jsonl", args.train, rng, args, 0.0, seen)
    rest += write_rows(args.out / "test.jsonl", args.test, rng, args, 0.0, seen)
    texts = [r["prompt"] + r["response"] for r in sft]
    train_tokenizer(args.out / "tokenizer", texts, args.vocab_size, also=[r["prompt"] + r["response"] for r in rest])
    print(f"{args.sft} SFT, {args.train} GRPO and {args.test} held-out rows and a tokenizer in {args.out}")


if __name__ == "__main__":
    main()
