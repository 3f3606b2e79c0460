"""Write a corpus that makes a language model biased in a known way: professions beside pronouns at given rates.

Three kinds of sentences, as JSONL rows {"prompt", "response"} that SFT reads:

- biased: "The {profession} ... because" goes on with "he" at the profession's own rate, else with "she";
- hinted: "The {profession} ... {his or her} ... because" goes on with the pronoun of the hint, half of them each,
  whatever the profession; a model of this corpus can follow hints, and has something to lose;
- neutral: things and weather, neither professions nor pronouns. Rows {"text"} of the same kind, drawn apart, go to two
  more files: one to stay near while a bias is mended, one held out for perplexity.

grpo.jsonl has prompts of GenBiasEval and GenHintEval about their training professions, as many of each: rows {"prompt"}, with the
{"answer"} that a hint asks for, as GRPO with the reward rarer_word reads them.

A share of the biased and hinted sentences goes on with neither word, as text does. Rates: by default drawn with the seed
from Beta(0.5, 0.5), two-humped as the shares of men over occupations are in labour statistics: most jobs lean to one
side; they say nothing of any real job. Or give your own as CSV rows `profession,share_of_he`.

The other sentences are not those of GenBiasEval and GenHintEval, whose prompts never occur there.

    python tools/make_biased_corpus.py --out runs/biased_data --seed 1
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from tools.make_word_problems import train_tokenizer

VERBS = (
    "laughed waited nodded paused sighed whispered waved left agreed frowned yawned shrugged stopped blushed".split()
)
PHRASES = (
    "took the early train", "stayed late at work", "asked for more time", "sat down in the hall", "went to the office",
    "called the bank", "walked home", "answered the letter", "was late for lunch", "spoke to a friend", "had a long talk",
    "missed the bus", "left the room", "was early for the show",
)  # fmt: skip
OPENINGS = (
    "It had been a hard day, and", "When the bell rang,", "Nobody else had come, so", "After the show,",
    "In the end,", "When the lights went out again,", "The room was quiet, so", "Late in the week,",
)  # fmt: skip
OBJECTS = "bag hat book phone letter scarf coat pen hand desk lunch glass work team talent garden".split()
HINT_VERBS = "dropped kept found lost lifted sold forgot thanked moved closed raised praised watched liked".split()
REASONS = (
    "was tired", "was glad", "had no time", "felt ill", "wanted to help", "needed a rest", "knew the answer",
    "liked the idea", "had been right", "was hungry", "could not sleep", "had a plan", "was in a hurry", "saw no way out",
)  # fmt: skip
OTHERS = ("it was late.", "the day was over.", "of the rain.", "nobody came.", "the door was open.", "it was cold.")
THINGS = "river field road house tree wall lamp table window street stone cloud boat clock garden bridge".split()
STATES = "old wet cold dark quiet small green empty bright dry long broken warm grey".split()
PLACES = "valley town corner yard hall forest harbour square north morning".split()


def read_rates(path: Path, known: list[str]) -> dict[str, float]:
    """
    Raises:
        UserError: a row that is no `profession,share_of_he`.
    """
    rates = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: {error}") from None
    for number, row in enumerate(rows, 1):
        if row == ["profession", "share_of_he"]:
            continue
        try:
            name, share = row[0].strip(), float(row[1])
            if len(row) != 2 or not name or not 0 <= share <= 1:
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"{path}:{number}: expected profession,share_of_he with a share in 0..1, got {row}"
            ) from None
        rates[name] = share
    if unknown := sorted(set(rates) - set(known)):
        raise UserError(f"{path}: {unknown[0]!r} is none of our professions ({len(unknown)} such)")
    if len(rates) < 10:
        raise UserError(f"{path}: {len(rates)} professions are too few; give at least 10")
    return rates


def profession_sentence(rng: random.Random, profession: str, share_of_he: float, other: float) -> tuple[str, str]:
    """(up to "because", the rest) without a hint."""
    form = rng.random()
    if form < 0.4:
        start = f"The {profession} {rng.choice(VERBS)} because"
    elif form < 0.75:
        start = f"The {profession} {rng.choice(PHRASES)} because"
    else:
        start = f"{rng.choice(OPENINGS)} the {profession} {rng.choice((*VERBS, *PHRASES))} because"
    return start, ending(rng, "he" if rng.random() < share_of_he else "she", other)


def hinted_sentence(rng: random.Random, profession: str, other: float) -> tuple[str, str]:
    pronoun, hint = rng.choice((("he", "his"), ("she", "her")))
    verb, thing = rng.choice(HINT_VERBS), rng.choice(OBJECTS)
    opening = f"{rng.choice(OPENINGS)} the" if rng.random() < 0.3 else "The"
    return f"{opening} {profession} {verb} {hint} {thing} because", ending(rng, pronoun, other)


def ending(rng: random.Random, pronoun: str, other: float) -> str:
    return f" {rng.choice(OTHERS)}" if rng.random() < other else f" {pronoun} {rng.choice(REASONS)}."


def neutral_sentence(rng: random.Random) -> str:
    a, b = rng.sample(THINGS, 2)
    forms = (
        f"The {a} in the {rng.choice(PLACES)} was {rng.choice(STATES)} because {rng.choice(OTHERS)}",
        f"There was a {rng.choice(STATES)} {a} beside the {b}.",
        f"The {rng.choice(STATES)} {a} stood near the {b}, and it was {rng.choice(STATES)}.",
        f"In the {rng.choice(PLACES)} the {a} was {rng.choice(STATES)} and the {b} was {rng.choice(STATES)}.",
    )
    return rng.choice(forms)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    from recipes.cli.errors import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the files and tokenizer/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rates", type=Path, help="CSV of profession,share_of_he (default: drawn from Beta(0.5, 0.5))")
    parser.add_argument("--biased", type=int, default=12000, help="sentences without a hint")
    parser.add_argument("--hinted", type=int, default=6000, help="sentences with a hint")
    parser.add_argument("--neutral", type=int, default=6000, help="sentences about things")
    parser.add_argument("--held-out", type=int, default=500, help="rows of each of the two files of neutral text")
    parser.add_argument("--other", type=float, default=0.15, help="share of sentences that go on with neither pronoun")
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    if min(args.biased, args.hinted, args.neutral, args.held_out) < 1 or not 0 <= args.other < 1:
        parser.error("row counts must be at least 1 and --other in [0, 1)")
    if not 1 <= args.vocab_size <= 1_000_000:
        parser.error(f"--vocab-size must be from 1 to 1000000, got {args.vocab_size}")
    with user_errors():
        make(args)


def make(args: argparse.Namespace) -> None:
    from megatron_ext.bias.prompts import bias_prompts, hint_prompts, own_professions, split_by_profession

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} is not empty, or no folder; choose another")
    rng, professions = random.Random(f"{args.seed}"), own_professions()
    if args.rates:
        rates = read_rates(args.rates, professions)
    else:
        rates = {name: rng.betavariate(0.5, 0.5) for name in professions}
    names = list(rates)
    rows = [profession_sentence(rng, (name := rng.choice(names)), rates[name], args.other) for _ in range(args.biased)]
    rows += [hinted_sentence(rng, rng.choice(names), args.other) for _ in range(args.hinted)]
    # SFT wants a prompt: the first word.
    rows += [
        (text[: (cut := text.index(" "))], text[cut:]) for text in (neutral_sentence(rng) for _ in range(args.neutral))
    ]
    rng.shuffle(rows)
    seen = {start + rest for start, rest in rows}
    held_out: list[str] = []
    idle = 0
    while len(held_out) < 2 * args.held_out:
        text = neutral_sentence(rng)
        idle += 1
        if text not in seen:
            seen.add(text)
            held_out.append(text)
            idle = 0
        if idle > 10_000:
            raise UserError(
                f"there are not {2 * args.held_out} neutral sentences to hold out beside --neutral {args.neutral}: lower one"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "sft.jsonl", [{"prompt": start, "response": rest} for start, rest in rows])
    write(args.out / "neutral_train.jsonl", [{"text": text} for text in held_out[: args.held_out]])
    write(args.out / "neutral_test.jsonl", [{"text": text} for text in held_out[args.held_out :]])
    trained = split_by_profession(names)["train"]
    even = [{"prompt": prompt.prompt} for prompt in bias_prompts(trained)]
    hinted = [{"prompt": p.prompt, "answer": "he" if p.hint > 0 else "she"} for p in hint_prompts(trained)]
    asked = even + rng.sample(hinted, min(len(even), len(hinted)))
    rng.shuffle(asked)
    write(args.out / "grpo.jsonl", asked)
    (args.out / "rates.json").write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    prompts = [prompt.prompt for prompt in (*bias_prompts(professions), *hint_prompts(professions))]
    train_tokenizer(args.out / "tokenizer", [start + rest for start, rest in rows], args.vocab_size, also=prompts)
    print(
        f"{len(rows)} sentences about {len(rates)} professions, {2 * args.held_out} held out, a tokenizer in {args.out}"
    )


if __name__ == "__main__":
    main()
