"""Weights through vLLM's own weight transfer into a real server, gloo in the place of NCCL alone."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from megatron_ext.rollouts import SamplingParams
from megatron_ext.rollouts.vllm import VllmError, source
from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.vllm_scenarios import transfer
from tests.gpt_cases import randomize
from tests.harness import run_ranks
from tests.vllm_cases import (
    BOUND,
    NEEDS_VLLM,
    PLANTED,
    QUICK,
    Served,
    engine_of,
    largest_difference,
    make_model,
    make_tokenizer,
)
from tests.vllm_gloo import GlooBroadcasters, gloo_options, gloo_servers

pytestmark = [pytest.mark.functional, pytest.mark.vllm, NEEDS_VLLM]

CHUNK_BYTES = 40_000  # of 460,000 that the model has


@pytest.fixture(scope="module")
def gloo() -> GlooBroadcasters:
    return GlooBroadcasters()


@pytest.fixture(scope="module")
def served(tmp_path_factory, world, gloo):
    with gloo_servers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "CHUNK_BYTES", CHUNK_BYTES)
        served = Served(tmp_path_factory.mktemp("served"), "llama", world, gloo_options(broadcasters=gloo))
        try:
            served.source.update_weights(0)
            yield served
        finally:
            served.opened.__exit__(None, None, None)


def test_a_server_without_weights_gets_all_of_them_and_follows_updates(served, gloo):
    served.check()
    for _ in range(2):
        randomize(served.model, served.rng)
        served.update()
        served.check(temperature=0.7)
    with torch.no_grad():
        served.model.decoder.layers[1].mlp.linear_fc2.weight.add_(0.01)
    served.update()
    served.check()
    assert gloo.joined == 1
    total = sum(t.numel() * t.itemsize for t in served.source._tensors.tensors.values())
    count = len(served.source._tensors.chunks)
    assert count > 3 and sum(gloo.sent[:count]) == total and gloo.sent[:count] * 4 == gloo.sent
    assert not list(served.source._root.rglob("*.safetensors")), "weights are in no file"


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_wrong_sync_stops_the_run(served, mistake: str, monkeypatch):
    served.update()

    def wrong(model, target, dtype, untied):
        old = {name: tensor.clone() for name, tensor in target.tensors.items()}
        gather_hf(model, target, dtype, untied)
        changed = PLANTED[mistake]({name: tensor.clone() for name, tensor in target.tensors.items()}, old)
        for name, tensor in target.tensors.items():
            tensor.copy_(changed[name])

    gather_hf = source.gather_hf
    served.stops_at(wrong, "gather_hf", monkeypatch)


def test_a_server_that_is_killed_in_the_middle_of_a_step_gets_the_newest_weights_again(served, gloo):
    server, before = engine_of(served), gloo.joined
    requests = served.requests(8, SamplingParams(max_new_tokens=120, ignore_eos=True), range(20, 40))
    killed = threading.Timer(1.0, lambda: os.kill(server.pid, signal.SIGKILL))
    killed.start()
    found = served.source.sample(requests)
    killed.join()
    assert not server.is_running() and gloo.joined == before + 1
    assert [[len(t) for t in group] for group in found] == [[120] * 8] * len(requests)
    assert largest_difference(served.model, requests[:4], found[:4]) < BOUND


def test_a_server_that_is_killed_in_the_middle_of_a_transfer_gets_all_of_it_when_it_is_back(served, gloo):
    server, before, first = engine_of(served), gloo.joined, len(gloo.sent)

    def kill(number: int) -> None:
        if number == first + 2:
            gloo.before = lambda number: None
            os.kill(server.pid, signal.SIGKILL)
            server.wait()

    gloo.before = kill
    randomize(served.model, served.rng)
    served.update()
    assert not server.is_running() and gloo.joined == before + 1
    served.check()


def test_a_server_that_has_a_part_of_the_weights_stops_the_run(served, gloo):
    """The last of this server's tests."""

    def fail(number: int) -> None:
        raise MemoryError("none left")

    gloo.before = fail
    with pytest.raises(MemoryError, match="none left"):
        served.update()
    gloo.before = lambda number: None
    with pytest.raises(VllmError, match="has got a part of the weights and not the rest: start it again"):
        served.update()


def test_a_server_that_has_no_nccl_is_refused_in_one_line(tmp_path, world):
    """A CPU's, as it is."""
    other = Served(tmp_path, "llama", world, gloo_options(broadcasters=GlooBroadcasters(), arguments=QUICK))
    try:
        with pytest.raises(VllmError) as raised:
            other.source.update_weights(0)
    finally:
        other.opened.__exit__(None, None, None)
    said = str(raised.value)
    assert "\n" not in said and "has failed to load the weights: is it on GPUs of its own" in said
    assert "Cannot access accelerator device when none is available" in said  # so far does vLLM come without a GPU


def test_ranks_of_two_stages_and_two_shards_send_what_they_train(tmp_path, world, rng):
    tokenizer, layers = make_tokenizer(tmp_path / "tokenizer"), {"num_layers": 4, "make_vocab_size_divisible_by": 16}
    versions = [
        dict(make_model(rng, world, "llama", tokenizer.vocab_size, **layers).named_parameters()) for _ in range(2)
    ]
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    sizes = ParallelSizes(tensor=2, pipeline=2)
    found = run_ranks(transfer, 4, tmp_path, layers | layout, versions, sizes=sizes, timeout=500)
    assert all(differences == found[0] for differences in found)
    assert len(found[0]) == 2 and max(found[0]) < BOUND
