"""Hugging Face weights in and out of a model of one rank: what is refused, types, full disks, kills, and patches of a block."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.blocks.delta import block_digest, block_weights, content_digest, read_delta, save_delta
from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.hf import apply_patch, export_hf, hf_model_config, load_hf_weights, make_patch
from megatron_ext.hf.files import create_files, plan_files, read_slots
from megatron_ext.hf.tensors import TensorWriter
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.config import VisionConfig
from megatron_ext.models.prompt_streams import text_logits
from tests.children import Children
from tests.gpt_cases import randomize
from tests.hf_models import VOCAB, hf_logits, make_hf_model

INDEX = "model.safetensors.index.json"
BOUND = 1e-4
BLOCK = 2


@pytest.fixture(scope="module")
def originals(module_rng, tmp_path_factory):
    """Folders of several files each, by case."""
    root = tmp_path_factory.mktemp("originals")
    folders = {name: root / name.replace(" ", "-") for name in ("llama 3", "qwen2 with windows", "qwen3")}
    for name, folder in folders.items():
        make_hf_model(folder, name, module_rng)
        assert len(list(folder.glob("*.safetensors"))) > 2
        (folder / "LICENSE.txt").write_text("free")
    return folders


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    """A copy of a Llama 3 folder to spoil."""
    return shutil.copytree(originals["llama 3"], tmp_path / "model")


def build(folder, world, **changes):
    return build_gpt(hf_model_config(folder, **{"precision": "32"} | changes), world)


def imported(folder, world, **changes):
    model = build(folder, world, **changes)
    load_hf_weights(folder, model)
    return model


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(str(path)).items()}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def file_of(folder, name) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def set_tensor(folder, name, tensor) -> None:
    """Replace one tensor, or add it to the file of the embedding."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].setdefault(name, index["weight_map"]["model.embed_tokens.weight"])
    save_file(
        load_file(str(folder / file)) | {name: tensor.contiguous()}, str(folder / file), metadata={"format": "pt"}
    )
    (folder / INDEX).write_text(json.dumps(index))


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
    with pytest.raises(ValueError, match="model.vision is {'feature_size': 5} here and None there"):
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
        writer = TensorWriter(disk, slots, torch.float32)
        writer.write("a", torch.zeros(1000, 100))
        (disk / "filler").unlink()  # what comes after an error is not written
        writer.write("b", torch.ones(1000, 100))
        error = writer.close()
        assert isinstance(error, OSError)
        assert str(error) == f"cannot write {disk / 'model.safetensors'}: No space left on device"
        at = slots["b"].start
        assert (disk / "model.safetensors").read_bytes()[at:] == bytes(400_000)


KILLS = 10


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

    target, rng = tmp_path / "killed", random.Random()
    for _ in range(KILLS):
        child = start(children, target)
        time.sleep(rng.random() * took)
        children.kill(child)
        while children.said() != ["gone"]:
            pass
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


def change_block(model, rng, block=BLOCK) -> None:
    with torch.no_grad():
        for parameter in model.decoder.layers[block].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))


def made_patch(folder, world, tmp_path) -> Path:
    model = imported(folder, world)
    base = block_digest(block_weights(model, BLOCK))
    change_block(model, torch.Generator().manual_seed(1))
    save_delta(tmp_path / "delta", model, BLOCK, base)
    assert make_patch(tmp_path / "delta", folder, tmp_path / "patch") == BLOCK
    return tmp_path / "patch"


def test_a_damaged_patch(folder, world, tmp_path):
    patch = made_patch(folder, world, tmp_path)
    data = bytearray(patch.read_bytes())
    data[-random.randint(1, 64)] ^= 1 << random.randrange(8)
    patch.write_bytes(data)
    with pytest.raises(ValueError, match="patch is damaged .its checksum differs.: make it again"):
        apply_patch(folder, patch, tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


def write_delta(path, about, tensors_of) -> None:
    """A delta that is whole, whatever it says."""
    about = about | {"content": content_digest(about, tensors_of)}
    save_file(tensors_of, str(path), metadata={"format": "megatron_ext.block_delta.1", "delta": json.dumps(about)})


def test_any_flipped_bit_of_a_delta_or_a_patch_is_found(folder, world, tmp_path):
    """Of the header, where the description is, and of the tensors."""
    patch = made_patch(folder, world, tmp_path)
    readers = {tmp_path / "delta": read_delta, patch: lambda path: apply_patch(folder, path, tmp_path / "mended")}
    rng = random.Random()
    for path, read in readers.items():
        sound = path.read_bytes()
        begin = 8 + int.from_bytes(sound[:8], "little")
        for place in [rng.randrange(begin) for _ in range(60)] + [rng.randrange(begin, len(sound)) for _ in range(60)]:
            flipped, bit = bytearray(sound), rng.randrange(8)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=f"(delta|patch) {path}|{path} is") as caught:
                read(path)
            assert "\n" not in str(caught.value), f"bit {bit} of byte {place}"
        path.write_bytes(sound)
        read(path)


def test_a_delta_of_a_block_that_is_not_there_or_broke(folder, world, tmp_path):
    made_patch(folder, world, tmp_path)
    about, found = read_delta(tmp_path / "delta")
    name = min(found)
    large = found[name].clone()
    large.view(-1)[-1] = 1e38
    for changes, tensor, words in (
        ({"block": 4}, found[name], "is of block 4 of 4 in float32, which no model of ours has; take another"),
        ({"block": -1}, found[name], "is of block -1 of 4"),
        ({"dtype": "float16"}, found[name], f"is of block {BLOCK} of 4 in float16, which no model of ours has"),
        ({}, found[name] * math.nan, f"holds a number that is not finite in {name}: its training broke"),
        ({}, found[name] * math.inf, f"holds a number that is not finite in {name}"),
    ):
        write_delta(tmp_path / "wrong", about | changes, found | {name: tensor})
        with pytest.raises(ValueError, match=f"the delta .*wrong {words}"):
            make_patch(tmp_path / "wrong", folder, tmp_path / "out")
    assert name == f"decoder.layers.{BLOCK}.mlp.linear_fc1.layer_norm_weight"
    theirs = f"model.layers.{BLOCK}.post_attention_layernorm.weight"
    set_tensor(folder, theirs, tensors(folder)[theirs].half())
    write_delta(tmp_path / "wide", about | {"base": "of no model"}, found | {name: large})
    with pytest.raises(ValueError, match=f"has a number in {name} that is not finite in torch.float16, the type of"):
        make_patch(tmp_path / "wide", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama 3", "qwen2 with windows", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_is_an_export_of_that_block(rng, tmp_path, world, name, dtype):
    folder = tmp_path / "folder"
    make_hf_model(folder, name, rng, dtype)
    (folder / "tokenizer.json").write_text("{}")
    model = imported(folder, world)
    base = block_digest(block_weights(model, BLOCK))
    change_block(model, rng)
    save_delta(tmp_path / "delta", model, BLOCK, base)
    assert make_patch(tmp_path / "delta", folder, tmp_path / "patch") == BLOCK
    assert apply_patch(folder, tmp_path / "patch", tmp_path / "mended") == BLOCK
    export_hf(model, tmp_path / "exported", source=folder, dtype=dtype)
    before, mended, exported = tensors(folder), tensors(tmp_path / "mended"), tensors(tmp_path / "exported")
    assert before.keys() == mended.keys() == exported.keys()
    for key, tensor in mended.items():
        assert tensor.dtype == dtype and torch.equal(tensor, exported[key]), key
        assert torch.equal(tensor, before[key]) == (f"layers.{BLOCK}." not in key), key
    files = contents(folder)
    assert contents(tmp_path / "mended").keys() == files.keys()
    for file, data in contents(tmp_path / "mended").items():
        changed = [s for n, s in read_slots(folder / file).items() if f".{BLOCK}." in n] if "model-" in file else []
        data, old = bytearray(data), bytearray(files[file])
        for slot in changed:
            data[slot.start : slot.start + slot.size] = old[slot.start : slot.start + slot.size] = bytes(slot.size)
        assert hashlib.sha256(data).digest() == hashlib.sha256(old).digest(), file
    patch = load_file(str(tmp_path / "patch"))
    assert patch.keys() == {key for key in before if f"layers.{BLOCK}." in key}


def test_a_mended_folder_is_complete(folder, world, tmp_path):
    """All that belongs to the model comes along; code, pickles, other copies of the weights and caches do not."""
    patch = made_patch(folder, world, tmp_path)
    along = {
        "README.md": "card", ".gitattributes": "x", "additional_chat_templates/tools.jinja": "{{ x }}", "merges.txt": "a b",
        "1_Pooling/config.json": "{}", "images/plot.png": "png", "tokenizer.model": "pieces",
    }  # fmt: skip
    left = (
        "modeling_llama.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "original/consolidated.00.pth",
        "consolidated.safetensors", "model-old.safetensors", "tf_model.h5", "llama.gguf", ".git/HEAD", ".cache/x/y.json",
    )  # fmt: skip
    for name, text in [*along.items(), *((name, "old") for name in left)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link.md").symlink_to(folder / "README.md")
    (folder / "astray.md").symlink_to(folder / "none")
    expected = {name: data for name, data in contents(folder).items() if name not in left}
    apply_patch(folder, patch, tmp_path / "mended")
    found = contents(tmp_path / "mended")
    assert found.keys() == expected.keys() and {"link.md", INDEX, "config.json", "LICENSE.txt"} < found.keys()
    changed = {name for name in found if found[name] != expected[name]}
    assert changed and all(name.endswith(".safetensors") for name in changed)

    whole = shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    save_file(tensors_read(folder), str(whole / "model.safetensors"), metadata={"format": "pt"})
    apply_patch(whole, patch, tmp_path / "mended whole")  # its index and shards are not what is read
    found = contents(tmp_path / "mended whole")
    assert {name for name in found if "model" in name} == {"model.safetensors", "tokenizer.model"}
    before, after = tensors_read(tmp_path / "mended"), load_file(str(tmp_path / "mended whole" / "model.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def tensors_read(folder) -> dict[str, torch.Tensor]:
    """Of the files that the index names."""
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(str(folder / file)).items()}


def test_a_patch_fits_a_body_that_was_saved_alone(folder, world, tmp_path):
    """Its tensors keep their names, which have no `model.` in front."""
    body = shutil.copytree(folder, tmp_path / "body")
    for path in body.glob("*.safetensors"):
        save_file({k.removeprefix("model."): t for k, t in load_file(str(path)).items()}, str(path))
    patch = made_patch(body, world, tmp_path)
    apply_patch(body, patch, tmp_path / "mended")
    apply_patch(folder, patch, tmp_path / "whole")
    whole = {name.removeprefix("model."): tensor for name, tensor in tensors(tmp_path / "whole").items()}
    mended = tensors(tmp_path / "mended")
    assert mended.keys() == whole.keys() == tensors(body).keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in mended.items())
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in tensors(body).items())


def test_patches_that_do_not_belong(folder, originals, world, tmp_path):
    patch = made_patch(folder, world, tmp_path)
    for call, words in (
        (lambda: make_patch(tmp_path / "delta", folder, patch), "patch exists already; nothing is ever overwritten"),
        (lambda: apply_patch(folder, patch, folder), "model exists already; nothing is ever overwritten"),
    ):
        with pytest.raises(AlreadyExistsError, match=words):
            call()
    mended = tmp_path / "mended"
    apply_patch(folder, patch, mended)
    other = shutil.copytree(folder, tmp_path / "other")
    norm = f"model.layers.{BLOCK}.input_layernorm.weight"
    set_tensor(other, norm, tensors(folder)[norm] + 1e-6)
    kept = {path.name for path in tmp_path.iterdir()}
    delta = tmp_path / "delta"
    out = tmp_path / "out"
    for call, words in (
        (lambda: apply_patch(mended, patch, out), "was made for other weights than .*mended's; name the folder"),
        (lambda: apply_patch(other, patch, out), "was made for other weights than .*other's"),
        (
            lambda: apply_patch(originals["qwen3"], patch, out),
            "belongs to another model than .*_proj.weight does not fit",
        ),
        (lambda: apply_patch(folder, delta, out), "delta is no patch of one block: its format is None"),
        (lambda: apply_patch(folder, tmp_path / "none", out), "the patch .*none does not exist"),
        (lambda: make_patch(delta, other, out), "was made from other weights than .*other's"),
        (lambda: make_patch(delta, originals["qwen3"], out), "belongs to another model than .*qwen3: .* is"),
        (lambda: make_patch(patch, folder, out), "patch is no delta of one block: its format is 'pt'"),
        (lambda: make_patch(folder / "config.json", folder, out), "cannot read the delta .*config.json"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    shapes = load_file(str(delta))
    turned = next(name for name, tensor in shapes.items() if tensor.dim() == 2 and tensor.size(0) != tensor.size(1))
    about = {"block": BLOCK, "num_layers": 4, "base": "of no model", "dtype": "float32"}
    for tensors_of, layers, words in (
        (shapes | {turned: shapes[turned].T.contiguous()}, 4, r"fc1.weight is \(32, 96\) there, \(96, 32\) here"),
        (shapes | {f"decoder.layers.{BLOCK}.more": torch.ones(1)}, 4, "more has no place there"),
        (shapes, 5, "belongs to another model than .*: of 5 blocks, not 4"),
        ({name.replace(f".{BLOCK}.", ".1."): t for name, t in shapes.items()}, 4, "layers.1.* has no place there"),
    ):
        write_delta(tmp_path / "wrong", about | {"num_layers": layers}, tensors_of)
        with pytest.raises(ValueError, match=words):
            make_patch(tmp_path / "wrong", folder, out)
    assert {path.name for path in tmp_path.iterdir()} == kept | {"wrong"}
