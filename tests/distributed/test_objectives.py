"""Every objective under tensor, pipeline and context parallelism, grouped, as trees and packed plainly, against the plain
computation on repeated sequences, in fp64.

The plain one shares nothing with ours: a GPT in plain PyTorch (tests/plain_gpt.py), one sequence after the other, and the
formulas by cases (tests/plain_objectives.py). Options are covered pairwise: every two values that go together are in a row.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from megatron_ext.losses import OBJECTIVES
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.objective_scenarios import IMPORTANCE, TEMPERATURE, ObjectiveCase, objectives
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import CONSTANT
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.harness import run_ranks
from tests.layouts import randn
from tests.plain_gpt import plain_logprobs
from tests.plain_objectives import PlainResponse, plain_loss

pytestmark = pytest.mark.distributed

BOUND = 1e-10
# Untied and without norms of q and k: then a rank's gradients are whole as they come, but for the sum over context-parallel
# ranks.
MODEL = {"share_embeddings_and_output_weights": False, "qk_layernorm": False}
LAYOUTS = {
    "tp2": (ParallelSizes(tensor=2), {"tensor_model_parallel_size": 2}),
    "pp2": (ParallelSizes(pipeline=2), {"pipeline_model_parallel_size": 2}),
    "cp2": (ParallelSizes(context=2), {"context_parallel_size": 2}),
}
LENGTHS = [(7, [3, 5, 4]), (4, [6]), (5, [2, 2]), (3, [9, 1])]
CUTS = {"whole": [[0, 1, 2, 3]], "parts": [[2], [0, 3], [1]]}
# Narrow, so that clipping matters at ratios of e^0.3.
OPTIONS = {
    "grpo": {"ratio_clip_max": 0.25},
    "dapo": {},
    "dr_grpo": {},
    "dual_clip": {"ratio_max": 1.3},
    "gspo": {"ratio_clip_min": 0.05, "ratio_clip_max": 0.05},
    "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
    "sapo": {},
    "gpg": {},
}
KL = {
    "none": {},
    "k2": {"kl_penalty": 0.3, "kl_type": "k2"},
    "k3": {"kl_penalty": 0.3},
    "weighted": {"kl_penalty": 0.3, "kl_weighted": True},
    "reward": {"kl_penalty": 0.3, "kl_type": "k1", "kl_in_reward": True},
}
FACTORS = {
    "objective": tuple(OBJECTIVES),
    "normalisation": ("token", "sequence", "constant"),
    "kl": tuple(KL),
    "entropy": (0.0, 0.02),
    "importance": tuple(IMPORTANCE),
    "packing": ("groups", "trees", "repeated"),
    "old": ("asked", "own"),
    "cuts": tuple(CUTS),
}
ROWS = [
    ("grpo", "token", "k3", 0.0, "token", "groups", "asked", "parts"),
    ("grpo", "sequence", "none", 0.0, "sequence", "repeated", "own", "whole"),
    ("grpo", "sequence", "k2", 0.0, "sequence", "repeated", "asked", "whole"),
    ("grpo", "sequence", "weighted", 0.02, "none", "trees", "asked", "parts"),
    ("grpo", "constant", "reward", 0.0, "sequence", "trees", "own", "whole"),
    ("dapo", "token", "none", 0.02, "sequence", "groups", "own", "whole"),
    ("dapo", "token", "k2", 0.02, "token", "trees", "asked", "parts"),
    ("dapo", "token", "k3", 0.0, "token", "groups", "asked", "whole"),
    ("dapo", "token", "weighted", 0.0, "token", "trees", "own", "parts"),
    ("dapo", "token", "reward", 0.0, "none", "repeated", "own", "whole"),
    ("dr_grpo", "constant", "none", 0.02, "sequence", "repeated", "own", "whole"),
    ("dr_grpo", "constant", "k2", 0.0, "none", "groups", "own", "parts"),
    ("dr_grpo", "constant", "k3", 0.02, "sequence", "trees", "asked", "whole"),
    ("dr_grpo", "constant", "weighted", 0.0, "token", "groups", "own", "whole"),
    ("dr_grpo", "constant", "reward", 0.02, "token", "repeated", "asked", "parts"),
    ("dual_clip", "token", "k3", 0.02, "none", "groups", "asked", "whole"),
    ("dual_clip", "token", "weighted", 0.02, "none", "trees", "own", "whole"),
    ("dual_clip", "sequence", "k2", 0.0, "token", "trees", "own", "whole"),
    ("dual_clip", "constant", "none", 0.0, "sequence", "repeated", "own", "parts"),
    ("dual_clip", "constant", "reward", 0.0, "none", "repeated", "asked", "parts"),
    ("gspo", "sequence", "none", 0.0, "none", "groups", "asked", "whole"),
    ("gspo", "sequence", "k2", 0.0, "sequence", "trees", "asked", "whole"),
    ("gspo", "sequence", "k3", 0.0, "sequence", "trees", "asked", "parts"),
    ("gspo", "sequence", "weighted", 0.02, "token", "repeated", "own", "parts"),
    ("gspo", "sequence", "reward", 0.0, "token", "trees", "own", "parts"),
    ("cispo", "token", "none", 0.02, "none", "groups", "asked", "whole"),
    ("cispo", "token", "k2", 0.0, "none", "trees", "asked", "parts"),
    ("cispo", "token", "weighted", 0.0, "sequence", "repeated", "own", "whole"),
    ("cispo", "sequence", "k3", 0.0, "sequence", "repeated", "own", "parts"),
    ("cispo", "constant", "reward", 0.02, "token", "repeated", "asked", "whole"),
    ("sapo", "token", "none", 0.02, "sequence", "groups", "own", "parts"),
    ("sapo", "sequence", "k2", 0.0, "sequence", "repeated", "asked", "whole"),
    ("sapo", "sequence", "reward", 0.02, "none", "groups", "own", "parts"),
    ("sapo", "constant", "k3", 0.02, "sequence", "trees", "asked", "whole"),
    ("sapo", "constant", "weighted", 0.0, "token", "trees", "asked", "parts"),
    ("gpg", "token", "none", 0.0, "token", "trees", "asked", "parts"),
    ("gpg", "token", "k3", 0.0, "none", "repeated", "asked", "whole"),
    ("gpg", "token", "weighted", 0.0, "sequence", "repeated", "own", "whole"),
    ("gpg", "sequence", "reward", 0.02, "sequence", "trees", "own", "parts"),
    ("gpg", "constant", "k2", 0.0, "sequence", "groups", "own", "whole"),
    ("gpg", "constant", "weighted", 0.02, "none", "groups", "asked", "parts"),
]


def together(row: tuple) -> bool:
    """Whether an objective goes with a normalisation."""
    fixed = OBJECTIVES[row[0]].FIXED.get("normalisation", row[1])
    return fixed == row[1]


def pairs(row: tuple) -> set:
    return set(itertools.combinations(zip(FACTORS, row, strict=True), 2))


def test_every_two_values_that_go_together_are_in_a_row():
    wanted = set().union(*(pairs(row) for row in itertools.product(*FACTORS.values()) if together(row)))
    assert all(together(row) for row in ROWS)
    assert set().union(*map(pairs, ROWS)) == wanted


def case_of(row: tuple) -> ObjectiveCase:
    name, normalisation, kl, entropy, importance, packing, old, cuts = row
    options = OPTIONS[name] | {"normalisation": normalisation}
    terms = KL[kl] | {"entropy_bonus": entropy}
    return ObjectiveCase(name, options, terms, importance, packing, old == "asked", CUTS[cuts])


def importance_of(kind: str, old: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """[n]: the weights that make up for the sampler, by hand."""
    terms, d = IMPORTANCE[kind], (old - sampled).detach()
    if kind == "token":
        ratio = d.exp()
        return torch.where((ratio < terms.low) | (ratio > terms.high), 0.0, ratio)
    if kind == "sequence":
        return torch.full_like(d, min(float(d[mask].sum().exp()), terms.high))
    return torch.ones_like(d)


class PlainBatch:
    """The batch, the weights, and the plain loss and gradients of every row."""

    def __init__(self, device: torch.device):
        rng = fresh_generator()
        config = small_config(**MODEL)
        model = build_gpt(config, device)
        randomize(model, rng)
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.rows: list[tuple[float, dict[str, Tensor]]] = []
        while not self._all_learn():  # where whole responses are clipped, none may be left
            self._draw(rng, config)

    def _all_learn(self) -> bool:
        """Whether every row has a gradient, in each part of every parameter that a rank has."""
        config = small_config(**MODEL | LAYOUTS["tp2"][1])
        parts = (shard(name, g, config, rank) for _, found in self.rows for name, g in found.items() for rank in (0, 1))
        return bool(self.rows) and all(map(torch.count_nonzero, parts))

    def _draw(self, rng: torch.Generator, config: GPTModelConfig) -> None:
        self.rollout = rollout = make_rollout(rng, LENGTHS, 61, common=3)
        leaves = {name: w.double().requires_grad_() for name, w in self.weights.items()}
        found = [plain_logprobs(leaves, config, prompt, response, TEMPERATURE) for prompt, response in rollout.flat]
        # Ratios of e^0.3 or so: the policy has moved a little.
        rollout.old, rollout.reference, self.sampled = (
            [logprobs.detach() + 0.3 * randn(rng, len(logprobs)) for logprobs, _ in found] for _ in range(3)
        )
        masks = [torch.tensor(mask) for mask in rollout.masks]
        masks[3][0] = True
        rollout.masks = [mask.tolist() for mask in masks]
        self.rows = []
        for row in ROWS:
            case = case_of(row)
            batch = []
            for i, (logprobs, entropy) in enumerate(found):
                old = rollout.old[i] if case.asked else logprobs.detach()
                weight = importance_of(case.importance, old, self.sampled[i], masks[i])
                batch.append(
                    PlainResponse(logprobs, old, rollout.reference[i], entropy, masks[i], rollout.advantages[i], weight)
                )
            options = asdict(OBJECTIVES[case.objective](**case.options))
            beta = case.terms.get("kl_penalty", 0.0)
            loss = plain_loss(case.objective, options, batch, beta, row[2], row[3], CONSTANT)
            gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
            self.rows.append((float(loss.detach()), dict(zip(leaves, gradients, strict=True))))


@pytest.fixture(scope="module")
def plain(world) -> PlainBatch:
    return PlainBatch(world)


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, plain) -> tuple[dict, list[dict]]:
    """(model's fields, results of every rank)."""
    sizes, fields = LAYOUTS[request.param]
    fields = MODEL | fields
    given = fields, plain.weights, plain.rollout, plain.sampled, [case_of(row) for row in ROWS]
    return fields, run_ranks(objectives, 2, *given, sizes=sizes)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[" ".join(map(str, row)) for row in ROWS])
def test_loss_and_every_gradient_are_the_plain_ones(number, ranks, plain):
    fields, results = ranks
    config = small_config(**fields)
    loss, gradients = plain.rows[number]
    seen = set()
    for result in results:
        found, ours = result["cases"][number]
        assert abs(found - loss) <= BOUND
        for name, value in ours.items():
            whole = full_name(name, config, result["stage"])
            seen.add(whole)
            expected = shard(name, gradients[whole], config, result["rank"])
            assert torch.count_nonzero(expected) and (value - expected).abs().max() <= BOUND, name
    assert seen == set(gradients)
