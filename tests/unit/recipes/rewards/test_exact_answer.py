"""exact_answer: an answer counts as a whole, in any notation, and never by a piece of it."""

from __future__ import annotations

import json
import logging
import random

import pytest

from recipes.cli.config import ConfigError
from recipes.data.rows import Prompt
from recipes.rewards.exact_answer import ENOUGH_RESPONSES
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.several import rewards_for
from tests.unit.recipes.rewards.answer_cases import STATED, reward, state


@pytest.mark.parametrize(
    ("response", "answer", "wrong"),
    [
        ("Answer: −12", "-12", "12"), (r"\frac{3}{4}", "0.75", "4"), ("1 1/2", "1.5", "1"), ("10^6", "1000000", "6"),
        ("Answer: (B)", "B", "A"), ("Answer: $18", "18", "8"), (r"\boxed{42}", "42", "2"), ("The answer is 25.", "25", "5"),
        ("1½", "3/2", "1"), ("10⁶", "1e6", "106"), ("Answer: 10^6", "1,000,000", "10"), ("2^10", "1024", "210"),
        ("#### 5 million", "5000000", "5"), ("(-2)^3", "-8", "8"), ("-2^2", "-4", "4"), ("6 * 3 = 18", "18", "6"),
        (r"\frac{6}{4} = 1.5", "3/2", "4"), ("½", "0.5", "12"), ("10^{-3}", "0.001", "-3"), ("1,234", "1234", "234"),
        ("10, 000", "10,  000", "10000"), ("0,123", "0,123", "123"),
    ],
)  # fmt: skip
def test_reported_answers(response, answer, wrong):
    assert reward(response, answer) == 1 and reward(response, wrong) == 0


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("3 + 4 = 7 #### 7", "7", 1),
        ("3 + 4 = 7 #### 7", 7, 1),
        ("#### 7.0", 7, 1),
        ("#### 1,234", "1234", 1),
        ("#### $7.", "7", 1),
        ("#### -7", "-7", 1),
        ("#### 10-7", "7", 0),
        ("#### 10-7", "-7", 0),
        ("#### 8", "7", 0),
        ("#### 17", "7", 0),
        ("#### 7km", "7", 0),
        ("#### 1/7", "7", 0),
        ("#### 1.2.7", "7", 0),
        ("#### 3 #### 7", "7", 1),
        ("#### 7 #### 3", "7", 0),
        ("Answer: 7", "7", 1),
        ("Answer: it is 7 apples.", "7", 1),
        ("#### 3 Answer: 7", "7", 1),
        ("Answer: 7 #### 3", "7", 0),
        ("7", "7", 1),
        ("  7\n", "7", 1),
        ("7.00", "7", 1),
        ("it is 7", "7", 0),  # without a marker the whole response is the answer
        ("Answer: Paris", "Paris", 1),
        ("Answer: paris", "Paris", 0),
        ("Paris", " Paris ", 1),
        ("#### 72", "Half of 144 is 72. #### 72", 1),
        (r"\frac{1}{2}", r"Hence $x = \boxed{\frac12}$.", 1),
        ("", "7", 0),
        ("####", "7", 0),
        ("Answer:\n7\n8", "7", 0),  # a list, one on each line
        ("Answer: 7\n\nThere are 8.", "7", 1),
        ("<answer>Answer: 7</answer> It is 8.", "7", 1),
        ("<answer>\n7\n</answer>\n8", "7", 1),
        ("#### 1e99999999999999999999999", "7", 0),
        ("#### 12345678901234567890123", "12345678901234567890124", 0),
    ],
)
def test_exact_answer(response, answer, expected):
    assert reward(response, answer) == expected


@pytest.mark.parametrize("given_unit", ["${}", r"\${}", "{} $", "US${}", "{} dollars", "{} USD", "${}.00"])
def test_units_may_be_left_out_but_not_exchanged(given_unit):
    number = random.randint(2, 999)
    response = given_unit.format(number)
    for answer in (f"{number}", f"${number}", f"{number} dollars"):
        assert reward(response, answer) == reward(answer, given_unit.format(number)) == 1
    for answer in (f"€{number}", f"{number}%", f"{number} km", f"${number + 1}", f"{number} thousand"):
        assert reward(response, answer) == reward(answer, response) == 0


def test_units_in_words():
    number = random.randint(2, 999)
    for unit in (
        "apples",
        "km",
        "cm^2",
        "cm²",
        "square feet",
        "miles per hour",
        "km/h",
        "m/s",
        "°",
        "degrees",
        r"^\circ",
        r"\text{ cm}",
    ):
        assert reward(f"The answer is {number} {unit}.", number) == 1
    assert reward(f"{number} hours", f"{number} hour") == 1
    assert reward(f"{number} hours", f"{number} minutes") == 0
    # The row's answer is all that is wanted: only what LaTeX sets as text is known to be a unit.
    assert reward(str(number), rf"{number}\text{{ cm}}") == 1
    assert reward(str(number), f"{number} dwarfs") == reward(f"{number} kings", f"{number} dwarfs") == 0
    assert reward(f"Answer: {number} dwarfs.", f"{number} dwarfs") == 1


def test_a_percentage_is_its_number_and_its_hundredth():
    number = random.choice([n for n in range(1, 400) if n != 100])
    for percentage in (
        f"{number}%",
        rf"{number}\%",
        f"{number} %",
        f"{number} percent",
        f"{number} per cent",
        f"{number}٪",
    ):
        for same in (f"{number}", f"{number}%", f"{number}/100"):
            assert reward(percentage, same) == reward(same, percentage) == 1
        for other in (f"{number * 100}", f"{number}/10000", f"{number + 1}%", f"{number}/100%"):
            assert reward(percentage, other) == reward(other, percentage) == 0


LETTERS = (
    "{}",
    "({})",
    "{}.",
    "{})",
    "[{}]",
    "**{}**",
    "**({})**",
    "option {}",
    r"\text{{({})}}",
    r"\boxed{{\text{{{}}}}}",
    "${}$",
)


def test_letters_are_chosen_in_every_form():
    right, wrong = random.sample("ABCDEFGHIJ", 2)
    for form in LETTERS:
        for stated in (*STATED, "The correct answer is {}. That is so because of the second law."):
            assert reward(state(stated, form.format(right)), random.choice(LETTERS).format(right)) == 1
            assert reward(state(stated, form.format(wrong)), right) == 0
    for more in ("{} or {}", "({}) and ({})", "{}, {}", "not {0}", "{0}{0}", "({0}", "({0}) is wrong"):
        assert reward(f"Answer: {more.format(right, wrong)}", right) == 0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("(1, 2)", r"\left( 1,2 \right)"), ("x^{2} + 1", "x² + 1"), ("y = 2x", "2x"), (r"\infty", "∞"), (r"2 \pi", "2π"),
        (r"\sqrt2", "√2"), ("10^{999999999}", "10^999999999"), ("don’t", "don't"), ("“Paris”", "Paris"), ("Ｐａｒｉｓ", "Paris"),
        ("cafe\u0301", "café"), ("New  York", "New York"), ("1990–1995", "1990-1995"), ("H₂O", "H_2O"), ("a\nb", "a\nb"),
        (r"\text{New York}", "New York"), (r"\{1,2\}", r"\{1, 2\}"), (r"\dfrac{\pi}{2}", r"\frac{π}{2}"),
        ("It is raining", "It is raining"), ("Dr. Smith", "Dr. Smith"), ("3:30", "3:30"),
    ],
)  # fmt: skip
def test_texts_are_right_in_every_spelling(given, answer):
    for response in (given, f"Answer: {given}", f"**{given}**", f"The answer is {given}"):
        assert reward(response, answer) == 1
    assert reward(f"{given} 7", answer) == reward(f"Answer: {given} or so", answer) == 0


@pytest.mark.parametrize("answer", ["Dr", "Paris", "(1,2", "1", "10^999999998", "New"])
def test_a_piece_of_a_text_is_not_the_answer(answer):
    for response in ("Dr. Smith", "Paris Hilton", "(1,2)", "(1, 2)", "10^999999999", "New York"):
        assert reward(response, answer) == reward(f"The answer is {response}", answer) == 0


@pytest.mark.parametrize(
    "unit",
    [
        "9",
        "10^",
        "e9",
        "½",
        "\\boxed{",
        "\\frac{",
        "\\text{",
        "**",
        "$",
        "####",
        "answer is ",
        "(",
        "{,}",
        "1,",
        "- ",
        " ",
        "\u00a0",
    ],
)
def test_huge_answers_end(unit):
    """Neither a number nor a pattern grows with them; those that fit are exact, the others text."""
    huge = unit * (50_000 // len(unit))
    for response in (huge, f"Answer: {huge}", f"{huge}x7", "\\boxed{" + huge, unit * (400 // len(unit))):
        assert reward(response, "7") == 0
    assert reward(f"x{huge}x", f"x{huge}x") == 1
    digits = str(random.randrange(10**449, 10**450))
    assert reward(f"#### {digits}", f"{digits}.0") == 1 and reward(f"#### {digits}", str(int(digits) + 1)) == 0
    for power in (
        "10^999999999",
        "9^9999999999999",
        "1e999999999",
        "3 \\times 10^{999999999}",
        "1e-999999999",
        "0^-1",
        "1/0",
    ):
        assert reward(power, "1") == 0 and reward(f"Answer: {power}", power) == 1


def test_what_the_answer_of_a_row_may_be():
    whole, digits = random.randint(1, 10**6), random.randint(1, 18)
    text = f"{whole}.{random.randrange(10**digits):0{digits}}7"
    assert reward(f"#### {text}", json.loads(text)) == 1  # JSON makes a double of it, which need not be that text
    assert reward(f"#### {text}", json.loads(text) * (1 + 1e-9)) == 0
    assert reward(f"{whole}", float(whole)) == reward(f"{whole}.0", whole) == reward("#### 0.1", 0.1) == 1
    assert reward("1e22", 1e22) == reward("0.0000001", 1e-7) == 1
    assert reward("1" + "0" * 400, 1e22) == 0
    for said in ("True", "true", "Answer: TRUE", "**true**"):
        assert reward(said, True) == 1 and reward(said, False) == reward(said, 1) == 0
    assert reward("1", True) == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x"},
        *(
            {"answer": a}
            for a in (None, "", " \n", ["7"], {"a": 7}, float("nan"), float("inf"), "####", "So, Answer: ")
        ),
    ],
    ids=str,
)
def test_a_row_needs_an_answer(row):
    """Found when the file is read, with the row's line; and when it is drawn, if nobody looked before."""
    exact = get_reward("exact_answer")
    with pytest.raises(RewardError, match="^reward exact_answer: no answer to compare with") as caught:
        score(exact, ["7", "7"], [{"answer": "7"}, row])
    assert "\n" not in str(caught.value)
    prompts = [Prompt((1,), {"answer": "7"}, 1), Prompt((1,), row, 3)]
    with pytest.raises(RewardError, match=r"data\.jsonl:3: no answer"):
        rewards_for("exact_answer", {}).check_rows(prompts, "data.jsonl")
    rewards_for("exact_answer", {}).check_rows(prompts[:1], "data.jsonl")


def test_a_marker_of_ones_own():
    for response, expected in {
        "so => 7": 1,
        "=> 8 => **7**.": 1,
        "so => 8 #### 7": 0,
        "#### 7": 0,
        r"so \boxed{7}": 0,
        "7": 1,
    }.items():
        assert reward(response, "7", marker="=>") == expected
    with pytest.raises(ConfigError, match="trainer.grpo.reward.marker is empty"):
        get_reward({"name": "exact_answer", "marker": " "})


# Why everything scores 0


def scored(exact, responses, answer, caplog) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="recipes.rewards.exact_answer"):
        caplog.clear()
        score(exact, responses, [{"answer": answer}] * len(responses))
    return caplog.messages


@pytest.mark.parametrize(
    ("response", "answer"),
    [("Well, {} it will be!", 25), ("Answer: {} or so", 25), ("I believe that it is Paris {}", "Paris"), ("{}", "")],
)
def test_answers_that_cannot_be_read_are_said_once(response, answer, caplog):
    answer = answer or r"\sqrt{2}"
    exact, responses = get_reward("exact_answer"), [response.format(n) for n in range(ENOUGH_RESPONSES)]
    assert not scored(exact, responses[:-1], answer, caplog)
    (message,) = scored(exact, responses, answer, caplog)
    assert f"the first {ENOUGH_RESPONSES} responses" in message and repr(answer) in message
    assert response.format(0) in message and "docs/data.md" in message and "\n" not in message
    assert not scored(exact, responses * 3, answer, caplog)


def test_wrong_answers_that_can_be_read_are_no_reason_to_speak(caplog, monkeypatch):
    silent = ["Well, 25 it will be!"] * ENOUGH_RESPONSES
    for readable, answer in (("The answer is 24.", 25), ("24", 25), ("Answer: London", "Paris"), ("Paris", "Paris")):
        assert not scored(get_reward("exact_answer"), [*silent[1:], readable, *silent], answer, caplog)
    monkeypatch.setenv("RANK", "1")
    assert not scored(get_reward("exact_answer"), silent, 25, caplog)
