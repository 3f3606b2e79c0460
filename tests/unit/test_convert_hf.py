"""What tools/convert_hf.py refuses before it builds a model: one line that names its own arguments, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_ext.runtime.checkpoint import INFO_FILE, WEIGHTS_FOLDER
from megatron_ext.runtime.checkpoint_files import self_checksum
from tests.data_cases import EOS, write_tokenizer
from tests.hf_models import make_hf_model
from tools.convert_hf import main
from tools.converting.arguments import sized

ROWS = 330


@pytest.fixture(scope="module")
def model(module_rng, tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    root = tmp_path_factory.mktemp("convert")
    make_hf_model(root / "model", "llama 3", module_rng, vocab_size=ROWS)
    for path in write_tokenizer(root / "tokenizer", eos_token=EOS).iterdir():
        shutil.copy(path, root / "model")
    return root / "model"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The line that a command ends with."""

    def run(*arguments: object) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert {path.name for path in tmp_path.iterdir()} == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        return line

    return run


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export {model} {out} --max-shard-size infGB", "'infGB' is no size of at least a byte: give one such as 5GB"),
        ("export {model} {out} --max-shard-size nan", "'nan' is no size of at least a byte"),
        ("export {model} {out} --max-shard-size -3", "'-3' is no size of at least a byte"),
        ("export {model} {out} --max-shard-size 0MB", "'0MB' is no size of at least a byte"),
        (
            "export {model} {out} --tensor 2",
            "--tensor 2 x --pipeline 1 does not divide the 1 processes that run: start them with torchrun --nproc-per-node 2",
        ),
        ("import {model} {out} --pipeline 0", "--tensor 1 and --pipeline 0 must be at least 1"),
        ("export {here} {out}", "no config.json with a model_type); check CHECKPOINT"),
        ("import {here} {out}", "no config.json with a model_type); check HF_FOLDER"),
        ("verify {model} {here} --text one", "no config.json with a model_type); check CHECKPOINT"),
        ("verify {here}/ours {model} --text one", "ours is a checkpoint of ours: name the Hugging Face folder first, then the"),
        ("verify {model} --text-file {here}/bytes", "bytes is no UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
        ("verify {model} --text \udcff", r"--text '\udcff' is no UTF-8 text"),
        ("verify {model} --text=", "the text '' is no token to the tokenizer of {model}; leave it out"),
        ("verify {model}", "nothing to compare: give --text or --text-file"),
        ("export {here}/none {here}/empty", "{here}/empty exists already; nothing is ever overwritten, choose another name"),
        ("export {here}/none {here}/link", "{here}/link exists already; nothing is ever overwritten"),
        ("import {here}/none {here}/empty", "{here}/empty exists already; nothing is ever overwritten"),
        ("import {here}/none {here}/astray", "{here}/astray exists already; nothing is ever overwritten"),
        ("patch {here}/none {model} {here}/empty", "{here}/empty exists already; nothing is ever overwritten"),
        ("apply {model} {here}/none {here}/link", "{here}/link exists already; nothing is ever overwritten"),
        ("export {model} {out} --delta {here}/none", "cannot read the delta {here}/none: No such file"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(command, words, model, refused, tmp_path):
    (tmp_path / "bytes").write_bytes(b"one\n\xff\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "astray").symlink_to(tmp_path / "nothing")
    (tmp_path / "ours" / WEIGHTS_FOLDER).mkdir(parents=True)
    (tmp_path / "ours" / INFO_FILE).write_text(json.dumps({"checksum": self_checksum({})}))
    names = {"model": model, "here": tmp_path, "out": tmp_path / "out"}
    assert words.format(**names) in refused(*command.format(**names).split(" "))


def test_sizes():
    assert [sized(text) for text in ("5GB", "1.5mb", "7KB", "100")] == [5 * 10**9, 1_500_000, 7000, 100]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--tensor", 3, "--tensor 3 does not divide num_attention_heads=4"),
        ("--pipeline", 3, "--pipeline 3 does not divide num_layers=4"),
    ],
)
def test_a_layout_that_the_model_has_not(option, value, words, model, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert f"{words} of {model}; choose another" in refused("export", model, tmp_path / "out", option, value)


def test_key_value_heads_that_ranks_can_neither_share_out_nor_share(refused, module_rng, tmp_path, monkeypatch):
    """3 of them, for 2 ranks."""
    folder = tmp_path / "six heads"
    make_hf_model(folder, "mistral", module_rng, num_attention_heads=6, num_key_value_heads=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = f"--tensor 2 is neither a divisor nor a multiple of num_query_groups=3 of {folder}; choose another"
    assert words in refused("export", folder, tmp_path / "out", "--tensor", 2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 10**11, f"embed_tokens.weight is ({ROWS}, 32), the configuration makes it (100000000000, 32)"),
        ("num_hidden_layers", 10**11, "num_hidden_layers is 100000000000, and it has "),
        ("intermediate_size", 29568, "gate_proj.weight is (48, 32), the configuration makes it (29568, 32)"),
    ],
)
def test_a_config_that_the_headers_contradict(key, value, words, model, refused, tmp_path):
    """Before anything of that size is allocated; recipes open a folder the same way."""
    from recipes.run.pretrained import Pretrained

    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    for command in (
        ("export", folder, tmp_path / "out"),
        ("import", folder, tmp_path / "out"),
        ("verify", folder, "--text", "one"),
    ):
        line = refused(*command)
        assert f"{folder} contradicts its config.json: " in line and words in line
    with pytest.raises(ValueError, match="contradicts its config.json"):
        Pretrained.open(str(folder))


def test_vocabularies_that_differ(model, refused, tmp_path):
    """In either direction, and a tokenizer that has more tokens than the model."""
    folder = shutil.copytree(model, tmp_path / "smaller")
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(str(path)).items()}
    for path in folder.glob("model*"):
        path.unlink()
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:4].contiguous()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    for source, checkpoint, sizes in ((folder, model, (ROWS, 4)), (model, folder, (4, ROWS))):
        assert refused("verify", source, checkpoint, "--text", "one").endswith(
            f"the vocabularies differ: {sizes[0]} rows in {checkpoint}, {sizes[1]} in {source}; name the folder that was "
            "exported from it"
        )
    assert f"the tokenizer of {folder} gives token " in refused("verify", folder, "--text", "one")
