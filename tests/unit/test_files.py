"""A file or folder is whole under its name, or what was there before is."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest

from megatron_ext import files
from megatron_ext.files import give_name, json_text, unfinished, whole, write_json, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    write_whole(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_has_left_is_not_in_the_next_folder(tmp_path):
    folder = tmp_path / "model"
    (unfinished(folder) / "of").mkdir(parents=True)
    (unfinished(folder) / "of" / "the_first").write_text("x")
    with whole(folder) as beside:
        beside.mkdir()
        (beside / "weights").write_text("w")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["weights"] and list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_breaks_off_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "model") as beside:
        (beside / "deep").mkdir(parents=True)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_name_is_given_after_all_is_on_the_disk(tmp_path, monkeypatch):
    """Every file and folder is flushed, then renamed, then the folder that holds the name is."""
    written, path, seen = tmp_path / "a" / "written", tmp_path / "a" / "named", []
    (written / "inner").mkdir(parents=True)
    (written / "inner" / "file").write_text("x")
    monkeypatch.setattr(files, "_flush_one", lambda flushed: seen.append((flushed, path.exists())))
    give_name(written, path)
    before, after = {p for p, named in seen if not named}, [p for p, named in seen if named]
    assert before == {written, written / "inner", written / "inner" / "file"} and after == [tmp_path / "a"]


def test_a_relative_name_is_written_beside_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unfinished(Path("x.json")) == tmp_path / "x.json.unfinished"
    assert unfinished(Path()) == tmp_path.with_name(tmp_path.name + ".unfinished")
    write_whole(Path("x.json"), "x")
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_of_numbers_that_are_none_is_json(tmp_path):
    """Wherever they are; everything else comes back as it was."""
    path, rng = tmp_path / "result.json", random.Random()
    sound = {"a": rng.random(), "b": [rng.randint(-9, 9), None, True, "NaN"], "c": {"d": (rng.gauss(0, 1e300), 5e-324)}}
    none = [math.nan, math.inf, -math.inf]
    write_json(path, sound | {"bad": none, "deep": {"x": [{"y": (1.5, rng.choice(none))}]}})
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found.pop("bad") == [None] * 3 and found.pop("deep") == {"x": [{"y": [1.5, None]}]}
    assert found == sound | {"c": {"d": list(sound["c"]["d"])}}
    assert json_text([math.nan, "ö"], ensure_ascii=False) == '[null, "ö"]'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == sound["a"] and list(tmp_path.iterdir()) == [path]
