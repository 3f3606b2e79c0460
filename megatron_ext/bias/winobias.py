"""WinoBias (Zhao et al. 2018, MIT): pairs of sentences that differ in the gender of their pronouns. Of the set nothing ships
here; what the labour statistics say of its forty occupations does, to tell its two files apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.bias.public_sets import CoreferenceQuestion, SentencePair, read_text
from megatron_ext.errors import UserError

__all__ = ["WinoBiasPair", "read_winobias"]


@dataclass(frozen=True)
class WinoBiasPair(SentencePair):
    """Alike but for the gender of the pronouns.

    Attributes:
        referent: whom the pronouns stand for, as written: "the developer".
        pronouns: each pronoun, in the stereotypical sentence and in the other: (("he", "she"),).
        other: the other occupation of the sentence, "designer"; None: none of the set's forty.
    """

    referent: str
    pronouns: tuple[tuple[str, str], ...]
    other: str | None = None

    @property
    def occupation(self) -> str:
        """The referent without article or capitals, the same in all of its sentences."""
        return _occupation(self.referent).lower()

    @property
    def questions(self) -> tuple[CoreferenceQuestion, ...]:
        """Whom the pronoun stands for, in the stereotypical sentence and in the other; none where there is nobody else."""
        if self.other is None:
            return ()
        referent, (pro, anti) = _occupation(self.referent), self.pronouns[0]
        return tuple(
            CoreferenceQuestion(sentence, pronoun.lower(), referent, self.other, 0, _GENDER[pronoun.lower()])
            for sentence, pronoun in ((self.more_stereotypical, pro), (self.less_stereotypical, anti))
        )


_GENDER = {
    **dict.fromkeys(("he", "his", "him", "himself"), "male"),
    **dict.fromkeys(("she", "her", "hers", "herself"), "female"),
}
_SPAN = re.compile(r"\[ ?([^\[\]]+?) ?\]")


# Occupations of the set by whom they mostly employ, women's share in the USA's labour statistics below and above a half
# (Zhao et al. 2018, table 1).
_MOSTLY = {
    **dict.fromkeys(
        "analyst, carpenter, ceo, chief, construction worker, cook, developer, driver, farmer, guard, janitor, laborer, "
        "lawyer, manager, mechanic, mover, physician, salesperson, sheriff, supervisor".split(", "), "male",
    ),
    **dict.fromkeys(
        "accountant, assistant, attendant, auditor, baker, cashier, cleaner, clerk, counselor, designer, editor, "
        "hairdresser, housekeeper, librarian, nurse, receptionist, secretary, tailor, teacher, writer".split(", "), "female",
    ),
}  # fmt: skip
_ANY = re.compile(rf"\b({'|'.join(sorted(_MOSTLY, key=len, reverse=True))})\b", re.IGNORECASE)
MANY = 20  # sentences that outweigh a file's name
_SIDE = re.compile(r"(pro|anti)[-_ ]?stereo|(?<![a-z])(pro|anti)(?![a-z])")


def read_winobias(one: str | Path, other: str | Path) -> tuple[list[WinoBiasPair], int]:
    """Pairs of WinoBias's `pro_stereotyped_type?.txt.*` and the `anti_` file of the same name, and how many were left out.

    In either order: which of them is the stereotypical one their names say, and the occupations of their sentences. Line
    by line the files hold the same sentence with the pronouns swapped, numbered or not, the referent and its
    pronouns in brackets: `1 [The developer] argued with the designer because [she] did not like the design.` Spacing
    does not matter. Of the 1,584 published pairs 21 differ in other words too, which a comparison of likelihoods would
    measure as well: such pairs are left out.

    Raises:
        UserError: files of different length, a line that is none of WinoBias's, lines of different numbers, a pair whose
            pronouns are of one gender, no pair left, or two files of which neither names nor sentences say which is which.
    """
    paths = (one, other)
    texts = [read_text(path).rstrip().split("\n") for path in paths]
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{one} has {len(texts[0])} lines and {other} {len(texts[1])}: give both files of the same type and split"
        )
    sides = [
        [_BracketedLine(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        for path, lines in zip(paths, texts, strict=True)
    ]
    if _anti_first(paths, sides):
        sides.reverse()
    pairs = [_winobias_pair(more, less) for more, less in zip(*sides, strict=True)]
    kept = [pair for pair in pairs if pair is not None]
    if not kept:
        raise UserError(f"{one} and {other} hold no pair of sentences that differ in the gender of a pronoun alone")
    return kept, len(pairs) - len(kept)


def _anti_first(paths: tuple[str | Path, str | Path], sides: list[list[_BracketedLine]]) -> bool:
    """Whether the first file is the one against stereotypes."""
    named = [_named_side(Path(path).name) for path in paths]
    if None not in named and named[0] == named[1]:
        raise UserError(f"{paths[0]} and {paths[1]} are both called {named[0]}: give one pro_ and one anti_ file")
    folders = [Path(path).parent for path in paths]
    if named == [None, None] and folders[0] != folders[1]:
        named = [_named_side(folder.name) for folder in folders]
    votes = [vote if side is sides[0] else -vote for side in sides for line in side if (vote := line.vote())]
    clear = votes and abs(sum(votes)) >= len(votes) / 2  # three of four say so
    if named == [None, None]:
        if not clear:
            raise UserError(
                f"{paths[0]} and {paths[1]}: neither names nor occupations say which of them holds the stereotypes; call them "
                "pro_... and anti_..., as their authors do"
            )
        return sum(votes) < 0
    anti = named[0] == "anti" or named[1] == "pro"
    if clear and len(votes) >= MANY and (sum(votes) < 0) != anti:
        raise UserError(
            f"{paths[anti]} is called the stereotypical one, but the sentences of {paths[not anti]} go with stereotypes and "
            "its own against them; fetch both again"
        )
    return anti


def _named_side(name: str) -> str | None:
    """pro or anti, if the name says one of them."""
    found = {one or other for one, other in _SIDE.findall(name.lower())}
    return found.pop() if len(found) == 1 else None


class _BracketedLine:
    """A line of WinoBias: its `number` or "", `text` with brackets, `sentence` without, `frame` with [] for pronouns."""

    def __init__(self, line: str, where: str) -> None:
        self.where = where
        self.number, self.text = re.fullmatch(r"(\d*) ?(.*)", " ".join(line.split())).groups()
        spans = _SPAN.findall(self.text)
        self.pronouns = [span for span in spans if span.lower() in _GENDER]
        referents = [span for span in spans if span.lower() not in _GENDER]
        if re.search(r"[\[\]]", _SPAN.sub("", self.text)) or len(referents) != 1 or not self.pronouns:
            raise UserError(f"{where}: {line.strip()!r} must have one referent and its pronouns in brackets")
        self.referent = referents[0]
        self.sentence = _SPAN.sub(r"\1", self.text)
        self.frame = _SPAN.sub(lambda span: "[]" if span[1].lower() in _GENDER else span[1], self.text)

    def core(self) -> tuple[str, str]:
        """What both sentences of a pair share; the article may stand inside or outside the brackets."""
        return self.frame, _occupation(self.referent).lower()

    def vote(self) -> int:
        """1 where the referent's occupation is mostly that of the pronouns' gender, -1 where not, 0 where nobody knows."""
        mostly = _MOSTLY.get(_occupation(self.referent).lower())
        return 0 if mostly is None else 1 if mostly == _GENDER[self.pronouns[0].lower()] else -1


def _occupation(referent: str) -> str:
    """Without its article."""
    return re.sub(r"^(the|an?) ", "", referent, flags=re.IGNORECASE)


def _other_occupation(line: _BracketedLine) -> str | None:
    """Of the two in a sentence the one that its pronouns do not stand for."""
    mine = _occupation(line.referent).lower()
    others = list(dict.fromkeys(found for found in _ANY.findall(line.sentence) if found.lower() != mine))
    return others[0] if len(others) == 1 else None


def _winobias_pair(more: _BracketedLine, less: _BracketedLine) -> WinoBiasPair | None:
    """None: the sentences differ in more than their pronouns."""
    if more.number != less.number:
        raise UserError(
            f"{less.where}: sentence {less.number or 'without a number'} stands beside {more.number or 'one without'} "
            f"({more.where}): give both files of the same type and split"
        )
    if more.core() != less.core():
        return None
    genders = [{_GENDER[pronoun.lower()] for pronoun in line.pronouns} for line in (more, less)]
    if any(len(gender) > 1 for gender in genders) or genders[0] == genders[1]:
        raise UserError(
            f"{less.where}: pronouns {less.pronouns} must all be of the other gender than {more.pronouns} ({more.where})"
        )
    pronouns = tuple(zip(more.pronouns, less.pronouns, strict=True))
    return WinoBiasPair(more.sentence, less.sentence, more.referent, pronouns, _other_occupation(more))
