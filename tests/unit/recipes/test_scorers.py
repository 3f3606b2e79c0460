"""Hugging Face folders to score: whole ones answer as transformers does, others are refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.scorers import HuggingFaceScorer

LAYERS = 3


def save_model(folder, rng, tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) / 8)
    model.save_pretrained(folder)
    return model


def open_folder(folder) -> HuggingFaceScorer:
    return HuggingFaceScorer(folder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_folder_answers(tied, rng, tmp_path):
    """A tied output is in no file, and is not missing."""
    model = save_model(tmp_path, rng, tied)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    prompts = [torch.randint(50, (n,), generator=rng).tolist() for n in (3, 7, 1)]
    found = open_folder(tmp_path).pair_probabilities(prompts, (5, 8))
    for prompt, row in zip(prompts, found, strict=True):
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[[5, 8]]
        assert torch.allclose(row, expected, atol=1e-6)


def test_missing_weights_are_not_made_up(rng, tmp_path):
    save_model(tmp_path, rng, tied=False)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    message = (
        f"{tmp_path} lacks {len(weights) - len(kept)} weights that its config.json asks for, first "
        "model.layers.1.input_layernorm.weight: scores of random numbers would mean nothing; complete the folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_folder(tmp_path)


def test_an_untied_output_may_not_be_missing(rng, tmp_path):
    save_model(tmp_path, rng, tied=False)
    path = tmp_path / "model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if n != "lm_head.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights that its config.json asks for, first lm_head.weight:"):
        open_folder(tmp_path)


def test_weights_of_another_shape(rng, tmp_path):
    save_model(tmp_path, rng, tied=True)
    path, name = tmp_path / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    weights = load_file(path)
    save_file(weights | {name: weights[name][:-1].contiguous()}, path, metadata={"format": "pt"})
    message = (
        f"{tmp_path}: {name} has shape [63, 32], and its config.json asks for [64, 32] (1 such); config.json and weights "
        "must belong together"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_folder(tmp_path)


def test_what_transformers_cannot_load(rng, tmp_path):
    with pytest.raises(ValueError, match=f"transformers cannot load {re.escape(str(tmp_path))}: "):
        open_folder(tmp_path)
    save_model(tmp_path, rng, tied=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"transformers cannot load {re.escape(str(tmp_path))}: "):
        open_folder(tmp_path)
