"""Parquet, Arrow and folders: the same rows as JSONL, or a refusal that names the row."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.files import data_files, existing_files, placed_rows
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.settings import RowsSection
from recipes.data.tables import BATCH
from tests.data_cases import ANSWER, USER, refused, write_rows, write_table

TIME = datetime.datetime(2026, 11, 1)


def read(path, ignored=()):
    return [row for _, row, _ in placed_rows(path, ignored)]


KINDS = ["t.parquet", "t.arrow", "t.stream.arrow"]
# Columns of one type each, as tables have them; what a struct lacks is not written in JSON either.
VALUES = {
    "prompt": st.text(st.characters(codec="utf-8"), max_size=20),
    "answer": st.none() | st.integers(-(2**63), 2**63 - 1),
    "score": st.floats(allow_nan=False, allow_infinity=False),
    "good": st.booleans() | st.none(),
    "tests": st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=5), max_size=4),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"])}, optional={"n": st.lists(st.integers(0, 9))}),
        max_size=3,
    ),
    "extra_info": st.fixed_dictionaries({"a": st.fixed_dictionaries({"b": st.integers(0, 255)})}),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_tables_hold_the_rows_of_jsonl(tmp_path_factory, rows, kind):
    folder = tmp_path_factory.mktemp("same")
    jsonl = write_rows(folder / "rows.jsonl", *rows)
    found = read(write_table(folder / kind, rows))
    assert found == read(jsonl) == rows
    assert [{k: type(v) for k, v in row.items()} for row in found] == [
        {k: type(v) for k, v in row.items()} for row in rows
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_places_count_rows_through_groups_and_batches(tmp_path, kind):
    count = 2 * BATCH + random.randrange(1, 900)
    size = {"row_group_size": 700} if kind.endswith("parquet") else {"max_chunksize": 1500}
    path = write_table(tmp_path / kind, [{"id": i} for i in range(count)], **size)
    found = list(placed_rows(path))
    assert [row["id"] for _, row, _ in found] == list(range(count))
    assert str(found[-1][0]) == f"{path}, row {count}"


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_pairs_are_those_of_jsonl(tmp_path, chat, kind):
    rows = [{"messages": [USER, ANSWER], "source": "web"}, {"messages": [USER, ANSWER, USER, ANSWER], "source": None}]
    pairs = [
        load_pairs(p, chat, 100) for p in (write_rows(tmp_path / "a.jsonl", *rows), write_table(tmp_path / kind, rows))
    ]
    assert [p.content for p in pairs[0]] == [p.content for p in pairs[1]]
    assert pairs[1][1].where == f"{tmp_path / kind}, row 2"
    message = refused(load_prompts, tmp_path / kind, chat, 100)
    assert message.startswith(f"{tmp_path / kind}, row 1: the last of messages is the assistant's")


BAD = {
    "time": ([TIME, TIME], 1, "x holds a time, which JSON has no word for"),
    "day": ([None, TIME.date()], 2, "x holds a time"),
    "decimal": ([None, Decimal("1.5")], 2, "x holds a decimal"),
    "picture": ([{"bytes": None}, {"bytes": b"x"}], 2, "x.bytes holds bytes"),
    "map": (pa.array([None, [("a", 1)]], pa.map_(pa.string(), pa.int64())), 2, "x[0] holds a map"),
    "NaN": ([1.5, float("nan")], 2, "x is nan, no number of JSON"),
    "infinity in a list": ([[1.0], [1.0, float("-inf")]], 2, "x[1] is -inf"),
    "text": (pa.array([b"ok", b"\xff"]).view(pa.string()), 2, "can't decode byte 0xff"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["t.parquet", "t.arrow"])
def test_what_json_has_no_word_for_is_refused_with_its_row(tmp_path, name, kind):
    column, row, words = BAD[name]
    table = pa.table({"id": pa.array([1, 2]), "x": column if isinstance(column, pa.Array) else pa.array(column)})
    path = write_table(tmp_path / kind, table)
    message = refused(read, path)
    assert message.startswith(f"{path}, row {row}: ") and words in message, message
    if name != "text":
        assert message.endswith("or name x in data.ignored_keys")
        assert [r["id"] for r in read(path, ["x"])] == [1, 2] and all(r.get("x") != column for r in read(path, ["x"]))


def test_a_column_without_values_of_its_type_is_no_harm(tmp_path, plain):
    times = pa.array([None], pa.timestamp("ns"))
    path = write_table(tmp_path / "t.parquet", pa.table({"prompt": ["the fox"], "created": times}))
    assert [p.row for p in load_prompts(path, plain, 100)] == [{"prompt": "the fox", "created": None}]
    path = write_table(tmp_path / "u.parquet", pa.table({"prompt": ["the fox"], "created": [TIME]}))
    assert "row 1: created holds a time" in refused(load_prompts, path, plain, 100)
    assert len(load_prompts(path, plain, 100, section=RowsSection(ignored_keys=["created"]))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cut_off_or_something_else(tmp_path, kind):
    path = write_table(tmp_path / kind, [{"prompt": f"text {i}"} for i in range(3000)])
    whole = path.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 8, random.randrange(len(whole) - 1)):
        path.write_bytes(whole[:cut])
        message = refused(read, path)
        assert str(path) in message and "make it anew" in message, (cut, message)
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    assert "make it anew" in refused(read, path)
    path.unlink()
    assert refused(read, path) == f"cannot read {path}: No such file or directory; name a file"
    write_table(path, pa.table({"prompt": pa.array([], pa.string())}))
    assert refused(read, path) == f"{path} has no rows"


def test_a_column_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert "several columns a" in refused(read, write_table(tmp_path / "t.arrow", table))


def test_a_folder_is_its_files_by_name(tmp_path):
    folder = tmp_path / "rows"
    (folder / "older").mkdir(parents=True)
    for i in (2, 0, 1):
        write_table(folder / f"train-{i:05d}-of-00003.parquet", [{"id": 10 * i}, {"id": 10 * i + 1}])
    (folder / "README.md").write_text("what this is")
    (folder / "_SUCCESS.parquet").write_text("")
    found = list(placed_rows(folder))
    assert [row["id"] for _, row, _ in found] == [0, 1, 10, 11, 20, 21]
    assert str(found[3][0]) == f"{folder}/train-00001-of-00003.parquet, row 2"
    assert [row["id"] for row in read(folder / "*-0000[02]-*")] == [0, 1, 20, 21]
    write_table(folder / "test-00000-of-00001.parquet", [{"id": 7}])
    assert "holds several splits, test, train" in refused(data_files, folder)
    assert "several splits" in refused(data_files, folder / "*.parquet")
    assert len(data_files(folder / "train-*")) == 3
    write_rows(folder / "more.jsonl", {"id": 1})
    assert f".jsonl and .parquet files, which may be the same rows twice: name one kind, as in {folder}/*.jsonl" in (
        refused(data_files, folder)
    )


def test_folders_and_patterns_without_files(tmp_path):
    (tmp_path / "rows/train").mkdir(parents=True)
    message = refused(data_files, tmp_path / "rows")
    assert (
        "folder without .jsonl, .jsonl.zst, .parquet, .arrow, .tar files; it has the folders train: name one" in message
    )
    assert refused(data_files, tmp_path / "*.parquet").startswith(f"no file is named {tmp_path}/*.parquet")
    assert existing_files(tmp_path / "rows") == existing_files(None) == existing_files(tmp_path / "no.jsonl") == []
    odd = write_rows(tmp_path / "odd[1].jsonl", {"id": 1})  # a name that is there is no pattern
    assert read(odd) == [{"id": 1}]


def test_rows_of_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": i, "messages": [USER, ANSWER]} for i in range(50)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert read(tmp_path / "saved") == rows
