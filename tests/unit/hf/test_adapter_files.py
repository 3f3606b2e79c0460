"""Folders of PEFT's that are not what our adapters compute, or are damaged: one line each, and nothing has been changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.adapters import LoraConfig, adapter_parameters, keep_adapters
from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.hf import hf_model_config, load_hf_weights
from megatron_ext.hf.adapter_files import export_adapters, load_adapter_folder
from megatron_ext.hf.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import text_logits
from tests.edges import Edges
from tests.hf_models import VOCAB, make_hf_model
from tests.lora_cases import draw_adapters, make_peft_adapter, peft_logits

LAYER = "base_model.model.model.layers.1."


@pytest.fixture(scope="module")
def made(originals, module_rng, tmp_path_factory) -> Path:
    """An adapter of PEFT's on the Llama 3 of `originals`, with dropout, which is of training alone."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    make_peft_adapter(originals["llama 3"], folder, "nemo", module_rng, lora_dropout=0.1)
    return folder


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "adapter")


def model_of(originals, world, **peft):
    config = LoraConfig(**{"dim": 4, "alpha": 6} | peft)
    return build_gpt(hf_model_config(originals["llama 3"], precision="32", peft=config), world)


def refused(folder: Path, words: str, model=None) -> None:
    before = {} if model is None else {name: p.clone() for name, p in adapter_parameters(model).items()}
    with pytest.raises(UserError, match=words) as caught:
        found = AdapterFolder.open(folder)
        assert model is not None
        load_adapter_folder(found, model)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in (adapter_parameters(model).items() if before else ()))


def set_config(folder: Path, **changes) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensors(folder: Path, changes: dict, removed: tuple[str, ...] = ()) -> None:
    tensors = load_file(str(folder / ADAPTER_WEIGHTS)) | changes
    save_file({k: v for k, v in tensors.items() if k not in removed}, str(folder / ADAPTER_WEIGHTS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not computed here, only 'LORA'"),
        ({"bias": "all"}, "bias='all' is not computed here"),
        ({"use_dora": True}, "use_dora=True is not computed here; merge it with peft first"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not computed here"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern=.* is not computed here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head.* is not computed here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not computed here"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"a_new_thing": 3}, "a_new_thing=3 is not computed here"),
        ({"r": 8}, r"says r=8: one rank for all is read"),
        ({"r": "4"}, "r must be an integer"),
        ({"r": [4]}, "r must be an integer"),
        ({"r": True}, "r must be an integer"),
        ({"lora_alpha": [6]}, r"lora_alpha must be a number of at least 0, got \[6\]"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number of at least 0, got nan"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"target_parameters": 3}, "target_parameters must be a list of names, got 3"),
        ({"target_parameters": [["a"]]}, "target_parameters must be a list of names"),
        ({"peft_type": ["LORA"]}, "peft_type=.*LORA.* is not computed here, only 'LORA'"),
        ({"bias": {}}, "bias={} is not computed here"),
    ],
)
def test_what_is_not_computed_is_refused(adapter, changes, words):
    set_config(adapter, **changes)
    refused(adapter, words)


@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor(1.0), r"is \(\) of F32, and adapters are matrices of F64, F32, F16, BF16; take another adapter"),
        (torch.zeros(4), r"is \(4,\) of F32, and adapters are matrices"),
        (torch.zeros(0), r"is \(0,\) of F32, and adapters are matrices"),
        (torch.zeros(4, 4, 4), r"is \(4, 4, 4\) of F32, and adapters are matrices"),
        (torch.zeros(0, 0), r"is \(0, 0\), and adapter_config.json says r=4"),
        (torch.zeros(4, 4, dtype=torch.int64), r"is \(4, 4\) of I64, and adapters are matrices"),
        (torch.zeros(4, 4, dtype=torch.bool), r"is \(4, 4\) of BOOL, and adapters are matrices"),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "",
)
def test_what_is_no_matrix_is_refused(adapter, kind, tensor, words):
    """Also of a tensor that nobody would ask for."""
    name = f"{LAYER}self_attn.q_proj.lora_{kind}.weight"
    sound = load_file(str(adapter / ADAPTER_WEIGHTS))
    set_tensors(adapter, {name: tensor})
    refused(adapter, f"{name} {words}")
    if tensor.shape != (0, 0):
        set_tensors(adapter, {name: sound[name], "something.else": tensor})
        refused(adapter, f"something.else {words}")


def test_a_tensor_under_two_names_is_refused(adapter):
    name = f"{LAYER}self_attn.q_proj.lora_A.weight"
    again = name.replace(".weight", ".default.weight")
    set_tensors(adapter, {again: load_file(str(adapter / ADAPTER_WEIGHTS))[name].clone()})
    refused(adapter, "are one tensor under two names; take another adapter")


def test_files_that_do_not_fit_are_refused(adapter, tmp_path):
    nothing = tmp_path / "nothing"
    with pytest.raises(UserError, match="name the folder of a Hugging Face model|cannot read"):
        AdapterFolder.open(nothing)
    name = f"{LAYER}self_attn.q_proj.lora_A.weight"
    tensors = load_file(str(adapter / ADAPTER_WEIGHTS))
    set_tensors(adapter, {}, (name,))
    refused(
        adapter, "layer 1 has no lora_A of self_attn.q_proj; every layer with adapters has them on the same linears"
    )
    set_tensors(adapter, {name: tensors[name], "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 8)})
    refused(adapter, "lm_head.lora_A.weight is no adapter of a linear that is adapted here")
    (adapter / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:-7])
    refused(adapter, "is damaged")
    (adapter / ADAPTER_WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(adapter, "a pickle, which can run code and is never loaded here")


def test_adapters_of_another_kind_or_model_are_refused(adapter, originals, world):
    model = model_of(originals, world, dim=8)
    refused(adapter, r"model.peft has dim=8, .* the adapter .* dim=4, alpha=6, rslora=False on q_proj, k_proj,", model)
    refused(adapter, "set them as there", model_of(originals, world, rslora=True))
    refused(adapter, "set them as there", model_of(originals, world, target_modules=["q_proj"]))
    model, name = model_of(originals, world), f"{LAYER}mlp.up_proj.lora_A.weight"
    tensors = load_file(str(adapter / ADAPTER_WEIGHTS))
    draw_adapters(model, torch.Generator().manual_seed(1))
    set_tensors(adapter, {name: torch.zeros(4, 33)})
    refused(adapter, "belongs to another model: .*up_proj.lora_A.weight is \\(4, 33\\), here \\(4, 32\\)", model)
    set_tensors(adapter, {name: tensors[name] + 1})
    refused(
        adapter, "has linear_fc1, with one A for gate_proj, up_proj, and the adapter .* has another for each", model
    )
    set_tensors(adapter, {name: tensors[name], f"{LAYER}mlp.up_proj.lora_B.weight": torch.full((48, 4), torch.nan)})
    refused(adapter, "holds a number that is not finite", model)
    moved = {k.replace("layers.1.", "layers.9."): v.clone() for k, v in tensors.items() if "layers.1." in k}
    set_tensors(adapter, tensors | moved)
    refused(adapter, "adapts layer 9, and the model has 4 layers", model)


def test_layers_without_adapters_have_none(adapter, originals, world, tmp_path):
    """What LFTF leaves: one block."""
    tensors = load_file(str(adapter / ADAPTER_WEIGHTS))
    set_tensors(adapter, {}, tuple(name for name in tensors if not name.startswith(LAYER)))
    model = model_of(originals, world)
    load_adapter_folder(AdapterFolder.open(adapter), model)
    assert {name.split(".")[2] for name in adapter_parameters(model)} == {"1"}
    export_adapters(model, tmp_path / "again")
    found = load_file(str(tmp_path / "again" / ADAPTER_WEIGHTS))
    assert found.keys() == {name for name in tensors if name.startswith(LAYER)}
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())
    assert json.loads((tmp_path / "again" / ADAPTER_CONFIG).read_text())["layers_to_transform"] == [1]


@pytest.fixture(scope="module")
def sparse(module_rng, tmp_path_factory) -> Path:
    """A Qwen2-MoE: layers 1 and 3 have experts and a shared one, 0 and 2 do not."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    make_hf_model(folder, "qwen2_moe", module_rng)
    return folder


@pytest.fixture(scope="module")
def of_experts(sparse, module_rng, tmp_path_factory) -> Path:
    """An adapter of PEFT's on all its linears."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    make_peft_adapter(sparse, folder, "nemo", module_rng)
    return folder


def sparse_model(folder: Path, world, **peft):
    config = hf_model_config(folder, precision="32", peft=LoraConfig(**{"dim": 4, "alpha": 6} | peft))
    model = build_gpt(config, world)
    load_hf_weights(folder, model)
    return model


def test_adapters_of_experts_that_do_not_fit_are_refused(of_experts, sparse, world, tmp_path):
    adapter = shutil.copytree(of_experts, tmp_path / "adapter")
    model, tensors = sparse_model(sparse, world), load_file(str(adapter / ADAPTER_WEIGHTS))
    experts = f"{LAYER}mlp.experts."
    alone = {f"{experts}0.up_proj.lora_A.weight": torch.zeros(4, 32)}
    set_tensors(adapter, alone)
    refused(adapter, "0.up_proj.lora_A.weight is no adapter .*; of experts all in one, as transformers 5 has them")
    shared = {name: value for name, value in tensors.items() if "shared_expert" in name}
    set_tensors(adapter, {}, (*alone, *shared))
    refused(adapter, "layer 1 has no adapter of mlp.shared_expert.down_proj, otherwise than the model here", model)
    set_tensors(adapter, shared, (f"{experts}base_layer.lora_B.weight",))
    refused(adapter, "layer 1 has no lora_B of mlp.experts.gate_up_proj; every layer with adapters")
    set_tensors(adapter, tensors, [name for name in tensors if name.startswith(f"{LAYER}mlp.")])
    refused(adapter, "layer 1 has no lora_A of mlp.experts.down_proj; every layer with adapters")
    inner = f"{experts}base_layer.lora_A.weight"
    set_tensors(adapter, tensors | {inner: torch.zeros(18, 32)})
    refused(adapter, r"is \(18, 32\), and adapter_config.json says r=4")
    set_tensors(adapter, {inner: torch.zeros(20, 32)})
    refused(adapter, "belongs to another model: .*base_layer.lora_A.weight is \\(20, 32\\), here \\(16, 32\\)", model)


@pytest.mark.parametrize("targets", [["linear_qkv", "linear_fc1", "linear_fc2"], ["linear_fc2"]])
def test_experts_of_some_layers_are_pefts(targets, sparse, world, rng, tmp_path):
    """What LFTF leaves of a model with experts: PEFT has adapters on these layers alone, and says the same."""
    model = sparse_model(sparse, world, target_modules=targets)
    draw_adapters(model, rng)
    keep_adapters(model, [model.decoder.layers[i] for i in (0, 3)])
    export_adapters(model, tmp_path / "adapter")
    clear = False
    while not clear:  # rounding may choose an expert where two are wanted alike
        texts = [torch.randint(VOCAB, (n,), generator=rng).tolist() for n in (1, 9)]
        with Edges("topk") as edges:
            expected = peft_logits(sparse, tmp_path / "adapter", texts)
        clear = edges.clear
    for text, theirs in zip(texts, expected, strict=True):
        assert (text_logits(model, text) - theirs).abs().max() <= 1e-4
    tensors = load_file(str(tmp_path / "adapter" / ADAPTER_WEIGHTS))
    assert {name.split(".")[4] for name in tensors} == {"0", "3"}
    again = sparse_model(sparse, world, target_modules=targets)
    load_adapter_folder(AdapterFolder.open(tmp_path / "adapter"), again)
    ours, read = adapter_parameters(model), adapter_parameters(again)
    assert ours.keys() == read.keys() and all(torch.equal(p, read[name]) for name, p in ours.items())


def test_dropout_of_training_is_read_over(made, originals, world, caplog):
    load_adapter_folder(AdapterFolder.open(made), model_of(originals, world))
    assert "lora_dropout=0.1 is for training, and none is here" in caplog.text


def test_nothing_is_overwritten_or_left_behind(originals, world, tmp_path):
    model = model_of(originals, world)
    (tmp_path / "there").mkdir()
    with pytest.raises(AlreadyExistsError, match="exists already; nothing is ever overwritten"):
        export_adapters(model, tmp_path / "there")
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(torch.inf)
    with pytest.raises(UserError, match="holds a number that is not finite"):
        export_adapters(model, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
