"""The whole model's log-probabilities, loss and gradients against a plain GPT in fp64 on the CPU.

At most twice the error of the plain GPT in the same precision for log-probabilities, three times for gradients, by every kernel
and form of plan that is there. In fp32, which only the blockwise kernel computes on a GPU, everything but flash attention is
held to fp32's rounding.
"""

from __future__ import annotations

import torch

from megatron_ext.attention.kernels import KERNELS
from tools.gpu.gpts import differences, draw_question
from tools.gpu.runner import Findings
from tools.gpu.worlds import world

__all__ = ["run"]

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def run(findings: Findings) -> None:
    device = world(findings)
    rng = torch.Generator().manual_seed(findings.settings.seed)
    question = draw_question(device, rng, findings.tiny)
    exact = question.plain(torch.float64)
    for precision, dtype in DTYPES.items():
        plain = differences(question.plain(dtype), exact)
        table = f"distance from a plain GPT in fp64, precision {precision}"
        _tell(findings, table, "plain GPT on the CPU, same precision", plain)
        for name, changes, share in _ways(device, precision):
            with findings.attempt(f"{name}, {precision}"):
                model = question.model(device, precision=precision, **changes)
                found = differences(question.answer(model, device, share), exact)
                _tell(findings, table, name, found)
                findings.check(f"{name}, {precision}: distance over what is allowed", found.over(plain), 1.0)


def _ways(device: torch.device, precision: str):
    """(name, changes of the configuration, whether prompts are shared)."""
    kernels = [
        name for name, kernel in KERNELS.items() if kernel.device in (None, device.type) and not kernel.missing()
    ]
    if device.type == "cuda" and precision == "32":
        kernels = ["blockwise"]
    for kernel in kernels:
        for plan in ("levels", "one_call"):
            yield f"{kernel}, {plan}", {"attention_kernel": kernel, "attention_plan": plan}, True
        yield f"{kernel}, prompts repeated", {"attention_kernel": kernel}, False


def _tell(findings: Findings, table: str, way: str, found) -> None:
    findings.row(table, way=way, logprobs=found.logprobs, loss=found.loss, gradients=found.gradients)
