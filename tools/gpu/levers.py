"""Updates of a GPT with what spares memory or overlaps, against a plain run: the weights they come to, seconds, peak bytes.

The levers change where things lie and when they move, not what is computed; moments in bf16 and FP8 round. On a GPU attention's
backward adds in any order, so that runs of the same form differ, too: how much stands in the table.
"""

from __future__ import annotations

import time

import torch
from bench_common import MIB, PeakMemory
from torch import Tensor

from megatron_ext.models.specs import has_transformer_engine
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.reference import ReferenceWeights
from tests.gpt_cases import pack_rollout
from tools.gpu.gpts import Question, draw_question, weights_of
from tools.gpu.runner import Findings
from tools.gpu.worlds import world

__all__ = ["FORMS", "run"]

UPDATES = 3
FULL = {"activations_checkpoint_granularity": "full"}
ROUNDED = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
# Name -> (keys of the model, of its optimizer, what is allowed). Distances are relative to how far weights have moved.
SAME, ROUNDING, FP8 = 0.05, 0.2, 1.0
FORMS: dict[str, tuple[dict, dict, float]] = {
    "once more": ({}, {}, SAME),
    "moments on the host": ({}, {"optimizer_cpu_offload": True}, SAME),
    "half of them there": ({}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}, SAME),
    "moments in bf16": ({}, ROUNDED, ROUNDING),
    "full recomputation": (FULL, {}, SAME),
    "layers' inputs on the host": (FULL | {"activation_offload": True}, {}, SAME),
    "overlapping": ({}, {"overlap_grad_reduce": True, "overlap_param_gather": True}, SAME),
    "fp8": ({"fp8": "hybrid", "transformer_impl": "transformer_engine"}, {}, FP8),
}


def run(findings: Findings) -> None:
    device = world(findings)
    question = draw_question(device, torch.Generator().manual_seed(findings.settings.seed), findings.tiny)
    start = weights_of(question.model(device, precision="bf16"))
    plain = _updates(findings, question, "plain", {}, {}, device)
    moved = _distance(plain, start)
    for name, (model, optim, allowed) in FORMS.items():
        if name == "fp8" and not has_transformer_engine():
            findings.note("fp8 needs a GPU and Transformer Engine")
            continue
        with findings.attempt(name):
            found = _updates(findings, question, name, model, optim, device)
            findings.check(f"{name}: distance of the weights", _distance(found, plain) / moved, allowed)
    with findings.attempt("reference on the host"):
        _reference(findings, question, device)


def _engine(question: Question, model: dict, optim: dict, device: torch.device) -> tuple[Engine, list]:
    engine = Engine(question.model(device, precision="bf16", **model), OptimConfig(lr=1e-2, eps=1e-3, **optim))
    rollout = question.rollout
    streams = [pack_rollout(rollout.pick([number]), device=device) for number in range(len(rollout.prompts))]
    return engine, [Microbatch(stream) for stream in streams]


def _updates(findings: Findings, question: Question, name: str, model: dict, optim: dict, device: torch.device) -> dict:
    """The weights after some updates, by their local names; tells of time and memory."""
    engine, microbatches = _engine(question, model, optim, device)
    engine.update(microbatches, likelihood)  # libraries, and room for moments
    with PeakMemory(device) as peak:
        began = time.perf_counter()
        for _ in range(UPDATES):
            loss = engine.update(microbatches, likelihood)["loss"]
        seconds = (time.perf_counter() - began) / UPDATES
    findings.row("updates", form=name, milliseconds=1e3 * seconds, peak_MiB=peak.growth / MIB, loss=loss)
    engine.gather_weights()
    return weights_of(engine.module)


def _reference(findings: Findings, question: Question, device: torch.device) -> None:
    """What the weights of the start say, from the host, after updates."""
    engine, microbatches = _engine(question, {}, {}, device)
    kept = ReferenceWeights(engine, on_host=True)
    before = engine.score(microbatches)
    engine.update(microbatches, likelihood)
    with kept.used():
        after = engine.score(microbatches)
    away = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    findings.check("reference on the host: difference of its log-probabilities", away, 0.0)


def likelihood(microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = -logprobs.mean()
    return loss, {"loss": loss.detach()}


def _distance(found: dict, expected: dict) -> float:
    a, b = (torch.cat([w[name].flatten() for name in sorted(expected)]) for w in (found, expected))
    return float((a - b).norm())
