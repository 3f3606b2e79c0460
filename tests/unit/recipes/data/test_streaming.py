"""Rows that are read when they are drawn: the same rows, in an order of their own that comes back exactly, each checked when it
arrives."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from recipes.data import blocks, streaming
from recipes.data.drawing import draw_order
from recipes.data.errors import DataError
from recipes.data.orders import BlockShuffle
from recipes.data.rows import PairReading, PromptReading
from recipes.data.sampler import EpochSampler
from recipes.data.settings import RowsSection, TrainSetSection
from recipes.data.token_cache import TokenCache
from tests.data_cases import USER, names_in, write_rows, write_table


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "LINES", 5)
    monkeypatch.setattr(blocks, "READ_BYTES", 64)
    monkeypatch.setattr(streaming, "FIRST_ROWS", 3)
    monkeypatch.setattr(streaming, "KEPT_ROWS", 4)


def section(window: int = 3, **changes) -> RowsSection:
    return RowsSection(streaming=True, streaming_window=window, **changes)


def stream(tmp_path, path, tokenizer, limit=100, **changes):
    return TokenCache(tmp_path / "kept", 1).stream(path, PromptReading(tokenizer, limit, None, section(**changes)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 99))
def test_an_epoch_has_every_row_once_and_a_window_of_blocks_at_a_time(sizes, window, seed):
    shuffle = BlockShuffle(sizes, window)
    order = shuffle.order(str(seed))
    rows = list(order)
    assert len(order) == len(rows) and sorted(rows) == list(range(sum(sizes)))
    assert [order[i] for i in reversed(range(len(rows)))] == rows[::-1] and order[2:7] == rows[2:7]
    met: list[int] = []
    for row in rows:
        block = shuffle.block_of(row)
        assert shuffle.first[block] <= row < shuffle.first[block] + sizes[block]
        if block not in met:
            met.append(block)
        assert met.index(block) // window == (len(met) - 1) // window, "a block of a window that has been left"
    assert rows == list(shuffle.order(str(seed)))
    if len(sizes) > 6:
        assert rows != list(shuffle.order("another"))


@pytest.mark.parametrize("ending", ["\n", ""])
@pytest.mark.parametrize("count", [1, 5, 10, 23])
def test_the_rows_of_lines_are_those_that_are_read_at_once(tmp_path, plain, count, ending):
    lines = [
        "" if i % 7 == 3 else json.dumps({"prompt": f"the fox {'x' * (i % 11)}", "answer": i}) for i in range(count)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + ending)
    rows = stream(tmp_path, path, plain)
    assert len(rows) == count and [row for row in rows if row is not None] == PromptReading(plain, 100).load(path)
    assert rows[-1] == rows[count - 1] and [i for i, row in enumerate(rows) if row is None] == [*range(3, count, 7)]
    with pytest.raises(IndexError):
        rows[count]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.stream.arrow"])
def test_the_rows_of_tables_are_those_that_are_read_at_once(tmp_path, chat, name):
    given = [{"prompt": None if i % 2 else "the fox", "messages": [USER] if i % 2 else None} for i in range(23)]
    size = {"row_group_size": 7} if name.endswith("parquet") else {"max_chunksize": 7}
    path = write_table(tmp_path / name, given, **size)
    rows = stream(tmp_path, path, chat)
    assert list(rows) == PromptReading(chat, 100).load(path) and rows.shuffle.sizes == [7, 7, 7, 2]
    assert rows[8].where == f"{path}, row 9" and rows.talks


def mixture(tmp_path, tokenizer, batch, steps, rank=0, world=1):
    """JSONL with blank lines and rows that are too long, and parquet with other names; both streamed."""
    sets = {
        "fox": TrainSetSection(str(tmp_path / "a.jsonl"), 2.0),
        "dog": TrainSetSection(str(tmp_path / "b.parquet"), 1.0, fields={"prompt": "question"}),
    }
    data = section(train_sets=sets)
    cache = TokenCache(tmp_path / "kept", 1)
    rows = {
        name: cache.stream(s.path, PairReading(tokenizer, 12, None, data.of_set(s))) for name, s in data.trained.items()
    }
    order = draw_order(rows, data.trained, batch, steps, 7, rank, world)
    found = [row for each in rows.values() for row in each]
    return found, order


def test_a_streamed_mixture_of_jsonl_and_parquet_goes_on_at_the_exact_row(tmp_path, plain, caplog):
    lines = [
        "" if i % 10 == 4 else {"prompt": "x" * 99 if i % 9 == 5 else f"fox {i}", "response": " it"} for i in range(41)
    ]
    write_rows(tmp_path / "a.jsonl", *lines)
    table = [{"question": f"dog {i}", "response": " it"} for i in range(29)]
    write_table(tmp_path / "b.parquet", table, row_group_size=6)
    rows, order = mixture(tmp_path, plain, 4, 60)
    steps = [[rows[i] for i in order.next_batch()] for _ in range(60)]
    assert len([m for m in caplog.messages if "left out as too long; the first is" in m]) == 1
    whole = [pair.where for step in steps for pair in step]
    of_fox = [w for w in whole if ".jsonl" in w]
    good = sum(isinstance(line, dict) and len(line["prompt"]) < 99 for line in lines)
    assert len(set(of_fox[:good])) == good and len(of_fox) == 160
    of_dog = [w for w in whole if ".parquet" in w]
    assert len(set(of_dog[:29])) == 29
    for step in steps[:9]:
        assert len({pair.where for pair in step}) == 4
    stop = random.randrange(60)
    rows, first = mixture(tmp_path, plain, 4, 60)
    for _ in range(stop):
        first.next()
    first.has_next()  # what has been looked at is not taken
    state = json.loads(json.dumps(first.state_dict()))
    found = []
    for rank in range(2):
        rows, second = mixture(tmp_path, plain, 4, 60, rank, 2)
        second.load_state_dict(state)
        found.append([[rows[i].where for i in second.next()] for _ in range(60 - stop)])
    assert [a + b for a, b in zip(*found, strict=True)] == [[pair.where for pair in step] for step in steps[stop:]]


def test_a_bad_row_is_refused_when_it_arrives_with_its_place(tmp_path, plain):
    lines = [{"prompt": f"fox {i}"} for i in range(30)]
    lines[17], lines[22] = {"prompt": 3}, "{"
    path = write_rows(tmp_path / "a.jsonl", *lines)
    rows = stream(tmp_path, path, plain)
    rows[16]
    with pytest.raises(DataError, match=f"{path}:18: prompt must be a string, got a number"):
        rows[17]
    with pytest.raises(DataError, match=f"{path}:23: "):
        rows[22]
    lines[1] = {"prompt": "fox", "nobody": 1}
    write_rows(path, *lines)
    reading = PromptReading(plain, 100, None, section(), ())
    with pytest.raises(
        DataError, match=f"{path}:2: nothing reads the key nobody"
    ):  # one of the first, before the run begins
        TokenCache(tmp_path / "kept", 1).stream(path, reading)

    def check(prompt):
        raise UserError(f"{prompt.where}: no")

    with pytest.raises(UserError, match=f"{path}:1: no"):
        TokenCache(tmp_path / "kept", 1).stream(path, PromptReading(plain, 100, None, section()), check)


def test_what_cannot_be_streamed_is_refused(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": "fox"} for _ in range(9)))
    with pytest.raises(DataError, match="none of the first 3 rows of .* has solution, which data.fields.answer reads"):
        stream(tmp_path, path, plain, fields={"answer": "solution"})
    with pytest.raises(DataError, match="b.jsonl.zst is packed: unpack it"):
        (tmp_path / "b.jsonl.zst").write_bytes(b"x")
        stream(tmp_path, tmp_path / "b.jsonl.zst", plain)
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(DataError, match="c.jsonl is empty"):
        stream(tmp_path, tmp_path / "c.jsonl", plain)
    with pytest.raises(DataError, match="cannot read .*d.jsonl"):
        stream(tmp_path, tmp_path / "d.jsonl", plain)
    rows = stream(tmp_path, path, plain, window=1)
    path.write_text(path.read_text().replace('{"prompt": "fox"}\n', "", 2))
    with pytest.raises(DataError, match="has been changed since the run began"):
        rows[8]
    too_long = stream(tmp_path, write_rows(tmp_path / "e.jsonl", *[{"prompt": "fox " * 9}] * 9), plain, limit=2)
    order = draw_order({"": too_long}, {}, 2, 3, 1, 0, 1)
    with pytest.raises(DataError, match="all rows are too long, or empty"):
        order.next()
    (tmp_path / "f.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="f.parquet cannot be read at all"):
        stream(tmp_path, tmp_path / "f.parquet", plain)


def test_where_rows_stand_is_found_once(tmp_path, plain, monkeypatch, caplog):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"fox {i}"} for i in range(30)))
    before = stream(tmp_path, path, plain)
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr("recipes.data.token_cache.find_blocks", None)
    again = stream(tmp_path, path, plain)
    assert list(again) == list(before) and again.digest == before.digest
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "LINES", 5)
    data = bytearray((kept / "blocks.npy").read_bytes())
    data[-5] ^= 1
    (kept / "blocks.npy").write_bytes(data)
    assert (
        list(stream(tmp_path, path, plain)) == list(before) and "are found anew: they are not what was" in caplog.text
    )
    (kept / "blocks.npy").write_bytes(b"")
    assert list(stream(tmp_path, path, plain)) == list(before)
    path.write_text(path.read_text() + '{"prompt": "fox"}\n')
    other = stream(tmp_path, path, plain)
    assert len(other) == 31 and len(names_in(tmp_path / "kept")) == 2 and other.digest.whole != before.digest.whole
    assert len(TokenCache(tmp_path / "none", 0).stream(path, PromptReading(plain, 100, None, section()))) == 31
    assert not (tmp_path / "none").exists()


def test_ranks_of_a_step_see_different_rows(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"fox {i}"} for i in range(48)))
    parts = []
    for rank in range(3):
        order = draw_order({"": stream(tmp_path, path, plain)}, {}, 12, 9, 1, rank, 3)
        assert isinstance(order, EpochSampler)
        parts.append([order.next() for _ in range(8)])
    for step in zip(*parts, strict=True):
        assert len({i for part in step for i in part}) == 12
    first = [i for step in zip(*parts, strict=True) for part in step for i in part]
    assert sorted(first[:48]) == sorted(first[48:]) == list(range(48)) and first[:48] != first[48:]
