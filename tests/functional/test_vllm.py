"""Against a real vLLM: the same weights say the same there and here, after updates, deaths and planted mistakes."""

from __future__ import annotations

import copy
import os
import re
import signal
import threading
from dataclasses import replace

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import FinishReason, SamplingParams
from megatron_ext.rollouts.vllm import VllmError, source
from megatron_ext.rollouts.vllm.checks import WrongWeightsError
from megatron_ext.vllm_servers import KEY_VARIABLE, ServerProcesses
from tests.conftest import fresh_generator
from tests.gpt_cases import randomize
from tests.sampling import Reckoning
from tests.vllm_cases import (
    BOUND,
    NEEDS_VLLM,
    PLANTED,
    Served,
    engine_of,
    home_of,
    largest_difference,
    make_model,
    make_tokenizer,
    source_of,
)
from tests.waiting import until

pytestmark = [pytest.mark.functional, pytest.mark.vllm, NEEDS_VLLM]


@pytest.fixture(scope="module", params=["llama", "qwen3 untied"])
def served(request, tmp_path_factory, world):
    family, *untied = request.param.split()
    changes = {"share_embeddings_and_output_weights": False} if untied else {}
    served = Served(tmp_path_factory.mktemp("served"), family, world, **changes)
    try:
        served.source.update_weights(0)
        yield served
    finally:
        served.opened.__exit__(None, None, None)


def test_both_engines_agree_and_follow_updates(served):
    served.check()
    served.check(temperature=0.7)
    randomize(served.model, served.rng)
    served.update()
    served.check(temperature=1.5)
    with torch.no_grad():
        served.model.decoder.layers[1].mlp.linear_fc2.weight.add_(0.01)
    served.update()
    served.check(repetition_penalty=1.0)


def test_ends_are_those_that_were_asked_for(served):
    found = [t for group in served.check(samples=8) for t in group]
    for trajectory in found:
        ended = trajectory.tokens[-1] in (0, 3)
        assert trajectory.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert not {0, 3} & set(trajectory.tokens[:-1])
    assert FinishReason.STOP in {t.finish_reason for t in found}  # whether all of them end so is chance
    free = [t for group in served.check(ignore_eos=True) for t in group]
    assert {(len(t), t.finish_reason) for t in free} == {(24, FinishReason.LENGTH)}
    texts = [t for group in served.check(samples=8, stop_strings=("answer", "what"), ignore_eos=True) for t in group]
    stopped = [t for t in texts if t.finish_reason is FinishReason.STOP_STRING]
    for trajectory in texts:
        said = served.tokenizer.decode(trajectory.tokens)
        assert (trajectory in stopped) == ("answer" in said or "what" in said)
    assert stopped
    greedy = served.check(use_greedy=True)
    assert all(len({tuple(t.tokens) for t in group}) == 1 for group in greedy)


def test_each_sample_has_its_own_limit(served):
    (request,) = served.requests(4, SamplingParams(max_new_tokens=20), (9,))
    found = served.source.sample([request.limited([20, 1, 7, 1])])
    assert [len(t) for t in found[0]] == [20, 1, 7, 1]


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "in flight"])
def test_turns_are_said_and_what_answers_them_is_read(served, ahead: bool, monkeypatch):
    """Every answer is that to what was said before it, and log-probabilities behind it are those of all that stands there."""
    environment = Reckoning(9, served.vocab_size)
    params = SamplingParams(max_new_tokens=60, stop_token_ids=tuple(range(0, served.vocab_size, 3)))
    requests = [replace(r, environment=environment) for r in served.requests(5, params, (3, 50))]
    monkeypatch.setattr(served.source, "ahead", ahead)
    served.update()
    if ahead:
        found = served.source.finish(served.source.begin(requests, served.version))
    else:
        found = served.source.sample(requests)
    turns = []
    for trajectory in (t for group in found for t in group):
        passages = trajectory.passages
        assert [p.sampled for p in passages] == [i % 2 == 0 for i in range(len(passages))]
        numbers = {sample for sample in range(5) if _is_played(environment, sample, passages)}
        assert numbers, "no sample's environment has answered like that"
        ended = passages[-1].tokens[-1] in params.ends
        assert trajectory.finish_reason == (FinishReason.STOP if ended and len(passages) == 5 else FinishReason.LENGTH)
        turns.append(len(passages))
    assert max(turns) == 5 and environment.asked >= sum(n // 2 for n in turns)
    assert largest_difference(served.model, requests, found) < BOUND


def _is_played(environment: Reckoning, sample: int, passages) -> bool:
    return all(list(passages[i].tokens) == environment.answer(sample, passages[:i]) for i in range(1, len(passages), 2))


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_wrong_sync_stops_the_run(served, mistake: str, monkeypatch):
    served.update()
    file = "model.safetensors"
    old = load_file(served.source._weights.folder / file)

    def wrong(model, folder, **options):
        export_hf(model, folder, **options)
        changed = PLANTED[mistake](load_file(folder / file), old)
        save_file({name: tensor.contiguous().clone() for name, tensor in changed.items()}, folder / file)

    export_hf = source.export_hf
    served.stops_at(wrong, "export_hf", monkeypatch)


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_a_server_that_is_killed_in_the_middle_of_a_step(served):
    server = engine_of(served)
    requests = served.requests(8, SamplingParams(max_new_tokens=120, ignore_eos=True), range(20, 60))
    killed = threading.Timer(1.0, lambda: os.kill(server.pid, signal.SIGKILL))
    killed.start()
    found = served.source.sample(requests)
    killed.join()
    assert not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE
    assert [[len(t) for t in group] for group in found] == [[120] * 8] * len(requests)
    assert largest_difference(served.model, requests[:4], found[:4]) < BOUND
    randomize(served.model, served.rng)
    served.update()
    served.check()


def ask_server(served: Served, method: str, path: str) -> str:
    fleet = served.source._fleet
    headers = {"Authorization": f"Bearer {fleet.key}"}
    return httpx.request(method, f"{fleet.urls[0]}{path}", headers=headers, timeout=300).text


def progress(served: Served) -> float:
    """Tokens that the server has sampled."""
    said = ask_server(served, "GET", "/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in said if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_what_is_in_flight_goes_on_with_new_weights_and_each_token_has_its_version(served, in_flight: str, monkeypatch):
    """Twice; and half of it waits in the server when the first update comes."""
    monkeypatch.setattr(served.source, "ahead", True)
    monkeypatch.setattr(served.source, "options", replace(served.source.options, in_flight=in_flight))
    served.update()
    requests = served.requests(16, SamplingParams(max_new_tokens=120))
    before, first = progress(served), served.version
    begun = served.source.begin(requests, first, priority=1)  # behind the canary
    weights = {first: copy.deepcopy(served.model.state_dict())}
    for number in (1, 2):
        until(lambda: progress(served) >= before + 1000 * number)  # noqa: B023
        ask_server(served, "POST", "/pause?mode=keep")  # until the weights come, so that the answers wait for them
        with torch.no_grad():
            served.model.decoder.layers[1].mlp.linear_fc2.weight.add_(0.02)
        served.update()
        weights[served.version] = copy.deepcopy(served.model.state_dict())
    found = served.source.finish(begun)
    assert [[len(t) for t in group] for group in found] == [[120] * 16] * len(requests)
    responses = [(r.prompt, t) for r, group in zip(requests, found, strict=True) for t in group]
    assert {p.weight_version for _, t in responses for p in t.passages} == set(weights)
    assert any(len(t.passages) > 1 for _, t in responses)
    apart = {True: [0.0], False: []}  # by whether the weights are those of the label
    for version, state in weights.items():
        served.model.load_state_dict(state)
        for prompt, t in responses:
            logits = text_logits(served.model, [*prompt, *t.tokens])[len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(t.tokens).unsqueeze(1)).squeeze(1)
            versions = torch.tensor([p.weight_version for p in t.passages for _ in p.tokens])
            difference = (expected - torch.tensor(t.logprobs)).abs()
            apart[True] += difference[versions == version].tolist()
            apart[False] += difference[versions != version].tolist()
    served.source._keeper.close()  # the other tests do without
    monkeypatch.setattr(served.source, "_keeper", None)
    assert max(apart[True]) < BOUND < sum(apart[False]) / len(apart[False])


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_a_server_of_another_run_is_refused_in_one_line(served, tmp_path, monkeypatch, world):
    processes = served.source.processes
    monkeypatch.setenv(KEY_VARIABLE, processes.key)

    def refusal(home=served.home, **changes) -> str:
        changes = {"vocab_size": served.vocab_size} | changes
        model = make_model(served.rng, world, "llama", **changes)
        given = {
            "urls": tuple(processes.urls),
            "start": 0,
            "arguments": (),
            "weights_dir": str(tmp_path),
            "patience": 20.0,
        }
        with source_of(model, home, **given) as other, pytest.raises((VllmError, WrongWeightsError)) as raised:
            other.update_weights(0)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "another tokenizer" in refusal(source.Home(**vars(served.home) | {"ids": (1, 2)}))
    assert "--max-model-len 512" in refusal(encoder_seq_length=512)
    assert "has not the trainer's weights" in refusal(num_layers=2)
    monkeypatch.setenv(KEY_VARIABLE, "another")
    assert KEY_VARIABLE in refusal()
    served.update()  # it is ours again
    served.check()
    monkeypatch.setenv(KEY_VARIABLE, processes.key)
    # The last of this server's tests: whether vLLM ends of it or says 500, it takes no weights any more.
    assert re.search("does it serve this run's model", refusal(hidden_size=96))


def test_a_server_with_its_own_flags_is_refused(tmp_path, world, monkeypatch):
    """Log-probabilities from before the temperature."""

    def without(self, number: int) -> list[str]:
        command = own(self, number)
        at = command.index("--logprobs-mode")
        return command[:at] + command[at + 2 :]

    own = ServerProcesses.command
    monkeypatch.setattr(ServerProcesses, "command", without)
    other = Served(tmp_path, "llama", world)
    try:
        with pytest.raises(VllmError, match="start it with --logprobs-mode processed_logprobs"):
            other.source.update_weights(0)
        guards = other.source.processes._guards
    finally:
        other.opened.__exit__(None, None, None)
    assert all(guard.poll() is not None for guard in guards)
    assert not list(tmp_path.glob("megatron-ext-*")), "the weights were left behind"


def test_a_server_that_cannot_start_says_why(tmp_path, world):
    rng, tokenizer = fresh_generator(), make_tokenizer(tmp_path / "tokenizer")
    model = make_model(rng, world, "llama", tokenizer.vocab_size)
    with source_of(model, home_of(tmp_path, tokenizer, rng), arguments=("--no-such-flag",)) as source_:
        with pytest.raises(VllmError, match=r"before it answered: .*--no-such-flag.*vllm-0\.log"):
            source_.update_weights(0)
