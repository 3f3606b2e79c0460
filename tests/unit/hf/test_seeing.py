"""Models that see, in and out: transformers' own logits, gradients and tokens on mixed texts, pictures and videos."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_ext.adapters import LoraConfig, keep_adapters
from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf, read_hf_config
from megatron_ext.hf.adapter_files import export_adapters, load_adapter_folder
from megatron_ext.hf.adapter_folder import AdapterFolder
from megatron_ext.hf.held import placed_parameters
from megatron_ext.hf.multimodal import read_vision
from megatron_ext.hf.spelling import common_name
from megatron_ext.models.media import pack_prompts
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import SamplingParams
from tests.conftest import fresh_generator
from tests.edges import CLEAR
from tests.hf_folders import imported, tensors
from tests.lora_cases import draw_adapters
from tests.sampling import generate
from tests.seeing_families import SEEING
from tests.vision_cases import QWEN_VIDEO

names = pytest.mark.parametrize("name", SEEING)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder, transformers' model) by name."""
    rng, root = fresh_generator(), tmp_path_factory.mktemp("seeing")
    return {name: (root / name, family.make(root / name, rng)) for name, family in SEEING.items()}


def theirs_on(name, model, prompt, response=()):
    """Logits [tokens, v] of transformers."""
    return model(**SEEING[name].arguments(prompt, response, next(model.parameters()).dtype)).logits[0]


@names
def test_logits_are_those_of_transformers(name, folders, rng, world):
    folder, theirs = folders[name]
    model, prompt = imported(folder, world), SEEING[name].mixed(rng)
    text = torch.randint(3, QWEN_VIDEO, (7,), generator=rng).tolist()
    with torch.no_grad():
        expected = theirs_on(name, theirs, prompt)
        of_text = theirs(input_ids=torch.tensor([text])).logits[0]
    assert expected.abs().max() > 1 and (text_logits(model, prompt) - expected).abs().max() < 1e-4
    assert (text_logits(model, text) - of_text).abs().max() < 1e-4


@names
def test_gradients_are_those_of_transformers(name, folders, rng, world):
    """Through text, connector and tower, of every parameter; fp64, shared prompts here and repeated ones there."""
    family, (folder, theirs) = SEEING[name], folders[name]
    model = imported(folder, world, freeze_vision_model=False).double()
    theirs = theirs.double()
    theirs.zero_grad()
    prompts, responses = (
        [family.mixed(rng), family.prompt(rng, [2, family.media(rng)[0], 1])],
        [[[5, 6, 7], [8, 9]], [[4, 3]]],
    )
    batch = pack_prompts(prompts, responses, model.model_config.position_embedding.scheme, 16)
    logprobs, _ = model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels, media=batch.media)
    factors = torch.linspace(-1, 1.5, len(logprobs), dtype=torch.float64)
    (logprobs * factors).sum().backward()
    parts = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = theirs_on(name, theirs, prompt, response)[len(prompt) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    (torch.cat(parts) * factors).sum().backward()
    theirs.float()
    named = {common_name(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    largest, seen = max(g.norm() for g in named.values()), set()
    for parameter_name, parameter, entry, layer in placed_parameters(model):
        if parameter.grad is None:  # features do not depend on it
            assert parameter_name.startswith("vision_tower."), parameter_name
            continue
        for part in entry.slices(layer, model.model_config, 0):
            ours, expected = parameter.grad.view(part.view)[part.place], named[part.name][part.index]
            seen.add(part.name)
            floor = 1e-6 if ".k_proj.bias" in part.name else family.floor  # zero in exact arithmetic, in a tower
            off = (ours.reshape(expected.shape) - expected).norm()
            assert off < max(1e-5 * expected.norm(), floor * largest), part.name
    assert named.keys() == seen and sum("vision_tower" in n for n in seen) > 20


@pytest.mark.parametrize(
    ("name", "recomputed"),
    [
        ("llava, clip", "full"),
        ("llava, siglip", "selective"),
        ("llava_next, clip", "full"),
        ("llava_next, siglip", "selective"),
        ("llava_onevision", "full"),
        ("llava_onevision, tiles", "selective"),
        ("qwen2_vl", "selective"),
        ("qwen2_5_vl", "full"),
        ("qwen3_vl", "selective"),
        ("qwen3_vl", "full"),
    ],
)
def test_grouped_equals_repeated_with_the_tower_trained(name, recomputed, folders, rng, world):
    """fp64, log-probabilities and every gradient: prefixes and trees with layers computed again, prompts repeated without."""
    family, folder = SEEING[name], folders[name][0]
    prompts = [family.mixed(rng), [5, 6, 7], family.prompt(rng, [2, family.media(rng)[-1], 1])]
    responses = [[[1, 2, 3], [1, 5]], [[7], [8, 9]], [[9, 9], [9, 8, 4]]]
    results = []
    for packing, granularity in (({"share_prefix": False}, None), ({}, recomputed), ({"min_shared": 1}, recomputed)):
        changes = {"activations_checkpoint_granularity": granularity, "freeze_vision_model": False}
        model = imported(folder, world, **changes).double()
        batch = pack_prompts(prompts, responses, model.model_config.position_embedding.scheme, 16, **packing)
        logprobs, _ = model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels, media=batch.media)
        (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((logprobs.detach(), gradients))
    (repeated, expected), *others = results
    largest = max(g.abs().max() for g in expected.values())
    for logprobs, gradients in others:
        assert (logprobs - repeated).abs().max() < 1e-10
        assert all((g - gradients[n]).abs().max() < 1e-10 * largest for n, g in expected.items())
    assert sum(bool(torch.count_nonzero(g)) for n, g in expected.items() if "vision_tower" in n) > 20


def test_llava_onevision_must_be_told_of_images_and_videos(folders, rng, world):
    """Features do not say which they are of; nor does a model without a token behind them tell where one ends."""
    model = imported(folders["llava_onevision"][0], world)
    prompt = SEEING["llava_onevision"].mixed(rng)
    features = type(prompt)(prompt.tokens, prompt.items, torch.zeros(len(prompt.media_rows), 24))
    with pytest.raises(UserError, match="connector=onevision must know of which images and videos they are"):
        text_logits(model, features)
    raw = json.loads((folders["llava_onevision"][0] / "config.json").read_text())
    raw["use_image_newline_parameter"] = False
    with pytest.raises(UserError, match="use_image_newline_parameter=false is not read here"):
        read_vision(raw, folders["llava_onevision"][0], "here")


@names
def test_every_tensor_comes_back_bitwise(name, folders, world, tmp_path):
    folder, _ = folders[name]
    model = imported(folder, world)
    export_hf(model, tmp_path / "out", source=folder, max_shard_size=30_000)
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(after[n], tensor) for n, tensor in before.items())
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((folder / file).read_text())


@names
def test_a_folder_that_is_made_is_one_that_transformers_reads(name, folders, rng, world, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder, theirs = folders[name]
    export_hf(imported(folder, world), tmp_path / "made")
    made = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "made")).eval()
    assert type(made) is type(theirs)
    for (parameter, ours), expected in zip(made.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, expected), parameter
    prompt = SEEING[name].mixed(rng)
    with torch.no_grad():
        assert torch.equal(theirs_on(name, made, prompt), theirs_on(name, theirs, prompt))
    assert read_hf_config(tmp_path / "made") == read_hf_config(folder)


@names
def test_decoding_goes_on_as_the_whole_is_placed(name, folders, rng, world):
    """Greedy tokens are those of transformers run on prompt and response in one go, token by token."""
    family, (folder, theirs) = SEEING[name], folders[name]
    model, clear = imported(folder, world), False
    while not clear:  # rounding may choose between two tokens
        found = [*family.placeholders]
        while family.placeholders & set(found):  # what transformers refuses to read again as text
            prompt = family.mixed(rng)
            while len(prompt) + 4 > model.model_config.encoder_seq_length:  # what does not fit is refused
                prompt = family.mixed(rng)
            ((found, again),) = generate(model, [prompt], 2, SamplingParams(4, use_greedy=True))
        response, nearest = [], math.inf
        with torch.no_grad():
            for said in found:
                logits = theirs_on(name, theirs, prompt, response)[-1]
                first, second = logits.topk(2).values.tolist()
                nearest = min(nearest, first - second)
                response.append(int(logits.argmax()))
                if response[-1] != said:
                    break
        clear = nearest > CLEAR
    assert found == again == response


@pytest.mark.parametrize(("name", "layers"), [("llava, clip", None), ("qwen3_vl", [1]), ("qwen2_5_vl", None)])
def test_adapters_are_of_the_language_model_in_peft_too(name, layers, folders, rng, world, tmp_path):
    """A tower has linears of the same names, and no adapters; of the located block alone, too."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder, _ = folders[name]
    model, prompt = imported(folder, world, peft=LoraConfig(dim=4, alpha=6)), SEEING[name].mixed(rng)
    draw_adapters(model, rng)
    if layers is not None:
        keep_adapters(model, [model.decoder.layers[i] for i in layers])
    export_adapters(model, tmp_path / "adapter", str(folder))
    base = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        before = theirs_on(name, base, prompt).clone()
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        after = theirs_on(name, theirs, prompt)
        found = text_logits(model, prompt)
    assert (found - after).abs().max() < 1e-4 < 1e-2 < (after - before).abs().max()
    held = [n for n, _ in theirs.named_parameters() if "lora_" in n]
    assert held and all(".language_model.layers." in n for n in held)
    again = imported(folder, world, peft=LoraConfig(dim=4, alpha=6))
    load_adapter_folder(AdapterFolder.open(tmp_path / "adapter"), again)
    with torch.no_grad():
        assert torch.equal(text_logits(again, prompt), found)
