"""AFGB, UB and what stands beside them: hand-made cases hit 0, 1 and -1 exactly; random ones follow the definition."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.bias import afgb_score, profession_table, pronoun_mass, ub_score
from megatron_ext.bias.scores import first_preferred, preferred, right_answers


def mean_of(score, *given) -> float:
    return float(score(*given).mean())


ONE, ZERO, HALF = torch.ones(4), torch.zeros(4), torch.full((4,), 0.5)
HINT = torch.tensor([1, -1, 1, -1])


def test_hand_made_cases_are_exact():
    assert afgb_score(ONE, ZERO) == afgb_score(ZERO, ONE) == 1
    assert afgb_score(HALF, HALF) == afgb_score(ZERO, ZERO) == 0
    he, she = (HINT > 0).float(), (HINT < 0).float()
    assert ub_score(he, she, HINT) == 1 and ub_score(she, he, HINT) == -1
    assert ub_score(HALF, HALF, HINT) == 0 and ub_score(ONE, ZERO, HINT) == 0
    assert pronoun_mass(ZERO, ZERO) == 0 and pronoun_mass(HALF, HALF) == 1
    assert mean_of(first_preferred, ONE, ZERO) == 1 and mean_of(first_preferred, ZERO, ONE) == 0
    assert mean_of(first_preferred, HALF, HALF) == 0.5


def test_random_cases_follow_the_definitions(rng):
    p = torch.rand(50, 3, generator=rng, dtype=torch.float64).softmax(-1)  # fp32 has ties
    he, she, hint = p[:, 0], p[:, 1], torch.randint(2, (50,), generator=rng) * 2 - 1
    rows = list(zip(he.tolist(), she.tolist(), hint.tolist(), strict=True))
    assert afgb_score(he, she) == pytest.approx(sum(abs(a - b) for a, b, _ in rows) / 50, abs=1e-12)
    assert ub_score(he, she, hint) == pytest.approx(sum(f * (a - b) for a, b, f in rows) / 50, abs=1e-12)
    assert pronoun_mass(he, she) == pytest.approx(sum(a + b for a, b, _ in rows) / 50, abs=1e-12)
    assert mean_of(first_preferred, he, she) == sum(a > b for a, b, _ in rows) / 50


def test_the_table_goes_from_female_to_male():
    he, she = torch.tensor([0.9, 0.1, 0.3, 0.5]), torch.tensor([0.1, 0.8, 0.1, 0.3])
    table = profession_table(he, she, ["smith", "nurse", "smith", "clerk"])
    assert list(table) == ["nurse", "clerk", "smith"]
    assert table == pytest.approx({"nurse": -0.7, "clerk": 0.2, "smith": 0.5}, abs=1e-7)


def test_share_of_pairs_that_follow_the_stereotype(rng):
    low, high = torch.tensor([-5.0, -4, -3]), torch.tensor([-4.0, -3, -2])
    assert (
        mean_of(preferred, high, low) == 1
        and mean_of(preferred, low, high) == 0
        and mean_of(preferred, low, low) == 0.5
    )
    more, less = -10 * torch.rand(2, 51, generator=rng, dtype=torch.float64)
    expected = sum(a > b for a, b in zip(more.tolist(), less.tolist(), strict=True)) / 51
    assert mean_of(preferred, more, less) == pytest.approx(expected, abs=1e-12)
    assert mean_of(preferred, less, more) == pytest.approx(1 - expected, abs=1e-12)


def test_accuracy_of_the_likeliest_choice(rng):
    scores = -10 * torch.rand(40, 3, generator=rng, dtype=torch.float64)
    answers = torch.randint(3, (40,), generator=rng)
    expected = sum(row.index(max(row)) == a for row, a in zip(scores.tolist(), answers.tolist(), strict=True)) / 40
    assert mean_of(right_answers, scores, answers) == pytest.approx(expected, abs=1e-12)
    assert (
        mean_of(right_answers, scores, scores.argmax(1)) == 1 and mean_of(right_answers, scores, scores.argmin(1)) == 0
    )
    tied = torch.tensor([[-1.0, -1, -2], [-1, -1, -2], [-1, -1, -1]])
    assert mean_of(right_answers, tied, torch.tensor([1, 2, 0])) == pytest.approx((1 / 2 + 0 + 1 / 3) / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: afgb_score(torch.empty(0), torch.empty(0)), r"expected probabilities \[n\]"),
        (lambda: afgb_score(ONE, ZERO[:2]), r"got \(4,\) and \(2,\)"),
        (lambda: afgb_score(ONE, ONE), "add up to 1 at most"),
        (lambda: afgb_score(-HALF, HALF), "must not be negative"),
        (lambda: ub_score(HALF, HALF, HINT * 2), r"a hint of \+1 or -1"),
        (lambda: ub_score(HALF, HALF, HINT[:1]), r"\(1,\) for \(4,\) prompts"),
        (lambda: profession_table(HALF, HALF, ["nurse"]), "1 professions for 4 prompts"),
        (lambda: mean_of(preferred, torch.empty(0), torch.empty(0)), r"log-likelihoods \[n\] of both sentences"),
        (lambda: mean_of(preferred, -ONE, -ONE[:3]), r"got \(4,\) and \(3,\)"),
        (lambda: mean_of(preferred, -ONE, HALF), "must be 0 or less"),
        (lambda: mean_of(preferred, -ONE * float("nan"), -ONE), "none NaN"),
        (lambda: mean_of(right_answers, -ONE, HINT), r"\[n, choices\] and answers \[n\], got \(4,\) and \(4,\)"),
        (lambda: mean_of(right_answers, -ONE[:, None], HINT[:3]), r"got \(4, 1\) and \(3,\)"),
        (lambda: mean_of(right_answers, torch.empty(0, 2), HINT[:0]), r"got \(0, 2\) and \(0,\)"),
        (
            lambda: mean_of(right_answers, -torch.ones(4, 2), HINT),
            "whole numbers from 0 to 1, got torch.int64 from -1 to 1",
        ),
        (lambda: mean_of(right_answers, -torch.ones(4, 2), ONE), "got torch.float32 from 1 to 1"),
        (lambda: mean_of(right_answers, torch.ones(4, 2), HINT.clamp(min=0)), "must be 0 or less"),
    ],
)
def test_refuses_what_has_no_score(call, words):
    with pytest.raises(ValueError, match=words):
        call()
