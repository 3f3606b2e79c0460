"""Rows of JSONL files to prompts and pairs."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.errors import DataError
from recipes.data.keys import HARMLESS
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import (
    ANSWER,
    EOS,
    USER,
    encode_chat,
    refused,
    write_rows,
    write_tokenizer,
    write_unigram,
    write_words,
)
from tests.recipe_runs import ROOT


def test_prompts_keep_row_and_line(tmp_path, chat):
    path = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "the fox", "answer": 3},
        "",
        {"messages": [USER], "prompt": None, "level": "easy"},
    )
    first, second = load_prompts(path, chat, 100)
    assert first.tokens == tuple(chat.encode("the fox"))
    assert first.row["answer"] == 3 and first.line == 1
    assert second.tokens == tuple(encode_chat(chat, [USER], True))
    assert second.row["level"] == "easy" and second.line == 3
    with pytest.raises(AttributeError):
        first.line = 2


BAD_PROMPTS = {
    "neither": ({"text": "x"}, ["neither prompt nor messages", "text"]),
    "both": ({"prompt": "x", "messages": [USER]}, ["both"]),
    "null": ({"prompt": None}, ["neither"]),
    "number": ({"prompt": 3}, ["prompt must be a string", "a number"]),
    "conversation as prompt": ({"prompt": [USER]}, ["prompt must be a string", "messages"]),
    "empty": ({"prompt": ""}, ["prompt is empty"]),
    "surrogate": ('{"prompt": "\\ud800"}', ["surrogate"]),
    "messages not a list": ({"messages": "hi"}, ["messages must be a list", "a string"]),
    "no messages": ({"messages": []}, ["messages is empty"]),
    "message not an object": ({"messages": [USER, "x"]}, ["messages[1]", "a string"]),
    "no role": ({"messages": [{"content": "x"}]}, ["messages[0] has no role"]),
    "no content": ({"messages": [{"role": "user"}]}, ["messages[0] has no content"]),
    "content not text": ({"messages": [{"role": "user", "content": None}]}, ["messages[0].content", "null"]),
    "empty content": ({"messages": [{"role": "user", "content": ""}]}, ["messages[0]", "empty"]),
    "assistant last": ({"messages": [USER, ANSWER]}, ["assistant"]),
    "template refuses": ({"messages": [{"role": "robot", "content": "x"}]}, ["no robots"]),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_name_the_line(tmp_path, chat, name):
    row, words = BAD_PROMPTS[name]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "fine"}, "", row)
    message = refused(load_prompts, path, chat, 100)
    assert message.startswith(f"{path}:3: ")
    for word in words:
        assert word in message, message


def test_prompt_length_limit(tmp_path, plain):
    tokens = len(plain.encode("the quick brown fox"))
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the quick brown fox"})
    assert len(load_prompts(path, plain, tokens)) == 1
    message = refused(load_prompts, path, plain, tokens - 1)
    assert (
        f"{tokens} tokens" in message and f"data.max_prompt_length={tokens - 1}" in message and "a.jsonl:1" in message
    )


def test_messages_without_a_template_name_the_line(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER]})
    message = refused(load_prompts, path, plain, 100)
    assert "a.jsonl:1" in message and "no chat template" in message


def test_a_prompt_that_encodes_to_nothing(tmp_path, folder):
    words = load_tokenizer(write_words(folder / "words", {EOS: 0, "fox": 1, "?": 2}))
    assert words.encode("fox dog") == [1, 2]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "  \t"})
    message = refused(load_prompts, path, words, 100)
    assert "a.jsonl:1" in message and "no token" in message


# Pairs


def test_pairs_end_with_eos_once(tmp_path, plain):
    path = write_rows(
        tmp_path / "a.jsonl", {"prompt": "the", "response": " fox"}, {"prompt": "the", "response": f" fox{EOS}"}
    )
    first, second = load_pairs(path, plain, 100)
    assert first.prompt.tokens == tuple(plain.encode("the"))
    assert first.response == (*plain.encode(" fox"), plain.eos_id)
    assert second.response == first.response and (first.prompt.line, second.prompt.line) == (1, 2)


def test_conversations_are_cut_at_the_last_answer(tmp_path, chat):
    talk = [{"role": "system", "content": "the quick"}, USER, ANSWER, USER, ANSWER]
    (pair,) = load_pairs(write_rows(tmp_path / "a.jsonl", {"messages": talk}), chat, 1000)
    assert pair.prompt.tokens + pair.response == tuple(encode_chat(chat, talk, False))
    assert pair.prompt.tokens == tuple(encode_chat(chat, talk[:-1], True))
    assert chat.decode(pair.response) == "it is 3" and pair.response[-1] == chat.eos_id


BAD_PAIRS = {
    "no response": ({"prompt": "x", "answer": "3"}, ["no response"]),
    "empty response": ({"prompt": "x", "response": ""}, ["response is empty"]),
    "response not text": ({"prompt": "x", "response": 3}, ["response must be a string", "a number"]),
    "empty prompt": ({"prompt": "", "response": "x"}, ["prompt is empty"]),
    "neither": ({"response": "x"}, ["neither prompt nor messages"]),
    "user last": ({"messages": [USER]}, ["must be the assistant's", "user"]),
    "only the assistant": ({"messages": [ANSWER]}, ["at least one message before"]),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["messages[1]", "empty"]),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_name_the_line(tmp_path, chat, name):
    row, words = BAD_PAIRS[name]
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "fine", "response": "fine"}, row)
    message = refused(load_pairs, path, chat, 100)
    assert message.startswith(f"{path}:2: ")
    for word in words:
        assert word in message, message


def test_pair_length_limit_counts_eos(tmp_path, plain):
    prompt, response = len(plain.encode("the")), len(plain.encode(" fox")) + 1
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the", "response": " fox"})
    assert len(load_pairs(path, plain, prompt + response)) == 1
    message = refused(load_pairs, path, plain, prompt + response - 1)
    assert f"{prompt} + {response} tokens" in message
    assert f"model.encoder_seq_length={prompt + response - 1}" in message


# Keys

PAIR, TALK = {"prompt": "the", "response": " fox"}, {"messages": [USER, ANSWER]}
# (a row of SFT, what is said of it): in other tools these reach the model.
UNREAD_PAIRS = {
    "system": (PAIR | {"system": "be kind"}, "nothing reads the key system: write it as the first of messages"),
    "history": (PAIR | {"history": [["a", "b"]]}, "nothing reads the key history: write its turns into messages"),
    "instruction": (
        PAIR | {"instruction": "x"},
        "nothing reads the key instruction: write what the model reads as prompt",
    ),
    "images": (
        TALK | {"images": ["a.png"]},
        "the row has images, but data.video is not set",
    ),
    "videos": (TALK | {"videos": ["a.mp4"]}, "the row has videos, but data.video is not set"),
    "video": (TALK | {"video": "a.mp4"}, "the row has a video, but data.video is not set"),
    "tools beside prompt": (PAIR | {"tools": [{"name": "f"}]}, "nothing reads the key tools: a chat template reads it"),
    "kwargs beside prompt": (
        PAIR | {"chat_template_kwargs": {"a": 1}},
        "nothing reads the key chat_template_kwargs: a chat",
    ),
    "response beside messages": (TALK | {"response": "x"}, "what is learnt of a conversation is its last message"),
    "misspelt": (PAIR | {"Prompt": "x"}, "nothing reads the key Prompt: did you mean prompt?"),
    "of nobody": (PAIR | {"weight": 2}, "nothing reads the key weight: remove it, or name it in data.ignored_keys"),
    "sharegpt": (
        {"conversations": [{"from": "human"}]},
        "(only conversations); a row carries exactly one of them; convers",
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, "output: write what is learnt as response"),
}


@pytest.mark.parametrize("name", UNREAD_PAIRS)
def test_what_another_tool_would_give_the_model_is_refused_with_a_remedy(tmp_path, chat, name):
    row, words = UNREAD_PAIRS[name]
    path = write_rows(tmp_path / "a.jsonl", PAIR, row)
    message = refused(load_pairs, path, chat, 1000)
    assert message.startswith(f"{path}:2: ") and words in message


def test_harmless_keys_and_nulls_are_left_alone(tmp_path, chat):
    harmless = {key: {"any": [1, None]} for key in HARMLESS - {"response"}}
    absent = dict.fromkeys(("system", "images", "tools", "weight"))
    path = write_rows(tmp_path / "a.jsonl", PAIR | harmless | absent, TALK | harmless | absent)
    assert len(load_pairs(path, chat, 1000)) == 2


def test_the_page_names_every_harmless_key():
    (line,) = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("| `id`, ")]
    assert set(re.findall("`(.*?)`", line.split("|")[1])) == HARMLESS - {"answer", "response"}


def test_ignored_keys_are_not_read_and_the_reward_gets_them(tmp_path, chat):
    row = {"prompt": "the fox", "messages": [{**USER, "name": "Ann"}], "system": "be kind", "weight": 2}
    ignored = RowsSection(ignored_keys=["prompt", "system", "weight", "messages.name"])
    path = write_rows(tmp_path / "a.jsonl", row)
    (prompt,) = load_prompts(path, chat, 1000, None, ignored, ())
    assert list(prompt.tokens) == encode_chat(chat, [USER], True) and prompt.row == row
    assert "both prompt and messages" in refused(load_prompts, path, chat, 1000)


@pytest.mark.parametrize(
    ("reward_keys", "key", "words"),
    [
        (("answer",), "solution", "nothing reads the key solution: remove it"),
        (("solution",), "solution", None),
        ((), "question", "nothing reads the key question: write what the model reads as prompt"),
        (("system",), "system", None),
        (None, "solution", None),
        (None, "system", "nothing reads the key system: write it as the first of messages"),
        (None, "images", "the row has images, but data.video is not set"),
        ((), "response", None),
        ((), "answer", None),
    ],
)
def test_a_key_of_grpo_is_the_rewards_or_refused(tmp_path, chat, reward_keys, key, words):
    """One that does not say what it reads is handed the row: only what is meant for the model is refused then."""
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the fox", key: "x"})
    if words is None:
        assert load_prompts(path, chat, 1000, reward_keys=reward_keys)[0].row[key] == "x"
    else:
        message = refused(load_prompts, path, chat, 1000, reward_keys=reward_keys)
        assert message.startswith(f"{path}:1: {words}")


@given(
    key=st.text(min_size=1, max_size=12).filter(lambda key: key not in HARMLESS | {"prompt", "response", "messages"}),
    value=st.one_of(st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2)),
    talk=st.booleans(),
)
@settings(max_examples=60)
def test_no_key_is_ignored_in_silence(tmp_path_factory, chat, key, value, talk):
    path = write_rows(tmp_path_factory.getbasetemp() / "drawn.jsonl", (TALK if talk else PAIR) | {key: value})
    refused(load_pairs, path, chat, 1000)
    refused(load_prompts, path, chat, 1000, reward_keys=())


def test_settings_of_conversations_without_one_are_refused(tmp_path, chat):
    path = write_rows(tmp_path / "a.jsonl", PAIR)
    section = RowsSection(chat_template_kwargs={"enable_thinking": False})
    message = refused(load_pairs, path, chat, 1000, section=section)
    assert message == f"data.chat_template_kwargs is set, and no row of {path} has messages: leave it out"


# Prompt and response together

TEXT = "def f(x):\n    return print(1)  # naïve 漢字 👍🏽 the quick\tbrown fox ? it is 3"


@pytest.fixture(scope="module")
def unigram(folder):
    return load_tokenizer(write_unigram(folder / "unigram", [TEXT]))


KINDS = ["plain", "sentencepiece", "unigram"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_pair_are_those_of_the_text_or_it_is_refused(tmp_path, request, kind):
    """Wherever it is cut; and text comes back as it was cut."""
    tokenizer, read = request.getfixturevalue(kind), 0
    whole = tokenizer.encode_prompt(TEXT)
    for cut in range(1, len(TEXT)):
        path = write_rows(tmp_path / "a.jsonl", {"prompt": TEXT[:cut], "response": TEXT[cut:]})
        try:
            (pair,) = load_pairs(path, tokenizer, 1000)
        except DataError as error:
            assert f"{path}:1: " in str(error) and "otherwise when" in str(error)
            start = tokenizer.encode_prompt(TEXT[:cut])
            assert whole[: len(start)] != start
            continue
        read += 1
        prompt, response = pair.prompt.tokens, pair.response
        assert [*prompt, *response] == [*whole, tokenizer.eos_id]
        assert tokenizer.decode(prompt) == TEXT[:cut] and tokenizer.decode_response(prompt, response) == TEXT[cut:]
    assert read > 20


@given(data=st.data(), kind=st.sampled_from(KINDS), text=st.text("the qui\n漢é👍(1)", min_size=2, max_size=30))
@settings(max_examples=150)
def test_drawn_texts_lose_nothing_where_they_are_cut(request, tmp_path_factory, unigram, data, kind, text):
    """A tokenizer may lose something by itself, such as the first space of a text; a cut adds nothing to that."""
    tokenizer, cut = request.getfixturevalue(kind), data.draw(st.integers(1, len(text) - 1))
    path = write_rows(tmp_path_factory.getbasetemp() / "cut.jsonl", {"prompt": text[:cut], "response": text[cut:]})
    try:
        (pair,) = load_pairs(path, tokenizer, 1000)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ")
        return
    whole, prompt = tokenizer.encode_prompt(text), pair.prompt.tokens
    assert [*prompt, *pair.response] == [*whole, tokenizer.eos_id]
    assert tokenizer.decode(prompt) + tokenizer.decode_response(prompt, pair.response) == tokenizer.decode(whole)


def test_a_prompt_may_end_within_a_word_of_sentencepiece(tmp_path, sentencepiece):
    path = write_rows(
        tmp_path / "a.jsonl", {"prompt": "print(", "response": "1)"}, {"prompt": "print(", "response": " 1)"}
    )
    texts = [sentencepiece.decode([*p.prompt.tokens, *p.response]) for p in load_pairs(path, sentencepiece, 1000)]
    assert texts == ["print(1)", "print( 1)"]


def test_a_token_across_the_cut_is_refused_with_a_remedy(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the ", "response": "fox"})
    message = refused(load_pairs, path, plain, 1000)
    assert message.startswith(f"{path}:1: tokenizer {plain.path} reads 'the ' otherwise when 'fox' follows")
    assert message.endswith("white space goes to the beginning of what follows")


def test_a_character_that_the_tokenizer_would_leave_out_is_refused(tmp_path):
    """A byte-level vocabulary that was not given all bytes: it says nothing, and "x" is gone."""
    folder = write_tokenizer(tmp_path / "few", eos_token=EOS)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    del state["model"]["vocab"]["x"]
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "x" not in "".join(m)]
    state["model"]["vocab"] = {token: i for i, token in enumerate(t for t in state["model"]["vocab"] if "x" not in t)}
    file.write_text(json.dumps(state))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fo"
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "the", "response": " fox"})
    assert f"{path}:1: " in (message := refused(load_pairs, path, tokenizer, 1000)) and "no token for 'x'" in message
    path = write_rows(tmp_path / "b.jsonl", {"prompt": "the fox"})
    assert "no token for 'x'" in refused(load_prompts, path, tokenizer, 1000)
