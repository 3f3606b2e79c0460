"""What the ranks of a layout compute: weights, gradients, steps, responses and a vocabulary's log-probabilities, in one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.attention.pages import PAGE, pages_of
from megatron_ext.losses import vocab_parallel_logprobs
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.prompt_streams import next_token_probabilities
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime.checkpoint import load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.grad_norm import gradient_norm
from megatron_ext.runtime.reference import ReferenceWeights
from tests.distributed.scenarios import CLIP, copies, optim, refuses_step
from tests.distributed.sharding import expert_ranks_here, load_full, ranks_here
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, randomize, small_config
from tests.sampling import generate

__all__ = ["NEW_TOKENS", "SAMPLES", "LayoutCase", "VocabCase", "gradients", "layouts"]


NEW_TOKENS, SAMPLES = 8, 3


@dataclass
class LayoutCase:
    """One model and batch for `layouts`.

    fields: changes to `small_config`. weights: of the full model, or the seed to make them from (one rank only).
    cuts: group numbers of each microbatch. prompts, stop: for generation. load: a checkpoint of the same weights;
    save: where to leave one.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    rollout: Rollout
    cuts: list[list[int]]
    prompts: list[list[int]]
    stop: int | None = None
    load: Path | None = None
    save: Path | None = None


@dataclass
class VocabCase:
    """Inputs of vocab_parallel_logprobs over the whole vocabulary, fp64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grads: tuple[Tensor, Tensor]
    options: dict[str, Any]


def layouts(device: torch.device, cases: list[LayoutCase], vocab: list[VocabCase]) -> dict[str, Any]:
    """Every case on this rank's layout, and where this rank stands in it."""
    rank, stage = ranks_here()
    return {
        "rank": rank,
        "stage": stage,
        "context": parallel_state.get_context_parallel_rank(),
        "experts": expert_ranks_here(),
        "cases": [_layout_case(device, case) for case in cases],
        "vocab": [_vocab_case(case) for case in vocab],
    }


def _layout_case(device: torch.device, case: LayoutCase) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    result: dict[str, Any] = {}
    if case.load:
        load_weights(case.load, model)
        result["loaded"] = copies(model)
    if isinstance(case.weights, int):
        randomize(model, torch.Generator().manual_seed(case.weights))
    else:
        load_full(model, case.weights)
    result["weights"] = copies(model)
    if case.save:
        save_checkpoint(case.save, model, {})
    result |= _sample(model, case)
    engine = Engine(model, optim(), clip_grad=CLIP)
    microbatches = make_microbatches(case.rollout, case.cuts, counts(case.rollout), pad=stream_multiple(config))
    result["tokens"] = [m.batch.groups.num_tokens for m in microbatches]
    result["scores"] = engine.score(microbatches)
    initial = ReferenceWeights(engine, on_host=True)
    result["bytes of the reference"] = initial.nbytes
    engine.zero_grad()
    result["alone metrics"] = engine.reduce_metrics(engine.run(microbatches[:1], grpo))
    result["alone"] = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    engine.zero_grad()
    result["metrics"] = engine.reduce_metrics(engine.run(microbatches, grpo))
    result["gradients"] = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    result["norms"] = _norms(engine, device)
    for name, old in ("asked", result["scores"]), ("not asked", [None] * len(microbatches)):
        engine.zero_grad()
        of_policy = [replace(m, old_logprobs=o) for m, o in zip(microbatches, old, strict=True)]
        metrics = engine.reduce_metrics(engine.run(of_policy, grpo))
        result[name] = metrics, {name: p.main_grad.clone() for name, p in model.named_parameters()}
    engine.zero_grad()
    engine.run(microbatches, grpo)
    result["report"] = engine.step()
    result["stepped"] = copies(model)
    with initial.used():
        result["scores of the reference"] = engine.score(microbatches)
    result["left of the reference"] = sum(int(p.main_grad.count_nonzero()) for p in model.parameters())
    engine.run(microbatches, lambda microbatch, logprobs, entropy: (logprobs.sum() * math.nan, {}))
    result["refused"] = refuses_step(engine)
    result["after refusal"] = copies(model)
    result["scores before"] = engine.score(microbatches)
    result["told"], result["scores told"] = engine.update_and_score(of_policy, grpo)
    return result


def _norms(engine: Engine, device: torch.device) -> tuple[float, float]:
    """Of the gradient, ours and Megatron's."""
    engine.optimizer.prepare_grads()
    return float(gradient_norm(engine.optimizer, device)), float(engine.optimizer.get_grad_norm())


def gradients(device: torch.device, cases: list[LayoutCase]) -> list[dict[str, Tensor]]:
    """This rank's gradients of every case, and how often its first layer's attention ran."""
    results = []
    for case in cases:
        config = small_config(**case.fields)
        model = build_gpt(config, device)
        randomize(model, torch.Generator().manual_seed(case.weights + torch.distributed.get_rank()))
        passes: list[int] = []
        attention = model.decoder.layers[0].self_attention.core_attention
        attention.register_forward_hook(lambda *args, seen=passes: seen.append(1))
        engine = Engine(model, optim(), clip_grad=CLIP)
        microbatches = make_microbatches(case.rollout, case.cuts, counts(case.rollout), pad=stream_multiple(config))
        engine.zero_grad()
        engine.run(microbatches, grpo)
        results.append({name: p.main_grad.clone() for name, p in model.named_parameters()})
        results[-1]["passes"] = torch.tensor(len(passes))
    return results


def _sample(model, case: LayoutCase) -> dict[str, Any]:
    """In fp64: of thousands of tokens some are so close to another that each layout's own rounding would decide in fp32."""
    greedy = SamplingParams(NEW_TOKENS, () if case.stop is None else (case.stop,), use_greedy=True)
    sampling = SamplingParams(NEW_TOKENS, temperature=1.2, top_k=30, top_p=0.95)
    stages = model.model_config.pipeline_model_parallel_size
    one = stages * PAGE * (pages_of(max(map(len, case.prompts))) + 1)  # for one response of the longest prompt
    found = {"next": next_token_probabilities(model, case.prompts, [3, 60, 0])}
    dtype, model.config.pipeline_dtype = model.config.pipeline_dtype, torch.float64
    model.double()
    found |= {
        "greedy": generate(model, case.prompts, SAMPLES, greedy),
        "sampled": generate(model, case.prompts, SAMPLES, sampling, 11),
        "one by one": generate(model, case.prompts, SAMPLES, sampling, 11, rollout_tokens=one),
    }
    model.float()
    model.config.pipeline_dtype = dtype
    return found


def _vocab_case(case: VocabCase) -> dict[str, Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    outputs = vocab_parallel_logprobs(hidden, weight, case.targets, group, **case.options)
    torch.autograd.backward(outputs, case.grads)
    return {
        "logprob": outputs[0].detach(),
        "entropy": outputs[1].detach(),
        "d hidden": hidden.grad,
        "d weight": weight.grad,
    }
