"""One block of a Hugging Face folder replaced by another: patches and the deltas that they are made of."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.blocks.delta import base_digest, content_digest, place_weights, read_delta, save_delta, tensor_digest
from megatron_ext.blocks.places import ModelPlace, parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.errors import AlreadyExistsError
from megatron_ext.hf import apply_patch, export_hf, make_patch
from megatron_ext.hf.files import read_slots
from megatron_ext.runtime.optimizer_state import trained_parameters
from tests.hf_folders import BLOCK, INDEX, contents, imported, made_patch, set_tensor, tensors
from tests.hf_models import make_hf_model

BOUND = 1e-4


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
    written = "megatron_ext.block_delta.1" if "block" in about else "megatron_ext.block_delta.2"
    save_file(tensors_of, str(path), metadata={"format": written, "delta": json.dumps(about)})


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


def test_a_delta_of_the_first_format_is_read(folder, world, tmp_path):
    """One whole block, and a digest of its weights by their names in the block."""
    patch, prefix = made_patch(folder, world, tmp_path), f"decoder.layers.{BLOCK}."
    about, found = read_delta(tmp_path / "delta")
    before = place_weights(imported(folder, world), [ModelPlace(BLOCK)])
    base = tensor_digest({name.removeprefix(prefix): tensor for name, tensor in before.items()})
    old = {"block": BLOCK, "num_layers": about["num_layers"], "base": base, "dtype": about["dtype"]}
    write_delta(tmp_path / "old", old, found)
    assert make_patch(tmp_path / "old", folder, tmp_path / "again") == (ModelPlace(BLOCK),)
    expected, again = (load_file(str(path)) for path in (patch, tmp_path / "again"))
    assert expected.keys() == again.keys() and all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_delta_of_a_block_that_is_not_there_or_broke(folder, world, tmp_path):
    made_patch(folder, world, tmp_path)
    about, found = read_delta(tmp_path / "delta")
    name = min(found)
    large = found[name].clone()
    large.view(-1)[-1] = 1e38
    for changes, tensor, words in (
        ({"places": [4]}, found[name], "is of block 4 of 4 in float32, which no model of ours has; take another"),
        ({"places": [-1]}, found[name], "is of block -1 of 4"),
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


MLP = ("post_attention_layernorm", "mlp.")
# What trains, and whose tensors of Hugging Face's block change then.
PLACES = [
    ("llama 3", torch.float32, BLOCK, ("",)),
    ("llama 3", torch.bfloat16, {"block": BLOCK, "part": "mlp"}, MLP),
    ("qwen2 with windows", torch.bfloat16, BLOCK, ("",)),
    ("qwen2 with windows", torch.float32, {"block": BLOCK, "heads": [0, 3]}, ("self_attn.q_proj", "self_attn.o_proj")),
    ("qwen3", torch.bfloat16, {"block": BLOCK, "heads": 1}, ("self_attn.q_proj", "self_attn.o_proj")),
    ("qwen3_moe", torch.bfloat16, {"block": BLOCK, "part": "mlp"}, MLP),
    ("deepseek_v3", torch.float32, BLOCK, ("",)),
]


@pytest.mark.parametrize(("name", "dtype", "spec", "changing"), PLACES)
def test_a_patch_is_an_export_of_what_was_trained(rng, tmp_path, world, name, dtype, spec, changing):
    folder = tmp_path / "folder"
    make_hf_model(folder, name, rng, dtype)
    (folder / "tokenizer.json").write_text("{}")
    model = imported(folder, world)
    places = parse_places(spec)
    base = base_digest(place_weights(model, places))
    train_only_places(model, places)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))
    save_delta(tmp_path / "delta", model, places, base)
    assert make_patch(tmp_path / "delta", folder, tmp_path / "patch") == places
    assert apply_patch(folder, tmp_path / "patch", tmp_path / "mended") == places
    export_hf(model, tmp_path / "exported", source=folder, dtype=dtype)
    before, mended, exported = tensors(folder), tensors(tmp_path / "mended"), tensors(tmp_path / "exported")
    assert before.keys() == mended.keys() == exported.keys()
    start = f"model.layers.{BLOCK}."
    changed = {key for key in before if key.startswith(start) and key.removeprefix(start).startswith(changing)}
    changed -= {key for key in changed if key.endswith("e_score_correction_bias")}  # in the delta, and no parameter
    for key, tensor in mended.items():
        assert tensor.dtype == dtype and torch.equal(tensor, exported[key]), key
        assert torch.equal(tensor, before[key]) == (key not in changed), key
    files = contents(folder)
    assert contents(tmp_path / "mended").keys() == files.keys()
    for file, data in contents(tmp_path / "mended").items():
        slots = [s for n, s in read_slots(folder / file).items() if n in changed] if "model-" in file else []
        data, old = bytearray(data), bytearray(files[file])
        for slot in slots:
            data[slot.start : slot.start + slot.size] = old[slot.start : slot.start + slot.size] = bytes(slot.size)
        assert hashlib.sha256(data).digest() == hashlib.sha256(old).digest(), file
    patch = load_file(str(tmp_path / "patch"))
    assert changed <= patch.keys() <= {key for key in before if key.startswith(start)}


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
        (lambda: apply_patch(folder, delta, out), "delta is no patch of ours: its format is None"),
        (lambda: apply_patch(folder, tmp_path / "none", out), "the patch .*none does not exist"),
        (lambda: make_patch(delta, other, out), "was made from other weights than .*other's"),
        (lambda: make_patch(delta, originals["qwen3"], out), "belongs to another model than .*qwen3: .* is"),
        (lambda: make_patch(patch, folder, out), "patch is no delta of ours: its format is 'pt'"),
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
