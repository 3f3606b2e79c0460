"""Trajectories out of files: what they become, and what is refused, with file, line and remedy."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest

from megatron_ext.errors import UserError
from megatron_ext.grouping.routes import write_routes
from megatron_ext.rollouts import Request, SamplingParams
from recipes.cli.compose import compose, forced
from recipes.cli.config import build
from recipes.data.conversation import read_conversation
from recipes.data.errors import DataError
from recipes.data.sampler import InOrder
from recipes.data.tokenizer import load_tokenizer
from recipes.grpo.recorded import RecordedSource, load_recorded
from recipes.grpo.settings import GRPOConfig
from tests.data_cases import ANSWER, CALL, EOS, QWEN2, RESULT, TOOL, USER, write_rows, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("chat") / "it", eos_token=EOS, chat_template=QWEN2))


def config(path, *overrides: str) -> GRPOConfig:
    given = [
        "data.train_path=null", "pretrained_checkpoint.restore_from_path=z", "trainer.grpo.samples_per_prompt=2",
        "trainer.grpo.num_prompts_per_grpo_step=2", "model.global_batch_size=4", "trainer.grpo.max_steps=1",
        f"++trainer.grpo.rollout={{source: file, path: {path}}}", *overrides,
    ]  # fmt: skip
    return build(GRPOConfig, compose("grpo_tiny", forced(given)))


def in_tokens(**changes) -> dict:
    """A row, with other values of its first response."""
    said = [random.randrange(20) for _ in range(3)]
    first = {"tokens": said, "logprobs": [-random.random() for _ in said], "reward": random.random(), **changes}
    return {"prompt_tokens": [1, 2, 3], "responses": [first, {"tokens": [4], "reward": 0}]}


def test_tokens_probabilities_and_rewards_are_what_the_rows_say(tmp_path, tokenizer):
    rows = [in_tokens() for _ in range(4)]
    rows[1]["responses"][0] |= {"finish_reason": "length", "weight_version": 7, "text": "for people"}
    path = write_rows(tmp_path / "a.jsonl", *rows)
    groups = load_recorded(config(path, "trainer.grpo.max_steps=2"), tokenizer)
    assert [group.for_prompt().where for group in groups] == [f"{path}:{line}" for line in range(1, 5)]
    source = RecordedSource(groups, 2)
    requests = [Request([1, 2, 3], 2, SamplingParams(8), (5, step, n)) for step in (1, 2) for n in (0, 1)]
    assert source.rewards(requests) == [[r["reward"] for r in row["responses"]] for row in rows]
    for row, (first, second) in zip(rows, source.sample(requests), strict=True):
        assert first.tokens == row["responses"][0]["tokens"] and first.logprobs == row["responses"][0]["logprobs"]
        assert all(first.mask) and second.tokens == [4] and math.isnan(second.logprobs[0])
    changed = source.sample(requests[1:2])[0][0]
    assert changed.truncated and changed.passages[0].weight_version == 7
    assert source.sample(requests[2:3])[0][0].finish_reason == "stop"


EXPERTS = "model.num_moe_experts=4", "model.moe_router_topk=2", "trainer.grpo.router_replay=R3"


def test_routes_of_whoever_sampled_are_read_with_the_rows(tmp_path, tokenizer):
    row = in_tokens()
    layers = config("z", *EXPERTS).model.num_layers
    routes = [np.random.default_rng().integers(0, 4, (length - 1, layers, 2)) for length in (3 + 3, 3 + 1)]
    for response, each in zip(row["responses"], routes, strict=True):
        response["routed_experts"] = write_routes(each)
    path = write_rows(tmp_path / "a.jsonl", row, row)
    groups = load_recorded(config(path, *EXPERTS), tokenizer)
    for group in groups:
        assert [np.array_equal(t.routes, each) for t, each in zip(group.trajectories, routes, strict=True)] == [
            True,
            True,
        ]
    with pytest.raises(
        DataError, match="has routed_experts, and trainer.grpo.router_replay=None: set it to R3 or leave"
    ):
        load_recorded(config(path, *EXPERTS[:2]), tokenizer)
    with pytest.raises(UserError, match="router_replay=R3 is for models with experts, and this one has none"):
        config(path, EXPERTS[2])
    del row["responses"][1]["routed_experts"]
    with pytest.raises(
        DataError, match=re.escape("responses[1] lacks routed_experts, and trainer.grpo.router_replay=R3")
    ):
        load_recorded(config(write_rows(tmp_path / "b.jsonl", row, row), *EXPERTS), tokenizer)
    row["responses"][1]["routed_experts"] = write_routes(routes[0])
    with pytest.raises(DataError, match=re.escape(f"responses[1]: routed_experts are int64 [5, {layers}, 2], not")):
        load_recorded(config(write_rows(tmp_path / "c.jsonl", row, row), *EXPERTS), tokenizer)


def test_passages_that_were_observed_are_no_part_of_what_is_trained(tmp_path, tokenizer):
    passages = [{"tokens": [5, 6], "logprobs": [-1, None]}, {"tokens": [7], "observed": True}, {"tokens": [8]}]
    row = in_tokens()
    row["responses"][0] = {"passages": passages, "reward": 1}
    groups = load_recorded(config(write_rows(tmp_path / "a.jsonl", row, row)), tokenizer)
    (said, _) = groups[0].trajectories
    assert said.tokens == [5, 6, 7, 8] and said.mask == [True, True, False, True]
    assert said.logprobs[0] == -1 and math.isnan(said.logprobs[1])


def test_messages_become_the_tokens_of_the_conversation(tmp_path, tokenizer):
    """What the assistant says behind the prompt is sampled; what it said in the prompt is not, nor what a tool says."""
    history = [USER, ANSWER, USER]
    turns = [CALL, RESULT, ANSWER]
    row = {
        "messages": history, "tools": [TOOL],
        "responses": [{"messages": turns, "reward": 1}, {"messages": [ANSWER], "reward": 0}],
    }  # fmt: skip
    limits = [
        "data.max_prompt_length=2000",
        "trainer.grpo.length_params.max_length=2000",
        "model.encoder_seq_length=4000",
    ]
    groups = load_recorded(config(write_rows(tmp_path / "a.jsonl", row, row), *limits), tokenizer)
    prompt, (first, second) = groups[0].prompt, groups[0].trajectories

    def tokens(messages: list, generate: bool = False) -> list[int]:
        talk = read_conversation({"messages": messages, "tools": [TOOL]}, (), "here")
        return tokenizer.encode(tokenizer.template.render(talk.messages, generate, talk.tools, {}))

    assert list(prompt) == tokens(history, True)
    assert [*prompt, *first.tokens] == tokens([*history, *turns])
    assert [*prompt, *second.tokens] == tokens([*history, ANSWER])
    assert [p.sampled for p in first.passages] == [True, False, True] and all(second.mask)
    seen = tokenizer.decode_whole(first.passages[1].tokens)
    assert RESULT["content"] in seen and "assistant:" in seen
    assert tokenizer.decode_whole(first.passages[2].tokens).startswith(ANSWER["content"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "responses[0].tokens must be a list of token ids, not empty, got an empty one"),
        ({"tokens": [1, True, 2]}, "responses[0].tokens[1] is 'True', no token id of"),
        ({"tokens": [1, 10**6, 2]}, "responses[0].tokens[1] is '1000000', no token id of"),
        ({"logprobs": [-1.0]}, "responses[0].logprobs must be a list of 3 numbers, one for each token, got 1"),
        ({"logprobs": [-1, 0.5, -1]}, "responses[0].logprobs[1] is '0.5': a log-probability is a number, 0 or less"),
        ({"reward": None}, "responses[0] needs a reward, a number, got none"),
        ({"reward": True}, "responses[0] needs a reward, a number, got true or false"),
        ({"finish_reason": "eos"}, "responses[0].finish_reason is 'eos': it is one of stop, stop_string, length, aborted"),
        ({"tokens": None}, "responses[0] has neither tokens nor messages: beside prompt_tokens it has passages or tokens"),
        ({"messages": [ANSWER]}, "responses[0] has tokens and messages: beside prompt_tokens it has passages or tokens"),
        ({"log_probs": [-1, -1, -1]}, "nothing reads the key log_probs"),
        ({"tokens": [1] * 17, "logprobs": None}, "has 17 tokens, more than trainer.grpo.length_params.max_length=16"),
        ({"tokens": None, "logprobs": None, "passages": [{"tokens": [1], "observed": True}]}, "has observed tokens alone"),
        (
            {"tokens": None, "logprobs": None, "passages": [{"tokens": [1], "observed": True, "logprobs": [-1]}]},
            "responses[0].passages[0] has logprobs, and is observed",
        ),
    ],
)  # fmt: skip
def test_responses_that_cannot_be_trained_on_are_refused(tmp_path, tokenizer, changes, message):
    path = write_rows(tmp_path / "a.jsonl", in_tokens(), in_tokens(**changes))
    with pytest.raises(DataError) as caught:
        load_recorded(config(path), tokenizer)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "neither prompt_tokens nor messages (only prompt); a row of trajectories carries exactly one"),
        ({**in_tokens(), "messages": [USER]}, "prompt_tokens and messages; a row of trajectories carries exactly one"),
        ({**in_tokens(), "anser": 1}, "nothing reads the key anser"),
        ({"prompt_tokens": [1]}, "responses must be a list of objects, got null"),
        ({"prompt_tokens": [1], "responses": [{}]}, "the prompt has 1 responses, trainer.grpo.samples_per_prompt=2"),
        (
            {"messages": [USER], "responses": [{"messages": [USER, ANSWER], "reward": 1}] * 2},
            "responses[0].messages begins with the user's: the assistant's must follow a prompt",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path, tokenizer, row, message):
    path = write_rows(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=re.escape(message)):
        load_recorded(config(path), tokenizer)


def test_too_few_rows_are_refused_before_anything_runs(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *(in_tokens() for _ in range(5)))
    with pytest.raises(DataError, match=r"has 5 prompts, enough for 2 steps .*: set trainer.grpo.max_steps=2 or less"):
        load_recorded(config(path, "trainer.grpo.max_steps=3"), tokenizer)


def test_what_a_file_says_and_the_rest_must_fit_together():
    for overrides, message in (
        (["data.train_path=x"], "data.train_path=x, and trainer.grpo.rollout.source=file brings its own prompts"),
        (["++trainer.grpo.rollout.path=null"], "source=file reads a path, and no other source does"),
        (["++trainer.grpo.rollout.source=megatron"], "source=file reads a path, and no other source does"),
        (
            ["++trainer.grpo.rollout.start=1"],
            "rollout.start is for servers, and trainer.grpo.rollout.source=file has none",
        ),
        (
            ["++trainer.grpo.rollout.source=megatron", "++trainer.grpo.rollout.path=null"],
            "data.train_path is null: name the file",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            config("a.jsonl", *overrides)


def test_rows_are_taken_as_they_come_by_any_number_of_ranks():
    whole = InOrder(12, 0, 1)
    wanted = [whole.next() for _ in range(3)]
    assert wanted == [list(range(i, i + 12)) for i in (0, 12, 24)]
    for world in (2, 3, 4):
        ranks = [InOrder(12, rank, world) for rank in range(world)]
        assert [[i for rank in ranks for i in rank.next()] for _ in range(3)] == wanted
    again = InOrder(12, 0, 1)
    again.load_state_dict(json.loads(json.dumps({"drawn": 12})))
    assert again.next() == wanted[1] and again.state_dict() == {"drawn": 24}


def in_messages(**changes) -> dict:
    responses = [{"messages": [ANSWER], "reward": i} for i in range(2)]
    return {"messages": [USER], "responses": responses, **changes}


def test_rows_have_the_names_and_the_system_prompt_of_the_run(tmp_path, tokenizer, caplog):
    """As other rows of the run; what is given in token ids is whole."""
    caplog.set_level("INFO")
    plain = load_recorded(config(write_rows(tmp_path / "a.jsonl", in_messages(), in_messages())), tokenizer)
    theirs = {"conversation": [USER], "responses": in_messages()["responses"]}
    path = write_rows(tmp_path / "b.jsonl", theirs, in_messages())
    assert load_recorded(config(path, "data.fields={messages: conversation}"), tokenizer)[0].content == plain[0].content
    theirs = {"question": USER["content"], "responses": in_messages()["responses"]}
    path = write_rows(tmp_path / "c.jsonl", theirs, theirs)
    given = config(path, "data.fields={prompt: question}", "data.prompt_as_message=true")
    assert load_recorded(given, tokenizer)[0].content == plain[0].content
    path = write_rows(tmp_path / "d.jsonl", in_messages(), in_tokens())
    with_system, tokens = load_recorded(config(path, "data.system_prompt=be brief"), tokenizer)
    talk = read_conversation({"messages": [{"role": "system", "content": "be brief"}, USER]}, (), "here")
    assert list(with_system.prompt) == tokenizer.encode(tokenizer.template.render(talk.messages, True, None, {}))
    assert tokens.prompt == (1, 2, 3)
    assert f"data.system_prompt is not put before prompt_tokens, which are whole: {path}:2" in caplog.text
    with pytest.raises(DataError, match=f"{path}:1: the row has no question, which data.fields.prompt reads"):
        load_recorded(config(path, "data.fields={prompt: question}"), tokenizer)


def test_prompts_that_are_too_long_are_left_out_and_counted_or_refused(tmp_path, tokenizer, caplog):
    rows = [in_tokens() for _ in range(4)]
    rows[1]["prompt_tokens"] = [1] * 40
    path, limit = write_rows(tmp_path / "a.jsonl", *rows), "data.max_prompt_length=30"
    groups = load_recorded(config(path, limit), tokenizer)
    assert [group.place.number for group in groups] == [1, 3, 4]
    assert (
        f"1 of 4 rows of {path} are left out as too long; the first is {path}:2: the prompt has 40 tokens"
        in caplog.text
    )
    with pytest.raises(DataError, match=f"{path}:2: the prompt has 40 tokens, .* or set data.overlong=filter"):
        load_recorded(config(path, limit, "data.overlong=error"), tokenizer)
    with pytest.raises(DataError, match="has 3 prompts, enough for 1 steps"):
        load_recorded(config(path, limit, "trainer.grpo.max_steps=2"), tokenizer)
