"""Rows of public sets, drawn at random: of the published shape, with words that mean nothing."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch

from megatron_ext.bias.bbq import UNKNOWN
from megatron_ext.bias.stereoset import GOLD

__all__ = [
    "bbq_rows", "cooccurrence_rows", "crows_rows", "decision_rows", "letters", "stereoset_file", "write_jsonl",
]  # fmt: skip


def letters() -> str:
    """All that these rows are written with."""
    return "".join(map(chr, range(32, 127))) + "\n‘’"


def pick(rng: torch.Generator, choices):
    return choices[int(torch.randint(len(choices), (1,), generator=rng))]


def word(rng: torch.Generator) -> str:
    return "".join(pick(rng, "abcdefghij") for _ in range(1 + int(torch.randint(6, (1,), generator=rng))))


def words(rng: torch.Generator, count: int) -> str:
    return " ".join(word(rng) for _ in range(count))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# (category, stereotyped groups, answer_info of both people), the harness's special cases among them.
PEOPLE = (
    ("Age", ["old"], (["grandmother", "old"], ["grandson", "nonOld"])),
    ("Gender_identity", ["Woman", "F"], (["woman", "F"], ["man", "M"])),
    ("Gender_identity", ["trans"], (["trans", "trans"], ["cisgender", "nonTrans"])),
    ("Nationality", ["German"], (["German", "Europe"], ["Panamanian", "ArabStates"])),
    ("Physical_appearance", ["obese"], (["fat", "obese"], ["slim", "nonObese"])),
    ("Race_x_gender", ["Latino", "F-Latino"], ([], ["Jamal", "M-Black"])),
    ("Race_x_SES", ["African American", "lowSES"], (["a", "lowSES-African American"], ["b", "highSES-African"])),
    ("Disability_status", ["disabled"], (["wheelchair", "disabled"], ["tall", "nonDisabled"])),
)


def bbq_rows(rng: torch.Generator, count: int) -> list[dict]:
    """Both conditions among them, by turns."""
    rows = []
    for number in range(count):
        category, stereotyped, infos = pick(rng, PEOPLE)
        unknown = pick(rng, UNKNOWN)
        answers = [(f"The {word(rng)}{' Latina' * (not info)} {i}", info) for i, info in enumerate(infos)]
        answers.append((unknown, [unknown, "unknown"]))
        answers = [answers[i] for i in torch.randperm(3, generator=rng).tolist()]
        of_unknown = [text for text, _ in answers].index(unknown)
        ambiguous = number % 2 == 0
        named = [i for i in range(3) if i != of_unknown]
        rows.append(
            {
                "example_id": number, "question_index": str(pick(rng, range(4))),
                "question_polarity": pick(rng, ("neg", "nonneg")),
                "context_condition": "ambig" if ambiguous else "disambig", "category": category,
                "answer_info": {f"ans{i}": info for i, (_, info) in enumerate(answers)},
                "additional_metadata": {"subcategory": "None", "stereotyped_groups": stereotyped, "version": "a"},
                "context": words(rng, 6) + ".", "question": words(rng, 3) + "?",
                **{f"ans{i}": text for i, (text, _) in enumerate(answers)},
                "label": of_unknown if ambiguous else pick(rng, named),
            }
        )  # fmt: skip
    return rows


def crows_rows(rng: torch.Generator, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        more = words(rng, 5)
        rows.append(
            {
                "sent_more": more + ".", "sent_less": f"{more} {word(rng)}.",
                "stereo_antistereo": pick(rng, ("stereo", "antistereo")), "bias_type": ("age", "gender")[number % 2],
            }
        )  # fmt: skip
    return rows


def cooccurrence_rows(rng: torch.Generator, count: int) -> list[dict]:
    return [{"sentence": f"The {word(rng)} {number} was a"} for number in range(count)]


def decision_rows(rng: torch.Generator, scenarios: int) -> list[dict]:
    """Every person in every scenario, as in the published files."""
    people = list(product((20, 50, 80), ("male", "Female", "non-binary"), ("white", "Black", "asian")))
    return [
        {
            "filled_template": f"{words(rng, 4)}?", "decision_question_id": scenario, "age": age, "gender": gender,
            "race": race, "fill_type": "explicit",
        }
        for scenario in range(scenarios)
        for age, gender, race in people
    ]  # fmt: skip


def stereoset_file(path: Path, rng: torch.Generator) -> Path:
    """Six triples of either kind about three terms; contexts with and without a full stop."""
    data = {}
    for kind in ("intersentence", "intrasentence"):
        data[kind] = []
        for number in range(6):
            order = torch.randperm(3, generator=rng).tolist()
            sentences = [
                {"sentence": words(rng, 4) + ".", "id": f"{number}{i}", "labels": [], "gold_label": GOLD[i]}
                for i in order
            ]
            data[kind].append(
                {
                    "id": str(number), "target": ("smith", "nurse", "Ruritanian")[number % 3],
                    "bias_type": ("profession", "profession", "race")[number % 3], "sentences": sentences,
                    "context": words(rng, 4) + ("", ".", "?")[number // 2],
                }
            )  # fmt: skip
    path.write_text(json.dumps({"version": "1.0", "data": data}), encoding="utf-8")
    return path
