"""What ranks really hold: bytes of parameters, gradients and optimizer state, and of what autograd saves."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.attention.context import ContextShard
from megatron_ext.grouping import pack
from megatron_ext.grouping.routes import Routes
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.planner import Job
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from tests.gpt_cases import small_config
from tests.held_bytes import engine_storages, optimizer_tensors, saved_here_and_there, storages
from tests.layouts import Lengths
from tests.pretend import be_alone, pretend

__all__ = [
    "ActivationCase",
    "Layout",
    "StateCase",
    "activations",
    "here",
    "planned_job",
    "pretended",
    "random_tokens",
    "states",
]


@dataclass
class StateCase:
    """fields: changes to `small_config`. block: the only layer that trains; None: all parameters do. optim: more of its keys."""

    fields: dict[str, Any]
    optimizer: str = "distributed_fused_adam"
    block: int | None = None
    optim: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> OptimConfig:
        return OptimConfig(name=self.optimizer, **self.optim)


@dataclass
class ActivationCase:
    fields: dict[str, Any]
    lengths: Lengths
    share_prefix: bool = True


@dataclass
class Held:
    """What a rank holds. parameters: name and shape of each, and whether Megatron says it is sharded. expert_ranks, expert_rank:
    those that have the same experts, and which of them this is."""

    config: GPTModelConfig
    stage: int
    data_ranks: int
    data_rank: int
    expert_ranks: int
    expert_rank: int
    parameters: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    optimizer_tensors: int = 0
    other_bytes: int = 0


@dataclass
class Layout:
    """A world, and which of its ranks are looked at; None: all."""

    world: int
    sizes: ParallelSizes
    ranks: list[int] | None = None


def pretended(device: torch.device, questions: list[tuple]) -> list[list[list[Any]]]:
    """For every question (function, layouts, cases) what `function(device, cases)` gives on every rank of every layout,
    all by this one process: answers[question][layout][rank]."""
    answers = []
    for function, layouts, cases in questions:
        answers.append([])
        for layout in layouts:
            answers[-1].append([])
            for rank in range(layout.world) if layout.ranks is None else layout.ranks:
                pretend(rank, layout.world, layout.sizes)
                answers[-1][-1].append(function(device, cases))
    be_alone()
    return answers


def here(fields: dict[str, Any]) -> GPTModelConfig:
    """The small model, spread as this run's ranks are."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    sizes = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }
    if "num_moe_experts" in fields:
        sizes["expert_model_parallel_size"] = parallel_state.get_expert_model_parallel_world_size()
        sizes["expert_tensor_parallel_size"] = parallel_state.get_expert_tensor_parallel_world_size()
    return small_config(**({"sequence_parallel": tensor > 1} | fields | sizes)).on("cpu")


def planned_job(case: ActivationCase, layout: Layout) -> Job:
    """The case as the planner is told of it: one microbatch, of groups that are all alike."""
    prompt, responses = case.lengths[0]
    sizes = layout.sizes
    config = small_config(**({"sequence_parallel": sizes.tensor > 1} | case.fields | sizes.named)).on("cpu")
    return Job(
        config,
        nodes=1,
        devices=layout.world,
        groups=len(case.lengths) * sizes.data(layout.world),
        prompt=prompt,
        response=responses[0],
        samples=len(responses),
        share_prefix=case.share_prefix,
        groups_per_stream=len(case.lengths),
    )


def states(device: torch.device, cases: list[StateCase]) -> list[Held]:
    """After one optimizer step of every case."""
    return [_state(device, case) for case in cases]


def _state(device: torch.device, case: StateCase) -> Held:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    gc.collect()
    gc.freeze()  # what is there already is looked at no more
    config = here(case.fields)
    alike = parallel_state.get_expert_data_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    held = Held(config, stage, group.size(), group.rank(), alike.size(), alike.rank())
    model = build_gpt(config, device)
    for name, parameter in model.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        held.parameters.append((name, tuple(parameter.shape), sharded))
    if case.block is not None:
        layers = {id(p): layer.layer_number - 1 for layer in model.decoder.layers for p in layer.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(layers.get(id(parameter)) == case.block)
    engine = Engine(model, case.settings)
    trained = [p for p in model.parameters() if p.requires_grad]  # of a model with adapters these
    if trained:
        engine.zero_grad()
        for parameter in trained:
            parameter.main_grad.fill_(0.1)
        engine.step()
    kinds = engine_storages(engine)
    held.optimizer_tensors = sum(1 for name, _ in optimizer_tensors(engine.optimizer) if name == "exp_avg")
    held.bytes = {kind: sum(found.values()) for kind, found in kinds.items()}
    known = {key for found in kinds.values() for key in found}
    held.other_bytes = min(_other_bytes(known, 0.02 * look) for look in range(4))
    return held


def _other_bytes(known: set, wait: float) -> int:
    """Of tensors that are alive and none of these, after so many seconds: a thread of gloo's lets go of what it has sent when it
    comes to it."""
    time.sleep(wait)
    gc.collect()
    alive = storages(o for o in gc.get_objects() if isinstance(o, Tensor))
    return sum(size for key, size in alive.items() if key not in known)


def random_tokens(lengths: Lengths) -> tuple[list, list]:
    """Prompts and responses of these lengths."""
    draw = lambda n: torch.randint(61, (n,)).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [[draw(n) for n in sizes] for _, sizes in lengths]


def activations(device: torch.device, cases: list[ActivationCase]) -> list[dict[str, int]]:
    return [_activation(device, case) for case in cases]


def _activation(device: torch.device, case: ActivationCase) -> dict[str, int]:
    config = here(case.fields)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = build_gpt(config, device)
    prompts, responses = random_tokens(case.lengths)
    batch = pack(prompts, responses, stream_multiple(config), device=device, share_prefix=case.share_prefix)
    record = batch.groups
    if config.context_parallel_size > 1:
        group = parallel_state.get_context_parallel_group()
        record = ContextShard.of(record, group, stream_multiple(config), model.pairs_per_token)
    tokens = record.num_tokens
    if stage:
        rows = tokens // config.tensor_model_parallel_size if config.sequence_parallel else tokens
        model.set_input_tensor(torch.randn(rows, 1, config.hidden_size, dtype=config.dtype, requires_grad=True))
    saved, there = saved_here_and_there(model, batch)
    return {
        "saved": saved,
        "host": there,
        "stage": stage,
        "tokens": tokens,
        "predicted": len(record.predict_index),
        "gathered": record.layout.num_gathered if config.context_parallel_size > 1 else 0,
    }


# What a rank of r sends of x bytes: a ring's sum (r - 1) / r twice, gathers, scatters and all-to-alls once; a send all.
KINDS = {"alltoall": "exchange", "gather": "gather", "scatter": "scatter", "send": "send"}


class Collectives(TorchDispatchMode):
    """Bytes that one rank sends for every collective that is called, by kind, and to its neighbour in the pipeline. What is
    less than `small` bytes, a norm or log-probabilities, is left out."""

    def __init__(self, small: int):
        super().__init__()
        self.small = small
        self.sent = dict.fromkeys((*KINDS.values(), "sum"), 0.0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            kind = next((kind for word, kind in KINDS.items() if word in name), "sum")
            # The larger of what goes in and what comes out, but of an all-to-all what goes in; a barrier has none.
            tensors = list(_tensors(args))
            size = tensors[1].nbytes if kind == "exchange" else max((t.nbytes for t in tensors), default=0)
            ranks = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject))).size()
            if size >= self.small and not name.startswith("recv"):
                ring = {"send": 1.0, "sum": 2 * (ranks - 1) / ranks}.get(kind, (ranks - 1) / ranks)
                self.sent[kind] += size * ring
        return function(*args, **(kwargs or {}))


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def busy_alike(config: GPTModelConfig, tokens: int) -> Tensor:
    """Experts [t, l, k] that tokens take in turn, as many on each expert-parallel rank."""
    first = torch.arange(tokens).unsqueeze(1)
    step = config.num_moe_experts // config.moe_router_topk
    taken = (first + step * torch.arange(config.moe_router_topk)) % config.num_moe_experts
    return taken.unsqueeze(1).expand(-1, config.num_layers, -1)


def traffic(device: torch.device, cases: list[ActivationCase]) -> list[dict[str, Any]]:
    """Bytes sent by a forward pass, by a forward and backward pass (gradients summed), and by an optimizer step."""
    return [_traffic(device, case) for case in cases]


def _traffic(device: torch.device, case: ActivationCase) -> dict[str, Any]:
    config = here(case.fields)
    engine = Engine(build_gpt(config, device), OptimConfig())
    prompts, responses = random_tokens(case.lengths)
    batch = pack(prompts, responses, stream_multiple(config), device=device, share_prefix=case.share_prefix)
    if config.num_moe_experts is not None:
        Routes.given(batch.groups, busy_alike(config, batch.groups.num_tokens))
    small = 4 * config.hidden_size * 10
    engine.zero_grad()
    with Collectives(small) as forward:
        engine.score([Microbatch(batch)])
    with Collectives(small) as both:
        engine.run([Microbatch(batch)], lambda microbatch, logprobs, entropy: (logprobs.sum(), {}))
    with Collectives(small) as step:
        engine.step()
    return {"forward": forward.sent, "both": both.sent, "step": step.sent}
