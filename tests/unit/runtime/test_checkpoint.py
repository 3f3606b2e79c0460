"""Saving and loading weights on one rank; other layouts are in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info, save_checkpoint
from tests.gpt_cases import randomize, small_config


def build(rng, world, **changes):
    model = build_gpt(small_config(**changes), world)
    randomize(model, rng)
    return model


def test_weights_come_back_bitwise(rng, world, tmp_path: Path):
    saved, other = build(rng, world), build(rng, world)
    save_checkpoint(tmp_path / "c", saved, {"model": {"num_layers": 2}})
    assert not torch.equal(saved.decoder.final_layernorm.weight, other.decoder.final_layernorm.weight)
    load_weights(tmp_path / "c", other)
    assert read_checkpoint_info(tmp_path / "c") == {"model": {"num_layers": 2}}
    for (name, a), (_, b) in zip(saved.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # nothing unfinished stays behind


def test_a_checkpoint_is_never_overwritten(rng, world, tmp_path: Path):
    model = build(rng, world)
    save_checkpoint(tmp_path / "c", model, {"step": 1})
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*"))
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_checkpoint(tmp_path / "c", model, {"step": 2})
    assert read_checkpoint_info(tmp_path / "c") == {"step": 1}
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
