"""Rewards of a text's form: tags, a letter, JSON of a schema."""

from __future__ import annotations

import json

import pytest

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.several import rewards_for
from tests.unit.recipes.rewards.cases import prompts

# format


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na < b > c\n</think>\n\n<answer> b </answer>\n", 1),
        ("<think>a</think>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("so <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> done", 0),
        ("<think>a<answer></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
        ("<THINK>a</THINK><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_tags_once_in_order_and_nothing_around(text, value):
    assert score(get_reward("format"), [text], [{}]) == [value]


def test_other_tags_and_one_that_the_prompt_has_opened():
    opened = get_reward({"name": "format", "opened": True})
    assert score(opened, ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"], [{}] * 2) == [1, 0]
    plan = get_reward({"name": "format", "tags": ["plan"]})
    assert score(plan, ["<plan>x</plan>", "<think>a</think><answer>b</answer>"], [{}] * 2) == [1, 0]


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["a b"], ["<a>"]])
def test_tags_that_are_none(tags):
    with pytest.raises(ConfigError, match=r"trainer\.grpo\.reward\.tags=.* must be names, each of them once"):
        get_reward({"name": "format", "tags": tags})


# choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("b)", "B"), ("**B**", "B"), ("B) Paris", "B"), ("(C) It is late.", "C"),
        ("Answer: D", "D"), ("The answer is (A) because it is", "A"), ("The answer is A.", "A"),
        ("the answer is **E**.", "E"),
        (r"so \boxed{C}", "C"), (r"\boxed{\text{(C)}}", "C"), (r"\boxed{\textbf{(D)}\ 12}", "D"), ("#### B", "B"),
        ("<answer>A</answer>", "A"),
        ("Answer: B. Paris is a city", "B"), ("Final Answer:\nE", "E"), ("Answer: option C", "C"), ("B is right", "B"),
        ("<think>A? no</think>B", "B"), ("I take option D, not option C. Answer: D", "D"),
        ("We see that option C fits.", "C"),
        ("Answer: A\nNo. Answer: B", "B"), ("$C$", "C"),
        # Not one letter.
        ("A dog is it", None), ("The answer is A dog", None), ("Answer: A or B", None), ("(B) and (C)", None),
        ("Answer: B, C", None), ("Both", None),
        ("F", None), ("", None), ("<think>B", None), ("Because", None), ("Answer: Berlin", None), ("I do not know", None),
        ("ABC", None),
    ],
)  # fmt: skip
def test_the_letter_that_is_chosen(text, letter):
    values = score(get_reward("choice"), [text] * 5, [{"answer": x} for x in "ABCDE"])
    assert values == [float(x == letter) for x in "ABCDE"]


def test_rows_have_a_letter_and_there_may_be_more_of_them():
    reward = rewards_for("choice", {})
    reward.check_rows(prompts({"answer": "B"}, {"answer": " (c). "}), "rows.jsonl")
    for wrong in (None, 2, "F", "BC", ["B"]):
        with pytest.raises(
            RewardError, match=r"rows\.jsonl:3: its answer is .* must be one of the letters A, B, C, D, E"
        ):
            reward.check_rows(prompts({"answer": wrong}), "rows.jsonl")
    ten = get_reward({"name": "choice", "letters": "ABCDEFGHIJ"})
    assert score(ten, ["Answer: J", "(J) x"], [{"answer": "J"}, {"answer": "I"}]) == [1, 0]
    assert score(ten, ["I do not know", "I", "(I) x"], [{"answer": "I"}] * 3) == [0, 1, 1]
    for letters in ("A", "ab", "ABA", ""):
        with pytest.raises(ConfigError, match="must be capital letters"):
            get_reward({"name": "choice", "letters": letters})


# json_schema

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "of": {"$ref": "#/$defs/word"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"word": {"type": "string", "minLength": 2}},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"n": 1}', 1), (' {"n": 1, "of": "ab"}\n', 1), ('```json\n{"n": 1}\n```', 1), ('```\n{"n": 1}\n```', 1),
        ('<think>{}</think>{"n": 1}', 1),
        ('{"n": 1.5}', 0), ('{"n": "1"}', 0), ('{"n": 1, "of": "a"}', 0), ('{"n": 1, "m": 2}', 0), ("{}", 0), ("[1]", 0),
        ('Here it is: {"n": 1}', 0), ('{"n": 1} {"n": 1}', 0), ('{"n": 1, "n": 2}', 0), ('{"n": NaN}', 0), ("{'n': 1}", 0),
        ("", 0),
        ("[" * 100_000, 0), ('{"n":' * 50_000, 0),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_json_that_a_schema_allows(text, value):
    assert score(get_reward({"name": "json_schema", "schema": SCHEMA}), [text], [{}]) == [value]


def test_schemas_in_files_and_rows(tmp_path):
    (tmp_path / "form.json").write_text(json.dumps(SCHEMA))
    reward = get_reward({"name": "json_schema", "schema": str(tmp_path / "form.json")})
    assert score(reward, ['{"n": 1}', "2"], [{}] * 2) == [1, 0] and list(reward.row_keys) == []
    own = get_reward("json_schema")
    assert list(own.row_keys) == ["schema"]
    assert score(own, ["2", "2"], [{"schema": {"type": "integer"}}, {"schema": {"type": "string"}}]) == [1, 0]
    with pytest.raises(RewardError, match=r"rows\.jsonl:3: its schema is 'None': a row needs a JSON schema"):
        rewards_for("json_schema", {}).check_rows(prompts({}), "rows.jsonl")
    with pytest.raises(RewardError, match=r"rows\.jsonl:3: no JSON schema: 'integr' is not valid"):
        rewards_for("json_schema", {}).check_rows(prompts({"schema": {"type": "integr"}}), "rows.jsonl")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": 3}, "no JSON schema: 3 is not valid"),
        ({"$ref": "http://localhost:9/x.json"}, r"its \$ref http://localhost:9/x.json leads nowhere"),
        ("nowhere.json", "cannot read nowhere.json as JSON"),
        ([1], "is no JSON schema, which is an object"),
    ],
)
def test_what_is_no_schema_is_refused(schema, message):
    with pytest.raises(ConfigError, match=rf"trainer\.grpo\.reward\.schema: .*{message}"):
        get_reward({"name": "json_schema", "schema": schema})
