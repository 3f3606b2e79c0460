"""Conversations with tools, from the environment to the gradient: what was sampled is what is trained, and nothing else is."""

from __future__ import annotations

import math
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import GrpoTerms, token_weights
from megatron_ext.models import build_gpt
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import FinishReason, MegatronSource, Passage, Request, SamplingParams, Trajectory
from recipes.data.errors import DataError
from recipes.data.rows import load_prompts
from recipes.data.tokenizer import load_tokenizer
from recipes.environments.environment import EnvironmentFailedError
from recipes.environments.processes import Environments
from recipes.environments.registry import Named, get_environment
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.conversations import Conversations, check_template, tool_format
from recipes.grpo.objective import objective
from tests.alive import gone
from tests.data_cases import EOS, FAMILIES, START, write_rows, write_tokenizer
from tests.gpt_cases import named_gradients, randomize, run, small_config
from tests.layouts import randn
from tests.plain_gpt import plain_logprobs

OWN = "tests.programs.own_environments"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen2"
    return load_tokenizer(write_tokenizer(folder, chat_template=FAMILIES["qwen2"], eos_token=EOS, bos_token=START))


@pytest.fixture
def environments():
    """By path and options, closed again."""
    made: list[Environments] = []

    def make(name: str, limit: float = 600.0, **options) -> Environments:
        made.append(Environments(get_environment({"name": f"{OWN}.{name}", **options}), limit))
        return made[-1]

    yield make
    for each in made:
        each.close()


def prompt_of(tokenizer, tmp_path, named: Named, **row):
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "what is 1 + 2 ?"}], **row})
    (prompt,) = load_prompts(path, tokenizer, 400, opening=named.opening)
    return prompt


def test_two_turns_with_a_tool_are_trained_as_a_tree_like_one_by_one(tokenizer, tmp_path, environments, rng, world):
    """fp64: the loss and every gradient, trajectories that fork behind the tool's answer among them."""
    insisting = environments("Insisting")
    prompt = prompt_of(tokenizer, tmp_path, insisting.named)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=700), world)
    randomize(model, rng)
    model.double()
    source = MegatronSource(model, tokenizer.decode_response)
    params = SamplingParams(300, tokenizer.stop_ids, ("e", "t", "1", " "))  # turns of a few tokens
    talks = [Conversations(insisting, tokenizer, prompt, None, (), None) for _ in range(2)]
    (said,) = source.sample([Request(prompt.tokens, 3, params, (int(rng.initial_seed()),), environment=talks[0])])
    for number, trajectory in enumerate(said):
        first, heard, last = trajectory.passages
        text = tokenizer.decode_whole(first.tokens)
        end = "" if first.tokens[-1] == tokenizer.eos_id else EOS
        result = f"{end}<start>user:<result>{3 * len(text)}</result><eos><start>assistant:"
        assert not heard.sampled and heard.tokens == tuple(tokenizer.encode(result))
        assert trajectory.mask == [True] * len(first.tokens) + [False] * len(heard.tokens) + [True] * len(last.tokens)
        context = [*prompt.tokens, *first.tokens, *heard.tokens]
        assert talks[0].answer(number, trajectory) == tokenizer.decode_response(context, last.tokens)
    # Other answers to the result of the first one.
    seen = [token for passage in said[0].passages[:2] for token in passage.tokens]
    (others,) = source.sample([Request([*prompt.tokens, *seen], 2, params, (int(rng.initial_seed()), 1))])
    responses = [[t.tokens for t in said] + [[*seen, *t.tokens] for t in others]]
    known = len(said[0].passages[0].tokens)
    of_others = [True] * known + [False] * (len(seen) - known)
    masks = [t.mask for t in said] + [of_others + [True] * len(t) for t in others]

    count = torch.tensor(sum(map(sum, masks)))
    loss_of = partial(_loss, masks=masks, advantages=randn(rng, 5), count=count)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    alone = [plain_logprobs(weights, model.model_config, list(prompt.tokens), r, 0.9)[0] for r in responses[0]]
    plain = pack_prompts([prompt.tokens], responses, "text", share_prefix=False)
    expected = loss_of(plain, torch.cat(alone))
    gradients = dict(zip(weights, torch.autograd.grad(expected, list(weights.values())), strict=True))
    for min_shared, shared in ((1, True), (None, False)):
        batch = pack_prompts([prompt.tokens], responses, "text", min_shared=min_shared)
        saved = batch.groups.num_repeated_tokens - batch.groups.num_tokens - 4 * len(prompt.tokens)
        assert (saved >= 2 * len(seen)) == shared
        loss = loss_of(batch, run(model, batch, 0.9)[0])
        assert abs(loss - expected) <= 1e-10 and expected.abs() > 1e-6
        loss.backward()
        for name, gradient in named_gradients(model).items():
            assert (gradient - gradients[name]).abs().max() <= 1e-10, name


def _loss(batch, logprobs, masks, advantages, count):
    ids = batch.groups.response_ids
    weights = token_weights(ids, batch.loss_mask(masks), len(masks), count, len(masks), "token")
    assert int((weights > 0).sum()) == count, "of every sampled token, and of no other"
    microbatch = GRPOMicrobatch(batch, 0.9, advantages=advantages[ids], weights=weights)
    return objective(microbatch, logprobs, torch.zeros_like(logprobs), GrpoTerms())[0]


def test_rewards_of_turns_add_up_and_turns_are_counted(tokenizer, tmp_path, environments, rng, world):
    paying = environments("Paying")
    prompt = prompt_of(tokenizer, tmp_path, paying.named, pay=0.25)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=500), world)
    randomize(model, rng)
    params = SamplingParams(200, tokenizer.stop_ids, ("e", "t", "1", " ", "a", "o"))
    talk = Conversations(paying, tokenizer, prompt, None, (), 3)
    (group,) = MegatronSource(model, tokenizer.decode_response).sample(
        [Request(prompt.tokens, 4, params, (int(rng.initial_seed()),), environment=talk)]
    )
    for i, trajectory in enumerate(group):
        assert [p.sampled for p in trajectory.passages] == [True, False, True, False, True]
        assert talk.reward(i) == 0.25 * (1 + 2 + 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raises",
            r"environment .*Failing\S*: step failed: ZeroDivisionError: division by zero \(own_environments.py, line",
        ),
        ("text", r"environment .*Failing\S*: step gave 'on': it must give an Observation or an End"),
        ("nan", r"environment .*Failing\S* gave the reward nan; it must be a finite number"),
        ("none", r"environment .*Failing\S* gave the reward None"),
        ("plain", r"environment .*Failing\S*: the prompt is messages and the answer plain text"),
        ("exit", r"environment .*Failing\S*: step failed: SystemExit: 0"),
        ("number", r"environment .*Failing\S*: TypeError"),
        ("large", r"environment .*Failing\S* gave the reward 1000"),
        ("draws", "start gave another prompt for .*:1 than when rows were read"),
    ],
)
@pytest.mark.parametrize("name", ["Failing", "FailingHere"])
def test_an_environment_that_fails_stops_the_run_in_a_line(
    name, how, message, tokenizer, tmp_path, environments, world
):
    failing = environments(name)
    prompt = prompt_of(tokenizer, tmp_path, failing.named, how=how)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=500), world)
    params = SamplingParams(9, tuple(range(tokenizer.vocab_size)))
    talk = Conversations(failing, tokenizer, prompt, None, (), None)
    request = Request(prompt.tokens, 1, params, environment=talk)
    with pytest.raises(UserError, match=message):
        MegatronSource(model, tokenizer.decode_response).sample([request])


@pytest.mark.parametrize("name", ["Closing", "ClosingHere"])
def test_conversations_have_rows_of_their_own_and_are_closed(name, tokenizer, tmp_path, environments):
    closing, file = environments(name), tmp_path / "closed"
    prompt = prompt_of(tokenizer, tmp_path, closing.named, file=str(file))
    talk = Conversations(closing, tokenizer, prompt, None, (), None)
    said = Passage((tokenizer.eos_id,), (-1.0,))
    for sample in (0, 1, 0):
        talk.begin(sample)
        assert talk.observe(sample, [said]) is None
    assert len(prompt.row["messages"]) == 1 and len(file.read_text().splitlines()) == 1, "the first one began anew"
    talk.end(0)
    talk.end(1)
    closed = [line.split() for line in file.read_text().splitlines()]
    assert len(closed) == 3 and not any(Path(folder).exists() for _, folder in closed)
    pids = {int(pid) for pid, _ in closed}
    assert pids == {os.getpid()} if name == "ClosingHere" else len(pids) == 3 and gone(*pids)


@pytest.mark.parametrize("policy", ["refuse", "zero", "drop"])
def test_a_conversation_whose_environment_is_lost_has_no_reward_and_no_text(
    policy, tokenizer, tmp_path, environments, caplog, monkeypatch
):
    stuck = environments("StuckIn", method="step")
    prompt = prompt_of(tokenizer, tmp_path, stuck.named)
    talk = Conversations(stuck, tokenizer, prompt, None, (), None, policy)
    talk.begin(0)
    said, begun = Passage((tokenizer.eos_id,), (-1.0,)), talk._open[0].environment
    ask = begun.ask

    def short(method: str, argument):
        """What hangs is not waited for; that which is asked before it may take its time."""
        stuck.limit = 0.1 if method == "step" else 600.0
        return ask(method, argument)

    monkeypatch.setattr(begun, "ask", short)
    words = f"step has not come back within trainer.grpo.environment_timeout=0.1 s, for the prompt of {prompt.where}: mend it"
    if policy == "refuse":
        with pytest.raises(EnvironmentFailedError, match=re.escape(words)):
            talk.observe(0, [said])
        return
    assert talk.observe(0, [said]) is None
    assert talk.lost(0) and talk.answer(0, Trajectory([said], FinishReason.STOP)) == ""
    assert talk.reward(0) == 0 if policy == "zero" else math.isnan(talk.reward(0))
    assert words in caplog.text and "the conversation is given up" in caplog.text
    talk.end(0)


@pytest.mark.parametrize(("method", "reward"), [("start", 0.0), ("calls", 0.0), ("close", 1.0)])
def test_whatever_call_does_not_come_back_gives_up_its_conversation_alone(
    method, reward, tokenizer, tmp_path, environments, caplog
):
    """Also that of an answer that was cut off, which no step has seen."""
    stuck = environments("StuckIn", method=method)
    prompt = prompt_of(tokenizer, tmp_path, stuck.named)

    @contextmanager
    def short(of: str):
        """What hangs is not waited for; what does not may take its time."""
        stuck.limit = 0.1 if of == method else 600.0
        yield
        stuck.limit = 600.0

    talk = Conversations(stuck, tokenizer, prompt, None, (), None, "zero")
    said = Passage((tokenizer.eos_id,), (-1.0,))
    with short("start"):
        talk.begin(0)
        talk.begin(1)
    with short("calls"):
        assert talk.observe(0, [said]) is None
        for sample in (0, 1):
            assert talk.answer(sample, Trajectory([said], FinishReason.LENGTH)) == ""
    assert [talk.lost(0), talk.lost(1)] == [method != "close"] * 2 and talk.reward(0) == reward
    with short("close"):
        talk.end(0)
        talk.end(1)
    assert caplog.text.count(f"{method} has not come back within") == 2
    refusing = Conversations(stuck, tokenizer, prompt, None, (), None)
    with pytest.raises(EnvironmentFailedError, match=f"{method} has not come back within"):
        with short("start"):
            refusing.begin(0)
        with short("calls"):
            refusing.observe(0, [said])
        with short("close"):
            refusing.end(0)


def test_what_a_template_cannot_write_is_refused_before_anything_is_sampled(tokenizer, tmp_path):
    folder = tmp_path / "llama"
    llama = load_tokenizer(write_tokenizer(folder, chat_template=FAMILIES["llama"], eos_token=EOS, bos_token=START))
    named = get_environment("calculator")
    prompt = prompt_of(tokenizer, tmp_path, named)
    check_template(named, tokenizer, prompt, ())
    with pytest.raises(DataError, match="not as JSON with its name and arguments"):
        check_template(named, llama, prompt, ())
    reads = get_environment(f"{OWN}.Insisting")
    assert tool_format(reads, llama) is None
    with pytest.raises(DataError, match="ends the assistant's message with none of the tokens that end a response"):
        check_template(named, tokenizer, prompt, (tokenizer.token_id("<pad>", ""),))
