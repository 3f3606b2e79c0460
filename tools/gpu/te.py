"""Transformer Engine's linears and norms against Megatron's own and our RMSNorm, with the same weights."""

from __future__ import annotations

import torch

from megatron_ext.models.specs import has_transformer_engine
from tools.gpu.gpts import differences, draw_question
from tools.gpu.runner import Findings, Skip
from tools.gpu.wheels import version_of
from tools.gpu.worlds import world

__all__ = ["run"]

TABLE = "distance from a plain GPT in fp64, precision bf16"


def run(findings: Findings) -> None:
    device = world(findings)
    if not has_transformer_engine():
        version = version_of("transformer-engine") or version_of("transformer-engine-torch")
        raise Skip(f"transformer-engine is {version or 'not installed'}; it runs on a GPU only")
    question = draw_question(device, torch.Generator().manual_seed(findings.settings.seed), findings.tiny)
    exact = question.plain(torch.float64)
    found = {}
    for implementation in ("local", "transformer_engine"):
        with findings.attempt(implementation):
            model = question.model(device, precision="bf16", transformer_impl=implementation)
            found[implementation] = differences(question.answer(model, device), exact)
            d = found[implementation]
            findings.row(TABLE, implementation=implementation, logprobs=d.logprobs, loss=d.loss, gradients=d.gradients)
    if len(found) == 2:
        over = found["transformer_engine"].over(found["local"])
        findings.check("transformer_engine: distance over what is allowed, with local's", over, 1.0)
