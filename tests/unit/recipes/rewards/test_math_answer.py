"""Answers in the forms of published sets (GSM8K, MATH, AIME, MMLU) against verdicts by hand, and against math-verify's own."""

from __future__ import annotations

import math_verify
import pytest

from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.several import rewards_for
from tests.unit.recipes.rewards.cases import prompts

# (the row's answer, a response, whether it is right).
AS_MATH_VERIFY = [
    ("42", r"So the total is $\boxed{42}$.", 1), ("42", "The answer is 42.", 1), ("42", "#### 42", 1),
    ("1234", "The answer is 1,234.", 1), ("-7", r"$\boxed{-7}$", 1), ("0.5", r"$\boxed{\frac{1}{2}}$", 1),
    ("3.14159", r"\boxed{\pi}", 0), ("1000000", r"\boxed{10^6}", 1),
    ("42", 'First $\\boxed{41}$.\nNo: $\\boxed{42}$.', 1), ("42", r"First $\boxed{42}$, no: $\boxed{41}$.", 0),
    (r"\frac{3}{4}", r"\boxed{\dfrac{3}{4}}", 1), (r"\frac{3}{4}", r"\boxed{0.75}", 1),
    (r"\frac{3}{4}", "The answer is 3/4.", 1), (r"\frac34", r"\boxed{\tfrac{6}{8}}", 1),
    (r"-\frac{1}{3}", r"\boxed{\frac{-1}{3}}", 1), (r"\frac{1}{3}", r"\boxed{0.33}", 0),
    (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}", 0), (r"1\frac{1}{2}", r"\boxed{1.5}", 1),
    ("3/2", r"\boxed{1\frac{1}{2}}", 1), ("1 1/2", "The answer is 1 1/2.", 1),
    (r"2\frac{3}{4}", r"\boxed{\frac{11}{4}}", 1), (r"1\frac{1}{2}", r"\boxed{\frac{1}{2}}", 0),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1), (r"\sqrt{2}", r"\boxed{2^{1/2}}", 1),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1), (r"3+2\sqrt{2}", r"\boxed{(1+\sqrt{2})^2}", 1),
    (r"\sqrt[3]{2}", r"\boxed{2^{\frac13}}", 1), (r"2\sqrt{3}", r"\boxed{3\sqrt{2}}", 0), ("50%", r"\boxed{5\%}", 0),
    ("$18", "She makes $18 every day. #### 18", 1), (r"5\text{ cm}", r"\boxed{5}", 1), ("5", r"\boxed{5\text{ cm}}", 1),
    ("12", r"\boxed{12 \text{ square units}}", 1), (r"60^\circ", r"\boxed{60}", 1),
    ("90", "The answer is 90 degrees.", 1), (r"\text{Monday}", r"\boxed{\text{Monday}}", 1),
    (r"\text{Monday}", r"\boxed{\text{Tuesday}}", 0), ("[0,1)", r"\boxed{[0, 1)}", 1), ("[0,1)", r"\boxed{[0,1]}", 0),
    (r"(-\infty, 2]", r"\boxed{(-\infty,2]}", 1),
    (r"(-\infty,-1)\cup(1,\infty)", r"\boxed{(1,\infty)\cup(-\infty,-1)}", 1), (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", 1),
    ("1,2,3", r"\boxed{3,2,1}", 1), ("(1,2)", r"\boxed{(2,1)}", 0),
    (r"(3,\frac{\pi}{2})", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", 1), ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ("x^2+2x+1", r"\boxed{x^2+1}", 0), ("2x+3", "The final answer is $3+2x$.", 1), ("y=2x+3", r"\boxed{y = 3 + 2x}", 1),
    ("x=5", r"\boxed{5}", 1), ("5", r"\boxed{x=5}", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", 1),
    ("3+4i", r"\boxed{4i+3}", 1), (r"\frac{\pi}{6}", r"\boxed{30^\circ}", 0), ("10!", r"\boxed{3628800}", 1),
    (r"\binom{5}{2}", r"\boxed{10}", 1), ("B", r"\boxed{\text{(B)}}", 1), ("B", r"\boxed{C}", 0),
    ("42", "I do not know.", 0), ("42", "", 0), ("42", "<think>42", 0), ("42", "<think>41</think>The answer is 42", 1),
    ("4", "There are 4 or 5 of them.", 0), ("2", "The answer is $x = 2$ because $4 = 2x$. I am sure.", 1),
    ("9", "So 4 + 5 = 9", 1), ("9", "So 4 + 5 = 9, which is more than 8.", 0),
    ("7", "I counted 7 apples and 3 pears", 0), (r"x \in [0,1]", r"\boxed{[0,1]}", 1),
    ("-1", 'Therefore\n\\[ x = -1 \\]', 1), ("5", r"Thus $x = 4$ and then $\boxed{x = 5}$ follows.", 1),
    ("5", "Answer: $5$ dollars", 1), ("3", r"Final Answer: The final answer is $\boxed{3}$. I hope it is correct.", 1),
    ("11", "**Answer:** 11", 1), ("8", "The answer is 8 because 2 * 4 = 8.", 1),
    (r"\frac{2}{3}", "Answer: 2/3 of the cake", 1), ("12", r"\boxed{12!}", 0),
]  # fmt: skip
# Where math-verify says otherwise: it does not read the Unicode minus and root, a percentage in text, a dollar sign, words, or a
# letter behind a phrase; it does not compare an interval with a chain of inequalities; and it takes a number out of what says
# something else.
OTHERWISE = [
    ("-7", "The answer is −7.", 1), ("42", r"First $\boxed{41}$, no: $\boxed{42}$.", 0),
    (r"2\sqrt{3}", "The answer is 2√3.", 1), ("50%", r"\boxed{50\%}", 1), ("50", r"\boxed{50\%}", 1),
    ("0.5", r"\boxed{50\%}", 1), (r"25\%", "The answer is 25 percent.", 1), (r"\$18.90", r"\boxed{\$18.90}", 1),
    ("Paris", "The answer is Paris.", 1), ("[0,1]", r"\boxed{0 \le x \le 1}", 1), ("B", "The answer is (B).", 1),
    ("(C)", "Answer: C", 1), ("12", "The answer is not 12.", 0), ("12", "The answer is not $12$.", 0),
    ("12", "It isn't $12$.", 0), ("12", "Answer: 12 or 13", 0), ("12", "Answer: 12 factorial", 0),
    ("12", "Answer: 12x", 0),
]  # fmt: skip


def math_verifys_own(answer: str, response: str) -> bool:
    """As its documentation has rows without a marker."""
    wanted = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
    gold, given = (math_verify.parse(text, parsing_timeout=None) for text in (wanted, response))
    return math_verify.verify(gold, given, timeout_seconds=None)


@pytest.mark.parametrize(("answer", "response", "right"), AS_MATH_VERIFY)
def test_equal_where_math_verify_is_right(answer, response, right):
    assert score(get_reward("math"), [response], [{"answer": answer}]) == [right]
    assert math_verifys_own(answer, response) == bool(right)


@pytest.mark.parametrize(("answer", "response", "right"), OTHERWISE)
def test_right_where_math_verify_is_not(answer, response, right):
    assert score(get_reward("math"), [response], [{"answer": answer}]) == [right]
    assert math_verifys_own(answer, response) != bool(right)


def test_numbers_as_answers_of_rows():
    responses = [r"\boxed{\frac{1}{2}}", "Answer: 12", r"$\boxed{7}$"]
    assert score(get_reward("math"), responses, [{"answer": 0.5}, {"answer": 12}, {"answer": 8}]) == [1, 1, 0]
    assert score(get_reward({"name": "math", "decimals": 2}), [r"\boxed{0.334}"], [{"answer": r"\frac{1}{3}"}]) == [1]
    with pytest.raises(RewardError, match=r"rows\.jsonl:3: no answer to compare with"):
        rewards_for("math", {}).check_rows(prompts({"answer": None}), "rows.jsonl")


def test_what_would_take_for_ever_is_stopped():
    """math-verify's own alarm would have made it a 0 without a word."""
    from recipes.rewards.settings import RewardLimits

    rewards = rewards_for("math", {}, None, RewardLimits(timeout=2.0))
    try:
        with pytest.raises(
            RewardError, match=r"reward math has not come back within trainer\.grpo\.reward_timeout=2 s"
        ):
            rewards.score([[r"\boxed{9^{9^{9^{9}}}}"]], prompts({"answer": "3"}))
        assert rewards.score([[r"\boxed{3}"]], prompts({"answer": "3"})).totals == [[1.0]]
    finally:
        rewards.close()
