"""Conversations with tools, from the environment to the gradient: what was sampled is what is trained, and nothing else is."""

from __future__ import annotations

import itertools
import sys
from functools import partial

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import GrpoTerms, token_weights
from megatron_ext.models import build_gpt
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import MegatronSource, Passage, Request, SamplingParams
from recipes.data.errors import DataError
from recipes.data.rows import load_prompts
from recipes.data.tokenizer import load_tokenizer
from recipes.environments.calculator import Calculator
from recipes.environments.environment import End, Environment, Observation, ToolCall
from recipes.environments.registry import Named
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.conversations import Conversations, check_template, tool_format
from recipes.grpo.objective import objective
from tests.data_cases import EOS, FAMILIES, START, write_rows, write_tokenizer
from tests.gpt_cases import named_gradients, randomize, run, small_config
from tests.layouts import randn
from tests.plain_gpt import plain_logprobs

NUMBERS = itertools.count()


class Insisting(Calculator):
    """Takes a first turn for a call of the calculator, whatever it is, and the second for the answer."""

    def calls(self, text):
        return [ToolCall("calculator", {"expression": f"{len(text)} * 3"}, "call00000")]

    def step(self, talk):
        return super().step(talk) if len(talk.turns) == 1 else End()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen2"
    return load_tokenizer(write_tokenizer(folder, chat_template=FAMILIES["qwen2"], eos_token=EOS, bos_token=START))


def prompt_of(tokenizer, tmp_path, kind: type[Environment], **row):
    named = Named(kind.__name__, kind, kind())
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "what is 1 + 2 ?"}], **row})
    (prompt,) = load_prompts(path, tokenizer, 400, opening=named.opening)
    return named, prompt


def test_two_turns_with_a_tool_are_trained_as_a_tree_like_one_by_one(tokenizer, tmp_path, rng, world):
    """fp64: the loss and every gradient, trajectories that fork behind the tool's answer among them."""
    named, prompt = prompt_of(tokenizer, tmp_path, Insisting)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=700), world)
    randomize(model, rng)
    model.double()
    source = MegatronSource(model, tokenizer.decode_response)
    params = SamplingParams(300, tokenizer.stop_ids, ("e", "t", "1", " "))  # turns of a few tokens
    talks = [Conversations(named, tokenizer, prompt, None, (), None) for _ in range(2)]
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
        assert abs(loss - expected) <= 1e-10 and expected.abs() > 1e-3
        loss.backward()
        for name, gradient in named_gradients(model).items():
            assert (gradient - gradients[name]).abs().max() <= 1e-10, name


def _loss(batch, logprobs, masks, advantages, count):
    ids = batch.groups.response_ids
    weights = token_weights(ids, batch.loss_mask(masks), len(masks), count, len(masks), "token")
    assert int((weights > 0).sum()) == count, "of every sampled token, and of no other"
    microbatch = GRPOMicrobatch(batch, 0.9, advantages=advantages[ids], weights=weights)
    return objective(microbatch, logprobs, torch.zeros_like(logprobs), GrpoTerms())[0]


class Paying(Environment):
    """Pays for every turn, by its number, and goes on."""

    row_keys = ("pay",)
    gives_reward = True

    def step(self, talk):
        return Observation([{"role": "user", "content": "on"}], talk.row["pay"] * len(talk.turns))


def test_rewards_of_turns_add_up_and_turns_are_counted(tokenizer, tmp_path, rng, world):
    named, prompt = prompt_of(tokenizer, tmp_path, Paying, pay=0.25)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=500), world)
    randomize(model, rng)
    params = SamplingParams(200, tokenizer.stop_ids, ("e", "t", "1", " ", "a", "o"))
    talk = Conversations(named, tokenizer, prompt, None, (), 3)
    (group,) = MegatronSource(model, tokenizer.decode_response).sample(
        [Request(prompt.tokens, 4, params, (int(rng.initial_seed()),), environment=talk)]
    )
    for i, trajectory in enumerate(group):
        assert [p.sampled for p in trajectory.passages] == [True, False, True, False, True]
        assert talk.reward(i) == 0.25 * (1 + 2 + 3)


class Failing(Environment):
    row_keys = ("how",)
    gives_reward = True

    def start(self, row):
        drawn = next(NUMBERS) if row["how"] == "draws" else 2
        return [{"role": "user", "content": f"what is {drawn} ?"}]

    def step(self, talk):
        answers = {
            "exit": lambda: sys.exit(0), "number": lambda: Observation(5), "large": lambda: End(10**400),
            "raises": lambda: 1 / 0, "text": lambda: "on", "nan": lambda: End(float("nan")), "none": End,
            "plain": lambda: Observation("on"),
        }  # fmt: skip
        return answers[talk.row["how"]]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raises",
            r"environment Failing: step failed: ZeroDivisionError: division by zero \(test_conversations.py, line",
        ),
        ("text", "environment Failing: step gave 'on': it must give an Observation or an End"),
        ("nan", "environment Failing gave the reward nan; it must be a finite number"),
        ("none", "environment Failing gave the reward None"),
        ("plain", "environment Failing: the prompt is messages and the answer plain text"),
        ("exit", "environment Failing: step failed: SystemExit: 0"),
        ("number", "environment Failing: TypeError"),
        ("large", "environment Failing gave the reward 1000"),
        ("draws", "start gave another prompt for .*:1 than when rows were read"),
    ],
)
def test_an_environment_that_fails_stops_the_run_in_a_line(how, message, tokenizer, tmp_path, world):
    named, prompt = prompt_of(tokenizer, tmp_path, Failing, how=how)
    model = build_gpt(small_config(vocab_size=tokenizer.vocab_size, encoder_seq_length=500), world)
    params = SamplingParams(9, tuple(range(tokenizer.vocab_size)))
    request = Request(prompt.tokens, 1, params, environment=Conversations(named, tokenizer, prompt, None, (), None))
    with pytest.raises(UserError, match=message):
        MegatronSource(model, tokenizer.decode_response).sample([request])


class Closing(Environment):
    closed = 0

    def step(self, talk):
        talk.row["messages"].append(1)
        return End()

    def close(self):
        type(self).closed += 1


def test_conversations_have_rows_of_their_own_and_are_closed(tokenizer, tmp_path):
    named, prompt = prompt_of(tokenizer, tmp_path, Closing)
    talk = Conversations(named, tokenizer, prompt, None, (), None)
    said = Passage((tokenizer.eos_id,), (-1.0,))
    for sample in (0, 1, 0):
        talk.begin(sample)
        assert talk.observe(sample, [said]) is None
    assert len(prompt.row["messages"]) == 1 and Closing.closed == 1, "the first one began anew"
    talk.close()
    assert Closing.closed == 3


def test_what_a_template_cannot_write_is_refused_before_anything_is_sampled(tokenizer, tmp_path):
    folder = tmp_path / "llama"
    llama = load_tokenizer(write_tokenizer(folder, chat_template=FAMILIES["llama"], eos_token=EOS, bos_token=START))
    named, prompt = prompt_of(tokenizer, tmp_path, Calculator)
    check_template(named, tokenizer, [prompt], ())
    with pytest.raises(DataError, match="not as JSON with its name and arguments"):
        check_template(named, llama, [prompt], ())
    reads = Named("own", Insisting, Insisting())
    assert tool_format(reads, llama) is None
    with pytest.raises(DataError, match="ends the assistant's message with none of the tokens that end a response"):
        check_template(named, tokenizer, [prompt], (tokenizer.token_id("<pad>", ""),))
