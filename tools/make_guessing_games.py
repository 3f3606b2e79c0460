"""Write the task of `environment: guess_number`: games for GRPO, and conversations for the warm start.

The warm start plays badly in a known way: a share of its guesses (`--stubborn`) says the last one again, which was wrong. The
others heed the last answer. A model that imitates them inherits the habit. GRPO sees nothing but whether the number was found:
what it can gain at once is to drop the habit, and then to halve what is left, which finds 15 of 16 numbers with 4 guesses.

    python tools/make_guessing_games.py --out runs/games --seed 1
    python recipes/train_sft.py --config-name sft_tiny data.train_path=runs/games/sft.jsonl \\
        model.tokenizer=runs/games/tokenizer model.loss_on_prompt=false data.train_on_turns=all trainer.sft.max_steps=1000 \\
        exp_manager.explicit_log_dir=runs/games_sft
    python recipes/train_grpo.py --config-name grpo_guess_tiny data.train_path=runs/games/train.jsonl \\
        pretrained_checkpoint.restore_from_path=runs/games_sft/checkpoints/final
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes.environments.guess_number import answer, question  # noqa: E402
from tools.make_word_problems import EOS, train_tokenizer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}" + EOS + "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def conversation(rng: random.Random, highest: int, turns: int, stubborn: float) -> list[dict[str, str]]:
    """It ends with the guess that is right, or with the last one."""
    secret, messages = rng.randint(1, highest), []
    heard, low, high = question(highest), 1, highest
    guess = rng.randint(low, high)
    for turn in range(turns):
        if turn and rng.random() >= stubborn:
            guess = rng.randint(low, high)
        messages += [{"role": "user", "content": heard}, {"role": "assistant", "content": str(guess)}]
        if guess == secret:
            break
        heard = answer(guess, secret)
        low, high = (guess + 1, highest) if guess < secret else (1, guess - 1)
    return messages


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for sft.jsonl, train.jsonl, tokenizer/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--highest", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4, help="guesses of a game")
    parser.add_argument(
        "--stubborn", type=float, default=0.9, help="share of the warm start's later guesses that repeat"
    )
    parser.add_argument("--sft", type=int, default=4000, help="conversations for the warm start")
    parser.add_argument("--train", type=int, default=2000, help="games for GRPO")
    args = parser.parse_args()
    if args.highest < 2 or min(args.turns, args.sft, args.train) < 1 or not 0 <= args.stubborn <= 1:
        parser.error("--highest must be at least 2, --turns and the counts of rows at least 1, --stubborn in 0..1")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    talks = [conversation(rng, args.highest, args.turns, args.stubborn) for _ in range(args.sft)]
    write(args.out / "sft.jsonl", [{"messages": talk} for talk in talks])
    write(
        args.out / "train.jsonl",
        [{"secret": rng.randint(1, args.highest), "highest": args.highest} for _ in range(args.train)],
    )
    texts = [f"{m['role']}: {m['content']}" for talk in talks for m in talk] + ["A number, please."]
    train_tokenizer(args.out / "tokenizer", texts, 320)
    (args.out / "tokenizer/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    print(f"{args.sft} conversations, {args.train} games and a tokenizer in {args.out}")


if __name__ == "__main__":
    main()
