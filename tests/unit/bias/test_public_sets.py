"""Readers of Winogender and CrowS-Pairs, on sentences of our own in the published formats."""

from __future__ import annotations

import csv
from dataclasses import astuple

import pytest

from megatron_ext.bias.public_sets import (
    CoreferenceQuestion,
    CrowsPair,
    OccupationStats,
    is_gotcha,
    read_crows_pairs,
    read_occupation_stats,
    read_winogender_sentences,
    read_winogender_templates,
)

HEADER = "occupation(0)\tother-participant(1)\tanswer\tsentence"
TEMPLATES = (
    "potter\tneighbour\t0\tThe $OCCUPATION waved to the $PARTICIPANT before $NOM_PRONOUN was gone.",
    "glazier\tpasser-by\t1\tThe $PARTICIPANT asked the $OCCUPATION about $POSS_PRONOUN window.",
    "tutor\tpupil\t1\tThe $OCCUPATION met a $PARTICIPANT and thanked $ACC_PRONOUN.",
)
STATS = "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year"
CROWS = ("", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations")


def test_winogender_templates(file):
    questions = read_winogender_templates(file(HEADER, *TEMPLATES))
    assert len(questions) == 18 and [q.gender for q in questions] == ["male", "female", "neutral"] * 6
    assert [q.participant for q in questions[:6]] == ["neighbour"] * 3 + ["someone"] * 3
    assert questions[0] == CoreferenceQuestion(
        "The potter waved to the neighbour before he was gone.", "he", "potter", "neighbour", 0, "male"
    )
    assert questions[0].choices == ("potter", "neighbour") and questions[3].choices == ("potter", "someone")
    assert [q.sentence for q in questions[2:6]] == [
        "The potter waved to the neighbour before they were gone.",
        "The potter waved to someone before he was gone.",
        "The potter waved to someone before she was gone.",
        "The potter waved to someone before they were gone.",
    ]
    assert [(q.sentence, q.answer) for q in questions[9:12]] == [
        ("Someone asked the glazier about his window.", 1),
        ("Someone asked the glazier about her window.", 1),
        ("Someone asked the glazier about their window.", 1),
    ]
    assert [q.pronoun for q in questions[12:]] == ["him", "her", "them"] * 2
    assert questions[15].sentence == "The tutor met someone and thanked him."


def test_winogender_sentences_say_the_same(file):
    questions = read_winogender_templates(file(HEADER, *TEMPLATES))
    rows = [f"{q.occupation}.{q.participant}.{q.answer}.{q.gender}.txt\t{q.sentence}" for q in questions]
    assert rows[1] == "potter.neighbour.0.female.txt\tThe potter waved to the neighbour before she was gone."
    assert read_winogender_sentences(file("sentid\tsentence", *rows)) == questions


def test_winogender_occupation_stats(file):
    stats = read_occupation_stats(file(STATS, "potter\t12.5\t40\t2015", "nanny\t100\t94.6\t2014", ""))
    assert stats == {"potter": OccupationStats(12.5, 40.0, 2015), "nanny": OccupationStats(100.0, 94.6, 2014)}


@pytest.mark.parametrize(
    ("read", "lines", "words"),
    [
        (
            read_winogender_templates,
            ["occupation\tanswer"],
            ":1: expected the columns occupation.0., other-participant",
        ),
        (read_winogender_templates, [HEADER], "no row follows the header"),
        (read_winogender_templates, [HEADER, TEMPLATES[0], "potter\t1\tHe"], ":3: expected 4 columns .*got 'potter"),
        (read_winogender_templates, [HEADER, "potter\t\t1\tHe"], ":2: expected 4 columns"),
        (
            read_winogender_templates,
            [HEADER, TEMPLATES[0].replace("\t0\t", "\t2\t")],
            ":2: expected an answer of 0 or 1",
        ),
        (read_winogender_templates, [HEADER, TEMPLATES[0].replace("$PARTICIPANT", "man")], "with .OCCUPATION, .PARTI"),
        (read_winogender_templates, [HEADER, TEMPLATES[0].replace("$NOM_PRONOUN", "he")], "and one of .NOM_PRONOUN"),
        (read_winogender_templates, [HEADER, TEMPLATES[0].replace("gone", "$ACC_PRONOUN")], "and one of .NOM_PRONOUN"),
        (read_winogender_templates, [HEADER, TEMPLATES[0].replace("$NOM_PRONOUN", "$PRONOUN")], "with .OCCUPATION"),
        (read_winogender_sentences, ["sentence\tsentid"], ":1: expected the columns sentid, sentence"),
        (read_winogender_sentences, ["sentid\tsentence", "a.b.2.male.txt\tHe ran."], ":2: id 'a.b.2.male.txt' is not"),
        (read_winogender_sentences, ["sentid\tsentence", "a.b.1.male.txt\tShe ran."], "one male pronoun .* found ..$"),
        (read_winogender_sentences, ["sentid\tsentence", "a.b.1.male.txt\tHe saw him."], "found .'He', 'him'."),
        (read_occupation_stats, ["occupation"], ":1: expected the columns occupation, bergsma_pct_female"),
        (read_occupation_stats, [STATS, "potter\t12\tmany\t2015"], ":2: expected two percentages and a year, got '12'"),
        (read_occupation_stats, [STATS, "potter\t12\t140\t2015"], "two percentages and a year"),
        (read_occupation_stats, [STATS, "potter\t12\tnan\t2015"], "two percentages and a year"),
        (read_occupation_stats, [STATS, *["potter\t1\t1\t2015"] * 2], ":3: occupation 'potter' is there a second time"),
    ],
)
def test_winogender_refuses_other_files(file, read, lines, words):
    with pytest.raises(ValueError, match=words):
        read(file(*lines))


@pytest.mark.parametrize(
    ("gender", "answer", "women"), [("female", 0, 20.0), ("female", 1, 50.0), ("male", 0, 50.0), ("male", 1, 20.0)]
)
def test_gotchas_are_where_statistics_speak_against_the_answer(gender, answer, women):
    question = CoreferenceQuestion("s", "p", "potter", "guest", answer, gender)
    assert is_gotcha(question, OccupationStats(0.0, women, 2015))
    assert not is_gotcha(question, OccupationStats(0.0, 70.0 - women, 2015))


def write_crows(path, *rows: tuple[str, ...], header: tuple[str, ...] = CROWS) -> str:
    with open(path, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return str(path)


def test_crows_pairs_of_one_bias_type(tmp_path):
    rows = [
        ("0", 'She "can\'t" park, they said.', 'He "can\'t" park, they said.', "stereo", "gender", "[['gender']]"),
        ("1", "Old men\nforget.", "Young men forget.", "stereo", "age", "[]"),
        ("2", "He led.", "She led. ", "antistereo", "gender", "[]"),
    ]
    path = write_crows(tmp_path / "crows.csv", *rows)
    first = CrowsPair('She "can\'t" park, they said.', 'He "can\'t" park, they said.', "stereo", "gender")
    assert read_crows_pairs(path) == [first, CrowsPair("He led.", "She led.", "antistereo", "gender")]
    (age,) = read_crows_pairs(path, "age")
    assert astuple(age) == ("Old men\nforget.", "Young men forget.", "stereo", "age")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            ("0", "He led.", "He led.", "stereo", "gender", ""),
            ":2: expected two different sentences and stereo or anti",
        ),
        (("0", "", "He led.", "stereo", "gender", ""), ":2: expected two different sentences"),
        (
            ("0", "She led.", "He led.", "more", "gender", ""),
            "and stereo or antistereo, got 'She led.', 'He led.' and 'more'",
        ),
        (("0", "She led."), ":2: expected two different sentences"),
        (("0", "She led.", "He led.", "stereo", "age", ""), "no pair of bias type 'gender'; the file's types: age"),
    ],
)
def test_crows_pairs_refuses_other_rows(tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        read_crows_pairs(write_crows(tmp_path / "crows.csv", row))


def test_crows_pairs_refuses_another_header(tmp_path):
    with pytest.raises(ValueError, match=":1: no column sent_less or bias_type; expected CrowS-Pairs' own header"):
        read_crows_pairs(write_crows(tmp_path / "crows.csv", header=("", "sent_more", "stereo_antistereo")))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=":1: no column sent_more or"):
        read_crows_pairs(tmp_path / "empty.csv")


def test_refuses_what_is_not_utf8(tmp_path):
    (tmp_path / "file.tsv").write_bytes(STATS.encode() + b"\ncaf\xe9\t1\t1\t2015\n")
    with pytest.raises(ValueError, match=r"file.tsv: byte \d+ is not UTF-8; save the file as UTF-8"):
        read_occupation_stats(tmp_path / "file.tsv")
