"""Shards of rows and their media: the same rows as files in a folder, in an order that comes back, read when they are drawn."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import replace

import pytest
import torch

from recipes.data import shards, streaming, token_cache
from recipes.data.blocks import RowBlocks, find_blocks
from recipes.data.digests import sampled_files
from recipes.data.drawing import draw_order
from recipes.data.errors import DataError, VideoError
from recipes.data.files import data_files
from recipes.data.frames import probe, read_frames
from recipes.data.media_rows import with_folder
from recipes.data.reader import Rows
from recipes.data.rows import PromptReading, load_prompts
from recipes.data.settings import RowsSection
from recipes.data.shards import opened, url_of
from recipes.data.token_cache import TokenCache
from recipes.data.tokenizer import load_tokenizer
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings
from tests.media_files import HeifFile, hevc_tile, number_of, numbered, write_film

HOW = VideoSettings(num_frames=2, height=16, width=16)
SAMPLES = 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "SAMPLES", 3)
    monkeypatch.setattr(streaming, "FIRST_ROWS", 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tools.make_word_problems import train_tokenizer

    found = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(found, ["see which of 0 1 2 3 4 5 6 7 8 9 and\n"], 300, special=("<video>",))
    return load_tokenizer(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """0.mp4, 0.png, and so on, each in the grey of its number, and rows.jsonl, which shows them."""
    found, rows = tmp_path_factory.mktemp("media"), []
    for i in range(SAMPLES):
        write_film(found / f"{i}.mp4", [numbered(i)] * 4, codec="libx264", pix_fmt="yuv420p")
        write_film(found / f"{i}.png", [numbered(i + 20)], codec="png", pix_fmt="rgb24", mux={"update": "1"})
        rows.append({"video": f"{i}.mp4", "images": [f"{i}.png"], "prompt": f"<video>see {i} <image>", "answer": i})
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def write_shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(folder, i: int, **changes) -> dict[str, bytes]:
    row = {"prompt": f"<video>see {i} <image>", "answer": i} | changes
    files = {f"s{i:03}.{end}": (folder / f"{i}.{end}").read_bytes() for end in ("mp4", "png")}
    return {f"s{i:03}.json": json.dumps(row).encode()} | files


def stream(tmp_path, path, tokenizer, **options):
    reading = PromptReading(tokenizer, 500, VideoReader(HOW, HOW.feature_size), RowsSection(streaming=True, **options))
    return TokenCache(tmp_path / "kept", 1).stream(path, reading)


@pytest.fixture
def path(folder, tmp_path):
    """Two shards; the first says nothing of its media, the second names them."""
    first = {name: data for i in range(7) for name, data in sample(folder, i).items()}
    write_shard(tmp_path / "train-0.tar", {"README": b"seven samples"} | first)
    named = [sample(folder, i, video=f"s{i:03}.mp4", image=f"s{i:03}.png") for i in range(7, SAMPLES)]
    write_shard(tmp_path / "train-1.tar", {name: data for files in named for name, data in files.items()})
    return tmp_path


def test_rows_of_shards_are_those_of_files_in_a_folder(path, folder, tokenizer, tmp_path):
    reader = VideoReader(HOW, HOW.feature_size)
    expected = load_prompts(folder / "rows.jsonl", tokenizer, 500, reader)
    rows = stream(tmp_path, f"{path}/train-*.tar", tokenizer)
    assert len(rows) == SAMPLES and rows.shuffle.sizes == [3, 3, 1, 3, 1]
    for i, (found, other) in enumerate(zip(rows, expected, strict=True)):
        assert found.tokens == other.tokens and found.row["answer"] == i
        assert torch.equal(found.for_model().content, other.for_model().content)
        assert found.where == f"{path}/train-{int(i > 6)}.tar, s{i:03}"
    assert data_files(path) == [f"{path}/train-{i}.tar" for i in range(2)]


def test_rows_that_are_read_before_a_run_may_stand_in_shards(path, folder, tokenizer, tmp_path):
    """Held-out ones, and those of a run without streaming: the same prompts, with the same digests of rows and clips."""
    reader = VideoReader(HOW, HOW.feature_size)
    expected = load_prompts(folder / "rows.jsonl", tokenizer, 500, reader)
    for found in (load_prompts(path, tokenizer, 500, reader), TokenCache(tmp_path / "kept", 1).load(path, PromptReading(
        tokenizer, 500, reader
    ))):  # fmt: skip
        assert [item.tokens for item in found] == [item.tokens for item in expected]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.for_model().content, other.for_model().content)
            digests = [sampled_files(f for clip in item.media for f in clip.files).values() for item in (one, other)]
            assert [*digests[0]] == [*digests[1]] and len(digests[0]) == 2
    assert str(found[-1].place) == f"{path}/train-1.tar, s{SAMPLES - 1:03}"


def test_texts_of_shards_are_not_kept_in_tokens(tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 0)
    write_shard(tmp_path / "a.tar", {f"{i}.json": json.dumps({"prompt": f"see {i}"}).encode() for i in range(7)})
    with caplog.at_level("INFO"):
        found = TokenCache(tmp_path / "kept", 1).load(tmp_path / "a.tar", PromptReading(tokenizer, 500))
    assert [item.row["prompt"] for item in found] == [f"see {i}" for i in range(7)]
    assert "made by each rank and not kept: rows of shards are read where they lie" in caplog.text


def test_keys_are_webdatasets(folder, tmp_path):
    """Of a shard that it has written."""
    webdataset = pytest.importorskip("webdataset")
    path = f"{tmp_path}/theirs.tar"
    with webdataset.TarWriter(path) as writer:
        for i in range(SAMPLES):
            files = {name.partition(".")[2]: data for name, data in sample(folder, i).items()}
            writer.write({"__key__": f"s{i:03}"} | files)
    theirs = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    expected = [(s["__key__"], json.loads(s["json"])["answer"]) for s in theirs]
    found = shards.read_samples(path, 1, len(expected))
    assert [(s.key, json.loads(s.row)["answer"]) for s in found] == expected and len(expected) == SAMPLES


def test_an_order_goes_on_where_it_was_with_any_number_of_ranks(path, tokenizer, tmp_path):
    def order(rank: int = 0, world: int = 1):
        rows = stream(tmp_path, str(path), tokenizer, streaming_window=2)
        return rows, draw_order({"": rows}, {}, 4, 9, 5, rank, world)

    rows, whole = order()
    expected = [[rows[i].row["answer"] for i in whole.next()] for _ in range(6)]
    assert sorted(sum(expected, [])[:SAMPLES]) == [*range(SAMPLES)]
    _, first = order()
    for _ in range(2):
        first.next()
    for rank in range(2):
        rows, later = order(rank, 2)
        later.load_state_dict(first.state_dict())
        for step in range(2, 6):
            assert [rows[i].row["answer"] for i in later.next()] == expected[step][rank * 2 : rank * 2 + 2]


def test_what_is_broken_in_a_shard_is_one_line_with_shard_and_key(folder, tokenizer, tmp_path):
    good = sample(folder, 0)
    broken = sample(folder, 1) | {"s001.mp4": sample(folder, 1)["s001.mp4"][:-300]}
    write_shard(tmp_path / "a.tar", good | broken)
    rows = stream(tmp_path, tmp_path / "a.tar", tokenizer)
    assert rows[0].for_model() is not None
    with pytest.raises(VideoError, match=rf"^{tmp_path}/a.tar, s001: .*{tmp_path}/a.tar/s001.mp4") as caught:
        rows[1].for_model()
    assert "\n" not in str(caught.value)
    cases = (
        ({"s000.mp4": b""}, r"b.tar, s000: it has 0 members s000.json, and a row is one"),
        ({"a.json": b"{}", "b.json": b"{}", "a.mp4": b""}, "b.tar, a: its members do not follow each other"),
        ({"s000.json": b"{"}, r"b.tar, s000: s000.json is not valid JSON: Expecting"),
        ({"s000.json": b"[]"}, "b.tar, s000: s000.json must be a JSON object"),
        ({}, "b.tar is empty"),
        (sample(folder, 0, video="none.mp4", image="s000.png"), "b.tar, s000: video .*b.tar/none.mp4 does not exist"),
        (
            sample(folder, 0, video="s000.mp4", image="~nouser/x.png"),
            "b.tar, s000: image ~nouser/x.png is no usable file",
        ),
    )
    for members, words in cases:
        write_shard(tmp_path / "b.tar", members)
        with pytest.raises((DataError, VideoError), match=words) as caught:
            stream(tmp_path, tmp_path / "b.tar", tokenizer)
        assert "\n" not in str(caught.value)
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2500])
    with pytest.raises(DataError, match="c.tar.*: fetch it again|cannot read .*c.tar: .* not packed, and whole"):
        stream(tmp_path, tmp_path / "c.tar", tokenizer)
    with pytest.raises(VideoError, match=rf"^{tmp_path}/a.tar, s001: .*{tmp_path}/a.tar/s001.mp4"):
        reader = VideoReader(replace(HOW, check=True), HOW.feature_size)
        load_prompts(tmp_path / "a.tar", tokenizer, 500, reader)
    (tmp_path / "d.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="d.tar.gz is packed: unpack it"):
        stream(tmp_path, tmp_path / "d.tar.gz", tokenizer)
    for path in (tmp_path / "d.tar.gz", f"{tmp_path}/d.*"):
        with pytest.raises(DataError, match="d.tar.gz is packed: unpack it"):
            load_prompts(path, tokenizer, 500, VideoReader(HOW, HOW.feature_size))
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.tar.gz"):
        (tmp_path / "mixed" / name).write_bytes(b"x")
    with pytest.raises(DataError, match="mixed is a folder of .tar and .tar.gz files"):
        data_files(tmp_path / "mixed")


def test_a_damaged_shard_is_not_a_shorter_one(folder, tmp_path, rng):
    """Cut at any byte, or with a header that is none: tarfile would take what comes before for all."""
    whole, path = tmp_path / "whole.tar", tmp_path / "cut.tar"
    write_shard(whole, {name: data for i in range(3) for name, data in sample(folder, i).items()})
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        headers = [member.offset for member in tar.getmembers()]
    assert len(shards.find_shard(str(whole)).samples) == 3
    within = int(torch.randint(1, 512, (), generator=rng))
    border = int(torch.randint(1, len(headers), (), generator=rng))
    end = tar.offset
    anywhere = int(torch.randint(1, end + 512, (), generator=rng))
    for cut in (headers[border], headers[border] + within, end, end + within, anywhere):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"cut.tar( is cut off| behind .*: |: ).*fetch it again") as caught:
            shards.find_shard(str(path))
        assert "\n" not in str(caught.value)
    broken = bytearray(data)
    broken[headers[border] + 148] ^= 1  # the checksum
    for written in (bytes(broken), data + data):
        path.write_bytes(written)
        with pytest.raises(DataError, match=r"cut.tar is cut off or damaged behind s00\d\..*: fetch it again"):
            shards.find_shard(str(path))
    path.write_bytes(data[: end + 512])
    assert len(shards.find_shard(str(path)).samples) == 3
    # Room that a download has set aside: from somewhere within the shard on, nothing but zeros.
    nothing = bytearray(data + bytes(50_000))
    begin = int(torch.randint(1, end, (), generator=rng))
    nothing[begin:] = bytes(len(nothing) - begin)
    path.write_bytes(bytes(nothing))
    with pytest.raises(DataError, match=r"cut.tar( is cut off or damaged | behind .*: |: ).*fetch it again"):
        shards.find_shard(str(path))
    # A gap between members.
    gap = int(torch.randint(1024, 90_000, (), generator=rng))
    path.write_bytes(data[: headers[border]] + bytes(gap) + data[headers[border] :])
    with pytest.raises(DataError, match=r"cut.tar.* behind s00\d\..*fetch it again"):
        shards.find_shard(str(path))


def test_members_with_holes_are_refused(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 20)
        file.seek((1 << 20) - 2)
        file.write(b"{}")
    subprocess.run(["tar", "-S", "-cf", tmp_path / "a.tar", "-C", tmp_path, "a.json"], check=True)
    with pytest.raises(DataError, match="a.tar: a.json is stored without its holes: make the shard without -S"):
        shards.find_shard(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "changes, options",
    [
        ({"pics": ["s000.png"], "clip": "s000.mp4"}, {"fields": {"images": "pics", "video": "clip"}}),
        ({"image": "http://x/y.png"}, {"ignored_keys": ["image"]}),
        ({"images": None, "video": None}, {}),
    ],
)
def test_media_are_found_by_our_names(changes, options, folder, tokenizer, tmp_path):
    """Behind data.fields and data.ignored_keys, in the shard."""
    write_shard(tmp_path / "a.tar", sample(folder, 0, **changes))
    (found,) = stream(tmp_path, tmp_path / "a.tar", tokenizer, **options)
    clip, image = found.media
    # As rows of a step that failed are written down, to be read again.
    (tmp_path / "failed.jsonl").write_text(json.dumps(with_folder(found.row, found.place.folder)))
    again = PromptReading(tokenizer, 500, VideoReader(HOW, HOW.feature_size), RowsSection(**options | {"fields": {}}))
    assert again.load(tmp_path / "failed.jsonl")[0].media == (
        replace(clip, where=f"{tmp_path}/failed.jsonl:1"),
        replace(image, where=f"{tmp_path}/failed.jsonl:1"),
    )
    assert clip.path == f"{tmp_path}/a.tar/s000.mp4" and image.path == f"{tmp_path}/a.tar/s000.png"


@pytest.mark.parametrize("key", ["image", "path", "url"])
@pytest.mark.parametrize("messages", ["messages", "conversations"])
def test_parts_of_messages_name_files_of_the_shard(key, messages, folder, tmp_path):
    """By all keys that they may have; other files of the sample are then not shown."""
    parts = [{"type": "image", key: "s000.1.png"}, {"type": "text", "text": "?"}]
    row = {messages: [{"role": "user", "content": parts}]}
    picture = (folder / "1.png").read_bytes()
    write_shard(
        tmp_path / "a.tar", {"s000.json": json.dumps(row).encode(), "s000.0.png": picture, "s000.1.png": picture}
    )
    fields = {} if messages == "messages" else {"messages": messages}
    table = RowBlocks([f"{tmp_path}/a.tar"], find_blocks([f"{tmp_path}/a.tar"], lambda said: None))
    reader = Rows(None, VideoReader(HOW, HOW.feature_size), RowsSection(fields=fields))
    found = reader.read(*table.read(0).row(0, ()))
    _, (clip,) = reader.video.read_row(found.read, found.place.folder, found.where)
    assert clip.path == f"{tmp_path}/a.tar/s000.1.png"


def test_headers_of_many_shards_are_read_once_as_far_as_there_is_room(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "KEPT", 8)
    paths = [f"{tmp_path}/{i}.tar" for i in range(3)]
    for path in paths:
        write_shard(path, sample(folder, 0))  # three members
    first, second = map(shards.find_shard, paths[:2])
    assert shards.find_shard(paths[0]) is first
    shards.find_shard(paths[2])
    assert shards.find_shard(paths[0]) is first and shards.find_shard(paths[1]) is not second


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder with a film or picture of each kind, some under wrong names, some cut."""
    from PIL import Image

    found = tmp_path_factory.mktemp("kinds")
    grey = [numbered(i, 64, 64) for i in (3, 9, 20, 31, 42)]
    for name, codec, form in (
        ("a.mp4", "libx264", "yuv420p"), ("b.mkv", "libx264", "yuv420p"), ("c.webm", "libvpx-vp9", "yuv420p"),
        ("d.gif", "gif", "rgb8"), ("e.avi", "mpeg4", "yuv420p"), ("f.ts", "libx264", "yuv420p"),
        ("10:30 %d,,.mov", "mpeg4", "yuv420p"),
    ):  # fmt: skip
        write_film(found / name, grey, codec=codec, pix_fmt=form)
    for end in ("png", "jpg", "webp", "bmp", "tiff", "avif"):
        Image.fromarray(grey[2]).save(found / f"g.{end}")
    heif = HeifFile(b"heic")
    heif.save(found / "h.heic", heif.add_coded(hevc_tile(grey[4]), 64, 64))
    Image.fromarray(grey[0]).save(found / "i.jpg")
    (found / "i.jpg").write_bytes((found / "i.jpg").read_bytes() + (found / "g.jpg").read_bytes())  # a phone's
    for name, source in (("j.jpg", "g.png"), ("k.JPG", "a.mp4"), ("l.mp4", "g.jpg"), ("m.png", "g.jpg")):
        (found / name).write_bytes((found / source).read_bytes())
    for name in ("a.mp4", "b.mkv", "d.gif", "g.jpg", "g.png", "h.heic"):
        data = (found / name).read_bytes()
        (found / f"cut-{name}").write_bytes(data[: int(len(data) * 0.6)])
    return found


def test_a_film_in_a_shard_is_the_same_film(kinds, tmp_path, rng):
    """Of every kind, between other bytes, with the same words where it is broken; nothing is copied."""
    names = sorted(path.name for path in kinds.iterdir())
    members = {}
    for name in names:
        members[f"{name}.bin"] = torch.randint(256, (700,), generator=rng, dtype=torch.uint8).numpy().tobytes()
        members[name] = (kinds / name).read_bytes()
    shard = tmp_path / "a,:b %d.tar"
    write_shard(shard, members | {"none.mp4": b""})

    def seen(path):
        try:
            frames = read_frames(path, 3, 32, 32)
        except VideoError as error:
            return str(error).replace(str(path), "PATH")
        return probe(path), [number_of(frame) for frame in frames], frames.tolist()

    broken = 0
    for name in names:
        found, expected = seen(shard / name), seen(kinds / name)
        assert found == expected, name
        broken += isinstance(found, str)
        with opened(shard / name) as file:
            assert file.read() == members[name]
    assert broken == 6  # those that are cut
    assert seen(shard / "none.mp4") == "PATH is empty: make it anew"
    assert seen(shard / "i.jpg")[1] == [3, 3, 3]
    assert url_of(kinds / "a.mp4") == f"file:{kinds}/a.mp4"
