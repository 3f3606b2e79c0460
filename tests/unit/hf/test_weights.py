"""Hugging Face weights in and out of a model of one rank: what is refused, types, full disks and kills."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.hf import apply_patch, export_hf, load_hf_weights, make_patch
from megatron_ext.hf.files import create_files, plan_files, read_slots
from megatron_ext.hf.tensors import TensorWriter
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.vision import VisionConfig
from tests.children import Children
from tests.gpt_cases import randomize
from tests.hf_folders import build, contents, file_of, imported, made_patch, set_config, set_tensor, tensors
from tests.hf_models import VOCAB, hf_logits, make_hf_model

BOUND = 1e-4


def refused(folder, world, words, model=None) -> None:
    """In one line, and no parameter has changed."""
    model = model or build(folder, world)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words) as caught:
        load_hf_weights(folder, model)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, r"contradicts its config.json: it lacks model.layers.4.* .of 9.; fetch both again"),
        ({"num_hidden_layers": 3}, r"contradicts its config.json: it has also model.layers.3.* .of 9."),
        ({"hidden_size": 64, "head_dim": 8}, r"is \(67, 32\), the configuration makes it \(67, 64\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \(16, 32\), the configuration makes it \(32, 32\)"),
        ({"intermediate_size": 64}, r"gate_proj.weight is \(48, 32\), the configuration makes it \(64, 32\)"),
        ({"vocab_size": 68}, r"embed_tokens.weight is \(67, 32\), the configuration makes it \(68, 32\)"),
        ({"tie_word_embeddings": False}, r"lacks lm_head.weight, and tie_word_embeddings is false"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, r"lacks model.layers.0.self_attn.*bias"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, r"lacks model.layers.0.self_attn.k_norm"),
    ],
)
def test_a_config_that_contradicts_the_weights(folder, world, changes, words):
    set_config(folder, **changes)
    refused(folder, world, words)


def test_another_model_than_the_folders(folder, originals, world):
    refused(originals["qwen3"], world, "is not of this model's shape: model.", build(folder, world))
    set_config(folder, rms_norm_eps=1e-4)
    refused(folder, world, "model.layernorm_epsilon is 1e-06 here and 0.0001 there", build(originals["llama 3"], world))


def test_damaged_and_missing_files(folder, world):
    path = file_of(folder, "model.norm.weight")
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    refused(folder, world, f"{path.name} is damaged")
    path.write_bytes(sound[:3] + bytes([sound[3] ^ 16]) + sound[4:])
    refused(folder, world, f"{path.name} is damaged")
    path.unlink()
    refused(folder, world, f"{path.name} is missing")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights(folder, world, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensor(folder, name, tensors(folder)[name].to(dtype))
    refused(folder, world, f"{name} is stored as (F8_E4M3|I8); quantised weights are not read")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_flip_that_leaves_no_finite_number_is_seen(rng, tmp_path, world, dtype, precision):
    """The exponent's lowest bit of a number whose other exponent bits are set; in any tensor, at any place."""
    make_hf_model(tmp_path, "llama 3", rng, dtype)
    everything = tensors(tmp_path)
    name = sorted(everything)[int(torch.randint(len(everything), (), generator=rng))]
    place = int(torch.randint(everything[name].numel(), (), generator=rng))
    lowest = 7 if dtype != torch.float16 else 2  # of the exponent's bits in the last two bytes
    exponent = (0xFF << 7) if dtype != torch.float16 else (0x1F << 10)
    width = dtype.itemsize
    file = file_of(tmp_path, name)
    at = read_slots(file)[name].start + (place + 1) * width - 2
    data = bytearray(file.read_bytes())
    top = int.from_bytes(data[at : at + 2], "little") | exponent
    for flipped, finite in ((top ^ (1 << (lowest if lowest == 7 else 10)), True), (top, False)):
        data[at : at + 2] = flipped.to_bytes(2, "little")
        file.write_bytes(data)
        if finite and (precision, dtype) != ("bf16", torch.float32):  # 3.4e38 may round up to infinity
            imported(tmp_path, world, precision=precision)
        elif not finite:
            with pytest.raises(ValueError, match=f"{file.name} is damaged: {name} holds a number that is not finite"):
                imported(tmp_path, world, precision=precision)


def test_a_tied_head_that_is_stored_again(folder, world):
    embedding = tensors(folder)["model.embed_tokens.weight"]
    set_tensor(folder, "lm_head.weight", embedding.clone())
    model = imported(folder, world)
    assert torch.equal(model.embedding.word_embeddings.weight[:VOCAB], embedding)
    embedding[66, 31] += 1e-3
    set_tensor(folder, "lm_head.weight", embedding)
    refused(folder, world, "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    set_tensor(folder, "lm_head.weight", embedding[:-1])
    refused(folder, world, "tie_word_embeddings is true, but lm_head.weight is not")


def test_what_old_files_hold_besides(folder, world):
    set_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    imported(folder, world)


def test_eyes_may_be_added(folder, world, caplog):
    model = imported(folder, world, vision=VisionConfig(feature_size=5))
    assert "has no " in caplog.text and "it keeps its random weights" in caplog.text
    with pytest.raises(ValueError, match="transformers has no such model: one that sees needs model.vision.tower"):
        export_hf(model, folder.with_name("out"), source=folder)
    assert {path.name for path in folder.parent.iterdir()} == {"model"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(rng, tmp_path, world, dtype):
    make_hf_model(tmp_path / "half", "qwen2 with windows", rng, dtype)
    stored = tensors(tmp_path / "half")
    model = imported(tmp_path / "half", world)
    name = str(dtype).removeprefix("torch.")
    for target, given in ((tmp_path / "same", dtype), (tmp_path / "wide", None)):
        export_hf(model, target, source=tmp_path / "half", dtype=given)
        found = tensors(target)
        assert found.keys() == stored.keys()
        for key, tensor in found.items():
            assert tensor.dtype == (given or torch.float32)
            assert torch.equal(tensor, stored[key].to(tensor.dtype)), key
        assert json.loads((target / "config.json").read_text())["dtype"] == (name if given else "float32")
    texts = [torch.randint(VOCAB, (17,), generator=rng).tolist()]
    (expected,) = hf_logits(tmp_path / "half", texts)
    assert (text_logits(model, texts[0]) - expected).abs().max() <= BOUND


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"hidden_size": 33, "window_size": [3, 0]}, "mistral"),
        ({"add_qkv_bias": True, "window_size": [4, 0], "window_attn_skip_freq": 2}, "qwen2"),
        ({"qk_layernorm": True, "layernorm_epsilon": 1e-3}, "qwen3"),
    ],
)
def test_a_model_that_never_came_from_hugging_face(rng, tmp_path, world, changes, kind, tied):
    """transformers loads it with the config.json that is made for it, and answers the same."""
    shape = {
        "hidden_size": 32, "kv_channels": 8, "num_query_groups": 2, "vocab_size": VOCAB, "encoder_seq_length": 64,
        "share_embeddings_and_output_weights": tied, "precision": "32",
    }  # fmt: skip
    config = GPTModelConfig(num_layers=3, num_attention_heads=4, ffn_hidden_size=40, **shape | changes)
    model = build_gpt(config, world)
    randomize(model, rng)
    export_hf(model, tmp_path / "out", max_shard_size=9000)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["model_type"], made["dtype"]) == (kind, "float32")
    text = torch.randint(VOCAB, (23,), generator=rng).tolist()
    (expected,) = hf_logits(tmp_path / "out", [text])
    assert (text_logits(model, text) - expected).abs().max() <= BOUND
    export_hf(model, tmp_path / "untied", max_shard_size=9000, untied=True)
    assert not json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(*hf_logits(tmp_path / "out", [text]), *hf_logits(tmp_path / "untied", [text]))
    again = imported(tmp_path / "out", world)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        rows = VOCAB if "embedding" in name or "output" in name else None  # those behind pad the vocabulary
        assert torch.equal(parameter[:rows], other[:rows]), name


def test_an_export_that_cannot_be_leaves_nothing(folder, originals, world, tmp_path):
    model, target = imported(folder, world), tmp_path / "out"
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="is not of this model's shape: .*; name the folder that it was made from"):
        export_hf(model, target, source=originals["qwen3"])
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = 1e6
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj.weight holds a number that is not finite in torch.float16"
    ):
        export_hf(model, target, source=folder, dtype=torch.float16)
    assert {path.name for path in tmp_path.iterdir()} == before
    export_hf(model, target, source=folder)
    kept = contents(target)
    with pytest.raises(AlreadyExistsError, match="out exists already; nothing is ever overwritten"):
        export_hf(model, target, source=folder)
    assert contents(target) == kept


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own, where this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(folder, world, tmp_path):
    """Seen beforehand; seen while companions are copied; in both cases what was there stays and nothing else does."""
    model = imported(folder, world)
    (folder / "tokenizer.json").write_bytes(bytes(1_500_000))  # more than the room that is kept for small files
    with small_disk(tmp_path / "disk", "1600k") as disk:
        export_hf(model, disk / "first")
        kept = contents(disk)
        with pytest.raises(UserError, match=r"cannot write .*/second: No space left on device"):
            export_hf(model, disk / "second", source=folder)
        assert contents(disk) == kept and {path.name for path in disk.iterdir()} == {"first"}
        (disk / "filler").write_bytes(bytes(600_000))
        kept = contents(disk)
        with pytest.raises(
            UserError, match=r"no room for .*second.unfinished: it needs .* GiB, .* GiB are free; free some"
        ):
            export_hf(model, disk / "second")
        with pytest.raises(UserError, match="no room for .*second.unfinished"):
            apply_patch(folder, made_patch(folder, world, tmp_path), disk / "second")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free + 600_000))
        kept = contents(disk)
        with pytest.raises(UserError, match=r"cannot write .*/patch: .*No space left on device"):
            make_patch(tmp_path / "delta", folder, disk / "patch")
        assert contents(disk) == kept and {path.name for path in disk.iterdir()} == {"first", "filler"}


def test_a_disk_that_fills_while_tensors_are_written(tmp_path):
    slots, beginnings = plan_files({"a": (1000, 100), "b": (1000, 100)}, torch.float32, 10**9)
    with small_disk(tmp_path / "disk", "3m") as disk:
        create_files(disk, slots, beginnings)
        (disk / "filler").write_bytes(bytes(2_900_000))
        writer = TensorWriter(disk, slots)
        writer.write("a", torch.zeros(1000, 100))
        (disk / "filler").unlink()  # what comes after an error is not written
        writer.write("b", torch.ones(1000, 100))
        error = writer.close()
        assert isinstance(error, OSError)
        assert str(error) == f"cannot write {disk / 'model.safetensors'}: No space left on device"
        at = slots["b"].start
        assert (disk / "model.safetensors").read_bytes()[at:] == bytes(400_000)


KILLS, MOST_KILLS = 10, 100  # more where the first export took so long that every kill comes too late


@pytest.fixture
def children():
    with Children("exporter") as found:
        yield found


def start(children, folder, limit=0) -> int:
    child = children.start(folder, limit)
    assert children.said() == ["ready"]
    return child


@pytest.mark.kills
def test_a_kill_at_any_moment_and_a_write_that_fails(children, tmp_path):
    start(children, tmp_path / "first")
    began = time.monotonic()
    assert children.said() == ["done"]
    took = time.monotonic() - began
    assert children.said() == ["gone"]
    expected, unfinished = contents(tmp_path / "first"), 0
    assert len(expected) > 4

    start(children, tmp_path / "limited", limit=100_000)  # the disk has room, a file has not
    assert " ".join(children.said()) == f"failed cannot write {tmp_path / 'limited'}: File too large"
    assert children.said() == ["gone"]
    assert {path.name for path in tmp_path.iterdir()} == {"first"}

    target, rng, kills = tmp_path / "killed", random.Random(), 0
    while kills < KILLS or (not unfinished and kills < MOST_KILLS):
        kills += 1
        child = start(children, target)
        time.sleep(rng.random() * took)
        children.kill(child)
        while (said := children.said()) != ["gone"]:
            took *= 0.7 if said == ["done"] else 1.0  # too late: this export was faster than the first
        if target.exists():  # all of it or nothing
            assert contents(target) == expected
            shutil.rmtree(target)
        assert {path.name for path in tmp_path.iterdir()} <= {"first", "killed.unfinished"}
        unfinished += (tmp_path / "killed.unfinished").exists()
    assert unfinished > 0, "no kill came in the midst of an export: nothing was tested"
    start(children, target)
    assert [children.said(), children.said()] == [["done"], ["gone"]]
    assert contents(target) == contents(tmp_path / "first") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"first", "killed"}
