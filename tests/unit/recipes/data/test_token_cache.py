"""Rows in tokens that are made once and kept: the same rows, made once on a machine, and never those of other files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from recipes.data import files, token_cache
from recipes.data.digests import rows_digest
from recipes.data.once import made_once
from recipes.data.rows import PairReading, PromptReading
from recipes.data.settings import RowsSection
from recipes.data.stored import StoredRows, encode_rows, write_rows
from recipes.data.token_cache import TokenCache
from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import ANSWER, EOS, SYSTEM, USER, names_in, refused, write_table, write_tokenizer
from tests.data_cases import write_rows as write_jsonl
from tests.token_cases import hold, load_as_ranks, started
from tests.waiting import until

TURNS = [
    USER,
    ANSWER,
    {"role": "user", "content": "and 2 + 2 ?"},
    {"role": "assistant", "content": "it is 4, \u00e4\ud7ff"},
]


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(files, "CHUNK_LINES", 7)


def some_rows(count: int, learnt: bool) -> list[dict]:
    rng, rows = random.Random(), []
    for i in range(count):
        text = " ".join(rng.choices("the quick brown fox what is 1 + 2 ?".split(), k=rng.randint(1, 30)))
        row = {"prompt": text, "answer": i, "meta": {"x": [rng.random()], "y": "\n"}}
        if rng.random() < 0.4:
            talk = [SYSTEM, *TURNS[: 2 * rng.randint(0, 1) + 1 + learnt]]
            row = {"messages": talk, "answer": None, "id": rng.random()}
        elif learnt:
            row["response"] = rng.choice([" fox", " it is 3"])
        rows.append(row)
    return rows


def readings(tokenizer, **section):
    section = RowsSection(**section)
    return {
        False: PromptReading(tokenizer, 10_000, None, section, ("answer",)),
        True: PairReading(tokenizer, 10_000, None, section, all_turns=True),
    }


@pytest.mark.parametrize("learnt", [False, True])
def test_what_is_kept_is_what_is_read(tmp_path, families, learnt, caplog):
    """JSONL and parquet, texts and conversations, rows that are left out as too long; also when it is read again."""
    reading, rows = readings(families["qwen2"], ignored_keys=["meta"])[learnt], some_rows(120, learnt)
    every = reading.load(write_jsonl(tmp_path / "every.jsonl", *rows))
    longest = max(len(getattr(x, "prompt", x).tokens) + len(getattr(x, "response", ())) for x in every)
    reading = dataclasses.replace(reading, limit=longest - 1)
    of_table = [{key: row.get(key) for key in sorted({key for row in rows for key in row})} for row in rows]
    (tmp_path / "tables").mkdir()
    for path in (
        write_jsonl(tmp_path / "a.jsonl", "", *rows),
        write_table(tmp_path / "tables/a.parquet", of_table[:50]).parent,
    ):
        write_table(tmp_path / "tables/b.parquet", of_table[50:], row_group_size=9)
        caplog.clear()
        expected = reading.load(path)
        said = caplog.messages
        assert len(expected) < 120 and len(said) == 1
        for _ in range(2):
            caplog.clear()
            found = TokenCache(tmp_path / "kept", 2).load(path, reading)
            assert isinstance(found, StoredRows) and list(found) == expected
            assert [m for m in caplog.messages if "left out" in m] == said
            assert found.digest == rows_digest([row.content for row in expected])
            assert [type(item) for item in found] == [type(item) for item in expected]
            assert (found[-1], found[3:17:4]) == (expected[-1], expected[3:17:4])
            with pytest.raises(IndexError):
                found[len(expected)]
    assert len(names_in(tmp_path / "kept")) == 2


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_cut_of_rows_is_stored_alike(data, tmp_path_factory, chat):
    folder, learnt = tmp_path_factory.mktemp("rows"), data.draw(st.booleans())
    path = write_jsonl(folder / "a.jsonl", *some_rows(data.draw(st.integers(1, 12)), learnt))
    items = readings(chat)[learnt].load(path)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=4)))
    parts = [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]
    write_rows(folder, (encode_rows(part, 0) for part in parts), {"key": "k"})
    found = StoredRows.open(folder, {"key": "k"}, [str(path)])
    assert list(found) == items and found.digest == rows_digest([item.content for item in items])
    assert StoredRows.open(folder, {"key": "l"}, [str(path)]) == "it is for other rows"


def test_a_hundred_thousand_rows_are_made_once_by_the_ranks_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_LINES", 1024)
    write_tokenizer(tmp_path / "tokenizer", eos_token=EOS)
    path, count = tmp_path / "rows.jsonl", 100_000
    path.write_text("".join(f'{{"prompt": "the fox {i}", "answer": {i}}}\n' for i in range(count)))
    made, found = load_as_ranks(2, path, tmp_path / "kept", tmp_path / "tokenizer")
    assert made == count and found[0] == found[1] and found[0][0] == count
    assert load_as_ranks(1, path, tmp_path / "kept", tmp_path / "tokenizer") == (0, found[:1])


def test_all_ranks_are_told_of_the_first_bad_row_and_nothing_is_left(tmp_path, plain):
    write_tokenizer(tmp_path / "tokenizer", eos_token=EOS)
    rows = [f'{{"prompt": "the fox {i}"}}' for i in range(30_000)]
    rows[11_000], rows[29_000] = '{"prompt": 3}', "{"
    path, place = write_jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "run" / "kept"
    _, found = load_as_ranks(2, path, place, tmp_path / "tokenizer")
    expected = refused(PromptReading(plain, 1000).load, path)
    assert expected.startswith(f"{path}:11001: prompt must be a string")
    for said in found:
        assert said.partition(": ")[2] == expected
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_to_its_end_is_refused_behind_what_stands_before(tmp_path, plain):
    reading, cache = PromptReading(plain, 1000), TokenCache(tmp_path / "kept", 1)
    rows = [{"prompt": f"the fox {i}"} for i in range(4000)]
    path = write_table(tmp_path / "a.stream.arrow", rows, max_chunksize=500)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3] + whole[-8:])
    assert refused(cache.load, path, reading) == refused(reading.load, path)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/a.jsonl", {"prompt": "a"})
    empty = write_jsonl(tmp_path / "folder/b.jsonl", "", "")
    assert refused(cache.load, empty.parent, reading) == refused(reading.load, empty.parent)
    fields = dataclasses.replace(reading, section=RowsSection(fields={"answer": "solution"}))
    path = write_jsonl(tmp_path / "c.jsonl", *rows[:40])
    assert refused(cache.load, path, fields) == refused(fields.load, path)


def test_what_is_damaged_is_made_anew_with_one_line(tmp_path, plain, caplog):
    reading = PromptReading(plain, 1000)
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": f"the fox {i}"} for i in range(60)))
    expected = reading.load(path)
    TokenCache(tmp_path / "kept", 1).load(path, reading)
    (place,) = (tmp_path / "kept").iterdir()
    for name in ("index.bin", "tokens.bin", "texts.bin", "digests.bin", "rows.json"):
        data = bytearray((place / name).read_bytes())
        data[random.randrange(len(data))] ^= 255
        (place / name).write_bytes(data)
        caplog.clear()
        assert list(TokenCache(tmp_path / "kept", 1).load(path, reading)) == expected
        assert len([m for m in caplog.messages if "are made anew" in m]) == 1, caplog.messages
    (place / "tokens.bin").unlink()
    assert list(TokenCache(tmp_path / "kept", 1).load(path, reading)) == expected


def test_whatever_decides_what_a_row_is_makes_others(tmp_path, plain, families):
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": "the fox", "question": "the"} for _ in range(20)))
    kept = tmp_path / "kept"

    def load(tokenizer=plain, limit=100, keys=("question",), where=path, **section):
        TokenCache(kept, 1).load(where, PromptReading(tokenizer, limit, None, RowsSection(**section), keys))
        return len(names_in(kept))

    assert load() == load() == 1
    assert load(limit=99) == 2
    assert load(keys=None) == 3
    assert load(overlong="error") == 4
    assert load(ignored_keys=["x"]) == 5
    renamed = write_jsonl(tmp_path / "b.jsonl", *[{"question": "a"}] * 9)
    assert load(fields={"prompt": "question"}, where=renamed) == 6
    chat = families["qwen2"]
    assert load(chat, prompt_as_message=True) == 7
    assert load(chat, prompt_as_message=True, system_prompt="be brief") == 8
    assert load(chat, prompt_as_message=True, system_prompt="be kind") == 9
    assert load(families["qwen3"], prompt_as_message=True) == 10
    assert load(families["qwen3"], prompt_as_message=True, chat_template_kwargs={"enable_thinking": False}) == 11
    assert load(token_processes=3, token_cache="x", train_sets={}) == 11
    moved = path.rename(tmp_path / "a.jsonl.moved")
    assert load(where=moved.rename(path)) == 11
    stat = path.stat()
    path.write_text(path.read_text().replace("fox", "dog", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load() == 12
    pairs = write_jsonl(tmp_path / "c.jsonl", *({"messages": TURNS} for _ in range(5)))
    for number, all_turns in enumerate((False, True), 13):
        TokenCache(kept, 1).load(pairs, PairReading(chat, 1000, all_turns=all_turns))
        assert len(names_in(kept)) == number


def test_a_template_that_writes_a_token_by_its_name_makes_others(tmp_path):
    """With a begin token that is the end token, and without one, which is begun with the end token as well."""
    path = write_jsonl(tmp_path / "a.jsonl", *({"messages": [USER]} for _ in range(9)))
    template, found = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", []
    for name, more in (("without", {}), ("with", {"bos_token": EOS})):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / name, chat_template=template, eos_token=EOS, **more))
        found.append(TokenCache(tmp_path / "kept", 1).load(path, PromptReading(tokenizer, 100)))
        assert list(found[-1]) == PromptReading(tokenizer, 100).load(path)
    assert found[1][0].tokens == (tokenizer.eos_id, *found[0][0].tokens)


def test_what_is_not_known_by_a_digest_is_not_kept(tmp_path, families, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", *({"messages": [USER]} for _ in range(9)))
    caplog.set_level("INFO")
    found = TokenCache(tmp_path / "kept", 2).load(path, PromptReading(families["llama"], 1000))
    assert isinstance(found, list) and len(found) == 9 and not (tmp_path / "kept").exists()
    assert "made by each rank and not kept: the chat template" in caplog.text
    assert isinstance(TokenCache(tmp_path / "kept", 0).load(path, PromptReading(families["qwen2"], 1000)), list)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, plain):
    (tmp_path / "file").touch()
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "the fox"})
    with pytest.raises(UserError, match="the tokens of .* cannot be kept in .*file/kept: .*: Not a directory"):
        TokenCache(tmp_path / "file/kept", 1).load(path, PromptReading(plain, 100))


@pytest.mark.kills
def test_who_waits_for_one_that_is_killed_goes_on_in_its_place(tmp_path):
    """However each of them calls the place."""
    place = tmp_path / "kept" / "it"
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    holder = started(hold, tmp_path / "link" / "it")
    until(lambda: list(place.parent.glob("*/*/half")))
    killed = threading.Event()

    def kill() -> None:
        killed.set()  # before: who waits may go on as soon as it is dead
        os.kill(holder.pid, signal.SIGKILL)

    threading.Timer(0.3, kill).start()
    made_once(place, lambda p: p.exists() or None, lambda p, tell: (p / "whole").touch(), "it")
    assert killed.is_set() and names_in(place) == {"whole"} and names_in(place.parent) == {"it"}
    holder.join()


@pytest.mark.kills
def test_who_shares_the_folder_and_not_the_lock_leaves_what_is_being_made(tmp_path):
    """Jobs of one machine with temporary folders of their own. What a killed one has left is removed."""
    (tmp_path / "own").mkdir()
    place = tmp_path / "kept" / "it"
    holder = started(hold, place, tmp_path / "own")
    half = until(lambda: list(place.parent.glob("*/*/half")))

    def make(folder, tell):
        (folder / "whole").touch()

    made_once(place, lambda p: p.exists() or None, make, "it")
    assert half[0].exists() and names_in(place) == {"whole"}
    holder.kill()
    holder.join()
    assert half[0].exists()
    made_once(place, lambda p: "again" in names_in(p) or None, lambda p, tell: (p / "again").touch(), "it")
    assert names_in(place.parent) == {"it"} and names_in(place) == {"again"}


def test_another_machine_may_have_been_faster(tmp_path):
    place = tmp_path / "it"

    def make(folder, tell):
        (folder / "ours").touch()
        place.mkdir()
        (place / "theirs").touch()

    assert made_once(place, lambda p: names_in(p) or None, make, "it") == {"theirs"}
    assert names_in(tmp_path) == {"it"}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, plain, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": "the fox"} for _ in range(50)))
    whole = token_cache.encoded_chunks

    def changing(*arguments):
        with open(path, "a") as file:
            file.write(json.dumps({"prompt": "the dog"}) + "\n")
        return whole(*arguments)

    monkeypatch.setattr(token_cache, "encoded_chunks", changing)
    with pytest.raises(UserError, match="was changed while it was read"):
        TokenCache(tmp_path / "kept", 1).load(path, PromptReading(plain, 100))
    assert not (tmp_path / "kept").exists()
