"""A run that goes on has read what it had read when it began, or is refused by the name of what is another."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.rotary import Video
from megatron_ext.runtime.checkpoint_files import self_checksum
from megatron_ext.vision.preprocessing import Preprocessor
from recipes.bias.settings import LFTFConfig
from recipes.data.clips import Clip
from recipes.data.conversation import Conversation
from recipes.data.digests import PARTS, RowsDigest, rows_digest, sampled_digest
from recipes.data.files import Place
from recipes.data.rows import Pair, Prompt, load_prompts
from recipes.data.tokenizer import load_tokenizer
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings
from recipes.run.contents import Contents, difference
from recipes.run.pretrained import START_KEY, Pretrained
from tests.data_cases import write_rows, write_words
from tests.unit.recipes.run.contents_cases import TRAIN, check, read, refusal, sums


def test_an_edited_row_is_named_with_its_line(tmp_path, plain):
    rows = sums(40)
    path = write_rows(tmp_path / "sft.jsonl", "", *rows)  # a blank line
    before = read(path, plain)
    number = random.randrange(40)
    rows[number]["response"] += " 3"
    message = refusal(read(write_rows(path, "", *rows), plain), before)
    assert f"{TRAIN}={path} holds other rows than when the run began" in message
    assert f"row {number + 1} ({path}:{number + 2}) is the first that differs" in message
    rows.append(rows[0])
    assert "it has 41 rows, and had 40" in refusal(read(write_rows(path, *rows), plain), before)


def test_rows_that_are_used_in_order_may_become_more(tmp_path, plain):
    """Those that there were must be what they were; fewer are others."""
    rows, count = sums(40), random.randrange(1, 40)

    def in_order(*rows) -> Contents:
        return read(write_rows(tmp_path / "sft.jsonl", *rows), plain, in_order=[TRAIN])

    before = in_order(*rows[:count])
    check(in_order(*rows), before)
    assert f"it has {count} rows, and had 40" in refusal(before, in_order(*rows))
    number = random.randrange(count)
    rows[number]["response"] += " 3"
    message = refusal(in_order(*rows), before)
    assert (
        f"holds other rows than when the run began: row {number + 1} ({tmp_path}/sft.jsonl:{number + 1}) is the first"
        in message
    )


def test_what_a_file_is_called_and_how_it_is_written_does_not_matter(tmp_path, plain):
    rows = sums(10)
    before = read(write_rows(tmp_path / "sft.jsonl", *rows), plain)
    (tmp_path / "moved").mkdir()
    path = write_rows(
        tmp_path / "moved/other.jsonl", *[json.dumps(row | {"source": "web"}, indent=None) + "  " for row in rows]
    )
    check(read(path, plain), before)


def test_a_reward_sees_the_whole_row(tmp_path, plain):
    rows = [{"prompt": f"what is {i} ?", "answer": str(i), "id": i} for i in range(10)]
    before = read(write_rows(tmp_path / "train.jsonl", *rows), plain, load_prompts)
    rows[6]["answer"] = "seven"
    message = refusal(read(write_rows(tmp_path / "train.jsonl", *rows), plain, load_prompts), before)
    assert f"row 7 ({tmp_path}/train.jsonl:7) is the first that differs" in message


def test_the_first_row_that_differs_is_found_among_many(tmp_path):
    count = random.randrange(2 * PARTS, 5000)
    rows = [[random.randrange(100) for _ in range(random.randrange(5))] for _ in range(count)]
    before = rows_digest(rows)
    assert before == rows_digest([tuple(row) for row in rows])
    number = random.randrange(count)
    rows[number].append(7)
    for later in random.sample(range(number, count), min(3, count - number)):
        rows[later].append(8)
    found = rows_digest(rows).first_difference(before)
    assert number in found and len(found) <= -(-count // PARTS)


def test_different_rows_have_different_digests():
    rows = [
        (),
        [[]],
        [1, 2],
        [[1], 2],
        [1, [2]],
        [12],
        ["1", 2],
        [1, None],
        None,
        [True],
        ["true"],
        [{"a": 1}],
        [{"a": "1"}],
        [1.5],
    ]
    assert len({rows_digest([row]).whole for row in rows}) == len(rows)
    assert rows_digest([[1], [2, 3]]).whole != rows_digest([[1, 2], [3]]).whole != rows_digest([[3], [1, 2]]).whole
    assert rows_digest([{"a": 1, "b": 2}]) == rows_digest([{"b": 2, "a": 1}])


# What is changed in a row, and whether that makes it another.
CLIP = Clip("clip.mp4", Video(2, 3, 4), VideoSettings(), "a.jsonl:1")
PROMPT = Prompt((1, 2), {"answer": "x"}, 1, (CLIP,), (7,))
CHANGES = {
    Prompt: {
        "tokens": ((1, 3), True), "row": ({"answer": "y"}, True), "line": (2, False), "placeholders": ((8,), True),
        "media": ((CLIP, CLIP), True),
        "talk": (Conversation(()), False),  # what the row, the configuration and the environment's file make of it
        "place": (Place("b.jsonl", 1), False),
    },
    Pair: {"prompt": (dataclasses.replace(PROMPT, tokens=(5,)), True), "response": ((4,), True), "learnt": ((False,), True)},
    # Its file is compared by content, its settings and what makes pictures for the model's tower are the configuration's.
    Clip: {"path": ("other.mp4", False), "grid": (Video(4, 3, 2), True), "settings": (None, False), "where": ("b:2", False),
           "kind": ("image", False), "frames": (("1.png",), False), "eyes": (Preprocessor("a tower", "{}"), False),
           "size": ((9, 9), False), "tiled": (True, False)},
}  # fmt: skip


@pytest.mark.parametrize("row", [PROMPT, Pair(PROMPT, (3,))], ids=lambda row: type(row).__name__)
def test_every_field_of_a_row_counts_that_is_computed_with(row):
    kinds = {type(row): lambda **changes: dataclasses.replace(row, **changes)}
    if isinstance(row, Prompt):
        kinds[Clip] = lambda **changes: dataclasses.replace(row, media=(dataclasses.replace(CLIP, **changes),))
    for kind, change in kinds.items():
        assert {field.name for field in dataclasses.fields(kind)} == CHANGES[kind].keys(), (
            "say whether the new one counts"
        )
        for name, (value, counts) in CHANGES[kind].items():
            changed = change(**{name: value})
            assert (rows_digest([changed.content]) != rows_digest([row.content])) == counts, (kind, name)


def test_features_of_the_same_shape_and_other_content_are_refused(tmp_path, plain):
    tokenizer = load_tokenizer(write_words(tmp_path / "words", {"?": 0, "see": 1, "it": 2}, "<video>"))
    video = VideoReader(VideoSettings(num_frames=2, height=8, width=8, patch_size=8), 6)
    rng, files = np.random.default_rng(), [f"{i}.npy" for i in range(3)]
    for name in files:
        np.save(tmp_path / name, rng.standard_normal((2, 1, 1, 6)).astype(np.float32))
    rows = [{"prompt": "see <video>", "response": "it", "features": name} for name in files]
    before = read(write_rows(tmp_path / "sft.jsonl", *rows), tokenizer, video=video)
    (tmp_path / "moved").mkdir()
    for name in ("sft.jsonl", *files):
        shutil.copy(tmp_path / name, tmp_path / "moved")
    moved = tmp_path / "moved/sft.jsonl"
    check(read(moved, tokenizer, video=video), before)
    np.save(tmp_path / "moved/1.npy", rng.standard_normal((2, 1, 1, 6)).astype(np.float32))
    message = refusal(read(moved, tokenizer, video=video), before)
    assert f"clips or features have other content than when the run began: row 2 ({moved}:2) is the first" in message


def test_a_large_file_is_known_by_its_length_and_samples(tmp_path):
    path, data = tmp_path / "clip", bytearray(random.randbytes(100_000))
    path.write_bytes(data)
    before = sampled_digest(path)
    for place in (0, 50_000, 99_999):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert sampled_digest(path) != before
    path.write_bytes(data[:-1])
    assert sampled_digest(path) != before
    path.write_bytes(data)
    assert sampled_digest(path) == before
    (tmp_path / "empty").touch()
    assert sampled_digest(tmp_path / "empty")


def test_a_checkpoint_without_digests_goes_on_with_one_warning(tmp_path, plain, caplog):
    now = read(write_rows(tmp_path / "sft.jsonl", *sums(3)), plain)
    with caplog.at_level(logging.WARNING):
        now.check({"versions": {}}, Path("runs/old/checkpoints/step-2"))
    (record,) = caplog.records
    assert (
        "runs/old/checkpoints/step-2 was saved before checkpoints said what their run had read" in record.getMessage()
    )


def test_held_out_rows_that_are_missing_are_named(tmp_path, plain):
    """`best` would compare numbers of different rows."""
    before, now = (read(write_rows(tmp_path / "sft.jsonl", *sums(3)), plain) for _ in range(2))
    before.found["data.validation_path"] = before.found[TRAIN]
    now.found[TRAIN] = before.found[TRAIN]
    assert "data.validation_path is not set, and was when the run began" in refusal(now, before)


def start(folder: Path) -> Pretrained:
    """A checkpoint, as far as the digest of its weights is concerned; each has others."""
    info = {"files": {"weights/a": [1, random.randbytes(8).hex()]}}
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "weights").mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps(info | {"checksum": self_checksum(info)}))
    return Pretrained.open(str(folder))


def test_other_weights_to_compare_with_are_refused(tmp_path, plain):
    path, folder = write_rows(tmp_path / "sft.jsonl", *sums(3)), tmp_path / "start"
    without = SimpleNamespace(reads_start=None)  # what compares with nothing that it began with
    for config, words in ((LFTFConfig, "and trainer.lftf.loss compares with them"), (without, "or set it to null")):
        before = read(path, plain, config=config, pretrained=start(folder))
        check(read(path, plain, config=config, pretrained=Pretrained.open(str(folder))), before)
        message = refusal(read(path, plain, config=config, pretrained=start(folder)), before)
        assert "restore_from_path=the start holds other weights than the run began with" in message and words in message
    gone = read(path, plain)
    check(gone, before)
    assert gone.found[START_KEY] == before.found[START_KEY], "kept for the next checkpoint"


def test_code_that_has_changed_is_worth_a_warning(tmp_path, plain, caplog):
    code, path = tmp_path / "my_reward.py", write_rows(tmp_path / "sft.jsonl", *sums(3))
    code.write_text("def reward(responses, rows): return [1.0 for _ in rows]")
    inputs = read(path, plain)._inputs

    def contents() -> Contents:
        found = Contents(inputs, code={"trainer.grpo.reward": code, "other": None})
        found.complete()
        return found

    before = contents()
    check(contents(), before)
    assert not caplog.records
    code.write_text("def reward(responses, rows): return [2.0 for _ in rows]")
    check(contents(), before)
    assert "trainer.grpo.reward: the code has changed since the run began" in caplog.text


def test_ranks_that_have_read_different_things_are_told_apart(tmp_path, plain):
    """Only what both have looked at counts: files are read by one process of a machine."""
    rows = sums(20)
    path = write_rows(tmp_path / "sft.jsonl", *rows)
    mine = read(path, plain).found
    rows[3]["prompt"] += " ?"
    theirs = read(write_rows(path, *rows), plain).found
    assert difference(mine, mine | {TRAIN: {"rows": 20}}) is None
    assert difference(mine, theirs) == f"{TRAIN} (file)"
    del theirs[TRAIN]["file"]
    assert difference(mine, theirs) == f"{TRAIN} (parts)"


def test_digests_are_small(tmp_path, plain):
    """They stand in every checkpoint.json."""
    rows = [[random.randrange(1000)] for _ in range(5000)]
    assert len(json.dumps(dataclasses.asdict(rows_digest(rows)))) < 2500
    assert RowsDigest(**json.loads(json.dumps(dataclasses.asdict(rows_digest(rows))))) == rows_digest(rows)
