"""Conversations to tokens, through chat templates that behave as those of real models do."""

from __future__ import annotations

import json
import logging

import pytest

from recipes.data.rows import load_pairs, load_prompts
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import (
    ANSWER,
    CALL,
    EOS,
    QWEN2,
    QWEN3,
    RESULT,
    SYSTEM,
    TEMPLATE,
    TOOL,
    USER,
    encode_chat,
    one_pair,
    one_refusal,
    refused,
    text_of,
    write_rows,
    write_tokenizer,
)

# Writes something into its generation prompt that is not there once the assistant has spoken.
FORGETFUL = TEMPLATE.replace("assistant:", "assistant:the")
# Ends its generation prompt with a space, which is a token there, and part of the first one of a response.
MERGING = TEMPLATE.replace(":", " ")


@pytest.mark.parametrize("template", [FORGETFUL, MERGING], ids=["forgetful", "merging"])
def test_a_template_that_does_not_continue_its_generation_prompt(tmp_path, template):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=template))
    message = refused(load_pairs, write_rows(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}), tokenizer, 100)
    assert "a.jsonl:1" in message and "generation prompt" in message


def ended_by(tmp_path, caplog, template, load, row) -> list[str]:
    """What is said of a template while such rows are read twice."""
    options = {"eos_token": EOS, "chat_template": template}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", **options))
    path = write_rows(tmp_path / "rows.jsonl", row, row)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(load(path, tokenizer, 1000)) == 2
    return [record.getMessage() for record in caplog.records if record.name == "recipes.data.chat"]


READERS = [(load_prompts, {"messages": [USER]}), (load_pairs, {"messages": [USER, ANSWER]})]


@pytest.mark.parametrize(("load", "row"), READERS)
def test_a_template_that_ends_with_another_token_is_said_once(tmp_path, caplog, load, row):
    (said,) = ended_by(tmp_path, caplog, TEMPLATE.replace("<eos>", "<pad>"), load, row)
    assert said == (
        f"the chat template of {tmp_path / 'tokenizer'} ends a response with '<pad>', sampling stops at its eos_token '<eos>', "
        'which such responses never contain: set "eos_token": "<pad>" in tokenizer_config.json of its folder (or of a '
        "copy that model.tokenizer names)"
    )


@pytest.mark.parametrize(("load", "row"), READERS)
def test_a_template_that_ends_with_nothing_is_said_once(tmp_path, caplog, load, row):
    (said,) = ended_by(tmp_path, caplog, TEMPLATE.replace("<eos>", ";"), load, row)
    assert "ends a response with no special token" in said
    assert "write '<eos>' behind the assistant's content in its chat template" in said


@pytest.mark.parametrize(("load", "row"), [*READERS, (load_prompts, {"prompt": "the fox"})])
def test_a_template_that_ends_with_the_end_token_is_not_spoken_of(tmp_path, caplog, load, row):
    template = TEMPLATE if "messages" in row else TEMPLATE.replace("<eos>", "<pad>")
    assert ended_by(tmp_path, caplog, template, load, row) == []


# Tools, calls and variables


def test_tools_and_calls_reach_the_model_and_a_call_is_learnt(tmp_path, families):
    """As OpenAI has them: arguments in JSON text, no content beside them."""
    tokenizer = families["qwen2"]
    pair = one_pair(tmp_path, tokenizer, {"messages": [USER, CALL], "tools": [TOOL]})
    expected = json.loads(json.dumps(TOOL["function"]))
    del expected["strict"]
    written = text_of(tokenizer, pair.prompt.tokens)
    assert json.dumps({"type": "function", "function": expected}) in written and written.endswith("<start>assistant:")
    call = '<call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</call><eos>'
    assert text_of(tokenizer, pair.response) == call
    again = one_pair(tmp_path, tokenizer, {"messages": [USER, CALL, RESULT, ANSWER], "tools": json.dumps([TOOL])})
    assert text_of(tokenizer, again.prompt.tokens).startswith(written + call + "<start>user:<result>2</result>")
    assert text_of(tokenizer, again.response) == "it is 3<eos>"
    llama = one_pair(tmp_path, families["llama"], {"messages": [USER, CALL], "tools": [TOOL]})
    assert text_of(families["llama"], llama.response) == 'add(a=1b="x")<eos>'
    (prompt,) = load_prompts(
        write_rows(tmp_path / "a.jsonl", {"messages": [USER, CALL, RESULT], "tools": [TOOL]}), tokenizer, 1000
    )
    assert text_of(tokenizer, prompt.tokens).endswith(
        "</call><eos><start>user:<result>2</result><eos><start>assistant:"
    )


def test_calls_without_a_function_around_them_and_without_arguments(tmp_path, families):
    for call in ({"name": "add"}, {"function": {"name": "add", "arguments": {}}}, {"name": "add", "arguments": "{}"}):
        pair = one_pair(tmp_path, families["qwen2"], {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        assert text_of(families["qwen2"], pair.response) == '<call>{"name": "add", "arguments": {}}</call><eos>'


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("ab", None),
        ("b", None),
        ("ba", "messages[3] is the result of 'a', and the calls before it that wait for one are none"),
        ("c", "messages[2] is the result of 'c', and the calls before it that wait for one are 'a', 'b'"),
        ("aab", "messages[3] is the result of 'a', and the calls before it that wait for one are 'b'"),
    ],
)
def test_results_stand_in_the_order_of_their_calls(tmp_path, families, results, words):
    """The template does not write which call a result belongs to: the model can tell it by the order alone."""
    calls = [{"id": name, "function": {"name": name, "arguments": {}}} for name in "ab"]
    talk = [USER, {"role": "assistant", "tool_calls": calls}]
    talk += [{**RESULT, "tool_call_id": name, "content": f"fox {name}"} for name in results]
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk})
    if words is None:
        assert len(load_prompts(path, families["qwen2"], 1000)) == 1
    else:
        assert f"{path}:1: {words}" in refused(load_prompts, path, families["qwen2"], 1000)


WRITTEN_NOWHERE = "the chat template does not write "
BAD_TALKS = {
    "template without tools": ("any", {"messages": [USER, ANSWER], "tools": [TOOL]}, WRITTEN_NOWHERE + "tools[0], its name"),
    "template without calls": ("any", {"messages": [USER, {**CALL, "content": "x"}]}, WRITTEN_NOWHERE + "messages[1].tool_c"),
    "content beside calls": (
        "llama", {"messages": [USER, {**CALL, "content": "x"}]}, "messages[1].content, so the model would not see it: leave it"
    ),
    "arguments in no JSON": (
        "qwen2", {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a: 1}"}]}]},
        "messages[1].tool_calls[0]: arguments '{a: 1}' is no JSON: Expecting property name",
    ),
    "arguments twice": (
        "qwen2", {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]},
        "is no JSON: the key 'a' stands twice",
    ),
    "arguments of another kind": (
        "qwen2", {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "messages[1].tool_calls[0]: arguments must be an object or its JSON text, got a list",
    ),
    "a call without a name": (
        "qwen2", {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
        "messages[1].tool_calls[0] names no function",
    ),
    "calls of another kind": ("qwen2", {"messages": [USER, {**CALL, "tool_calls": {"name": "f"}}]}, "must be a list of calls"),
    "tools of another kind": ("qwen2", {"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools must be a list of funct"),
    "a tool without a name": ("qwen2", {"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools[0] names no"),
    "tools in no JSON": ("qwen2", {"messages": [USER, ANSWER], "tools": "add"}, "tools 'add' is no JSON"),
    "nothing beside null": ("qwen2", {"messages": [USER, {**CALL, "tool_calls": []}]}, "messages[1].content must be a string"),
    "a picture among parts": (
        "qwen2", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, ANSWER]},
        "messages[0].content[0] (image_url) is no {",
    ),
    "parts of a string": ("qwen2", {"messages": [{"role": "user", "content": ["x"]}, ANSWER]}, "content[0] (a string) is no {"),
    "a key that is not read": (
        "qwen2", {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinkin": False}},
        "chat_template_kwargs.enable_thinkin: the chat template of",
    ),
    "our own argument": (
        "qwen2", {"messages": [USER, ANSWER], "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs.add_generation_prompt is what the recipe itself tells the chat template",
    ),
    "kwargs of another kind": ("qwen2", {"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "must be an object, got a l"),
    "turns": ("mistral", {"messages": [USER, USER, ANSWER]}, "refuses messages: roles must take turns"),
    "two calls at a time": ("llama", {"messages": [USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}]}, "one call at a time"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TALKS)
def test_a_conversation_that_cannot_be_written_is_one_line(tmp_path, families, chat, name):
    family, row, words = BAD_TALKS[name]
    assert words in one_refusal(tmp_path, load_pairs, families.get(family, chat), row)


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}", "{{ nothing | tojson }}", "{% if %}"],
)
def test_whatever_a_template_raises_is_one_line(tmp_path, fault):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=TEMPLATE + fault))
    for load, talk in ((load_pairs, [USER, ANSWER]), (load_prompts, [USER])):
        message = one_refusal(tmp_path, load, tokenizer, {"messages": talk})
        assert message.startswith(f"the chat template of {tokenizer.path} ")


def test_variables_reach_the_template_and_a_rows_own_go_before_the_runs(tmp_path, families):
    llama, qwen = families["llama"], families["qwen2"]
    section = RowsSection(chat_template_kwargs={"date_string": "1 May"})
    for row, date in (({}, "1 May"), ({"chat_template_kwargs": {"date_string": "2 June", "x": None}}, "2 June")):
        pair = one_pair(tmp_path, llama, {"messages": [USER, ANSWER], **row}, section=section)
        assert text_of(llama, pair.prompt.tokens).startswith(f"<start>system:Today {date}<eos>")
    row = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}
    (prompt,) = load_prompts(write_rows(tmp_path / "a.jsonl", row), qwen, 1000)
    assert list(prompt.tokens) == encode_chat(qwen, [USER], True, enable_thinking=False)
    assert text_of(qwen, prompt.tokens).endswith("<think></think>")
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER]})
    message = refused(load_prompts, path, qwen, 1000, section=section)
    assert (
        message.startswith("data.chat_template_kwargs.date_string: the chat template of") and "enable_think" in message
    )


def test_text_parts_are_one_text(tmp_path, chat):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "1 + 2 ?", "cache_control": None}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    pair = one_pair(tmp_path, chat, row)
    assert pair.prompt.tokens == one_pair(tmp_path, chat, {"messages": [USER, ANSWER]}).prompt.tokens


def test_one_of_several_templates_is_chosen(tmp_path, families):
    folder = write_tokenizer(tmp_path / "several", eos_token=EOS)
    (folder / "additional_chat_templates").mkdir()
    for name, template in (("plain", TEMPLATE), ("tools", QWEN2)):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    message = one_refusal(tmp_path, load_prompts, tokenizer, {"messages": [USER]})
    assert message.endswith("none of them is the default: choose one by data.chat_template=plain or tools")
    tokenizer.template.choose("tools")
    assert encode_chat(tokenizer, [USER], True) == encode_chat(families["qwen2"], [USER], True)
    tokenizer.save(tmp_path / "saved")
    assert encode_chat(load_tokenizer(tmp_path / "saved"), [USER], True) == encode_chat(tokenizer, [USER], True)
    own = tmp_path / "own.jinja"
    own.write_text(QWEN3)
    tokenizer.template.choose(str(own))
    assert encode_chat(tokenizer, [USER, ANSWER], False) == encode_chat(families["qwen3"], [USER, ANSWER], False)
    words = refused(load_tokenizer(folder).template.choose, "plian")
    assert words.startswith("data.chat_template=plian: no file that can be read") and words.endswith("plain, tools")


# All turns


def spans(pair) -> list[int]:
    """Places of learnt tokens in prompt and response together."""
    learnt = pair.learnt or (True,) * len(pair.response)
    return [len(pair.prompt.tokens) + i for i, it in enumerate(learnt) if it]


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "any"])
def test_all_turns_learn_what_each_turn_alone_would_learn(tmp_path, families, chat, family):
    """The learnt tokens are those of the rows that end with each of the assistant's messages, and no others."""
    tokenizer = families.get(family, chat)
    talk = [] if family == "mistral" else [SYSTEM]
    for text in ("it is 3", "fox", "the quick brown"):
        talk += [{**USER, "content": f"what is {text} ?"}, {**ANSWER, "content": text}]
    if family == "qwen2":
        talk += [USER, CALL, RESULT, ANSWER]
    whole = one_pair(tmp_path, tokenizer, {"messages": talk}, all_turns=True)
    tokens, expected = (*whole.prompt.tokens, *whole.response), []
    for place, message in enumerate(talk):
        if message["role"] == "assistant":
            single = one_pair(tmp_path, tokenizer, {"messages": talk[: place + 1]})
            assert single.learnt is None and tokens[: len(single.prompt.tokens)] == single.prompt.tokens
            assert [tokens[i] for i in spans(single)] == list(single.response)
            expected += spans(single)
    assert spans(whole) == expected and whole.num_learnt == len(expected) and whole.learnt[0]
    last = one_pair(tmp_path, tokenizer, {"messages": talk})
    assert (*last.prompt.tokens, *last.response) == tokens and spans(last) == spans(single)


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_with_a_remedy(tmp_path, families):
    talk = [USER, ANSWER, {**USER, "content": "the fox"}, ANSWER]
    for name, row in (("qwen3", {"messages": talk}), ("mistral", {"messages": [SYSTEM, *talk]})):
        assert one_pair(tmp_path, families[name], row, all_turns=False)
        message = one_refusal(tmp_path, load_pairs, families[name], row, all_turns=True)
        assert message.startswith(f"the chat template of {families[name].path} writes messages[")
        assert "otherwise once the conversation goes on" in message and "set data.train_on_turns=last" in message
    assert one_pair(tmp_path, families["qwen3"], {"messages": [USER, ANSWER]}, all_turns=True).learnt is None


def test_an_empty_turn_is_not_learnt_in_silence(tmp_path, chat):
    row = {"messages": [USER, {**ANSWER, "content": ""}, USER, ANSWER]}
    assert one_pair(tmp_path, chat, row).learnt is None
    message = one_refusal(tmp_path, load_pairs, chat, row, all_turns=True)
    assert message == "the content of messages[1] is empty, and it is to be learnt"
    message = one_refusal(tmp_path, load_pairs, chat, {"messages": [ANSWER, USER, ANSWER]}, all_turns=True)
    assert message == "messages needs at least one message before the assistant's"
