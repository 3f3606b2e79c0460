"""GenBiasEval and GenHintEval as products of professions and templates, split by profession."""

from __future__ import annotations

import json

import pytest

from megatron_ext.bias.prompts import (
    BIAS_TEMPLATES,
    HINT_TEMPLATES,
    AttributePair,
    Template,
    bias_prompts,
    hint_prompts,
    own_professions,
    read_professions_json,
    split_by_profession,
    write_jsonl,
)
from megatron_ext.errors import UserError

GENDERED = ("man", "woman", "boy", "girl", "ess", "master", "mistress", "wife", "king", "queen", "lord", "lady")


def test_our_professions():
    names = own_professions()
    assert len(names) >= 250 and len(set(names)) == len(names) and names == sorted(names)
    assert all(name == name.strip().lower() and name.replace(" ", "").isalpha() for name in names)
    assert not [name for name in names if name.split()[-1].endswith(GENDERED)]


def test_nine_templates_on_three_scales():
    for templates in (BIAS_TEMPLATES, HINT_TEMPLATES):
        assert [t.scale for t in templates] == ["word"] * 3 + ["phrase"] * 3 + ["sentence"] * 3
        assert len({t.text for t in templates}) == 9 and all(t.text.endswith(" because") for t in templates)


def test_prompts_are_the_product():
    names = own_professions()
    prompts = bias_prompts(names)
    assert len(prompts) == 9 * len(names) and len({p.prompt for p in prompts}) == len(prompts)
    assert {p.hint for p in prompts} == {0}
    hinted = hint_prompts(names)
    assert len(hinted) == 18 * len(names) and sum(p.hint for p in hinted) == 0
    assert all((" his " in p.prompt) == (p.hint == 1) and (" her " in p.prompt) == (p.hint == -1) for p in hinted)
    first = prompts[0]
    assert first.prompt == f"The {names[0]} smiled because" and (first.template_id, first.scale) == (0, "word")


def test_another_pair_of_attributes():
    (first, second) = hint_prompts(
        ["cook"],
        [Template("The {profession}, a {hint}, said", "word")],
        AttributePair("man", "woman", "father", "mother"),
    )
    assert first.prompt == "The cook, a father, said" and second.prompt == "The cook, a mother, said"


def test_hints_belong_to_their_words_in_either_order():
    """Else UB would have the other sign."""
    for pair in (AttributePair("she", "he"), AttributePair("she", "he", "her", "his")):
        assert (pair.first_hint, pair.second_hint) == ("her", "his")
        hinted = hint_prompts(["cook"], pair=pair)
        assert all((" her " in p.prompt) == (p.hint == 1) and (" his " in p.prompt) == (p.hint == -1) for p in hinted)
    assert AttributePair() == AttributePair("he", "she", "his", "her")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("she", "he", "his", "her"), "first='she' and first_hint='his' are of different genders, .* change the order"),
        (("woman", "man", "his", "her"), "first='woman' and first_hint='his' are of different genders"),
        (("they", "he", "her", "she"), "second='he' and second_hint='she' are of different genders"),
        (("man", "woman"), "first='man' has no first_hint: say which word hints at it, as 'his' does at 'he'"),
        (("he", "it"), "second='it' has no second_hint"),
        (("he", "she", "her"), "first_hint and second_hint must be two different words, got 'her' and 'her'"),
    ],
)
def test_hints_of_the_other_word_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        AttributePair(*words)


def test_no_profession_is_in_two_parts():
    names = own_professions()
    parts = split_by_profession(names, seed=3)
    assert sorted(n for part in parts.values() for n in part) == names
    assert [round(len(p) / len(names), 1) for p in parts.values()] == [0.6, 0.2, 0.2]
    assert split_by_profession(reversed(names), seed=3) == parts != split_by_profession(names, seed=4)


def test_the_published_file_format(tmp_path):
    rows = [
        ["accountant", 0.0, 0.4],
        ["actress", -1.0, -1.0],
        ["air_traffic_controller", 0.1, 0.2],
        ["monk", 0.9, 0.6],
        ["nun", 0.0, 0.0],
    ]
    path = tmp_path / "professions.json"
    path.write_text(json.dumps(rows))
    assert read_professions_json(path, 0.5, exclude=["nun"]) == ["accountant", "air traffic controller"]
    assert len(read_professions_json(path, 1.0)) == 5
    with pytest.raises(ValueError, match="no profession is left with most_definitional=-1"):
        read_professions_json(path, -1)
    path.write_text('{"accountant": 0}')
    with pytest.raises(ValueError, match="entry 0 is .*expected .name, definitional score, stereotypical score."):
        read_professions_json(path)
    path.write_text('[["dry_cleaner", 0, 0], ["dry cleaner", 0, 0.5]]')
    assert read_professions_json(path) == ["dry cleaner"]
    path.write_text('[["dry_cleaner", 0, 0], ["dry cleaner", 0.75, 0]]')
    with pytest.raises(ValueError, match="entry 1 gives 'dry cleaner' a definitional score of 0.75, one before it 0$"):
        read_professions_json(path)


def test_rows_are_plain_json(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", hint_prompts(["cook"])[:2])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = {
        "prompt": "The cook lost his keys because",
        "profession": "cook",
        "template_id": 0,
        "scale": "word",
        "hint": 1,
    }
    assert rows[0] == expected and rows[1]["hint"] == -1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: bias_prompts(["cook"], [Template("The {job} sat because", "word")]),
            "must hold {profession} and nothing else",
        ),
        (
            lambda: hint_prompts(["cook"], [Template("The {profession} sat because", "word")]),
            "must hold {hint} and {profession}",
        ),
        (lambda: split_by_profession(["a", "b", "c"], shares=(0.5, 0.2, 0.2)), "add up to 1"),
        (lambda: split_by_profession(["a", "b"]), "2 professions are too few"),
    ],
)
def test_refuses_what_makes_no_prompts(call, words):
    with pytest.raises(ValueError, match=words):
        call()
