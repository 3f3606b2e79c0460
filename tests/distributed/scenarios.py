"""What the ranks of a layout compute: everything a test wants to compare, in one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.attention import Scoring
from megatron_ext.attention.context import ContextShard, context_parallel_attention
from megatron_ext.attention.pages import PAGE, pages_of
from megatron_ext.errors import DivergedError
from megatron_ext.grouping import PrefixGroups
from megatron_ext.losses import vocab_parallel_logprobs
from megatron_ext.losses.objective import NORMALISATIONS
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.models.prompt_streams import next_token_probabilities
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime.checkpoint import load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.grad_norm import gradient_norm
from megatron_ext.runtime.optim import OptimConfig
from tests.distributed.sharding import load_full, ranks_here
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, randomize, small_config
from tests.sampling import generate

__all__ = [
    "OPTIMIZERS", "ContextCase", "DataCase", "LayoutCase", "MediaCase", "VocabCase", "context_attention", "data_parallel",
    "gradients", "layouts", "media", "optim",
]  # fmt: skip

NEW_TOKENS, SAMPLES = 8, 3
CLIP = 0.3  # below the gradient's norm


def optim(name: str = "adam") -> OptimConfig:
    """A large eps: Adam divides by |g| + eps, so rounding of a gradient near zero must not become a step of full size."""
    return OptimConfig(name=name, lr=1e-2, eps=1e-3)


OPTIMIZERS = {
    "adam": optim("adam"),
    "distributed_fused_adam": optim("distributed_fused_adam"),
    "overlapped": replace(optim("distributed_fused_adam"), overlap_grad_reduce=True),
    "on the host": replace(optim("distributed_fused_adam"), optimizer_cpu_offload=True),
}


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


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def layouts(device: torch.device, cases: list[LayoutCase], vocab: list[VocabCase]) -> dict[str, Any]:
    """Every case on this rank's layout, and where this rank stands in it."""
    rank, stage = ranks_here()
    return {
        "rank": rank,
        "stage": stage,
        "context": parallel_state.get_context_parallel_rank(),
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
    engine.zero_grad()
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


@dataclass
class MediaCase:
    """A model that sees, prompts with media, their responses, and a factor for every response token [r].

    weights: of the full model, or the seed to make them from (one rank only). save, load: a checkpoint of them.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    prompts: list
    responses: list[list[list[int]]]
    factors: Tensor
    folder: Path
    load: bool = False


def media(device: torch.device, cases: list[MediaCase]) -> dict[str, Any]:
    rank, stage = ranks_here()
    return {"rank": rank, "stage": stage, "cases": [_media_case(device, case) for case in cases]}


def _media_case(device: torch.device, case: MediaCase) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    result: dict[str, Any] = {}
    if case.load:
        load_weights(case.folder, model)
        result["loaded"] = copies(model)
    if isinstance(case.weights, int):
        randomize(model, torch.Generator().manual_seed(case.weights))
        save_checkpoint(case.folder, model, {})
    else:
        load_full(model, case.weights)
    result["weights"] = copies(model)
    engine = Engine(model, optim(), clip_grad=CLIP)
    scheme = config.position_embedding.scheme
    batch = pack_prompts(case.prompts, case.responses, scheme, stream_multiple(config), device)
    engine.zero_grad()
    microbatches = [Microbatch(batch), Microbatch(batch)]
    engine.run(microbatches, lambda microbatch, logprobs, entropy: ((logprobs * case.factors).sum(), {}))
    result["gradients"] = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    (result["scores"],) = engine.score(microbatches[:1])
    sampling = SamplingParams(NEW_TOKENS, use_greedy=True)
    result["greedy"] = generate(model, case.prompts, 2, sampling)
    return result


def _sample(model, case: LayoutCase) -> dict[str, Any]:
    greedy = SamplingParams(NEW_TOKENS, () if case.stop is None else (case.stop,), use_greedy=True)
    sampling = SamplingParams(NEW_TOKENS, temperature=1.2, top_k=30, top_p=0.95)
    stages = model.model_config.pipeline_model_parallel_size
    one = stages * PAGE * (pages_of(max(map(len, case.prompts))) + 1)  # for one response of the longest prompt
    return {
        "greedy": generate(model, case.prompts, SAMPLES, greedy),
        "sampled": generate(model, case.prompts, SAMPLES, sampling, 11),
        "one by one": generate(model, case.prompts, SAMPLES, sampling, 11, rollout_tokens=one),
        "next": next_token_probabilities(model, case.prompts, [3, 60, 0]),
    }


def refuses_step(engine: Engine) -> bool:
    try:
        engine.step()
    except DivergedError:
        return True
    return False


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


@dataclass
class ContextCase:
    """Attention over one stream: nested lengths, and the whole stream's q, k, v and output gradient, fp64."""

    lengths: list
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    comm_type: str
    scoring: Scoring
    attention_kernel: str = "auto"
    perturb: int | None = None  # a stream row whose key and value are changed


def context_attention(device: torch.device, cases: list[ContextCase]) -> list[dict[str, Any]]:
    """This rank's part of every case, and how many rows it received through all-gathers."""
    return [_context_case(case) for case in cases]


def _context_case(case: ContextCase) -> dict[str, Any]:
    group = parallel_state.get_context_parallel_group()
    groups = PrefixGroups.from_lengths(case.lengths)
    shard = ContextShard.of(groups, group, 4, pairs_per_token=3.0)
    real = shard.layout.num_rows[group.rank()]
    q, k, v, grad = (x[shard.rows].clone() for x in case.inputs)
    grad[real:] = 0
    if case.perturb is not None:
        changed = (shard.rows == case.perturb) & (torch.arange(len(shard.rows)) < real)
        k[changed] += 1
        v[changed] -= 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    received = []
    gather = torch.distributed.all_gather_into_tensor

    def counting(out, mine, **kwargs):
        received.append(out.numel())
        return gather(out, mine, **kwargs)

    torch.distributed.all_gather_into_tensor = counting
    try:
        out = context_parallel_attention(*leaves, shard, case.scoring, case.comm_type, case.attention_kernel)
    finally:
        torch.distributed.all_gather_into_tensor = gather
    out.backward(grad)
    parts = [x.detach()[:real] for x in (out, *(leaf.grad for leaf in leaves))]
    return {
        "rows": shard.rows[:real],
        "parts": parts,
        "received": sum(received),
        "gathered": shard.layout.num_gathered,
        "cut": len(shard.layout.cut),
    }


@dataclass
class DataCase:
    """One batch for `data_parallel`: `spread[rank]` holds the microbatches (group numbers) of a data-parallel rank."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    rollout: Rollout
    spread: list[list[list[int]]]


def data_parallel(device: torch.device, case: DataCase) -> dict[str, Any]:
    """Gradients for every normalisation, and parameters after a step of both optimizers."""
    rank, _ = ranks_here()
    return {
        "rank": rank,
        "gradients": {level: _data_run(device, case, level, "adam", step=False) for level in NORMALISATIONS},
        "steps": {name: _data_run(device, case, "token", name, step=True) for name in OPTIMIZERS},
    }


def _data_run(device: torch.device, case: DataCase, level: str, optimizer: str, step: bool) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    number = parallel_state.get_data_parallel_rank()
    # Only the first data-parallel rank gets the weights: the engine must tell the others.
    randomize(model, torch.Generator().manual_seed(number))
    if number == 0:
        load_full(model, case.weights)
    engine = Engine(model, OPTIMIZERS[optimizer], clip_grad=CLIP)
    started = copies(model)
    cuts = case.spread[number]
    mine = case.rollout.pick([g for numbers in cuts for g in numbers])
    local = counts(mine)
    sums = torch.tensor(list(local.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    totals = dict(zip(local, sums.tolist(), strict=True))
    microbatches = make_microbatches(case.rollout, cuts, totals, level, pad=stream_multiple(config))
    engine.zero_grad()
    result = {"started": started, "totals": totals}
    result["metrics"] = engine.reduce_metrics(engine.run(microbatches, grpo))
    if not step:
        return result | {"gradients": {name: p.main_grad.clone() for name, p in model.named_parameters()}}
    result["norms"] = _norms(engine, device)
    result |= {"report": engine.step(), "stepped": copies(model)}
    # NaN on the last rank alone: all must refuse, or their weights would part.
    factor = math.nan if number == parallel_state.get_data_parallel_world_size() - 1 else 1.0
    engine.zero_grad()
    engine.run(microbatches, lambda microbatch, logprobs, entropy: (logprobs.sum() * factor, {}))
    return result | {"refused": refuses_step(engine), "after refusal": copies(model)}
