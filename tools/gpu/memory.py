"""Bytes of every phase of a step against the planner's.

State is exact on every device. What autograd saves is exact on the CPU, and on a GPU within what the planner says of it. The
peaks of training and of sampling are the planner's upper bounds, and are held to them on a GPU; the CPU's are of the whole
process and only told.
"""

from __future__ import annotations

import torch
from bench_common import MIB, PeakMemory

from megatron_ext.grouping import PackedTokens, pack
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.planner import Job
from megatron_ext.planner.activations import EAGER, on_gpu, stage_activations
from megatron_ext.planner.memory import stage_memory
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from tests.held_bytes import engine_storages, saved_bytes
from tools.gpu.runner import Findings
from tools.gpu.worlds import world

__all__ = ["run"]

# A Llama of 1.1 billion parameters: 20 GB of state, and activations that are far above what libraries take.
LARGE = {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 8192,
         "vocab_size": 32768, "precision": "bf16"}  # fmt: skip
TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128,
        "vocab_size": 128, "precision": "32"}  # fmt: skip
BATCH, TINY_BATCH = (4096, 8, 256), (48, 4, 8)  # prompt, responses, length of each
# Above the planner's upper bounds, for gaps between allocations; and for what autograd saves on a GPU.
GAPS, SAVED = 1.05, 0.02


def run(findings: Findings) -> None:
    device = world(findings)
    prompt, samples, response = TINY_BATCH if findings.tiny else BATCH
    fields = (TINY if findings.tiny else LARGE) | {"transformer_impl": "local", "attention_plan": "levels"}
    config = GPTModelConfig(**fields, encoder_seq_length=prompt + response).on(device.type)
    job = Job(config, nodes=1, devices=1, groups=1, prompt=prompt, response=response, samples=samples, rollout=True)
    planned = stage_memory(job, 0)
    draw = torch.Generator().manual_seed(findings.settings.seed)
    tokens = torch.randint(config.vocab_size, (prompt + samples * response,), generator=draw).tolist()
    responses = [tokens[prompt + i * response : prompt + (i + 1) * response] for i in range(samples)]
    batch = pack([tokens[:prompt]], [responses], stream_multiple(config), device=device)
    engine = Engine(build_gpt(config, device), OptimConfig(lr=1e-6))
    warm_up(engine, device)
    _state(findings, engine, planned)
    _saved(findings, engine, job, batch, device)
    _training(findings, engine, planned, batch, device)
    _sampling(findings, engine, planned, tokens[:prompt], samples, response, device)


def loss(microbatch: Microbatch, logprobs, entropy):
    value = -logprobs.mean()
    return value, {"loss": value.detach()}


def warm_up(engine: Engine, device: torch.device) -> None:
    """A step on a short stream: libraries take what they need, and the optimizer makes its state."""
    batch = pack([[1] * 16], [[[2] * 16] * 2], stream_multiple(engine.module.model_config), device=device)
    engine.update([Microbatch(batch)], loss)


def _state(findings: Findings, engine: Engine, planned) -> None:
    for kind, found in engine_storages(engine).items():
        expected = getattr(planned, kind)
        _tell(findings, kind, expected, sum(found.values()))
        findings.equal(f"bytes of {kind}", sum(found.values()), expected)


def _saved(findings: Findings, engine: Engine, job: Job, batch: PackedTokens, device: torch.device) -> None:
    with findings.attempt("what autograd saves"):
        config = job.model
        way = EAGER if device.type == "cpu" else on_gpu("local")
        kept = stage_activations(config, 0, job.largest().shape, way).kept
        found = saved_bytes(engine.module, batch)
        _tell(findings, "saved by autograd", kept, found)
        allowed = 1e-12 if device.type == "cpu" else SAVED
        findings.check("what autograd saves: relative difference from the plan", abs(found / kept - 1), allowed)


def _training(findings: Findings, engine: Engine, planned, batch: PackedTokens, device: torch.device) -> None:
    with findings.attempt("peak of training"):
        engine.zero_grad()
        with PeakMemory(device) as peak:
            engine.run([Microbatch(batch)], loss)
        _bounded(findings, "peak of forward and backward", planned.activations + planned.working, peak, device)
        with PeakMemory(device) as peak:
            engine.step()
        _tell(findings, "peak of the optimizer's step", None, peak.growth)


def _sampling(
    findings: Findings, engine: Engine, planned, prompt: list[int], samples: int, response: int, device
) -> None:
    with findings.attempt("peak of sampling"):
        source = MegatronSource(engine.module)
        source.sample([Request(prompt[:16], 2, SamplingParams(2))])  # libraries again
        with PeakMemory(device) as peak:
            source.sample([Request(prompt, samples, SamplingParams(response))])
        _bounded(findings, "peak of sampling", planned.cache, peak, device)


def _bounded(findings: Findings, phase: str, plan: int, peak: PeakMemory, device: torch.device) -> None:
    _tell(findings, phase, plan, peak.growth)
    if device.type == "cuda":
        findings.check(f"{phase}: over the planner's upper bound", peak.growth / plan, GAPS)


def _tell(findings: Findings, phase: str, plan: int | None, found: int) -> None:
    ratio = found / plan if plan else None
    findings.row(
        "memory, MiB", phase=phase, planned=None if plan is None else plan / MIB, found=found / MIB, ratio=ratio
    )
