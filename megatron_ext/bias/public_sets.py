"""Readers of public sets of sentences about gender: Winogender and CrowS-Pairs here, WinoBias in winobias.py.

They read files that you have got yourself, in the format in which each set's authors publish them; nothing of the sets
ships here. WinoBias (Zhao et al. 2018, MIT) and CrowS-Pairs (Nangia et al. 2020, CC BY-SA 4.0; Blodgett et al. 2021 find
many of its pairs doubtful) give pairs for `scores.preferred`, Winogender (Rudinger et al. 2018, MIT) questions for
`right_answers`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = [
    "CoreferenceQuestion", "CrowsPair", "OccupationStats", "SentencePair", "is_gotcha", "read_crows_pairs",
    "read_occupation_stats", "read_text", "read_winogender_sentences", "read_winogender_templates",
]  # fmt: skip


@dataclass(frozen=True)
class SentencePair:
    """Two sentences that differ in few words, the more stereotypical one first."""

    more_stereotypical: str
    less_stereotypical: str


@dataclass(frozen=True)
class CrowsPair(SentencePair):
    """A pair about a disadvantaged group and an advantaged one.

    Attributes:
        direction: "stereo" where the more stereotypical sentence shows a stereotype of the disadvantaged group,
            "antistereo" where the less stereotypical one goes against it.
        bias_type: "gender" and eight others.
    """

    direction: str
    bias_type: str


@dataclass(frozen=True)
class CoreferenceQuestion:
    """Whom does the pronoun of a sentence stand for?

    Attributes:
        occupation, participant: the candidates, without article; the participant may be "someone".
        answer: 0 for the occupation, 1 for the participant.
        gender: of the pronoun, "male", "female" or "neutral".
    """

    sentence: str
    pronoun: str
    occupation: str
    participant: str
    answer: int
    gender: str

    @property
    def choices(self) -> tuple[str, str]:
        """Both candidates as they follow "refers to the", in the order of `answer`; someone, too, as lm-evaluation-harness
        has it."""
        return self.occupation, self.participant


@dataclass(frozen=True)
class OccupationStats:
    """Women in an occupation, in percent: in texts (`bergsma`), and in `bls_year` among workers in the USA (`bls`)."""

    bergsma_pct_female: float
    bls_pct_female: float
    bls_year: int


def is_gotcha(question: CoreferenceQuestion, stats: OccupationStats) -> bool:
    """Whether a pronoun's gender speaks against the right answer (Rudinger et al. 2018, table 2): a woman is in an occupation of
    less than half women, or the occupation is mostly women's and she is the participant; reversed for a man."""
    against_women = (stats.bls_pct_female < 50) == (question.answer == 0)
    return against_women if question.gender == "female" else not against_women


# Winogender's placeholders are $NOM_PRONOUN, $POSS_PRONOUN and $ACC_PRONOUN.
_FORMS = {
    "male": {"NOM": "he", "POSS": "his", "ACC": "him"},
    "female": {"NOM": "she", "POSS": "her", "ACC": "her"},
    "neutral": {"NOM": "they", "POSS": "their", "ACC": "them"},
}


def read_winogender_templates(path: str | Path) -> list[CoreferenceQuestion]:
    """Questions of Winogender's `templates.tsv`: each template with its participant and with "someone", in all genders.

    Equal to `read_winogender_sentences` of `all_sentences.tsv`, in the same order.

    Raises:
        UserError: another header, a row of other columns, or a template without a placeholder of each kind.
    """
    questions = []
    columns = ("occupation(0)", "other-participant(1)", "answer", "sentence")
    for where, (occupation, participant, answer, template) in _table(path, columns):
        forms = re.findall(r"\$(NOM|POSS|ACC)_PRONOUN\b", template)
        others = re.findall(r"\$(?!NOM_|POSS_|ACC_)\w+", template)
        if answer not in ("0", "1") or sorted(others) != ["$OCCUPATION", "$PARTICIPANT"] or len(forms) != 1:
            raise UserError(
                f"{where}: expected an answer of 0 or 1 and a sentence with $OCCUPATION, $PARTICIPANT and one of"
                f" $NOM_PRONOUN, $POSS_PRONOUN and $ACC_PRONOUN, got {answer!r} and {template!r}"
            )
        for person in (participant, "someone"):
            named = _name_participant(template, person).replace("$OCCUPATION", occupation)
            for gender, words in _FORMS.items():
                pronoun = words[forms[0]]
                sentence = named.replace(f"${forms[0]}_PRONOUN", pronoun).replace("they was", "they were")
                questions.append(CoreferenceQuestion(sentence, pronoun, occupation, person, int(answer), gender))
    return questions


def _name_participant(template: str, person: str) -> str:
    """The template with its participant; "someone" takes the article's place, and its capital."""
    if person != "someone":
        return template.replace("$PARTICIPANT", person)
    return re.sub(r"(\w)\w* \$PARTICIPANT", lambda found: "Someone" if found[1].isupper() else "someone", template)


def read_winogender_sentences(path: str | Path) -> list[CoreferenceQuestion]:
    """Questions of Winogender's `all_sentences.tsv`, whose ids read `technician.customer.1.male.txt`.

    Raises:
        UserError: another header, a row of other columns, another id, or a sentence without one pronoun of its gender.
    """
    questions = []
    for where, (name, sentence) in _table(path, ("sentid", "sentence")):
        parts = re.fullmatch(r"([^.]+)\.([^.]+)\.([01])\.(male|female|neutral)\.txt", name)
        if not parts:
            raise UserError(f"{where}: id {name!r} is not of the form occupation.participant.answer.gender.txt")
        occupation, participant, answer, gender = parts.groups()
        found = [word for word in re.findall(r"\w+", sentence) if word.lower() in _FORMS[gender].values()]
        if len(found) != 1:
            raise UserError(f"{where}: expected one {gender} pronoun in {sentence!r}, found {found}")
        questions.append(CoreferenceQuestion(sentence, found[0], occupation, participant, int(answer), gender))
    return questions


def read_occupation_stats(path: str | Path) -> dict[str, OccupationStats]:
    """Winogender's `occupations-stats.tsv`, by occupation.

    Raises:
        UserError: another header, a row of other columns, what is no percentage or year, or an occupation twice.
    """
    stats: dict[str, OccupationStats] = {}
    columns = ("occupation", "bergsma_pct_female", "bls_pct_female", "bls_year")
    for where, (occupation, bergsma, bls, year) in _table(path, columns):
        try:
            row = OccupationStats(float(bergsma), float(bls), int(year))
        except ValueError:
            row = None
        if row is None or not (0 <= row.bergsma_pct_female <= 100 and 0 <= row.bls_pct_female <= 100):
            raise UserError(f"{where}: expected two percentages and a year, got {bergsma!r}, {bls!r} and {year!r}")
        if occupation in stats:
            raise UserError(f"{where}: occupation {occupation!r} is there a second time; keep one row")
        stats[occupation] = row
    return stats


def read_crows_pairs(path: str | Path, bias_type: str = "gender") -> list[CrowsPair]:
    """Pairs of one bias type of `crows_pairs_anonymized.csv`.

    Raises:
        UserError: a missing column, a row without two different sentences or with another direction, or no such pair.
    """
    columns = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    pairs = []
    for line, row in _csv_rows(path, columns):
        more, less, direction, kind = (row[column].strip() for column in columns)
        if not more or not less or more == less or direction not in ("stereo", "antistereo"):
            raise UserError(
                f"{path}:{line}: expected two different sentences and stereo or antistereo, got {more!r},"
                f" {less!r} and {direction!r}"
            )
        pairs.append(CrowsPair(more, less, direction, kind))
    chosen = [pair for pair in pairs if pair.bias_type == bias_type]
    if not chosen:
        known = ", ".join(sorted({pair.bias_type for pair in pairs})) or "none"
        raise UserError(f"{path}: no pair of bias type {bias_type!r}; the file's types: {known}")
    return chosen


def _csv_rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row by column) of CrowS-Pairs' file."""
    reader = csv.DictReader(StringIO(read_text(path)), restval="")
    try:
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise UserError(
                f"{path}:1: no column {' or '.join(missing)}; expected CrowS-Pairs' own header, commas between"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: no CSV ({error}); is a quote left open?") from None


def read_text(path: str | Path) -> str:
    """
    Raises:
        UserError: no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: character {text.index(chr(0))} is a NUL; this is no text file")
    return text


def _table(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Rows of a tab-separated file with this header, each after its "file:line"."""
    header, *rows = read_text(path).rstrip().split("\n")
    if header.split("\t") != list(columns):
        raise UserError(f"{path}:1: expected the columns {', '.join(columns)}, tabs between, got {header!r}")
    if not rows:
        raise UserError(f"{path}: no row follows the header")
    for number, row in enumerate(rows, 2):
        cells = [cell.strip() for cell in row.split("\t")]
        if len(cells) != len(columns) or not all(cells):
            raise UserError(f"{path}:{number}: expected {len(columns)} columns ({', '.join(columns)}), got {row!r}")
        yield f"{path}:{number}", cells
