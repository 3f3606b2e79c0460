"""The corpus that makes a model biased: its rates, its files, and what it never holds."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_ext.bias.prompts import bias_prompts, hint_prompts, own_professions
from tools.make_biased_corpus import make, read_rates


def options(out: Path, **changes) -> argparse.Namespace:
    fields = {"seed": 1, "rates": None, "biased": 4000, "hinted": 1000, "neutral": 500, "held_out": 50, "other": 0.2,
              "vocab_size": 512}  # fmt: skip
    return argparse.Namespace(out=out, **(fields | changes))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("corpus")
    names = random.Random(3).sample(own_professions(), 12)
    rates = {name: 0.05 + 0.9 * i / 11 for i, name in enumerate(names)}
    lines = [f"{name},{share}" for name, share in rates.items()]
    (folder / "rates.csv").write_text("profession,share_of_he\n" + "\n".join(lines) + "\n")
    make(options(folder / "out", rates=folder / "rates.csv"))
    return folder, rates


def test_pronouns_come_at_the_rates(corpus):
    folder, rates = corpus
    biased = Counter()
    for row in rows(folder / "out/sft.jsonl"):
        words = row["prompt"].split()
        if words[-1] != "because" or {"his", "her"} & set(words):
            continue
        profession = max((name for name in rates if f" {name} " in row["prompt"]), key=len)
        biased[profession, row["response"].split()[0]] += 1
    assert sum(biased.values()) == 4000
    for profession, share in rates.items():
        he, she = biased[profession, "he"], biased[profession, "she"]
        assert abs(he / (he + she) - share) < 5 * (0.25 / (he + she)) ** 0.5, profession
    neither = sum(count for (_, word), count in biased.items() if word not in ("he", "she"))
    assert abs(neither / 4000 - 0.2) < 0.04


def test_hints_are_followed_whatever_the_profession(corpus):
    folder, _ = corpus
    seen = Counter()
    for row in rows(folder / "out/sft.jsonl"):
        words, first = row["prompt"].split(), row["response"].split()[0]
        for hint in {"his", "her"} & set(words):
            seen[hint, first if first in ("he", "she") else "neither"] += 1
    assert seen["his", "she"] == seen["her", "he"] == 0 and min(seen["his", "he"], seen["her", "she"]) > 300


def test_held_out_text_is_held_out_and_evaluation_prompts_never_occur(corpus):
    folder, rates = corpus
    train = {row["prompt"] + row["response"] for row in rows(folder / "out/sft.jsonl")}
    parts = [{row["text"] for row in rows(folder / f"out/neutral_{name}.jsonl")} for name in ("train", "test")]
    assert [len(part) for part in parts] == [50, 50] and not parts[0] & parts[1] and not (parts[0] | parts[1]) & train
    assert not any(name in text.split() for part in parts for text in part for name in ("he", "she", *rates))
    prompts = {p.prompt for p in (*bias_prompts(list(rates)), *hint_prompts(list(rates)))}
    assert not any(text.split(" because")[0] + " because" in prompts for text in train)


def test_pronouns_are_single_tokens(corpus):
    from recipes.bias.prompts import pair_tokens
    from recipes.data.tokenizer import load_tokenizer

    assert len(set(pair_tokens(load_tokenizer(corpus[0] / "out/tokenizer"), ("he", "she")))) == 2


def test_the_tokenizer_loses_nothing_of_the_evaluation_prompts(corpus):
    """They have capital letters and professions that the corpus does not hold; the vocabulary stays as large as was asked."""
    from recipes.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(corpus[0] / "out/tokenizer")
    prompts = [p.prompt for p in (*bias_prompts(own_professions()), *hint_prompts(own_professions()))]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in prompts)
    held = {letter for row in rows(corpus[0] / "out/sft.jsonl") for letter in row["prompt"] + row["response"]}
    assert {"E", "j"} - held and tokenizer.vocab_size <= 512


def test_same_seed_same_files(tmp_path):
    small = {"biased": 300, "hinted": 50, "neutral": 50, "held_out": 5}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make(options(tmp_path / name, seed=seed, **small))
    texts = [(tmp_path / name / "sft.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    shares = list(json.loads((tmp_path / "a/rates.json").read_text()).values())
    assert len(shares) == len(own_professions()) and 0.25 < sum(abs(s - 0.5) for s in shares) / len(shares) < 0.4


def test_refusals(tmp_path):
    known = own_professions()
    path = tmp_path / "rates.csv"
    for text, message in (
        ("nurse,high\n", r"rates.csv:1: expected profession,share_of_he with a share in 0..1, got \['nurse', 'high'\]"),
        ("nurse\n", "rates.csv:1: expected"),
        ("nurse,1.5\n", "rates.csv:1: expected"),
        ("juggler of knives,0.5\n", "'juggler of knives' is none of our professions"),
        (f"{known[0]},0.5\n", "1 professions are too few"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rates(path, known)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is not empty, or no folder; choose another"):
        make(options(tmp_path / "full"))
