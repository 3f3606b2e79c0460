"""Estimates by themselves: what adds up, what is refused, which layout is best, what grouping and growth are worth."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.flops import ModelShape, model_flops, num_tokens
from megatron_ext.planner import HARDWARE, Assumptions, best_layouts, estimate, grouping_gain, grow, layouts
from megatron_ext.planner.growth import expected_seconds
from megatron_ext.planner.parameters import model_parameters
from tests.unit.planner.cases import job, model

GIB = 1 << 30

LAYOUTS = st.fixed_dictionaries(
    {
        "tensor_model_parallel_size": st.sampled_from([1, 2, 4]),
        "pipeline_model_parallel_size": st.sampled_from([1, 2]),
        "context_parallel_size": st.sampled_from([1, 2]),
        "activations_checkpoint_granularity": st.sampled_from([None, "selective", "full"]),
    }
)


@given(LAYOUTS, st.booleans())
def test_the_parts_of_the_peak_add_up(sizes, share):
    if math.prod(v for v in sizes.values() if isinstance(v, int)) > 8:
        return
    estimated = estimate(job(sizes, share_prefix=share))
    assert len(estimated.stages) == sizes["pipeline_model_parallel_size"]
    for stage in estimated.stages:
        assert sum(stage.parts().values()) == stage.total
        assert {"parameters", "gradients", "optimizer", "copies"} < stage.parts().keys()


def test_bytes_by_hand():
    """One document of 1024 tokens on one GPU, without recomputation. Llama 3.2 1B has 1,235,814,400 parameters."""
    fields = {"rollout": False, "reference_copy": False, "scoring_passes": 0, "distributed_optimizer": False}
    one = job({"logprob_chunk_size": 128}, devices=1, groups=1, prompt=0, response=1024, samples=1, **fields)
    (stage,) = estimate(one).stages
    assert (stage.parameters, stage.gradients, stage.optimizer) == tuple(1_235_814_400 * n for n in (2, 4, 12))
    row = (
        2 * (2048 * 2 + 4 + 2048 * 2)  # two norms: input and 1 / rms; and their output, which the linears keep
        + (2 * 32 + 2 * 8) * 64 * 2 + 32 * 4  # queries, output, keys and values; log-sum-exp
        + 3 * 8192 * 2  # into SwiGLU and out of it
    )  # fmt: skip
    ends = 1024 * 8 + 1024 * (2048 * 2 + 4) + 1023 * (2048 * 2 + 2 * 8 + 2 * 4)
    tables = 1024 * 64 * 2  # cosines and sines
    assert stage.activations == 16 * 1024 * row + tables + ends
    # A chunk's logits in fp32, in bf16 and a mask; gradients of the vocabulary's weights and of the predicting rows.
    assert stage.working == 128 * 128256 * (4 + 2 + 1) + 128256 * 2048 * 2 + 1023 * 2048 * 2
    assert stage.total == 1_235_814_400 * 18 + stage.activations + stage.working


def test_a_byte_decides_what_fits():
    needed, reserve = estimate(job()).bytes_per_rank, 3 * GIB
    for memory, fits in ((needed + reserve, True), (needed + reserve - 1, False)):
        machine = dataclasses.replace(HARDWARE["H100"], memory=memory)
        assert estimate(job(), machine, Assumptions(reserve=reserve)).fits == fits


@given(st.integers(1, 4), st.integers(0, 300), st.integers(1, 100), st.integers(1, 8), st.booleans())
def test_operations_and_tokens_are_those_of_the_flop_model(local, prompt, response, samples, share):
    """Of one optimizer step: each group once forward for every scoring pass, and once forward and backward."""
    given_job = job(
        groups=8 * local, prompt=prompt, response=response, samples=samples, share_prefix=share, scoring_passes=1
    )
    lengths = [(prompt, [response] * samples)] * given_job.groups
    shape = ModelShape.of(given_job.model)
    expected = sum(model_flops(shape, lengths, share, backward).total for backward in (False, True))
    step = estimate(given_job).step
    assert step.flops == pytest.approx(expected)
    assert step.tokens == num_tokens(lengths, share)


def test_grouping_pays_by_what_the_tokens_say():
    long = grouping_gain(estimate(job(prompt=4096, response=64, samples=16, rollout=False)))
    assert long.repeated_tokens / long.tokens == pytest.approx((16 * (4096 + 64)) / (4096 + 16 * 64))
    assert long.pays and 5 < long.repeated_seconds / long.seconds <= long.repeated_tokens / long.tokens * 1.5
    assert long.repeated_flops / long.flops > 5
    short = grouping_gain(estimate(job(prompt=2, response=2048, rollout=False)))
    assert not short.pays and short.repeated_seconds / short.seconds < 1.01


def test_the_search_finds_the_fastest_of_what_fits():
    start = job({"num_layers": 8}, groups=16)
    found = best_layouts(start, count=1000)
    everything = [estimate(candidate) for candidate in layouts(start)]
    assert len(everything) > 30
    assert {id(p) for p in found}.isdisjoint(id(p) for p in everything if not p.fits)
    assert [p.step.total for p in found] == sorted(p.step.total for p in everything if p.fits)
    for estimated in found:
        sizes = estimated.job.sizes
        assert sizes.tensor * sizes.pipeline * sizes.context * estimated.job.data_parallel == 8


def test_the_search_keeps_tensor_parallel_groups_in_their_nodes():
    """Of 2 x 6 GPUs: 4 divides the 12, but one group of the three would lie in both nodes."""
    heads = {"num_attention_heads": 12, "num_query_groups": 12, "kv_channels": 64, "ffn_hidden_size": 6144}
    found = {j.model.tensor_model_parallel_size for j in layouts(job(heads, nodes=2, devices=6, groups=144))}
    assert found == {1, 2, 3, 6}


def test_nothing_is_found_where_nothing_fits():
    tiny = dataclasses.replace(HARDWARE["H100"], memory=6 * GIB)
    assert best_layouts(job({"num_layers": 4}), tiny) == []
    refused = estimate(job(), tiny)
    assert not refused.fits and refused.reason.startswith("does not fit: ") and "use more nodes" in refused.reason


def test_a_large_model_needs_machines():
    """70 billion parameters: 18 bytes each for Adam in bf16, 1.27 TB, are more than 16 GPUs of 80 GB have to spare."""
    large = {
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "ffn_hidden_size": 28672,
        "share_embeddings_and_output_weights": False,
    }
    assert model_parameters(model(**large)) / 1e9 == pytest.approx(70.55, abs=0.005)
    fits = {}
    for nodes in (1, 2, 4, 8):
        sizes = {
            "tensor_model_parallel_size": 8,
            "pipeline_model_parallel_size": min(nodes, 4),
            "sequence_parallel": True,
        }
        sizes["activations_checkpoint_granularity"] = "full"
        estimated = estimate(job(large | sizes, nodes=nodes, rollout=False, reference_copy=False))
        fits[nodes] = estimated.fits
        resident = sum(stage.resident for stage in estimated.stages) * 8 * estimated.job.data_parallel
        if nodes <= 4:  # one data-parallel rank
            assert resident == pytest.approx(70.55e9 * 18, rel=0.01)
    assert fits == {1: False, 2: False, 4: True, 8: True}


def test_growth_waits_and_loses():
    start = estimate(job(rollout=False))
    found = grow(start, [1, 8, 64, 512])
    assert [g.gpus for g in found] == [8, 64, 512, 4096]
    assert found[0].weak_efficiency == 1 and found[0].strong_efficiency == 1
    weak = [g.weak_efficiency for g in found]
    assert weak == sorted(weak, reverse=True) and 0.3 < weak[-1] < 0.95
    strong = [g.strong_efficiency for g in found]
    assert strong[1] < 1 and strong[2:] == [None, None]  # 64 groups over 512 ranks
    perfect = Assumptions(spread=0.0, hours_between_failures=math.inf)
    alone = estimate(job(rollout=False), assumptions=perfect)
    assert expected_seconds(alone) == alone.step.total


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: job({"tensor_model_parallel_size": 4}, devices=6),
            "cannot be divided by tensor_model_parallel_size=4",
        ),
        (
            lambda: job(groups=12),
            "12 prompts (or samples) of an optimizer step do not divide by the data-parallel size 8",
        ),
        (lambda: job(nodes=0), "nodes=0 must be at least 1"),
        (lambda: job(prompt=-1), "prompt=-1 must not be negative"),
        (lambda: job({"vocab_size": None}), "model.vocab_size is not set"),
        (lambda: job(stream_tokens=8), "give one of them"),
        (lambda: estimate(job(groups_per_stream=None, stream_tokens=1100)), "exceed the budget of 1100 tokens"),
        (lambda: estimate(job(), "V100"), "hardware 'V100' is not known; there are: A100, H100, H200, B200"),
        (lambda: grow(estimate(job({"tensor_model_parallel_size": 8}, devices=8)), [0]), "nodes=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    assert words in str(caught.value) and "\n" not in str(caught.value)


# As the data sheets print them: TFLOPS in bf16 with sparsity, which is twice as many; GB of memory, and TB/s of it; GB/s of
# NVLink, both directions together; Gb/s of the NIC that a DGX has for each GPU. B200: a DGX's figures for 8 GPUs, 72 PFLOPS
# in FP8, of which bf16 has half.
PUBLISHED = {
    "A100": (624, 80, 2.039, 600, 200),
    "H100": (1978.9, 80, 3.35, 900, 400),
    "H200": (1978.9, 141, 4.8, 900, 400),
    "B200": (72_000 / 2 / 8, 1440 / 8, 64 / 8, 14_400 / 8, 400),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_hardware_is_what_is_published(name):
    assert PUBLISHED.keys() == HARDWARE.keys() and HARDWARE[name].name == name and HARDWARE[name].source
    sparse, memory, bandwidth, nvlink, nic = PUBLISHED[name]
    found = HARDWARE[name]
    assert found.flops / 1e12 == pytest.approx(sparse / 2, rel=1e-3)
    # What is sold as GB are GiB, of which drivers keep about one in a hundred.
    assert 0.985 < found.memory / GIB / memory < 0.995
    assert found.memory_bandwidth / 1e12 == pytest.approx(bandwidth)
    assert found.node_link / 1e9 == pytest.approx(nvlink / 2)
    assert found.network_link / 1e9 == pytest.approx(nic / 8)
