"""exact_answer: a number is right in every notation and in no piece of something larger."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from tests.unit.recipes.rewards.answer_cases import STATED, reward, state

# Each notation is a function of a value, None where the value has none in it.


def decimal(value: Fraction) -> str | None:
    for digits in range(8):
        if (shifted := value * 10**digits).denominator == 1:
            whole = str(int(shifted)).rjust(digits + 1, "0")
            return whole if digits == 0 else f"{whole[:-digits]}.{whole[-digits:]}"
    return None


def grouped(separator: str):
    return lambda v: f"{int(v):,}".replace(",", separator) if v.denominator == 1 else None


def over(form: str):
    return lambda v: form.format(v.numerator, v.denominator)


def mixed(form: str):
    def write(v: Fraction) -> str | None:
        whole, rest = divmod(v.numerator, v.denominator)
        return form.format(whole, rest, v.denominator) if rest and whole else None

    return write


def scientific(form: str):
    def write(v: Fraction) -> str | None:
        plain = decimal(v)
        if not plain or not v:
            return None
        exponent = len(str(int(v))) - 1
        return form.format(decimal(v / 10**exponent) or "", exponent) if decimal(v / 10**exponent) else None

    return write


def in_digits(zero: str):
    digits = str.maketrans("0123456789", "".join(chr(ord(zero) + i) for i in range(10)))
    return lambda v: plain.translate(digits) if (plain := decimal(v)) else None


def superscript(v: Fraction) -> str | None:
    """10⁶"""
    if v < 1 or set(str(v)[1:]) - {"0"} or not str(v).startswith("1"):
        return None
    return "10" + str(len(str(v)) - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


NOTATIONS = [
    decimal, lambda v: f"{d}.00" if (d := decimal(v)) and "." not in d else None,
    *map(grouped, (",", " ", "\u00a0", "\u202f", "'", "’", r"\,", "{,}", r",\!")),
    *map(over, ("{}/{}", "{} / {}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}", "{}⁄{}", r"\tfrac {{ {} }}{{ {} }}")),
    *map(mixed, ("{} {}/{}", r"{}\frac{{{}}}{{{}}}", r"{} \frac{{{}}}{{{}}}")),
    *map(scientific, ("{}e{}", "{}E+{}", r"{} \times 10^{{{}}}", "{}×10^{}", r"{}\cdot10^{{{}}}", "{} x 10^{}", "{}*10**{}")),
    superscript,
    *map(in_digits, ("٠", "०", "０", "𝟎")),
]  # fmt: skip
SIGNS = ("-", "−", "–", "－", "- ")
AROUND = (
    "{}", "{}.", " {}\n", "${}$", "**{}**", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}", "x = {}", "({})", "`{}`", r"\mathbf{{{}}}",
)  # fmt: skip
values = st.one_of(
    st.fractions(-2000, 2000, max_denominator=30),
    st.integers(-(10**9), 10**9).map(Fraction),
    st.builds(lambda n, k: n * Fraction(10) ** k, st.integers(-99, 99), st.integers(-5, 9)),
)


def write(value: Fraction, draw) -> str:
    """The number in a drawn notation."""
    forms = [text for form in NOTATIONS if (text := form(abs(value)))]
    return (draw(st.sampled_from(SIGNS)) if value < 0 else "") + draw(st.sampled_from(forms))


def state_drawn(answer: str, draw) -> str:
    return state(draw(st.sampled_from(STATED)), draw(st.sampled_from(AROUND)).format(answer))


@given(values, st.data())
def test_a_number_is_right_in_every_notation(value, data):
    assert reward(state_drawn(write(value, data.draw), data.draw), write(value, data.draw)) == 1


@given(values, values, st.data())
def test_another_number_is_wrong_in_every_notation(value, other, data):
    near = (
        other,
        -value,
        value + 1,
        value * 10,
        value / 10,
        Fraction(value.numerator),
        Fraction(value.denominator),
        value * value,
    )
    other = data.draw(st.sampled_from(near))
    assume(other != value)
    assert reward(state_drawn(write(other, data.draw), data.draw), write(value, data.draw)) == 0


FRAGMENTS = (
    "{0} or 8", "{0} and a half", "{0}, 8", "8 and {0}", "between {0} and 8", "{0} to 8", "not {0}", "about {0}", "more than {0}",
    "{0}x", "3{0}", "x{0}", "{0}i", "{0}π", r"{0}\pi", "{0} pi", "{0}!", "{0}²", "{0}^2", "{0}^{{x}}", r"\sqrt{{{0}}}", "√{0}",
    "|{0}|", "{0} squared", "{0} halves", "{0} 1/0", "{0}/x", "{0}:30", "{0}-8", "{0}–8", "{0} ± 1", "{0}..", "{0}…", "~{0}",
    "≈ {0}", "{0}_8", "{0}₈", "{0}①", "{0} + x", "{0} - 8", "2({0})", "{0}(2)", "{0}%/2", "x > {0}", "3x = {0}", "{0} = x",
    "x = {0}, y = 8", r"\frac{{{0}}}{{x}}", r"\boxed{{{0}", r"\boxed{{{0}}}^2", r"-\boxed{{x}} {0}", r"\boxed{{{0}}}/5",
    r"\frac{{\boxed{{{0}}}}}{{5}}", r"2\cdot\boxed{{{0}}}", r"\boxed{{{0}}}x", r"\boxed{{{0}}} million", "{0} million", "{0}k",
    r"\boxed{{{0}}}, \boxed{{8}}", "Answer: {0}. No, 8.", "#### {0} #### x", "<think>Answer: {0}",
    "{0} dozen", "{0} millions d'euros",
)  # fmt: skip


# Not 8, which stands in them: two boxes of 8 are one answer.
@given(st.integers(2, 10**6).filter(lambda number: number != 8), st.sampled_from(FRAGMENTS), st.sampled_from(STATED))
def test_a_number_in_something_larger_is_not_the_answer(number, fragment, stated):
    assert reward(stated.format(fragment.format(number)), number) == 0
