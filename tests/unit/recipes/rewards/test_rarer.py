"""The reward of the rarer word, counted by hand, and what it does to a policy."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError, get_reward, score

TEXTS = {"he": (" he", " He was late", "so he and she"), "she": (" she", " SHE", "then she or he")}
NEITHER = ("", " it was late", " they", " hers", " sheep")


def draw(rng: random.Random, count: int) -> tuple[list[str], list[str | None]]:
    """Responses, and the word that each says."""
    words = [rng.choice(("he", "he", "she", None)) for _ in range(count)]
    return [rng.choice(NEITHER if word is None else TEXTS[word]) for word in words], words


def test_the_share_of_the_other_word_among_those_that_say_either():
    """Of several prompts in one call, too, mixed."""
    rng, reward = random.Random(), get_reward({"name": "rarer_word", "said": 0.25})
    groups = [draw(rng, rng.randrange(1, 12)) for _ in range(3)]
    calls, expected = [], []
    for number, (texts, words) in enumerate(groups):
        spoken = [word for word in words if word is not None]
        for text, word in zip(texts, words, strict=True):
            calls.append((text, {"prompt": f"p{number}"}))
            others = Fraction(sum(w != word for w in spoken), len(spoken)) if spoken else 0
            expected.append(0.0 if word is None else 0.25 + float(others))
    order = rng.sample(range(len(calls)), len(calls))
    found = score(reward, [calls[i][0] for i in order], [calls[i][1] for i in order])
    assert found == pytest.approx([expected[i] for i in order], abs=1e-12)


def test_a_hint_asks_for_its_word():
    row = {"prompt": "The nurse lost his hat because", "answer": "he"}
    assert score(get_reward("rarer_word"), [" he", " she", " it", " he"], [row] * 4) == [1.5, 0.5, 0.0, 1.5]


def test_other_words():
    reward = get_reward({"name": "rarer_word", "words": ["His", "her"], "said": 0})
    assert score(reward, [" his", " her", " HER", " he"], [{"prompt": "x"}] * 4) == pytest.approx(
        [2 / 3, 1 / 3, 1 / 3, 0]
    )


def test_a_policy_comes_to_rest_where_both_words_are_even_and_said():
    """Policy gradient with centred rewards on a policy of three tokens: from 9 : 1, with as much silence, to even words."""
    rng, reward, texts = (
        torch.Generator().manual_seed(random.getrandbits(31)),
        get_reward("rarer_word"),
        [" he", " she", " it"],
    )
    logits = torch.tensor([0.72, 0.08, 0.2]).log()
    for _ in range(600):
        p = logits.softmax(0)
        drawn = torch.multinomial(p, 32, replacement=True, generator=rng)
        found = torch.tensor(score(reward, [texts[i] for i in drawn], [{"prompt": "x"}] * 32))
        one_hot = torch.nn.functional.one_hot(drawn, 3).float()
        logits = logits + 0.3 * ((found - found.mean())[:, None] * (one_hot - p)).mean(0)
    he, she, it = logits.softmax(0).tolist()
    assert abs(he - she) < 0.3 and it < 0.05, (he, she, it)  # it was 0.64 apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["he"]}, "words=.* must be two different words"),
        ({"words": ["he", "HE"]}, "must be two different words"),
        ({"words": ["he", "s.e"]}, "must be two different words"),
        ({"said": -1}, "said=-1.* must be at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        get_reward({"name": "rarer_word", **options})


def test_a_row_that_asks_for_another_word_is_refused():
    with pytest.raises(RewardError, match="its answer is 'they', and must be he or she, or be left out"):
        score(get_reward("rarer_word"), [" he"], [{"prompt": "x", "answer": "they"}])
