"""JSON lines, as strict as JSON is."""

from __future__ import annotations

import pytest

from recipes.data.jsonl import read_jsonl
from tests.data_cases import refused


def test_rows_skip_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xc3\xa9"}')
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n\n{"a": \n', ["rows.jsonl:3:", "one JSON object"]),
        (b'{"a": 1}\n[1, 2]\n', ["rows.jsonl:2:", "a list"]),
        (b'{"a": 1}\n"text"\n', ["rows.jsonl:2:", "a string"]),
        (b"null\n", ["rows.jsonl:1:", "null"]),
        (b'{"a": 1}\n{"a": "\xff"}\n', ["rows.jsonl:2:", "UTF-8"]),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", ["rows.jsonl:2:", "digits"]),
        (b"[" * 200_000 + b"\n", ["rows.jsonl:1:", "recursion"]),
        (b'[\n  {"a": 1}\n]\n', ["rows.jsonl:1:", "each line"]),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', ["rows.jsonl:1:", "the key 'c' stands twice"]),
        (b'{"a": 1}\n{"a": [1, NaN]}\n', ["rows.jsonl:2:", "NaN is no number"]),
        (b'{"a": -Infinity}\n', ["rows.jsonl:1:", "-Infinity is no number"]),
        (b'{"a": 1e999}\n', ["rows.jsonl:1:", "1e999 is too large"]),
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 1}\n', ["rows.jsonl:2:", "byte order mark"]),
        (b'{"a": 1} {"a": 2}\n', ["rows.jsonl:1:", "Extra data at column 10"]),
        (b"", ["rows.jsonl", "empty"]),
        (b"\n  \n", ["rows.jsonl", "empty"]),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    message = refused(read_jsonl, path)
    for word in words:
        assert word in message, message


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.jsonl" in refused(read_jsonl, tmp_path / "nowhere.jsonl")
    assert "folder" in refused(read_jsonl, tmp_path)
