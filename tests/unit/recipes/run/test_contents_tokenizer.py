"""A run that goes on with another tokenizer than it began with is refused by the name of what differs."""

from __future__ import annotations

import json
import logging
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import (
    ANSWER,
    FAMILIES,
    LLAMA,
    TEMPLATE,
    write_rows,
    write_sentencepiece,
    write_tokenizer,
    write_words,
)
from tests.unit.recipes.run.contents_cases import SPECIAL, TRAIN, check, read, refusal, sums


def test_a_template_that_writes_the_date_gives_other_rows_tomorrow(tmp_path, monkeypatch, caplog):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "llama", chat_template=LLAMA, **SPECIAL))
    rows = [{"messages": [{"role": "user", "content": f"what is {i} ?"}, ANSWER]} for i in range(3)]
    path = write_rows(tmp_path / "chat.jsonl", *rows)
    dated = write_rows(
        tmp_path / "dated.jsonl", *[row | {"chat_template_kwargs": {"date_string": "1 May"}} for row in rows]
    )
    before, fixed = read(path, tokenizer), read(dated, tokenizer)
    with caplog.at_level(logging.WARNING):
        before.warn()
    assert "can write the date of today (strftime_now)" in caplog.text
    check(read(path, tokenizer), before)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    message = refusal(read(path, tokenizer), before)
    assert (
        f"{TRAIN}={path} gives other tokens than when the run began, and file and tokenizer are what they were"
        in message
    )
    assert "writes the date of today (strftime_now)" in message and f"row 1 ({path}:1) is the first" in message
    check(read(dated, tokenizer), fixed)


def another(folder: Path, what: str) -> Path:
    """A tokenizer that takes the place of `write_tokenizer(folder, chat_template=TEMPLATE)`."""
    shutil.rmtree(folder)
    config = SPECIAL | {"chat_template": TEMPLATE}
    if what == "chat template":
        config["chat_template"] = TEMPLATE.replace("assistant:", "Assistant:")
    if what == "special tokens":
        config["pad_token"] = "<pad>"
    write_tokenizer(folder, around="<start> $A" if what == "rules" else "", **config)
    if what == "vocabulary":
        state = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("what", ["vocabulary", "chat template", "special tokens", "rules"])
def test_another_tokenizer_behind_the_same_path_is_named(tmp_path, what):
    folder = write_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATE, **SPECIAL)
    path = write_rows(tmp_path / "sft.jsonl", *sums(3))
    before = read(path, load_tokenizer(folder))
    message = refusal(read(path, load_tokenizer(another(folder, what))), before)
    said, parts = re.search(r"(.*) is another than the run began with \((.*?)\): it would", message).groups()
    assert said == f"the tokenizer of {folder} (model.tokenizer)" and what in parts
    assert "runs/mine/checkpoints/step-5/tokenizer" in message


def tokenizers(folder: Path) -> list:
    made = [write_tokenizer(folder / name, chat_template=text, **SPECIAL) for name, text in FAMILIES.items()]
    made += [
        write_tokenizer(folder / "around", around="<start> $A <eos>", **SPECIAL),
        write_sentencepiece(folder / "pieces"),
    ]
    made += [write_words(folder / "words", {"?": 0, "a": 1, "b": 2}, "<x>")]
    return list(map(load_tokenizer, made))


def test_the_copy_in_a_checkpoint_is_the_same_tokenizer(tmp_path):
    """Whatever it was called and wherever it was, so that a run can go on with it."""
    seen = set()
    for number, tokenizer in enumerate(tokenizers(tmp_path)):
        tokenizer.save(tmp_path / str(number))
        copy = load_tokenizer(tmp_path / str(number))
        assert copy.digests() == tokenizer.digests(), tokenizer.path
        copy.save(tmp_path / f"{number}-again")
        assert load_tokenizer(tmp_path / f"{number}-again").digests() == tokenizer.digests()
        seen.add(tuple(tokenizer.digests().values()))
    assert len(seen) == number + 1


def test_rules_that_another_version_of_the_library_wrote_are_not_compared(tmp_path, plain):
    path = write_rows(tmp_path / "sft.jsonl", *sums(3))
    before, now = read(path, plain), read(path, plain)
    (rules,) = (name for name in before.found["model.tokenizer"] if name.startswith("rules"))
    before.found["model.tokenizer"]["rules (tokenizers 0.1.0)"] = before.found["model.tokenizer"].pop(rules)[::-1]
    check(now, before)
