"""Calls are read as the chat template writes them."""

from __future__ import annotations

import json

import pytest
import torch

from recipes.data.errors import DataError
from recipes.environments.tool_calls import ToolFormat, call_id

FORMATS = {
    "qwen2": ToolFormat("<call>", "name", "arguments", False),
    "qwen3": ToolFormat("<call>", "name", "arguments", False),
    "llama31": ToolFormat("", "name", "parameters", False),
    "mistral3": ToolFormat("[TOOL_CALLS]", "name", "arguments", False),
}


@pytest.mark.parametrize("family", FORMATS)
def test_the_template_says_how_calls_are_written(family, families):
    assert ToolFormat.of(families[family].template) == FORMATS[family]


@pytest.mark.parametrize("family", FORMATS)
def test_what_the_template_writes_is_read_back(family, families, rng):
    template, turn = families[family].template, int(torch.randint(20, (), generator=rng))
    count = 1 if family == "llama31" else 1 + int(torch.randint(3, (), generator=rng))
    numbers = torch.randint(999, (count,), generator=rng).tolist()
    calls = [
        {"id": call_id(turn, i), "type": "function",
         "function": {"name": f"tool{n}", "arguments": {"a": n, "b": f'"{n}" {{x}}'}}}
        for i, n in enumerate(numbers)
    ]  # fmt: skip
    asked = {"role": "user", "content": "go"}
    tool = {"type": "function", "function": {"name": "tool", "parameters": {}}}
    before = template.render([asked], True, [tool])
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    text = template.render([asked, said], False, [tool]).removeprefix(before)
    found = ToolFormat.of(template).calls(text, turn)
    assert [(c.name, dict(c.arguments), c.id, c.complaint) for c in found] == [
        (c["function"]["name"], c["function"]["arguments"], c["id"], None) for c in calls
    ]
    assert ToolFormat.of(template).calls("the answer is {42}", turn) == []


def test_a_call_that_cannot_be_read_has_a_complaint():
    form, bare = FORMATS["qwen2"], FORMATS["llama31"]
    said = 'a<call>{"name": "f", "arguments": </call><call>[1, {"name": 3}]<call>{"name": "g", "arguments": [1]}</call>'
    found = form.calls(said, 2)
    assert [c.name for c in found] == ["", "", "", "g"] and [c.id for c in found] == [call_id(2, i) for i in range(4)]
    assert [c.complaint and c.complaint.split(":")[0] for c in found] == [
        "no JSON", 'no object with a "name" of letters, digits and . _ -', 'no object with a "name" of letters, digits and . _ -',
        '"arguments" is no object',
    ]  # fmt: skip
    (text,) = form.calls('<call>{"name": "f", "arguments": ' + json.dumps('{"a": 1}') + "}", 0)
    assert text.arguments == {"a": 1} and text.complaint is None
    said = '<call>{"name": "f"}{"name": "g"}</call><call>{"name": "\\ud800"}<call>{"name": "a\\n"}'
    assert [(c.name, c.complaint and c.complaint[:12]) for c in form.calls(said, 0)] == [
        ("f", None), ("", "another call"), ("", "no JSON: 'ut"), ("", "no object wi"),
    ]  # fmt: skip
    (deep,) = bare.calls('{"name":' + "[" * 100_000, 0)
    assert deep.complaint.startswith("no JSON")


def test_a_template_with_another_form_is_refused(families):
    with pytest.raises(DataError, match="not as JSON with its name and arguments"):
        ToolFormat.of(families["llama"].template)
