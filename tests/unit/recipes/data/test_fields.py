"""Rows with keys of other programs, prompts that a user says, system prompts, and rows that are too long."""

from __future__ import annotations

import logging
import random

import pytest

from megatron_ext.errors import UserError
from recipes.data.reader import Opening
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.settings import RowsSection
from tests.data_cases import ANSWER, SYSTEM, USER, encode_chat, refused, write_rows

GSM8K = {"prompt": "question", "response": "solution"}


def prompts(path, tokenizer, limit=100, **section):
    return load_prompts(path, tokenizer, limit, section=RowsSection(**section), reward_keys=["answer"])


def test_rows_by_other_names_are_those_by_ours(tmp_path, plain):
    theirs = write_rows(tmp_path / "theirs.jsonl", {"question": "the fox", "solution": " it is 3", "id": 1})
    ours = write_rows(tmp_path / "ours.jsonl", {"prompt": "the fox", "response": " it is 3", "id": 1})
    expected = load_pairs(ours, plain, 100)
    assert [p.content for p in load_pairs(theirs, plain, 100, section=RowsSection(fields=GSM8K))] == [
        p.content for p in expected
    ]
    # What a stopped run has written of its batch has our names, and is read with the same settings.
    assert load_pairs(ours, plain, 100, section=RowsSection(fields=GSM8K)) == expected


def test_names_may_change_places_and_stand_within_objects(tmp_path, plain, chat):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "it is 3", "response": "the fox"})
    (pair,) = load_pairs(path, plain, 100, section=RowsSection(fields={"prompt": "response", "response": "prompt"}))
    assert pair.prompt.tokens == tuple(plain.encode("the fox"))
    verl = {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "3"}, "data_source": "sums"}
    fields = {"messages": "prompt", "answer": "reward_model.ground_truth"}
    path = write_rows(tmp_path / "b.jsonl", verl, {"prompt": [USER], "reward_model": {"ground_truth": "4"}})
    first, second = prompts(path, chat, fields=fields, ignored_keys=["reward_model"])
    assert first.row == {
        "messages": [USER], "answer": "3", "reward_model": {"style": "rule"}, "data_source": "sums"
    }  # fmt: skip
    assert second.row == {"messages": [USER], "answer": "4"} and first.tokens == tuple(encode_chat(chat, [USER], True))
    assert "b.jsonl:1: nothing reads the key reward_model" in refused(prompts, path, chat, fields=fields)
    dotted = write_rows(tmp_path / "c.jsonl", {"a.b": "the fox", "a": {"b": "a dog"}})
    (prompt,) = prompts(dotted, plain, fields={"prompt": "a.b"}, ignored_keys=["a"])
    assert prompt.row["prompt"] == "the fox"


def test_a_name_that_no_row_has(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", "", {"prompt": "the fox", "id": 1}, {"prompt": "the dog"})
    assert refused(prompts, path, plain, fields={"answer": "solution"}) == (
        f"{path}:2: the row has no solution, which data.fields.answer reads, and no other row of {path} has it; it has prompt, id"
    )
    message = refused(prompts, path, plain, fields={"prompt": "question", "answer": "prompt"})
    assert message.startswith(f"{path}:2: neither prompt nor messages (only id, answer)")
    assert message.endswith("; data.fields.prompt reads question, which the row lacks")
    path = write_rows(tmp_path / "b.jsonl", {"prompt": "the fox"}, {"prompt": "the fox", "solution": "3"})
    assert [p.row.get("answer") for p in prompts(path, plain, fields={"answer": "solution"})] == [None, "3"]
    path = write_rows(tmp_path / "c.jsonl", {"prompt": "x", "question": "the fox"})
    assert "c.jsonl:1: the row has prompt, and question, which" in refused(
        prompts, path, plain, fields={"prompt": "question"}
    )
    with pytest.raises(UserError, match="data.fields reads text under two names"):
        RowsSection(fields={"prompt": "text", "response": "text"})


def test_a_prompt_that_a_user_says(tmp_path, chat):
    row = {"prompt": USER["content"], "response": ANSWER["content"], "answer": "3"}
    said = RowsSection(prompt_as_message=True, system_prompt=SYSTEM["content"])
    flat, talk = write_rows(tmp_path / "a.jsonl", row), write_rows(tmp_path / "b.jsonl", {"messages": [USER, ANSWER]})
    (one,), (other,) = load_pairs(flat, chat, 100, section=said), load_pairs(talk, chat, 100, section=said)
    assert one.content == other.content
    assert one.prompt.tokens == tuple(encode_chat(chat, [SYSTEM, USER], True))
    (prompt,) = load_prompts(flat, chat, 100, section=said, reward_keys=["answer"])
    assert prompt.tokens == one.prompt.tokens and prompt.row == row
    assert [m["role"] for m in prompt.talk.messages] == ["system", "user"]
    del row["response"]
    message = refused(load_pairs, write_rows(tmp_path / "c.jsonl", row), chat, 100, section=said)
    assert message.startswith(f"{tmp_path / 'c.jsonl'}:1: the last of messages must be the assistant's")


def test_a_system_prompt_needs_a_conversation_without_one(tmp_path, chat):
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER]}, {"messages": [SYSTEM, USER]})
    assert "a.jsonl:2: messages begin with a system message, and data.system_prompt is set" in refused(
        prompts, path, chat, system_prompt="be brief"
    )
    path = write_rows(tmp_path / "b.jsonl", {"prompt": "the fox"})
    assert (
        "b.jsonl:1: data.system_prompt begins conversations, and the row's prompt is plain text: set data.prompt_as_message"
        in (refused(prompts, path, chat, system_prompt="be brief"))
    )
    section, opening = RowsSection(system_prompt="be brief"), Opening(lambda row: [USER])
    assert "data.system_prompt is set, and trainer.grpo.environment writes prompts itself" in refused(
        load_prompts, path, chat, 100, None, section, (), opening
    )
    with pytest.raises(UserError, match="data.system_prompt is empty"):
        RowsSection(system_prompt="")


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path, plain, caplog, monkeypatch):
    lengths = [random.randrange(1, 9) for _ in range(60)] + [1, 8]
    rows = [{"prompt": "fox" + " fox" * (n - 1), "response": " it", "id": i} for i, n in enumerate(lengths)]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    tokens = [len(plain.encode(row["prompt"])) for row in rows]
    limit = sorted(tokens)[30]
    kept, long = ([i for i, t in enumerate(tokens) if (t <= limit) == fits] for fits in (True, False))
    with caplog.at_level(logging.WARNING):
        assert [p.row["id"] for p in prompts(path, plain, limit)] == kept
    assert [r.getMessage() for r in caplog.records] == [
        f"{len(long)} of {len(rows)} rows of {path} are left out as too long; the first is {path}:{long[0] + 1}: the prompt has "
        f"{tokens[long[0]]} tokens, more than data.max_prompt_length={limit}: shorten it or raise the limit"
    ]  # fmt: skip
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    whole = [len(p.prompt.tokens) + len(p.response) for p in load_pairs(path, plain, 10**6)]
    cut = sorted(whole)[30]
    assert [p.prompt.row["id"] for p in load_pairs(path, plain, cut)] == [i for i, t in enumerate(whole) if t <= cut]
    assert not caplog.records  # said by one rank


def test_too_long_may_be_refused(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "fox"}, {"prompt": "the quick brown fox"})
    tokens = len(plain.encode("the quick brown fox"))
    assert refused(prompts, path, plain, tokens - 1, overlong="error") == (
        f"{path}:2: the prompt has {tokens} tokens, more than data.max_prompt_length={tokens - 1}: shorten it or raise the "
        "limit, or set data.overlong=filter to leave such rows out"
    )
    assert f"all 2 rows of {path} are too long; {path}:1: the prompt has" in refused(prompts, path, plain, 0)
    with pytest.raises(UserError, match="data.overlong must be filter or error, got 'drop'"):
        RowsSection(overlong="drop")
