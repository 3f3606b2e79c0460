"""Files of public sets that are refused, or read in spite of what looks like an end."""

from __future__ import annotations

import json

import pytest

from megatron_ext.bias.bbq import read_bbq
from megatron_ext.bias.decisions import read_cooccurrence, read_decisions
from megatron_ext.bias.stereoset import GOLD, read_stereoset
from tests.unit.recipes.bias.random_sets import bbq_rows, decision_rows, write_jsonl

TRIPLE = {
    "context": "BLANK", "target": "Ruritanian", "bias_type": "race",
    "sentences": [{"gold_label": gold, "sentence": f"It is {gold}."} for gold in GOLD],
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_bbq, '{"example_id": 1}', r"file:1: no row of BBQ \(KeyError: 'ans0'\)"),
        (read_bbq, "", "file: no question of BBQ"),
        (read_stereoset, "[1]", "file: not StereoSet's dev.json"),
        (read_stereoset, '{"data": {}}', "file: no triple of StereoSet"),
        (
            read_cooccurrence,
            "text\nThe nurse was a\n",
            r"expected CSV or JSONL with a sentence in every row .KeyError",
        ),
        (read_cooccurrence, "sentence\n", "found one that is empty, or none"),
        (read_decisions, '{"race": "white"}', r"file:1: no row of discrim-eval .KeyError"),
        (read_decisions, "\n", "no row says filled_template, race, gender and age"),
        (
            read_decisions,
            '{"filled_template": "a", "decision_question_id": 1, "race": "white", "gender": "male", "age": NaN}',
            "file:1: no row of discrim-eval .ValueError: age is nan",
        ),
        (
            read_stereoset,
            json.dumps({"data": {"intrasentence": [TRIPLE | {"target": ["nurse"]}]}}),
            r"file: intrasentence 0: expected context, target and bias_type, texts, .* got 'BLANK', \['nurse'\], 'race'",
        ),
    ],
)
def test_other_files_are_refused(read, text, message, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read([path] if read is read_bbq else path)


def test_a_file_of_bbq_counts_once(tmp_path, rng):
    """Also where a row holds a mark that some take for the end of a line."""
    rows = bbq_rows(rng, 4)
    rows[0]["context"] += "\u2028They left."
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [q.context for q in read_bbq([path])] == [row["context"] for row in rows]
    with pytest.raises(ValueError, match="is named twice: its questions would count twice"):
        read_bbq([path, tmp_path / "." / "rows.jsonl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "a label of 0 to 2, neg or nonneg, and ambig or disambig, got 3"),
        ({"question_polarity": "bad"}, "neg or nonneg"),
        ({"ans0": "Who knows"}, "must say that it is not known, as Unknown"),
        ({"additional_metadata": {"stereotyped_groups": "F"}}, "TypeError: expected a list of texts, got 'F'"),
        ({"context_condition": "ambig"}, "the context is ambig, and label . says that it tells who it is"),
    ],
)
def test_bbq_rows_of_another_kind_are_refused(change, message, tmp_path, rng):
    # Of people who all have their answer_info: without, another answer is refused first.
    known = (row for row in bbq_rows(rng, 100) if row["context_condition"] == "disambig")
    row = next(row for row in known if all(row["answer_info"].values()))
    if "ans0" in change:
        change = {name: f"{change['ans0']} {name}" for name in ("ans0", "ans1", "ans2")}
    path = write_jsonl(tmp_path / "rows.jsonl", [row | change])
    with pytest.raises(ValueError, match=message):
        read_bbq([path])


def test_persons_too_few_to_tell_apart_are_refused(tmp_path, rng):
    rows = [row for row in decision_rows(rng, 2) if row["decision_question_id"] == 0 or row["gender"] == "male"]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=r"d\.jsonl: scenario 1 has .* too few persons to tell apart"):
        read_decisions(path)
