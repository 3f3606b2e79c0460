r"""What an answer says, whatever its notation: an exact number where all of it is one, else a text in one spelling.

The grammar of a number, over the text that `plain` gives (in it every minus is "-", every \dfrac is \frac, `x²` is `x^2`):

    quantity   [sign] [currency] rational [thousand | million | ...] [unit]
    rational   [sign] (decimal | decimal "e" integer | decimal "*10^" integer | integer "^" integer | [integer] fraction)
    fraction   "\frac{" decimal "}{" decimal "}" | decimal "/" decimal
    decimal    digits, in threes by one of "," " " "'" or not at all; "." digits

Nothing of it is a guess: a text that is not such a number as a whole has none, however many digits stand in it. A comma separates
thousands, never decimals.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from recipes.rewards.spelling import plain

__all__ = ["SCALES", "Answer", "agree", "read"]

LARGEST_NUMBER = 500  # digits, or powers of ten; what is larger, such as 10^999999999, is text


@dataclass(frozen=True)
class Answer:
    """An answer that has been read."""

    # In one spelling, without `name`.
    text: str
    # Its exact value, if the text is a number as a whole.
    number: Fraction | None = None
    # Of the number: "$", "%", "km/h", ...
    unit: str = ""
    # The other side may leave the unit out: a sign, or what LaTeX sets as text.
    unit_optional: bool = True
    # x, where the answer is written x = ...
    name: str = ""

    @property
    def is_short(self) -> bool:
        """A number, or a letter that chooses: what a sentence around it cannot change."""
        return self.number is not None or (len(self.text) == 1 and self.text.isalpha())


def agree(given: Answer, wanted: Answer) -> bool:
    """Two answers are the same: equal numbers, or equal texts; never a number and a text.

    A name or unit that only one of them has is passed over, but for a unit in words of the wanted answer: "7" is not all of "7
    dwarfs". A percentage is equal to its number and to a hundredth of it: whoever asks for percent, wants 50 or 50%, and a
    probability may be 0.5 or 50%.
    """
    if given.name and wanted.name and given.name != wanted.name:
        return False
    if given.number is None and wanted.number is None:
        return given.text == wanted.text
    if given.number is None or wanted.number is None:
        return False
    if given.unit == wanted.unit:
        return given.number == wanted.number
    if given.unit and wanted.unit or wanted.unit and not wanted.unit_optional:
        return False
    percent = 100 if given.unit == "%" else Fraction(1, 100) if wanted.unit == "%" else 1
    return given.number in (wanted.number, wanted.number * percent)


def read(text: str) -> Answer:
    """The answer that `text` as a whole is."""
    spelt = plain(text)
    if choice := _CHOICE.fullmatch(spelt):
        spelt = choice[choice.lastgroup]
    name, body = "", spelt
    if named := _NAMED.fullmatch(spelt):
        name, body = named.groups()
    quantity = _quantity(_REACHED_BY.sub("", body))
    # Lists and lines are parted in one way; a number may not be: "1, 234" are two.
    body = _AROUND_COMMA.sub(",", body).replace("\n", " ")
    if quantity is None:
        return Answer(body, name=name)
    number, unit = quantity
    is_optional = unit in _SIGNS.values() or _LATEX_UNIT.search(text) is not None
    return Answer(body, number, unit, is_optional, name)


# B, (B), B), B., option B
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(?:\((?P<a>[A-Za-z])\)|\[(?P<b>[A-Za-z])\]|(?P<c>[A-Za-z])[).:]?)")
# x = ..., f(x) = ...
_NAMED = re.compile(r"([A-Za-z](?:_\w+)?(?:\([A-Za-z]\))?)=(?!=)(.+)", re.S)
# 48/2 = 24: of a chain of equal numbers the last is the answer.
_REACHED_BY = re.compile(r"\A(?:[\d.+\-*/^()$%= {}]|,(?=\d{3})|\\frac)+=(?=.)", re.A)
_LATEX_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*[A-Za-z]")
_AROUND_COMMA = re.compile(r" ?, ?")


# Numbers


_DIGITS = r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_PART = r"[-+]?(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"  # of a fraction: "1 234/5" would be two things
_FLOAT = re.compile(rf"({_DECIMAL})(?:(?:e| ?[*x] ?10\^\(?)([-+]?\d+)\)?)?", re.I | re.A)
_POWER = re.compile(r"(\d+|\([-+]?\d+\))\^\(?([-+]?\d+)\)?", re.A)
_BRACKETED = re.compile(r"\(([^()]*)\)")
_RATIO = re.compile(rf"(?:(\d+)(?: |(?=\\)))?(?:\\frac\{{({_PART})\}}\{{({_PART})\}}|({_PART})/({_PART}))", re.A)


def _rational(text: str) -> Fraction | None:
    """The value of `[sign] (decimal | ...)`, None for everything else."""
    if len(text) > LARGEST_NUMBER:
        return None
    if bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1]
    sign = -1 if text.startswith("-") else 1
    if text.startswith(("-", "+")):
        text = text[1:]
    if found := _RATIO.fullmatch(text):
        value = _ratio(found)
    elif found := _POWER.fullmatch(text):
        value = _power(int(found[1].strip("()")), int(found[2]))
    elif found := _FLOAT.fullmatch(text):
        scale = _power(10, int(found[2] or 0))
        value = None if scale is None else _decimal(found[1]) * scale
    else:
        return None
    return None if value is None else sign * value


def _ratio(found: re.Match) -> Fraction | None:
    whole, *parts = found.groups()
    top, bottom = (_decimal(part) for part in parts if part is not None)
    if bottom == 0:
        return None
    if whole is None:
        return top / bottom
    is_proper = 0 <= top < bottom and top.denominator == bottom.denominator == 1
    return int(whole) + top / bottom if is_proper else None


def _power(base: int, exponent: int) -> Fraction | None:
    if base == 0 and exponent < 0 or abs(base) > 1 and abs(exponent) * math.log10(abs(base)) > LARGEST_NUMBER:
        return None
    return Fraction(base) ** exponent


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ']", "", text))


# Quantities


_SIGNS = {
    "us$": "$", "dollar": "$", "usd": "$", "euro": "€", "eur": "€", "gbp": "£", "yen": "¥", "jpy": "¥", "rupee": "₹", "inr": "₹",
    "cent": "¢", "percent": "%", "per cent": "%", "degree": "°", **{sign: sign for sign in "$€£¥₹¢%°"}, "°c": "°c", "°f": "°f",
}  # fmt: skip
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
# Words behind a number that make another one of it, or none.
_NO_UNITS = frozenset(
    "half halves third fourth fifth sixth seventh eighth ninth tenth twelfth twentieth hundredth thousandth millionth quarter "
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety couple score gross "
    "plus minus times over under and but then than from with without until unless except otherwise maybe perhaps "
    "mod modulo choose root squared cubed factorial doubled tripled halved more less fewer off down most least odd ish "
    "not wrong incorrect false never about approximately roughly "
    "log exp sin cos tan sqrt tau phi inf infinity nan binary octal hex hexadecimal bce "
    "mil mille mila millones milione milioni milliard milliarde miliardo miliardi miljoen miljard tausend duizend mln mld mio mrd"
    .split()
)  # fmt: skip
_WORD = r"(?:[a-z]{3,}|km|cm|mm|kg|mg|lb|oz|m[lL]|hr|ft|in|yd|mi|[kMGT]B|[kMG]?Hz|k?Wh?|USD|EUR|GBP|JPY|INR)(?:\^[23])?"
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)(?P<currency>(?:US)?\$|[€£¥₹])?(?P<rational>.*?[\d})])"
    rf"(?: (?P<scale>{'|'.join(SCALES)})s?)?"
    rf"(?P<unit>%|°[CF]?|[$€£¥₹¢]| per cent| m/s(?:\^2)?|(?: (?:square |cubic )?{_WORD})?(?:(?: per |/)(?:{_WORD}|[hsL]))?)",
    re.A,
)


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """The value of a number with its unit, if the text is one as a whole."""
    found = _QUANTITY.fullmatch(text) if len(text) <= LARGEST_NUMBER else None
    if not found or (found["sign"] and found["rational"].startswith(("-", "+"))):
        return None
    words = re.findall(r"[a-z]+", found["unit"])
    number = _rational(found["sign"] + found["rational"])
    if number is None or any({word, _singular(word)} & (_NO_UNITS | SCALES.keys()) for word in words):
        return None
    unit = _unit((found["currency"] or "") + found["unit"])
    return number * SCALES.get(found["scale"], 1), unit


def _unit(text: str) -> str:
    unit = _singular(text.strip().casefold())
    return _SIGNS.get(unit, unit)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and len(word) > 3 else word
