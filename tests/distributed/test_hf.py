"""Hugging Face folders in and out, on layouts of ranks: transformers' own logits, and every tensor as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.hf.files import read_headers
from megatron_ext.hf.mapping import EMBEDDING, OUTPUT
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.hf_scenarios import import_and_export
from tests.harness import run_ranks
from tests.hf_models import FAMILY_CASES, VOCAB, hf_logits, make_clear_hf_model

pytestmark = pytest.mark.distributed

BOUND = 1e-4
LAYOUTS = {
    "one rank": (ParallelSizes(), 1, {}),
    "tp2": (ParallelSizes(tensor=2), 2, {"tensor_model_parallel_size": 2}),
    "pp2 in pieces": (
        ParallelSizes(pipeline=2), 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "pp2 uneven": (
        ParallelSizes(pipeline=2), 2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    ),
    # More ranks than most of the models have key/value heads.
    "tp4": (ParallelSizes(tensor=4), 4, {"tensor_model_parallel_size": 4}),
    "tp2 pp2 sp": (
        ParallelSizes(tensor=2, pipeline=2), 4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "tp2 dp2": (ParallelSizes(tensor=2), 4, {"tensor_model_parallel_size": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder of each case, texts, transformers' logits of each case and text)."""
    rng, root = fresh_generator(), tmp_path_factory.mktemp("hf")
    texts = [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in (1, 7, 29)]
    folders = {name: root / f"model-{number}" for number, name in enumerate(FAMILY_CASES)}
    return folders, texts, {n: make_clear_hf_model(folder, n, rng, texts) for n, folder in folders.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def converted(request, models, tmp_path_factory):
    """(answers by case, exported folder by case, what was gathered by case)."""
    folders, texts, _ = models
    sizes, ranks, layout = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp("exported")
    targets = {name: root / folders[name].name for name in folders}
    cases = [(folders[name], target) for name, target in targets.items()]
    results = run_ranks(import_and_export, ranks, layout, cases, texts, 30_000, sizes=sizes)
    answers, gathered = results[0]
    for others, nothing in results[1:]:
        assert all(torch.equal(a, b) for x, y in zip(answers, others, strict=True) for a, b in zip(x, y, strict=True))
        assert nothing == [[{}, {}]] * len(cases)
    return dict(zip(folders, answers, strict=True)), targets, dict(zip(folders, gathered, strict=True))


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(str(path)).items()}


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_logits_are_those_of_transformers(models, converted, name):
    folders, texts, expected = models
    for ours, theirs in zip(converted[0][name], expected[name], strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 1
        assert (ours - theirs).abs().max() <= BOUND


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_tensor_comes_back_bitwise(models, converted, name):
    folders, texts, expected = models
    before, after = tensors(folders[name]), tensors(converted[1][name])
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    here = {p.name for p in converted[1][name].glob("model*")}
    assert len(here) > 2 and "model.safetensors.index.json" in here
    config = [json.loads((folder / "config.json").read_text()) for folder in (folders[name], converted[1][name])]
    assert config[0] == config[1]
    for ours, theirs in zip(hf_logits(converted[1][name], texts), expected[name], strict=True):
        assert (ours - theirs).abs().max() <= BOUND  # where a file is mapped to may change the order of sums


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_what_is_gathered_is_what_is_written(converted, name):
    """Names in their order, shapes, types and bits."""
    _, targets, gathered = converted
    written, order = tensors(targets[name]), list(read_headers(targets[name]))
    untied, halved = gathered[name]
    assert list(halved) == order
    assert list(untied) == list(dict.fromkeys([*order, OUTPUT]))
    for key, tensor in untied.items():
        expected = written[key if key in written else EMBEDDING]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), key
    for key, tensor in halved.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, written[key].bfloat16()), key
