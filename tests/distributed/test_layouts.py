"""Tensor, sequence, context and pipeline parallelism against one rank: scores, loss, every gradient, a step, sampled tokens.

The same weights everywhere: made by a run with one rank, cut by hand for the others. fp32; the bound is 1e-5 relative
to the largest entry, where other orders of summation were seen to change 3e-6 at most.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.prompt_streams import next_token_probabilities
from megatron_ext.rotary import RopeScaling
from megatron_ext.runtime.checkpoint import load_weights
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.layout_scenarios import NEW_TOKENS, SAMPLES, LayoutCase, VocabCase, layouts
from tests.distributed.scenarios import CLIP
from tests.distributed.sharding import full_name, shard
from tests.edges import Edges
from tests.engine_cases import edges_of, gradient_floor, relative_error
from tests.gpt_cases import LATENT, Rollout, make_rollout, randomize, small_config
from tests.harness import run_ranks
from tests.layouts import error, randn
from tests.plain_gpt import greedy

pytestmark = pytest.mark.distributed

BOUND = 1e-5
# Compressed rows pass two norms more, and their gradients the sums over heads: seen to change 1.2e-5.
GRADIENT_BOUNDS = {"latent": 3e-5}
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_query_groups": 4}
# Sinks, a layer that does not rotate, stretched positions.
UNUSUAL = {
    "softmax_type": "learnable", "no_rope_freq": 4,
    "position_embedding": PositionEmbedding(
        scaling=RopeScaling(4.0, original_max_position_embeddings=16, rope_type="yarn", beta_fast=4.0)
    ),
}  # fmt: skip
MULTIPLIED = {
    "embedding_multiplier": 1.7, "residual_multiplier": 0.4, "logits_scaling": 1.3, "attention_multiplier": 0.2,
}  # fmt: skip
# One rank runs each of these; a layout takes one of them and says how it is run. Of two key/value heads, four ranks have one
# by twos.
MODELS = {
    "tied": MODEL,
    "untied": MODEL | {"share_embeddings_and_output_weights": False} | UNUSUAL,
    "few heads": MODEL | {"num_attention_heads": 12, "num_query_groups": 2} | MULTIPLIED,
    "one head": MODEL
    | {"num_attention_heads": 12, "num_query_groups": 1, "share_embeddings_and_output_weights": False},
    "latent": MODEL | LATENT,
    "five layers": MODEL | {"num_layers": 5} | MULTIPLIED,
    "experts": MODEL | {
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1, 1, 1],
        "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True, "qk_layernorm_across_heads": True,
    },
    # As gpt-oss has them.
    "biased experts": MODEL | {
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "add_bias_linear": True,
        "activation": "quick_gelu", "activation_func_clamp_value": 1.5, "glu_linear_offset": 1.0,
    },
}  # fmt: skip
TIED, UNTIED, FEW_HEADS, ONE_HEAD, LATENT_ROWS, FIVE_LAYERS, EXPERTS, BIASED = ({"model": name} for name in MODELS)
LENGTHS = [(7, [3, 5]), (4, [6]), (5, [2, 2, 2]), (3, [9, 1]), (5, [4, 0, 14])]
CUTS = [[0, 1], [2], [3, 4]]  # streams of 32, 16 and 48 tokens
PROMPTS = [9, 1, 22]
SEQUENCE = {"sequence_parallel": True}
ALL_TO_ALL = {"cp_comm_type": "a2a"}
PIECES = {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": (
        ParallelSizes(tensor=2),
        [TIED, UNTIED, TIED | SEQUENCE, UNTIED | SEQUENCE, LATENT_ROWS, BIASED | SEQUENCE],
    ),
    "pp2": (ParallelSizes(pipeline=2), [TIED, UNTIED, FIVE_LAYERS | {"num_layers_in_last_pipeline_stage": 2}]),
    "pp2 in pieces": (ParallelSizes(pipeline=2), [TIED | PIECES, UNTIED | PIECES]),
    "tp2 pp2": (
        ParallelSizes(tensor=2, pipeline=2),
        [UNTIED, TIED | SEQUENCE | {"activations_checkpoint_granularity": "full"}],
    ),
    "tp4": (
        ParallelSizes(tensor=4),
        [FEW_HEADS | SEQUENCE, ONE_HEAD | {"activations_checkpoint_granularity": "full"}],
    ),
    "cp2": (ParallelSizes(context=2), [TIED, UNTIED, UNTIED | ALL_TO_ALL]),
    "cp2 tp2": (ParallelSizes(tensor=2, context=2), [UNTIED | SEQUENCE, TIED | ALL_TO_ALL, LATENT_ROWS | SEQUENCE]),
    "cp2 pp2": (ParallelSizes(pipeline=2, context=2), [TIED | {"activations_checkpoint_granularity": "full"}]),
    "tp2 ep2": (ParallelSizes(tensor=2, expert=2, expert_tensor=1), [EXPERTS | SEQUENCE, BIASED | SEQUENCE]),
    "cp2 ep2 pp2": (
        ParallelSizes(context=2, pipeline=2, expert=2),
        [EXPERTS, EXPERTS | {"activations_checkpoint_granularity": "full"}],
    ),
    "tp2 cp2 ep2": (ParallelSizes(tensor=2, context=2, expert=2), [EXPERTS | SEQUENCE, BIASED | SEQUENCE]),
}


def make_vocab_cases(rng: torch.Generator) -> list[VocabCase]:
    """Targets at both sides of the border between shards; padding in part of the last shard, and all of it."""
    cases = []
    for num_valid in (None, 47, 32, 20):
        hidden, weight = randn(rng, 23, 12), randn(rng, 64, 12)
        last = (num_valid or 64) - 1
        borders = torch.tensor([0, 31, 32, 33, last, min(31, last)]).clamp(max=last)
        targets = torch.cat((borders, torch.randint(last + 1, (17,), generator=rng)))
        options = {"num_valid": num_valid, "chunk_size": 5, "temperature": 0.8}
        cases.append(VocabCase(hidden, weight, targets, (randn(rng, 23), randn(rng, 23)), options))
    return cases


def clear_seed(
    device: torch.device, fields: dict, rollout: Rollout, prompts: list[list[int]], rng: torch.Generator
) -> int:
    """Of weights by which rounding decides nothing: which experts a token takes, or whether it is clipped."""
    model = build_gpt(small_config(**fields), device)
    while True:
        seed = int(torch.randint(2**31, (), generator=rng))
        randomize(model, torch.Generator().manual_seed(seed))
        with Edges("topk") as edges:
            next_token_probabilities(model, prompts, [0])
        if edges.clear and edges_of(model, rollout).clear:
            return seed


class Reference:
    """The inputs of all layouts, and what one rank makes of them. Keyed by the name of the model."""

    def __init__(self, folder: Path, device: torch.device):
        rng, number, clipped = fresh_generator(), 0, False
        while not clipped:  # a gradient may be too small for that
            self._draw(folder / str(number), device, rng)
            number, clipped = number + 1, all(r["report"]["grad_norm"] > CLIP for r in self.results.values())

    def _draw(self, folder: Path, device: torch.device, rng: torch.Generator) -> None:
        folder.mkdir()
        self.folder, self.cases, self.results = folder, {}, {}
        self.vocab = make_vocab_cases(rng)
        prompts = [torch.randint(61, (n,), generator=rng).tolist() for n in PROMPTS]
        for number, (name, fields) in enumerate(MODELS.items()):
            rollout = make_rollout(rng, LENGTHS, 61, common=3 * (number % 2))  # groups, and trees
            seed = clear_seed(device, fields, rollout, prompts, rng)
            self.cases[name] = LayoutCase(fields, seed, rollout, CUTS, prompts, save=self.checkpoint(name))
        (result,) = run_ranks(layouts, 1, list(self.cases.values()), [])
        for name, case_result in zip(self.cases, result["cases"], strict=True):
            self.results[name] = case_result
            self.cases[name].weights = case_result["weights"]

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"of one rank, {name}"

    def expected_greedy(self, name: str, stop: int | None = None) -> list[list[int]]:
        """By the plain GPT, in fp64."""
        case = self.cases[name]
        weights = {key: w.double() for key, w in case.weights.items()}
        return [greedy(weights, small_config(**case.fields), p, NEW_TOKENS, stop) for p in case.prompts]

    def stop(self, name: str) -> int:
        """A token that ends the first response early, and not all of them at once."""
        return self.expected_greedy(name)[0][2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, world) -> Reference:
    return Reference(tmp_path_factory.mktemp("weights"), world)


class Layout:
    """One layout's results: (configuration, its model, [result of every rank]) for each of its cases."""

    def __init__(self, name: str, reference: Reference):
        sizes, changes = LAYOUTS[name]
        self.sizes, self.cases, self.saved = sizes, [], []
        cases = []
        for number, change in enumerate(changes):
            model, options = change["model"], {key: value for key, value in change.items() if key != "model"}
            source = reference.cases[model]
            fields = source.fields | options | sizes.named
            self.saved.append(reference.folder / f"{name}-{number}")
            cases.append(
                LayoutCase(
                    fields, source.weights, source.rollout, CUTS, source.prompts,
                    reference.stop(model), reference.checkpoint(model), self.saved[-1],
                )
            )  # fmt: skip
        self.ranks = run_ranks(
            layouts, sizes.tensor * sizes.pipeline * sizes.context, cases, reference.vocab, sizes=sizes
        )
        for number, (case, change) in enumerate(zip(cases, changes, strict=True)):
            self.cases.append((small_config(**case.fields), change["model"], [r["cases"][number] for r in self.ranks]))

    def tensors(self, kind: str, reference: Reference):
        """(model, where, this layout's tensor, the same part of one rank's) for every parameter of every rank."""
        for number, (config, model, results) in enumerate(self.cases):
            seen = set()
            for place, result in zip(self.ranks, results, strict=True):
                for name, value in result[kind].items():
                    (expert, expert_rank), rank = place["experts"], place["rank"]
                    whole = full_name(name, config, place["stage"], expert)
                    seen.add(whole)
                    expected = shard(name, reference.results[model][kind][whole], config, rank, expert_rank)
                    yield model, f"case {number}, rank {rank}, stage {place['stage']}, {name}", value, expected
            assert seen == set(reference.results[model][kind])  # no parameter of the full model is missing


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, reference) -> Layout:
    return Layout(request.param, reference)


def least(values: Iterable[tuple[str, float]]) -> float:
    """Of (where, value) the smallest; the experts of a layer, of which some may have got no token, count as their largest."""
    alone, of_layers = [], {}
    for where, value in values:
        if "local_experts" in where:
            layer = re.sub(r"rank \d+, |local_experts\.\d+", "", where)
            of_layers[layer] = max(of_layers.get(layer, 0.0), value)
        else:
            alone.append(value)
    return min(alone + list(of_layers.values()))


def test_every_gradient_equals_one_ranks(layout: Layout, reference: Reference):
    """After finalisation; tied embeddings under pipeline parallelism on both stages that hold them."""
    floors = {name: gradient_floor(result["gradients"]) for name, result in reference.results.items()}
    assert least((where, float(g.abs().max())) for _, where, _, g in layout.tensors("gradients", reference)) > 0
    for name, where, found, expected in layout.tensors("gradients", reference):
        assert relative_error(found, expected, floors[name]) <= GRADIENT_BOUNDS.get(name, BOUND), where


def gradient(result: dict, end: str) -> torch.Tensor | None:
    """Of the parameter whose name ends so, in whichever piece it is."""
    return next((value for name, value in result["gradients"].items() if name.endswith(end)), None)


def test_a_tied_embedding_has_one_gradient_wherever_it_is_held(layout: Layout):
    """Under pipeline parallelism the first and the last stage hold a copy each, with bitwise the same gradient."""
    for config, _, results in layout.cases:
        tied = config.share_embeddings_and_output_weights
        tp = config.tensor_model_parallel_size
        for first, last in zip(results[:tp], results[-tp:], strict=True):
            embedding = gradient(first, "embedding.word_embeddings.weight")
            output = gradient(last, "output_layer.weight")
            if layout.sizes.pipeline > 1:
                assert torch.equal(embedding, output) == tied
            else:
                assert (output is None) == tied


def test_loss_and_metrics_equal_one_ranks(layout: Layout, reference: Reference):
    """And every rank knows them, those of other stages included."""
    for _, name, results in layout.cases:
        expected = reference.results[name]["metrics"]
        assert set(expected) == {"loss", "ratio", "clip_fraction", "kl", "entropy", "weight"}
        for result in results:
            assert result["metrics"] == pytest.approx(expected, rel=BOUND, abs=1e-6)


def test_one_stream_alone_has_the_gradient_of_one_rank(layout: Layout, reference: Reference):
    """Fewer streams than stages."""
    floors = {name: gradient_floor(result["alone"]) for name, result in reference.results.items()}
    for name, where, found, expected in layout.tensors("alone", reference):
        assert relative_error(found, expected, floors[name]) <= GRADIENT_BOUNDS.get(name, BOUND), where
    for _, name, results in layout.cases:
        for result in results:
            assert len(result["alone metrics"]) == 6
            assert result["alone metrics"] == pytest.approx(
                reference.results[name]["alone metrics"], rel=BOUND, abs=1e-6
            )


def test_scores_equal_one_ranks_on_every_stage(layout: Layout, reference: Reference):
    for _, name, results in layout.cases:
        for result in results:
            assert result["tokens"] == [32, 16, 48]
            for found, expected in zip(result["scores"], reference.results[name]["scores"], strict=True):
                assert relative_error(found, expected) <= BOUND


def test_the_reference_on_the_host_says_after_a_step_what_one_rank_said_before_it(layout: Layout, reference: Reference):
    """Bitwise what this rank said; its bytes are those of the rank's weights, and nothing of it is left in the gradients."""
    for _, name, results in layout.cases:
        for result in results:
            assert result["bytes of the reference"] == sum(w.nbytes for w in result["weights"].values())
            assert result["left of the reference"] == 0
            said, before = result["scores of the reference"], result["scores"]
            assert all(torch.equal(a, b) for a, b in zip(said, before, strict=True))
            for found, expected in zip(said, reference.results[name]["scores"], strict=True):
                assert relative_error(found, expected) <= BOUND


def test_an_update_whose_own_pass_says_the_old_log_probabilities_is_bitwise_that_with_a_pass_before(layout: Layout):
    """And it hands them back, on every stage."""
    for config, _, results in layout.cases:
        experts = {"expert_load_max", "balance_loss"} if config.num_moe_experts else set()
        for result in results:
            (metrics, gradients), (same, found) = result["asked"], result["not asked"]
            assert same == metrics and metrics["ratio"] > 0 and metrics["clip_fraction"] == 0
            assert found.keys() == gradients.keys()
            assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
            assert set(result["told"]) == {*metrics, "grad_norm", "lr", "skipped"} | experts
            for told, before in zip(result["scores told"], result["scores before"], strict=True):
                assert torch.equal(told, before) and not told.requires_grad


def test_a_step_equals_one_ranks(layout: Layout, reference: Reference):
    """Clipped by the norm of the WHOLE gradient, which every rank reports."""
    for _, name, results in layout.cases:
        expected = reference.results[name]["report"]
        assert expected["grad_norm"] > CLIP  # the clipping matters
        for result in results:
            assert result["report"] == pytest.approx(expected, rel=BOUND)
    for _, where, found, expected in layout.tensors("stepped", reference):
        assert error(found, expected) <= BOUND, where
    both = zip(layout.tensors("stepped", reference), layout.tensors("weights", reference), strict=True)
    assert least((where, error(after, before)) for (_, where, after, _), (_, _, before, _) in both) > 10 * BOUND


def test_the_gradients_norm_is_megatrons(layout: Layout):
    """To the rounding of fp32 sums."""
    for _, _, results in layout.cases:
        for result in results:
            ours, megatrons = result["norms"]
            assert ours == pytest.approx(megatrons, rel=1e-6) and ours == result["report"]["grad_norm"]


def test_no_rank_takes_a_step_that_is_not_finite(layout: Layout):
    for _, _, results in layout.cases:
        for result in results:
            assert result["refused"]
            assert all(torch.equal(result["stepped"][n], w) for n, w in result["after refusal"].items())


def test_greedy_equals_the_full_forward_token_by_token(layout: Layout, reference: Reference):
    """With a stop token that ends some responses before others."""
    for _, name, results in layout.cases:
        expected = reference.expected_greedy(name, reference.stop(name))
        assert len(expected[0]) == expected[0].index(reference.stop(name)) + 1 <= 3
        for result in results:
            assert result["greedy"] == [[response] * SAMPLES for response in expected]


def test_sampled_tokens_equal_one_ranks_under_the_same_draws(layout: Layout, reference: Reference):
    for _, name, results in layout.cases:
        expected = reference.results[name]["sampled"]
        assert len({tuple(r) for rs in expected for r in rs}) > 3
        assert all(result["sampled"] == expected for result in results)
        assert all(result["one by one"] == expected for result in results)


def test_next_token_probabilities_equal_one_ranks(layout: Layout, reference: Reference):
    for _, name, results in layout.cases:
        for result in results:
            assert relative_error(result["next"], reference.results[name]["next"]) <= BOUND


def test_weights_saved_by_one_rank_load_here_bitwise(layout: Layout, reference: Reference):
    """Megatron's own cutting of the checkpoint agrees with the cutting by hand."""
    for _, where, found, expected in layout.tensors("weights", reference):
        assert torch.equal(found, expected), where
    for _, _, results in layout.cases:
        for result in results:
            assert all(torch.equal(result["loaded"][name], w) for name, w in result["weights"].items())


def test_weights_saved_here_load_on_one_rank_bitwise(layout: Layout, reference: Reference, world):
    for folder, (_, name, _) in zip(layout.saved, layout.cases, strict=True):
        case = reference.cases[name]
        model = build_gpt(small_config(**case.fields), world)
        load_weights(folder, model)
        assert all(torch.equal(p, case.weights[name]) for name, p in model.named_parameters())


def test_log_probabilities_over_a_sharded_vocabulary(layout: Layout, reference: Reference):
    """fp64 to 1e-10 against log_softmax over the whole vocabulary: values, entropies, gradients of both inputs."""
    for number, case in enumerate(reference.vocab):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        logp = (hidden @ weight[: case.options["num_valid"]].t() / case.options["temperature"]).log_softmax(-1)
        logprob = logp.gather(1, case.targets.unsqueeze(1)).squeeze(1)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.autograd.backward((logprob, entropy), case.grads)
        for place in itertools.product(range(layout.sizes.pipeline), range(layout.sizes.context)):
            ranks = [r["vocab"][number] for r in layout.ranks if (r["stage"], r["context"]) == place]
            assert len(ranks) == layout.sizes.tensor
            for result in ranks:
                assert error(result["logprob"], logprob.detach()) <= 1e-10
                assert error(result["entropy"], entropy.detach()) <= 1e-10
            assert error(sum(r["d hidden"] for r in ranks), hidden.grad) <= 1e-10
            assert error(torch.cat([r["d weight"] for r in ranks]), weight.grad) <= 1e-10
