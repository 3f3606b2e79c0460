"""Every message, key and tool of a conversation is among the tokens, or it is refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.errors import DataError
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import (
    ANSWER,
    CALL,
    EOS,
    SYSTEM,
    TEMPLATE,
    USER,
    one_pair,
    one_refusal,
    refused,
    text_of,
    write_rows,
    write_tokenizer,
)


@pytest.mark.parametrize("role", ["human", "User", "developer", "gpt", "", "ipython"])
@pytest.mark.parametrize("content", ["what is 1 + 2 ?", "", "user", "it is 3"])
@pytest.mark.parametrize("before", [[], [SYSTEM], [USER, ANSWER]], ids=["first", "after the system", "in the middle"])
def test_a_message_of_a_role_that_the_template_drops_is_refused(tmp_path, families, role, content, before):
    """Whatever it says, also where the same words stand elsewhere in the conversation."""
    talk = [*before, {"role": role, "content": content}]
    for name in ("qwen2", "qwen3"):
        for load, row in ((load_prompts, [*talk, USER]), (load_pairs, [*talk, USER, ANSWER])):
            message = one_refusal(tmp_path, load, families[name], {"messages": row})
            place = f"messages[{len(before)}] (role {role!r})"
            assert message.startswith(
                f"the chat template does not write {place}, so the model would not see it: give it a role"
            )


def test_a_role_that_the_template_takes_for_another_is_refused(tmp_path):
    """Who is not the user is the assistant, says this one, and would teach the user's words."""
    template = (
        "{% for m in messages %}{{ '<start>u:' if m.role == 'user' else '<start>a:' }}{{ m.content }}<eos>{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<start>a:{% endif %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=template))
    message = one_refusal(tmp_path, load_pairs, tokenizer, {"messages": [{**USER, "role": "human"}, ANSWER]})
    assert "writes messages[0] as it would with any role that it does not know: 'human' is none of its roles" in message
    assert one_pair(tmp_path, tokenizer, {"messages": [USER, ANSWER]}).learnt is None


def test_a_message_that_one_text_makes_the_template_drop_is_refused(tmp_path, chat):
    """The shape of the conversation is known and good; what is written depends on the text."""
    template = TEMPLATE.replace(
        "<start>{{ m.role }}:{{ m.content }}<eos>", "{% if 'fox' not in m.content %}{}{% endif %}"
    )
    template = template.replace("{}", "<start>{{ m.role }}:{{ m.content }}<eos>")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=template))
    path = write_rows(
        tmp_path / "a.jsonl", {"messages": [SYSTEM, USER]}, {"messages": [{**SYSTEM, "content": "the fox"}, USER]}
    )
    assert f"{path}:2: the chat template does not write messages[0]" in refused(load_prompts, path, tokenizer, 1000)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (0, "name", "Ann"), (1, "weight", 0), (1, "train", False), (1, "loss", 1.0), (0, "documents", [{"text": "x"}]),
        (1, "reasoning_content", "hm"), (0, "reasoning_content", "hm"), (0, "tool_calls", CALL["tool_calls"]),
        (1, "function_call", {"name": "add", "arguments": "{}"}), (0, "images", ["a.png"]),
    ],
)  # fmt: skip
def test_a_key_of_a_message_that_the_template_does_not_read_is_refused(tmp_path, families, place, key, value):
    talk = [USER, ANSWER]
    talk[place] = talk[place] | {key: value}
    message = one_refusal(tmp_path, load_pairs, families["qwen2"], {"messages": talk})
    assert message.startswith(f"the chat template does not write messages[{place}].{key}")
    if key != "tool_calls":
        assert f"name messages.{key} in data.ignored_keys" in message
    ignored = RowsSection(ignored_keys=[f"messages.{key}"])
    pair = one_pair(tmp_path, families["qwen2"], {"messages": talk}, section=ignored)
    assert text_of(families["qwen2"], pair.response) == "it is 3<eos>"


@pytest.mark.parametrize("nothing", ["", [], {}, None])
def test_a_key_that_says_nothing_is_left_alone(tmp_path, families, nothing):
    talk = [{**USER, "name": nothing}, {**ANSWER, "reasoning_content": nothing, "tool_calls": nothing or None}]
    pair = one_pair(tmp_path, families["qwen2"], {"messages": talk})
    assert text_of(families["qwen2"], pair.response) == "it is 3<eos>"


def test_thinking_counts_where_it_was_said_and_may_be_dropped_later(tmp_path, families):
    """Qwen 3 writes it in the turn itself, and leaves it out once the user goes on."""
    thought, tokenizer = {**ANSWER, "reasoning_content": "1 + 2"}, families["qwen3"]
    pair = one_pair(tmp_path, tokenizer, {"messages": [USER, thought]})
    assert text_of(tokenizer, pair.response) == "<think>1 + 2</think>it is 3<eos>"
    pair = one_pair(tmp_path, tokenizer, {"messages": [USER, thought, USER, ANSWER]})
    assert text_of(tokenizer, pair.prompt.tokens).count("it is 3<eos>") == 1 and "1 + 2</think>" not in text_of(
        tokenizer, pair.prompt.tokens
    )
    assert "messages[0].reasoning_content" in one_refusal(
        tmp_path, load_pairs, tokenizer, {"messages": [{**USER, "reasoning_content": "1 + 2"}, ANSWER]}
    )


def test_what_is_learnt_is_what_the_row_says(tmp_path):
    """A template that leaves out thinking everywhere, as that of DeepSeek-R1's children, would teach answers without it."""
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", eos_token=EOS, chat_template=template))
    thinking = {**ANSWER, "content": "<think>1 + 2</think>it is 3"}
    message = one_refusal(tmp_path, load_pairs, tokenizer, {"messages": [USER, thinking]})
    assert f"the chat template of {tokenizer.path} changes messages[1] of the assistant's" in message
    earlier = one_pair(tmp_path, tokenizer, {"messages": [USER, thinking, USER, ANSWER]})
    assert "think" not in text_of(tokenizer, earlier.prompt.tokens)


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "User", "developer", "function"])
WORD = st.text("abcdefghij", min_size=4, max_size=8)


@st.composite
def talks(draw):
    """Conversations of drawn roles, with drawn keys; texts are words that stand nowhere else."""
    messages = []
    for i in range(draw(st.integers(0, 3))):
        message = {"role": draw(ROLES), "content": f"{draw(WORD)}{i}"}
        if draw(st.booleans()):
            key = draw(st.sampled_from(["name", "reasoning_content", "tool_calls", "weight", "audio", "thought"]))
            call = [{"name": f"{draw(WORD)}{i}", "arguments": {f"{draw(WORD)}{i}": draw(WORD)}}]
            message[key] = call if key == "tool_calls" else draw(st.one_of(WORD, st.integers(), st.booleans()))
        messages.append(message)
    row = {"messages": [*messages, USER, ANSWER]}
    if draw(st.booleans()):
        row[draw(st.sampled_from(["tools", "documents", "functions"]))] = [
            {"name": draw(WORD), "description": draw(WORD)}
        ]
    return row


@given(row=talks(), family=st.sampled_from(["qwen2", "qwen3", "llama", "mistral", "any"]))
@settings(max_examples=150)
def test_nothing_that_the_model_would_not_see_is_silent(tmp_path_factory, families, chat, row, family):
    """A drawn conversation is refused in one line, or every word of it is among the tokens."""
    tokenizer = families.get(family, chat)
    path = write_rows(tmp_path_factory.getbasetemp() / "drawn.jsonl", row)
    try:
        (pair,) = load_pairs(path, tokenizer, 10_000)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ") and "\n" not in str(error)
        return
    seen = text_of(tokenizer, (*pair.prompt.tokens, *pair.response))

    def words(value):
        if isinstance(value, dict):
            return [w for key, v in value.items() if key != "role" for w in words(v)]
        return [w for v in value for w in words(v)] if isinstance(value, list) else [str(value)]

    later = {m["reasoning_content"] for m in row["messages"][:-2] if isinstance(m.get("reasoning_content"), str)}
    assert all(word in seen for word in words(row) if word not in later)
    assert set(row) <= {"messages", "tools"}
    assert not later or family == "qwen3", "thinking of earlier turns is dropped by that one alone"
