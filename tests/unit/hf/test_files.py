"""Safetensors files that are written and read by position, beside the library; and folders that are no model."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_ext.errors import AlreadyExistsError
from megatron_ext.files import give_name, unfinished
from megatron_ext.hf.files import (
    DTYPES,
    Stored,
    check_target,
    companions,
    copy_files,
    create_files,
    hf_weights_digest,
    plan_files,
    read_headers,
    read_slots,
)
from megatron_ext.hf.tensors import TensorWriter, is_finite, read_slice

FLOATS = list(DTYPES.values())
INDEX = "model.safetensors.index.json"
shapes_of_a_model = st.dictionaries(
    st.text("abcdefghij.0123456789\u00e9", min_size=1, max_size=40),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    min_size=1,
    max_size=12,
)


def random(shape, dtype, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(shapes=shapes_of_a_model, dtype=st.sampled_from(FLOATS), largest=st.integers(1, 3000))
def test_written_files_are_those_of_the_library(tmp_path_factory, shapes, dtype, largest):
    folder = tmp_path_factory.mktemp("written")
    tensors = {name: random(shape, dtype, number) for number, (name, shape) in enumerate(shapes.items())}
    slots, beginnings = plan_files(shapes, dtype, largest)
    create_files(folder, slots, beginnings)
    writer = TensorWriter(folder, slots)
    for name in sorted(tensors):  # in any order
        writer.write(name, tensors[name])
    assert writer.close() is None
    assert slots.keys() == tensors.keys()
    for file, beginning in beginnings.items():
        names = [name for name, slot in slots.items() if slot.file == file]
        size = sum(slots[name].size for name in names)
        assert size <= largest or len(names) == 1
        assert len(beginning) % 8 == 0 and int.from_bytes(beginning[:8], "little") == len(beginning) - 8
        assert (folder / file).stat().st_size == len(beginning) + size
        with safe_open(str(folder / file), framework="pt") as opened:  # checks offsets and lengths
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == set(names)
        found = load_file(str(folder / file))
        save_file({name: tensors[name] for name in names}, str(folder / "theirs"))
        theirs = load_file(str(folder / "theirs"))
        (folder / "theirs").unlink()
        for name in names:
            assert found[name].dtype == theirs[name].dtype and torch.equal(found[name], theirs[name])
        assert read_slots(folder / file) == {name: slots[name] for name in names}
    if len(beginnings) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {name: slot.file for name, slot in slots.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {name: (DTYPES[s.dtype], s.shape) for name, s in read_headers(folder).items()} == {
        name: (dtype, shape) for name, shape in shapes.items()
    }


@given(data=st.data(), dtype=st.sampled_from(FLOATS), into=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_block_is_read_into_any_type_and_layout(tmp_path_factory, data, dtype, into):
    folder = tmp_path_factory.mktemp("read")
    groups, height, width = (data.draw(st.integers(1, 7)) for _ in range(3))
    before, after, left, right = (data.draw(st.integers(0, 5)) for _ in range(4))
    whole = random((before + groups * height + after, left + width + right), dtype)
    save_file({"x": whole, "other": random((3,), torch.float16)}, str(folder / "model.safetensors"))
    stored = read_headers(folder)["x"]
    rows = slice(before, before + groups * height)

    target = torch.full((groups * height, width), math.nan, dtype=into)  # columns
    read_slice("x", stored, (rows, slice(left, left + width)), target)
    assert torch.equal(target, whole[rows, left : left + width].to(into))

    wide = torch.full((groups, height + 2, whole.size(1)), math.nan, dtype=into)  # groups within a larger parameter
    read_slice("x", stored, (rows,), wide[:, 1:-1])
    assert torch.equal(wide[:, 1:-1], whole[rows].to(into).view(groups, height, -1))
    assert wide[:, [0, -1]].isnan().all()


@given(data=st.data(), dtype=st.sampled_from(FLOATS), own=st.sampled_from([torch.float32, torch.bfloat16]))
def test_blocks_of_any_type_and_layout_are_written_side_by_side(tmp_path_factory, data, dtype, own):
    """By writers of their own, as ranks are: columns of one tensor, groups of rows of another, and nothing between."""
    folder = tmp_path_factory.mktemp("blocks")
    groups, height, width, parts = (data.draw(st.integers(1, 6)) for _ in range(4))
    x, y = random((3, parts * width), own, 1), random((parts * groups * height, 5), own, 2)
    slots, beginnings = plan_files({"x": (3, parts * width), "y": tuple(y.shape)}, dtype, 10**6)
    create_files(folder, slots, beginnings)
    for part in data.draw(st.permutations(range(parts))):
        writer = TensorWriter(folder, slots)
        columns = slice(part * width, (part + 1) * width)
        writer.write("x", x[:, columns], (slice(0, 3), columns))
        rows = slice(part * groups * height, (part + 1) * groups * height)
        larger = torch.full((groups, height + 2, 5), math.nan, dtype=own)
        larger[:, 1:-1] = y[rows].view(groups, height, 5)
        writer.write("y", larger[:, 1:-1], (rows,))
        writer.write("y", y[:0], (slice(len(y), len(y)),))  # of a rank with nothing but padding
        assert writer.close() is None
    found = load_file(str(folder / "model.safetensors"))
    assert torch.equal(found["x"], x.to(dtype)) and torch.equal(found["y"], y.to(dtype))


def test_large_slices_are_read_in_chunks(tmp_path):
    """Rows that are longer than a chunk; many rows in a chunk."""
    for shape in ((3, 3 << 18), ((3 << 20) + 5, 1), ((5 << 20) + 1,)):
        whole = random(shape, torch.float32)
        save_file({"x": whole}, str(tmp_path / "model.safetensors"))
        stored = read_headers(tmp_path)["x"]
        target = torch.empty(len(whole) - 1, *shape[1:])
        read_slice("x", stored, (slice(1, len(whole)),), target)
        assert torch.equal(target, whole[1:])
        slots, beginnings = plan_files({"x": shape}, torch.float32, 1)
        (tmp_path / "copy").mkdir(exist_ok=True)
        create_files(tmp_path / "copy", slots, beginnings)
        writer = TensorWriter(tmp_path / "copy", slots)
        writer.write("x", whole)
        assert writer.close() is None
        assert torch.equal(load_file(str(tmp_path / "copy" / "model.safetensors"))["x"], whole)
        half = torch.empty(len(whole), *shape[1:], dtype=torch.bfloat16)
        read_slice("x", stored, (slice(0, len(whole)),), half)
        assert torch.equal(half, whole.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_seen_wherever_it_is(tmp_path, rng, dtype, value):
    tensor = torch.randn(33, 65, generator=rng).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    row, column = (int(torch.randint(n, (), generator=rng)) for n in tensor.shape)
    tensor[row, column] = value
    assert not is_finite(tensor) and not is_finite(tensor[:, column])
    save_file({"x": tensor}, str(tmp_path / "model.safetensors"))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged: x holds a number that is not finite in torch.f"
    ):
        read_slice("x", read_headers(tmp_path)["x"], (slice(0, 33),), torch.empty(33, 65))


def test_a_type_of_too_small_a_range_is_refused(tmp_path):
    save_file({"x": torch.tensor([1e300], dtype=torch.float64)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        read_slice("x", read_headers(tmp_path)["x"], (slice(0, 1),), torch.empty(1))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="cannot read .*x .it ends too early.; fetch it again"):
        read_slice("x", Stored(tmp_path / "x", "F32", (30,), 0, "x"), (slice(0, 30),), torch.empty(30))


@pytest.fixture
def sharded(tmp_path):
    """Two files, an index, and their tensors."""
    shapes = {f"layer.{n}": (4, n + 1) for n in range(6)}
    slots, beginnings = plan_files(shapes, torch.float32, 200)
    create_files(tmp_path, slots, beginnings)
    assert len(beginnings) == 2
    return tmp_path, sorted(beginnings)


def refused(folder, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_headers(folder)
    assert "\n" not in str(caught.value)


def test_damaged_files(sharded):
    folder, (first, second) = sharded
    assert len(read_headers(folder)) == 6
    path = folder / second
    sound = path.read_bytes()
    length = 8 + int.from_bytes(sound[:8], "little")
    for damage in (sound[:-1], sound[: length + 3], sound[: length - 3], sound[:5], b"", sound + b"\0"):
        path.write_bytes(damage)
        refused(folder, f"{second} is damaged .*; fetch it again")
    for bit in range(8):  # of the length, and of a number in the header
        for place in (1, sound.index(b"data_offsets") + 15):
            flipped = bytearray(sound)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            refused(folder, f"{second}.*fetch (it|both) again")
    path.unlink()
    refused(folder, f"{second} is missing; fetch the model again")


def test_an_index_says_which_files_there_are_and_they_what_is_in_them(sharded):
    folder, (first, second) = sharded
    sound = json.loads((folder / INDEX).read_text())
    found = read_headers(folder)
    moved = next(name for name, file in sound["weight_map"].items() if file == first)
    for change in ({moved: second}, {"layer.9": second}):
        (folder / INDEX).write_text(json.dumps({"weight_map": sound["weight_map"] | change}))
        assert read_headers(folder) == found and found[moved].file.name == first
    (folder / INDEX).write_text(json.dumps({"weight_map": {moved: first}}))
    assert read_headers(folder) == {name: stored for name, stored in found.items() if stored.file.name == first}


def test_damaged_indices(sharded):
    folder, (first, second) = sharded
    sound = json.loads((folder / INDEX).read_text())
    moved = next(name for name, file in sound["weight_map"].items() if file == first)
    for file, words in (
        ("../model.safetensors", "'../model.safetensors' is no file name"),
        (3, "3 is no file name"),
        ("model-00003-of-00002.safetensors", "model-00003-of-00002.safetensors is missing; fetch the model again"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": sound["weight_map"] | {moved: file}}))
        refused(folder, words)
    for text in ('{"weight_map": {}}', "{}", '{"weight_map": []}', "[", ""):
        (folder / INDEX).write_text(text)
        refused(folder, "is damaged")
    (folder / INDEX).write_text(json.dumps(sound))
    shutil.copy(folder / first, folder / "again.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": sound["weight_map"] | {"x": "again.safetensors"}}))
    refused(folder, f"holds layer.0 twice, in {first} and in again.safetensors; fetch the model again")


def test_folders_that_are_no_model(tmp_path):
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json; name the folder")
    refused(tmp_path / "none", "has neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path, "has its weights in pytorch_model.bin only, a pickle, which can run code and is never loaded")


def test_targets(tmp_path):
    """Nothing may be there, not even an empty folder: a checkpoint's rule."""
    check_target(tmp_path / "new")
    (tmp_path / "something").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "astray").symlink_to(tmp_path / "none")
    for taken in (tmp_path, *tmp_path.iterdir()):
        with pytest.raises(AlreadyExistsError, match="exists already; nothing is ever overwritten"):
            check_target(taken)


def test_what_goes_along(tmp_path):
    """Names as they are asked for, links followed; no code and no weights."""
    source, target = tmp_path / "source", unfinished(tmp_path / "target")
    source.mkdir(), target.mkdir()
    for name in ("tokenizer.json", "tokenizer.py", "tokenizer.safetensors", "LICENSE", "other"):
        (source / name).write_text(name)
    (source / "tokenizers").mkdir()
    (source / "tokenizers" / "more.jinja").write_text("more")
    (source / "tokenizer_config.json").symlink_to(source / "other")
    copy_files(source, target, companions(source, ("tokenizer*", "tokenizers/*", "LICENSE*")))
    give_name(target, tmp_path / "target")
    found = (path for path in (tmp_path / "target").rglob("*") if path.is_file())
    assert {str(path.relative_to(tmp_path / "target")): path.read_text() for path in found} == {
        "tokenizer.json": "tokenizer.json", "LICENSE": "LICENSE", "tokenizer_config.json": "other",
        "tokenizers/more.jinja": "more",
    }  # fmt: skip
    assert not (tmp_path / "target" / "tokenizer_config.json").is_symlink() and not target.exists()


def test_a_digest_of_weights_knows_every_tensor_and_no_file(tmp_path, rng):
    """Other weights of the same model differ in samples of each tensor that was trained; where a tensor stands does not count."""
    shapes = {"model.norm.weight": (5,), "model.embed_tokens.weight": (300, 40), "lm_head.weight": (1, 1)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}

    def digest(files: dict[str, list[str]]) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, names in files.items():
            save_file({name: tensors[name] for name in names}, folder / file)
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        return hf_weights_digest(folder)

    one = {"model.safetensors": list(shapes)}
    before = digest(one)
    assert digest({"a.safetensors": ["lm_head.weight"], "b.safetensors": list(shapes)[:2]}) == before
    for name in shapes:
        own = tensors[name]
        tensors[name] = own + 0.01
        assert digest(one) != before, name
        tensors[name] = own.to(torch.bfloat16)
        assert digest(one) != before, name
        tensors[name] = own
    assert digest(one) == before
