"""Files of rollouts: whole or not there, bounded, and read strictly."""

from __future__ import annotations

import json
import random
import resource

import pyarrow
import pytest

from megatron_ext.errors import UserError
from recipes.data.errors import DataError
from recipes.grpo.dump_files import VERSION, forget_steps, keep_within, read_step, step_files, write_step

HEADER = {"step": 3, "prompts": 2, "written": 2}


def groups(count: int = 2) -> list[dict]:
    return [{"number": i, "text": "é\n\x1b\ud800", "x": [random.gauss(0, 9) for _ in range(50)]} for i in range(count)]


def packed(path, *rows) -> None:
    path.write_bytes(pyarrow.Codec("zstd").compress("\n".join(map(json.dumps, rows)).encode(), asbytes=True))


def test_numbers_come_back_to_the_last_bit(tmp_path):
    told = groups()
    write_step(tmp_path, HEADER, told)
    dump = read_step(step_files(tmp_path)[3])
    assert dump.full and dump.header["version"] == VERSION
    assert [line for line, _ in dump.groups] == [2, 3]
    assert [g["x"] for _, g in dump.groups] == [g["x"] for g in told]
    assert dump.groups[0][1]["text"] == "é\n\x1b?", "half of a surrogate pair is no text"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for the disk."""
    before = groups()
    write_step(tmp_path, HEADER, before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(
            UserError, match=r"the rollouts of step 3 cannot be written to .*step-000003.*: make room, or set "
        ):
            write_step(tmp_path, HEADER, groups(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003.jsonl.zst"]
    assert read_step(step_files(tmp_path)[3]).groups[1][1]["x"] == before[1]["x"]


def test_the_oldest_go_first_and_the_newest_stays(tmp_path):
    for step in (1, 2, 10, 11):
        write_step(tmp_path, {**HEADER, "step": step}, groups())
    sizes = {step: path.stat().st_size for step, path in step_files(tmp_path).items()}
    keep_within(tmp_path, None)
    assert list(step_files(tmp_path)) == [1, 2, 10, 11]
    keep_within(tmp_path, sum(sizes.values()) - sizes[1])
    assert list(step_files(tmp_path)) == [2, 10, 11]
    keep_within(tmp_path, 1)
    assert list(step_files(tmp_path)) == [11]


def test_a_run_that_goes_on_makes_its_steps_again(tmp_path):
    for step in (1, 2, 3, 4):
        write_step(tmp_path, {**HEADER, "step": step}, groups())
    (tmp_path / "step-000004.jsonl.zst.unfinished").write_text("of a kill")
    forget_steps(tmp_path, 3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001.jsonl.zst", "step-000002.jsonl.zst"]


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "step-000003.jsonl.zst"
    head = {"format": "megatron-ext rollouts", "version": VERSION, **HEADER}
    for rows, message in (
        ([{"prompt": "a"}], "is no dump of rollouts: its first line does not say format='megatron-ext rollouts'"),
        ([{**head, "version": 2}], "has version 2 of the format, and this code reads up to 1"),
        ([head, {}], "has 1 prompts, and says that it has 2: it is damaged"),
    ):
        packed(path, *rows)
        with pytest.raises(DataError, match=message):
            read_step(path)
    write_step(tmp_path, HEADER, groups())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"cannot be unpacked to its end .*: it is no zstd file, or cut off"):
        read_step(path)
