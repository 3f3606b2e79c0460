"""Only the learnt tokens of the assistant's turns train, each with the same weight, however the batch is spread over ranks.

Pairs have drawn lengths and drawn turns; ranks and microbatches hold unequal numbers of learnt tokens. The truth is the mean over
the learnt tokens of the whole batch, in float64, by a plain GPT that sees one conversation at a time; of adapters on experts, it
is PEFT's.
"""

from __future__ import annotations

import pytest
import torch

from megatron_ext.adapters import LoraConfig
from megatron_ext.hf import hf_model_config
from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from recipes.data.rows import Pair, Prompt
from recipes.sft.settings import SFTModel
from tests.conftest import fresh_generator
from tests.distributed.sft_scenarios import SFTCase, sft_adapters, sft_gradients
from tests.distributed.sharding import shard
from tests.engine_cases import gradient_floor, relative_error
from tests.gpt_cases import randomize, small_config
from tests.harness import run_ranks
from tests.hf_models import VOCAB, make_hf_model
from tests.lora_cases import (
    TARGETS,
    adapter_tensors,
    difference,
    least_gap,
    make_peft_adapter,
    peft_gradients,
    shared_gradients,
)
from tests.plain_gpt import plain_logprobs

pytestmark = pytest.mark.distributed

BOUND = 1e-5  # fp32, as in test_layouts.py
PAIRS = 6
# Name -> (ranks, changes to the model, pairs of each data-parallel rank).
SPREADS = {
    "one rank": (1, {}, [[0, 1, 2, 3, 4, 5]]),
    "dp2": (2, {}, [[0, 1, 2], [3, 4, 5]]),
    "dp2 unequal": (2, {}, [[5], [0, 1, 2, 3, 4]]),
    "cp2": (2, {"context_parallel_size": 2}, [[0, 1, 2, 3, 4, 5]]),
}


def draw_pairs(rng: torch.Generator, vocabulary: int) -> list[Pair]:
    """Of drawn lengths; half of them learn drawn tokens, the first of which is one, the others all."""

    def tokens(least: int) -> tuple[int, ...]:
        count = int(torch.randint(least, 20, (), generator=rng))
        return tuple(torch.randint(vocabulary, (count,), generator=rng).tolist())

    pairs = []
    for number in range(PAIRS):
        response = tokens(4)
        learnt = (True, *(torch.rand(len(response) - 1, generator=rng) < 0.4).tolist()) if number % 2 else None
        pairs.append(Pair(Prompt(tokens(1), {}, number + 1), response, learnt))
    return pairs


@pytest.fixture(scope="module")
def batch(world):
    """(fields of the model, weights, pairs, loss, entropy and gradients by the plain GPT)."""
    rng = fresh_generator()
    config = small_config()
    model = build_gpt(config, world)
    randomize(model, rng)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pairs = draw_pairs(rng, config.vocab_size)
    exact = {name: w.double().requires_grad_() for name, w in weights.items()}
    loss = entropy = 0.0
    for pair in pairs:
        logprobs, entropies = plain_logprobs(exact, config, list(pair.prompt.tokens), list(pair.response))
        for place, learnt in enumerate(pair.learnt or [True] * len(pair.response)):
            if learnt:
                loss, entropy = loss - logprobs[place], entropy + entropies[place]
    count = sum(pair.num_learnt for pair in pairs)
    (loss / count).backward()
    gradients = {name: w.grad for name, w in exact.items()}
    return weights, pairs, (loss / count).item(), (entropy / count).item(), gradients


@pytest.mark.parametrize("name", SPREADS)
def test_the_loss_is_the_mean_over_the_learnt_tokens_of_the_global_batch(batch, name):
    weights, pairs, loss, entropy, gradients = batch
    ranks, changes, spread = SPREADS[name]
    fields = vars(small_config(**changes))
    model = SFTModel(**fields, micro_batch_size=2, global_batch_size=PAIRS)
    case = SFTCase(model, weights, [[pairs[i] for i in share] for share in spread])
    sizes = ParallelSizes(context=model.context_parallel_size)
    floor = gradient_floor(gradients)
    for result in run_ranks(sft_gradients, ranks, case, sizes=sizes):
        assert result["metrics"] == pytest.approx({"loss": loss, "entropy": entropy}, rel=BOUND)
        for parameter, found in result["gradients"].items():
            expected = shard(parameter, gradients[parameter], model, result["rank"])
            assert relative_error(found, expected, floor) <= BOUND, parameter


def test_whole_prompts_are_learnt_where_that_is_asked_for(batch):
    """Every token but the first of each conversation."""
    weights, pairs, *_ = batch
    pairs = [Pair(pair.prompt, pair.response) for pair in pairs]
    model = SFTModel(**vars(small_config()), micro_batch_size=4, global_batch_size=PAIRS, loss_on_prompt=True)
    exact = {name: w.double() for name, w in weights.items()}
    texts = [[*pair.prompt.tokens, *pair.response] for pair in pairs]
    expected = -torch.cat([plain_logprobs(exact, model, [], text)[0] for text in texts]).mean()
    (result,) = run_ranks(sft_gradients, 1, SFTCase(model, weights, [pairs]))
    assert result["metrics"]["loss"] == pytest.approx(expected.item(), rel=BOUND)


@pytest.mark.parametrize(
    ("ranks", "spread"), [SPREADS["one rank"][::2], SPREADS["dp2 unequal"][::2]], ids=["one rank", "ep2"]
)
def test_adapters_on_experts_learn_as_pefts_and_nothing_else_moves(ranks, spread, rng, tmp_path):
    """Gradients of the mean over the learnt tokens; the model below is bitwise what it was."""
    pairs = draw_pairs(rng, VOCAB)
    rows = [([*pair.prompt.tokens], [*pair.response]) for pair in pairs]
    learnt = [float(x) for pair in pairs for x in pair.learnt or [True] * len(pair.response)]
    factors = -torch.tensor(learnt) / sum(learnt)
    source, adapter, gap, rounding = tmp_path / "model", tmp_path / "adapter", 0.0, 1.0
    while gap < 1e-4 or rounding > BOUND / 5:  # so that rounding chooses no expert, and counts little
        make_hf_model(source, "qwen3_moe", rng)
        make_peft_adapter(source, adapter, "nemo", rng)
        gap = least_gap(source, adapter, [prompt + response for prompt, response in rows])
        theirs, rounding = peft_gradients(source, adapter, rows, factors)
    targets, _, rslora = TARGETS["nemo"]
    expected = shared_gradients(theirs, targets)
    peft = LoraConfig(dim=4, alpha=6, target_modules=targets, rslora=rslora)
    config = hf_model_config(source, precision="32", peft=peft, expert_model_parallel_size=ranks)
    model = SFTModel(**vars(config), micro_batch_size=2, global_batch_size=PAIRS)
    shares = [[pairs[i] for i in share] for share in spread]
    arguments = (model, source, adapter, shares, tmp_path / "gradients")
    for result in run_ranks(sft_adapters, ranks, *arguments, sizes=ParallelSizes(expert=ranks)):
        assert any(".local_experts." in name for name in result["changed"])
        assert all(".lora." in name for name in result["changed"])
        # Of an expert that no token takes, adapters stay as well.
        assert all(".lora." not in name or ".local_experts." in name for name in result["kept"])
    found = adapter_tensors(tmp_path / "gradients")
    assert sum(bool(g.count_nonzero()) for name, g in expected.items() if "experts" in name) > 2
    assert difference(found, expected) <= BOUND
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
