"""Families with experts in and out on ranks that share experts: transformers' own logits, and every tensor as it was."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.hf.mapping import EMBEDDING, OUTPUT
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.hf_scenarios import import_and_export
from tests.edges import Edges
from tests.harness import run_ranks
from tests.hf_folders import imported, tensors
from tests.hf_models import EXPERT_CASES, VOCAB, make_clear_hf_model
from tests.quantised_models import make_4_bits, make_8_bits

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2": (ParallelSizes(tensor=2), 2, {"tensor_model_parallel_size": 2}),
    "ep2": (ParallelSizes(expert=2), 2, {"expert_model_parallel_size": 2}),
    "tp2 ep2": (
        ParallelSizes(tensor=2, expert=2), 4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    ),
    "tp2 ep2, whole experts": (
        ParallelSizes(tensor=2, expert=2, expert_tensor=1), 2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "pp2 tp2 ep2, whole experts": (
        ParallelSizes(tensor=2, pipeline=2, expert=2, expert_tensor=1), 4,
        {
            "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder of each family, texts, transformers' logits of each family and text)."""
    rng, root = fresh_generator(), tmp_path_factory.mktemp("hf")
    texts = [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in (1, 23)]
    return root, texts, {name: make_clear_hf_model(root / name, name, rng, texts) for name in EXPERT_CASES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out(layout, models, tmp_path):
    """Logits on every rank, what is written bitwise, and what is gathered for servers."""
    root, texts, expected = models
    sizes, ranks, keys = LAYOUTS[layout]
    cases = [(root / name, tmp_path / name) for name in EXPERT_CASES]
    results = run_ranks(import_and_export, ranks, keys, cases, texts, 30_000, sizes=sizes)
    for answers, _ in results:
        for name, ours in zip(EXPERT_CASES, answers, strict=True):
            for found, theirs in zip(ours, expected[name], strict=True):
                assert theirs.abs().max() > 1 and (found - theirs).abs().max() <= 1e-4
    for name, (untied, halved) in zip(EXPERT_CASES, results[0][1], strict=True):
        before, after = tensors(root / name), tensors(tmp_path / name)
        assert before.keys() == after.keys() == halved.keys() and untied.keys() == {*before, OUTPUT}
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor) and torch.equal(untied[key], tensor), key
            assert torch.equal(halved[key], tensor.bfloat16()), key
        assert OUTPUT in before or torch.equal(untied[OUTPUT], before[EMBEDDING])


@pytest.fixture(scope="module")
def quantised(world, tmp_path_factory):
    """(folders with weights of 8 and of 4 bits, a text, what one rank answers and writes)."""
    rng, root = fresh_generator(), tmp_path_factory.mktemp("quantised")
    folders = [root / "8 bits", root / "4 bits"]
    for folder, make in zip(folders, (make_8_bits, make_4_bits), strict=True):
        make(folder, rng)
    models, clear = [imported(folder, world) for folder in folders], False
    while not clear:  # rounding may choose an expert where two are wanted alike
        text = torch.randint(VOCAB, (23,), generator=rng).tolist()
        with Edges("topk") as edges:
            for model in models:
                text_logits(model, text)
        clear = edges.clear
    cases = [(folder, root / f"{folder.name}, written") for folder in folders]
    ((answers, _),) = run_ranks(import_and_export, 1, {}, cases, [text], 30_000)
    return folders, text, answers, [tensors(target) for _, target in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_8_and_4_bits_are_read_by_ranks_as_by_one(layout, quantised, tmp_path):
    """Bitwise, by what is written."""
    folders, text, expected, alone = quantised
    sizes, ranks, keys = LAYOUTS[layout]
    cases = [(folder, tmp_path / folder.name) for folder in folders]
    for answers, _ in run_ranks(import_and_export, ranks, keys, cases, [text], 30_000, sizes=sizes):
        for (ours,), (theirs,) in zip(answers, expected, strict=True):
            assert theirs.abs().max() > 1 and (ours - theirs).abs().max() <= 1e-4
    for (_, target), before in zip(cases, alone, strict=True):
        after = tensors(target)
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
