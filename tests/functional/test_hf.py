"""From a Hugging Face folder through recipes and back, as a user does it: command lines alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.blocks.delta import base_digest, place_weights, save_delta
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.hf import export_hf, hf_model_config, load_hf_weights
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build
from recipes.data.tokenizer import load_tokenizer
from tests.conftest import fresh_generator
from tests.hf_models import make_hf_model
from tests.recipe_runs import Finished, metrics, run, run_on

pytestmark = pytest.mark.functional

ONE_RANK = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
TP2 = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]


@dataclass
class Start:
    """A tiny Llama 3 with a tokenizer, and a task's data."""

    data: Path
    folder: Path

    def train(self, recipe: str, out: Path, *overrides: str) -> Finished:
        return run(
            f"recipes/train_{recipe}.py", "--config-name", f"{recipe}_tiny", "model=pretrained",
            f"pretrained_checkpoint.restore_from_path={self.folder}", f"exp_manager.explicit_log_dir={out}",
            "model.micro_batch_size=4", *overrides,
        )  # fmt: skip

    def sft(self, out: Path, *overrides: str) -> Finished:
        return self.train(
            "sft", out, f"data.train_path={self.data / 'sft.jsonl'}", "trainer.sft.max_steps=2", "model.global_batch_size=8",
            *overrides,
        )  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    root = tmp_path_factory.mktemp("hf")
    made = run(
        "tools/make_word_problems.py", "--out", root / "data", "--seed", 7, "--sft", 32, "--train", 16, "--test", 4
    )
    assert made.code == 0, made.err
    folder = root / "llama"
    vocab = load_tokenizer(root / "data" / "tokenizer").vocab_size + 5  # rows that no token has
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.05}
    make_hf_model(folder, "llama 3", fresh_generator(), vocab_size=vocab, **sizes)
    for path in (root / "data" / "tokenizer").iterdir():
        shutil.copy(path, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return Start(root / "data", folder)


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    done = start.sft(out, *TP2)
    assert done.code == 0, done.err
    return out


def weights(folder) -> dict:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(str(path)).items()}


def test_train_export_verify(start, trained, tmp_path):
    """Two steps from a Hugging Face folder; the exported folder is what transformers answers like our checkpoint from."""
    steps = metrics(trained)
    assert len(steps) == 2 and all(0 < row["train_optim/loss"] < 20 for row in steps)
    checkpoint, target = trained / "checkpoints" / "final", tmp_path / "new" / "exported"
    done = run("tools/convert_hf.py", "export", checkpoint, target, "--max-shard-size", "100KB")
    assert done.code == 0, done.err
    assert done.out.startswith(f"Hugging Face folder in {target}, float32, config.json like {checkpoint / 'source'}")
    before, after = weights(start.folder), weights(target)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    moved = [float((after[k] - before[k]).abs().max()) for k in before]
    assert 0 < min(moved) and max(moved) < 0.02  # two steps of 4e-3 at most
    for name in ("config.json", "generation_config.json"):
        assert json.loads((target / name).read_text()) == json.loads((start.folder / name).read_text())
    assert load_tokenizer(target).vocab_size == load_tokenizer(start.folder).vocab_size
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\nAnna gives two pears to Ben.\n")
    done = run("tools/convert_hf.py", "verify", target, checkpoint, "--text", "Tom has 3 apples.", "--text-file", lines)
    assert done.code == 0, done.err
    assert "same next token" in done.out and float(done.out.rsplit("logit ")[1].split(",")[0]) <= 1e-4
    done = run("tools/convert_hf.py", "verify", target, start.folder, "--text", "Tom has 3 apples.")
    assert done.code == 2
    (line,) = done.error_lines
    assert f"{start.folder} and transformers' {target} differ: a logit by" in line


@pytest.fixture(scope="module")
def delta(trained, world, tmp_path_factory) -> Path:
    """Of the trained checkpoint's block 1, moved by a thousandth; and what the model is then."""
    folder = tmp_path_factory.mktemp("delta")
    config = build(GPTModelConfig, read_checkpoint_info(trained / "checkpoints" / "final")["model"] | ONE_RANK)
    model = build_gpt(config, world)
    load_weights(trained / "checkpoints" / "final", model)
    base = base_digest(place_weights(model, [ModelPlace(1)]))
    with torch.no_grad():
        for parameter in model.decoder.layers[1].parameters():
            parameter.mul_(1.001)
    save_delta(folder / "delta.safetensors", model, [ModelPlace(1)], base)
    export_hf(model, folder / "expected", trained / "checkpoints" / "final" / "source")
    return folder


def same(folder, other) -> bool:
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


def convert(*arguments: object, ranks: int = 1) -> None:
    """It must end well; prints one line, whatever the number of ranks."""
    command = ["tools/convert_hf.py", *arguments]
    ended = run_on(ranks, *command) if ranks > 1 else [run(*command)]
    assert not any(done.code for done in ended), ended
    said = [line for done in ended for line in done.out.splitlines() if not line.startswith("  ")]
    assert len(said) == 1, said


def test_in_and_out_on_two_ranks(start, tmp_path):
    """A checkpoint made by two stages, a folder made of it by two halves, checked by two stages: every tensor as it was."""
    convert("import", start.folder, tmp_path / "ours", "--pipeline", 2, "--precision", "32", ranks=2)
    assert (tmp_path / "ours" / "tokenizer").is_dir() and (tmp_path / "ours" / "source" / "config.json").is_file()
    convert("export", tmp_path / "ours", tmp_path / "theirs", "--tensor", 2, ranks=2)
    assert same(tmp_path / "theirs", start.folder)
    convert("verify", tmp_path / "theirs", tmp_path / "ours", "--text", "Tom has 3 apples.", "--pipeline", 2, ranks=2)


def test_a_delta_goes_along_and_a_patch_is_the_same(start, trained, delta, tmp_path):
    """export --delta --like --dtype; and patch and apply on the folder of the checkpoint without it."""
    checkpoint, like = trained / "checkpoints" / "final", shutil.copytree(start.folder, tmp_path / "like")
    (like / "generation_config.json").write_text('{"top_k": 7}')
    options = ("--delta", delta / "delta.safetensors", "--like", like, "--dtype", "bfloat16")
    convert("export", checkpoint, tmp_path / "half", *options)
    expected, found = weights(delta / "expected"), weights(tmp_path / "half")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "half" / "generation_config.json").read_text()) == {"top_k": 7}

    convert("export", checkpoint, tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("card")
    convert("patch", delta / "delta.safetensors", tmp_path / "plain", tmp_path / "block.safetensors")
    convert("apply", tmp_path / "plain", tmp_path / "block.safetensors", tmp_path / "mended")
    assert same(tmp_path / "mended", delta / "expected") and not same(tmp_path / "mended", tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "mended").iterdir()} == names and "README.md" in names


def test_verify_fails_where_logits_are_not_finite(start, tmp_path):
    """Two finite weights whose product is not: the difference of such logits is NaN, which no maximum sees."""
    broken = shutil.copytree(start.folder, tmp_path / "broken")
    for path in broken.glob("*.safetensors"):
        tensors = load_file(str(path))
        for name, place in (("model.norm.weight", (0,)), ("model.embed_tokens.weight", (-1, 0))):
            if name in tensors:
                tensors[name][place] = 3e38
        save_file(tensors, str(path), metadata={"format": "pt"})
    done = run("tools/convert_hf.py", "verify", broken, "--text", "Tom has 3 apples.")
    assert done.code == 2
    (line,) = done.error_lines
    assert f"{broken} here has logits that are not finite behind 6 of 6 tokens of 'Tom has 3 apples.'" in line


def test_grpo_starts_from_the_folder(start, world, tmp_path):
    """The first step has a learning rate of 0: what it saves are the folder's weights, bitwise."""
    done = start.train(
        "grpo", tmp_path / "run", f"data.train_path={start.data / 'train.jsonl'}", "trainer.devices=1",
        "trainer.grpo.max_steps=1", "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4",
        "model.global_batch_size=16", "trainer.grpo.val_check_interval=0", "trainer.grpo.length_params.max_length=8",
        "trainer.grpo.reward={name:length,target:12}",
    )  # fmt: skip
    assert done.code == 0, done.err
    (step,) = metrics(tmp_path / "run")
    assert (
        step["train_optim/ratio"] == pytest.approx(1, abs=1e-5)
        and step["train_optim/lr"] == 0 < step["train_optim/grad_norm"]
    )
    config = hf_model_config(start.folder, precision="32")
    expected, found = build_gpt(config, world), build_gpt(config, world)
    load_hf_weights(start.folder, expected)
    load_weights(tmp_path / "run" / "checkpoints" / "final", found)
    for (name, theirs), ours in zip(expected.named_parameters(), found.parameters(), strict=True):
        rows = config.vocab_size if "embedding" in name else None  # those behind pad the vocabulary
        assert torch.equal(ours[:rows], theirs[:rows]), name


def test_yaml_that_contradicts_the_folder(start, tmp_path):
    done = start.sft(tmp_path / "run", "trainer.devices=1", "+model.num_layers=3")
    assert done.code == 2
    (line,) = done.error_lines
    assert f"model.num_layers=3, but the checkpoint {start.folder} was made with num_layers=4" in line
    assert not (tmp_path / "run").exists()
