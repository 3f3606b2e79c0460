"""Saving and loading weights on one rank; other layouts are in tests/distributed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import (
    CheckpointSave,
    load_optimizer,
    load_rng,
    load_weights,
    read_checkpoint_info,
    remove_unfinished,
    save_checkpoint,
)
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from tests.gpt_cases import randomize, small_config
from tests.waiting import until


def build(rng, world, **changes):
    model = build_gpt(small_config(**changes), world)
    randomize(model, rng)
    return model


def test_weights_come_back_bitwise(rng, world, tmp_path: Path):
    saved, other = build(rng, world), build(rng, world)
    save_checkpoint(tmp_path / "c", saved, {"model": {"num_layers": 2}})
    assert not torch.equal(saved.decoder.final_layernorm.weight, other.decoder.final_layernorm.weight)
    load_weights(tmp_path / "c", other)
    assert read_checkpoint_info(tmp_path / "c")["model"] == {"num_layers": 2}
    for (name, a), (_, b) in zip(saved.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # nothing unfinished stays behind


def test_a_checkpoint_is_never_overwritten(rng, world, tmp_path: Path):
    model = build(rng, world)
    save_checkpoint(tmp_path / "c", model, {"step": 1})
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*"))
    with pytest.raises(AlreadyExistsError, match="never overwritten"):
        save_checkpoint(tmp_path / "c", model, {"step": 2})
    assert read_checkpoint_info(tmp_path / "c")["step"] == 1
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")) == before


def test_an_unfinished_checkpoint_is_refused(rng, world, tmp_path: Path):
    """The description is written last: without it the save did not get to its end."""
    model = build(rng, world)
    save_checkpoint(tmp_path / "c", model, {})
    (tmp_path / "c" / "checkpoint.json").unlink()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for folder in (tmp_path / "c", tmp_path / "nothing here"):
        with pytest.raises(ValueError, match="not a complete checkpoint"):
            load_weights(folder, model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_damaged_description_is_refused(rng, world, tmp_path: Path):
    model = build(rng, world)
    save_checkpoint(tmp_path / "c", model, {}, None, lambda folder: (folder / "more").write_text("kept"))
    assert (tmp_path / "c" / "more").read_text() == "kept"
    (tmp_path / "c" / "checkpoint.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(tmp_path / "c", model)


def test_an_interrupted_save_does_not_block_the_next(rng, world, tmp_path: Path):
    (tmp_path / "c.unfinished" / "weights").mkdir(parents=True)
    (tmp_path / "c.unfinished" / "weights" / "left.distcp").write_bytes(b"from an earlier run")
    saved, other = build(rng, world), build(rng, world)
    save_checkpoint(tmp_path / "c", saved, {})
    load_weights(tmp_path / "c", other)
    assert torch.equal(saved.embedding.word_embeddings.weight, other.embedding.word_embeddings.weight)


def test_a_save_in_the_background_keeps_the_values_it_was_given(rng, world, tmp_path: Path):
    saved, other = build(rng, world), build(rng, world)
    before = {name: p.detach().clone() for name, p in saved.named_parameters()}
    save = CheckpointSave(tmp_path / "c", saved, {"step": 3})
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    assert not (tmp_path / "c").exists()
    until(save.is_finished)
    assert save.is_finished()
    save.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    load_weights(tmp_path / "c", other)
    assert all(torch.equal(before[name], p) for name, p in other.named_parameters())


def flip(path: Path, rng: torch.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[int(torch.randint(len(data), (), generator=rng))] ^= 1 << int(torch.randint(8, (), generator=rng))
    path.write_bytes(data)


def test_a_flipped_bit_in_the_description_is_found(rng, world, tmp_path: Path):
    model = build(rng, world)
    save_checkpoint(tmp_path / "c", model, {"learning_rate": 1e-4, "step": 3, "of": ["a", None, float("nan")]})
    path = tmp_path / "c" / "checkpoint.json"
    whole = path.read_bytes()
    assert read_checkpoint_info(tmp_path / "c")["step"] == 3
    for _ in range(50):
        path.write_bytes(whole)
        flip(path, rng)
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint_info(tmp_path / "c")


DAMAGES = {
    "cut off": (lambda path, rng: os.truncate(path, path.stat().st_size - 1), "were saved"),
    "a bit flipped": (flip, "checksum differs"),
    "missing": (lambda path, rng: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found(rng, world, tmp_path: Path, damage: str):
    model = build(rng, world)
    engine = Engine(model, OptimConfig())
    save_checkpoint(tmp_path / "c", model, {}, engine.optimizer)
    hurt, words = DAMAGES[damage]
    folder = tmp_path / "hurt"
    for name in read_checkpoint_info(tmp_path / "c")["files"]:
        part = name.split("/")[0]
        read = {"weights": load_weights, "optimizer": load_optimizer, "rng": load_rng}.get(part)
        if read is None:  # of no part that a run reads: none is saved here
            raise AssertionError(f"{name} is read by nobody")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "c", folder)
        hurt(folder / name, rng)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"hurt is damaged: {name} .*{words}.*take another checkpoint"):
            read(folder, *{"weights": [model], "optimizer": [model, engine.optimizer], "rng": []}[part])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def small_disk(folder: Path, kilobytes: int) -> None:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")


def test_a_full_disk(rng, world, tmp_path: Path):
    """Whether it is seen beforehand or only while writing: one line, and the last checkpoint is still there."""
    disk = tmp_path / "disk"
    small_disk(disk, 3000)
    try:
        model = build(rng, world)
        save_checkpoint(disk / "first", model, {"step": 1})
        before = read_checkpoint_info(disk / "first")
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - (700 << 10)))
        with pytest.raises(UserError, match=r"^no room for the checkpoint .*free some") as refused:
            save_checkpoint(disk / "second", model, {})
        assert "\n" not in str(refused.value)
        for in_background in (False, True):
            filler.unlink()
            with pytest.raises(
                UserError, match=r"could not be written \(.*No space left on device.*untouched$"
            ) as failed:
                # The disk fills while the checkpoint is being written.
                save = CheckpointSave(
                    disk / "second", model, {}, None,
                    lambda folder: (folder / "more").write_bytes(bytes(3000 << 10)), None, in_background,
                )  # fmt: skip
                save.finish()
            assert "\n" not in str(failed.value)
            filler.write_bytes(b"")
            remove_unfinished(disk)
            assert {p.name for p in disk.iterdir()} == {"first", "filler"}
        load_weights(disk / "first", model)
        assert read_checkpoint_info(disk / "first") == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_refuses_the_weights(rng, world, tmp_path: Path):
    """As above, but Megatron's writers meet it: no file may become longer than this."""
    model = build(rng, world)
    save_checkpoint(tmp_path / "first", model, {"step": 1})
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, allowed[1]))
    try:
        for in_background in (False, True):
            with pytest.raises(
                UserError, match=r"could not be written \(Worker failure.* GiB are free.*untouched$"
            ) as failed:
                CheckpointSave(tmp_path / "second", model, {}, in_background=in_background).finish()
            assert "\n" not in str(failed.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert not (tmp_path / "second").exists()
    load_weights(tmp_path / "first", model)
