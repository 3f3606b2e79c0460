"""What several answers to a held-out prompt say."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from recipes.grpo.sampling import ValidationSamplingSection, ValidationSetSection
from recipes.grpo.settings import GRPOData
from recipes.grpo.validation import majority, measures, pass_at


@given(answers=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(answers, data):
    right, k = data.draw(st.integers(0, answers)), data.draw(st.integers(1, answers))
    draws = list(itertools.combinations(range(answers), k))
    assert pass_at(k, answers, right) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))


@pytest.mark.parametrize(
    ("texts", "right", "expected"),
    [
        (["#### 4", "The answer is 4.", "#### 5"], [True, True, False], True),
        (["#### 5", "#### 5.0", "#### 4"], [False, False, True], False),
        (["#### 4", "#### 5"], [True, False], True),  # as many: the first
        (["#### 5", "#### 4"], [False, True], False),
        ([r"\boxed{\frac{1}{2}}", "Answer: 0.5", "Answer: 3", "well"], [True, True, False, False], True),
        (["a", "b", "#### 7", "#### 7"], [False, False, True, True], True),
    ],
)
def test_the_answer_that_most_state_is_right_or_not(texts, right, expected):
    assert majority(texts, right) is expected


@given(seed=st.integers(), samples=st.integers(2, 12), prompts=st.integers(0, 6))
def test_measures_add_up_over_prompts_however_they_are_dealt(seed, samples, prompts):
    rng = random.Random(seed)
    section = ValidationSetSection("x", samples, right_from=0.5)
    rewards = [[rng.choice([0.0, 0.4, 0.5, 1.0]) for _ in range(samples)] for _ in range(prompts)]
    texts = [[f"#### {rng.randrange(3)}" for _ in range(samples)] for _ in range(prompts)]
    whole = measures(texts, rewards, section)
    cut = rng.randint(0, prompts)
    parts = [measures(texts[part], rewards[part], section) for part in (slice(0, cut), slice(cut, None))]
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole)
    assert whole["right"] == pytest.approx(sum(r >= 0.5 for group in rewards for r in group) / samples)
    assert whole[f"pass_at_{samples}"] == sum(max(group) >= 0.5 for group in rewards)
    names = [f"pass_at_{k}" for k in (2, 4, 8) if k < samples] + [f"pass_at_{samples}"]
    assert list(whole) == ["right", *names, f"majority_at_{samples}"]
    values = [whole[name] for name in ("right", *names)]
    assert values == sorted(values)


def test_several_greedy_answers_are_refused():
    greedy, drawn = ValidationSamplingSection(), ValidationSamplingSection(use_greedy=False)
    with pytest.raises(
        UserError, match="data.validation_sets.gsm.samples=4: greedy answers to a prompt are all the same"
    ):
        ValidationSetSection("x", 4).check("gsm", greedy)
    ValidationSetSection("x", 4).check("gsm", drawn)
    ValidationSetSection("x", 4, drawn).check("gsm", greedy)
    ValidationSetSection("x").check("gsm", greedy)
    with pytest.raises(UserError, match="'a b' names a set in the log: use letters, digits, _ and -"):
        GRPOData("x", validation_sets={"a b": ValidationSetSection("y")})
