"""Which attention calls a GPU is asked for, and how their errors are judged. tools/gpu_check.py asks for the same.

On "cpu" these are the CPU's kernels, so that the asking has run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.attention import Scoring
from megatron_ext.attention.kernels import KERNELS
from tests.gpu.scenarios import AttentionCase, MergeCase
from tests.layouts import LAYOUTS, documents, plain_tree_attention, randn

__all__ = [
    "ALLOWED", "CASES", "DTYPES", "KINDS", "PARTS", "PLAIN", "WINDOW", "Errors", "errors", "kernel_variants", "lacking",
    "make_case", "merge_cases", "truth",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = {
    "long prefix": ([(1021, [130, 7, 255]), (300, [64] * 8)], 16),
    "long responses": ([(17, [500, 301, 12])], 16),
    "tree": ([(65, [(130, [64, (33, [20, 260])]), 70, (21, [30, 30])]), (9, [4])], 16),
}
CASES = LAYOUTS | LARGE
PLAIN, WINDOW, SOFTCAP = Scoring(0.125), Scoring(0.125, window=50), Scoring(0.125, softcap=2.0)
RULES = {"": PLAIN, "window": WINDOW, "softcap": SOFTCAP}
# What attention may be besides: queries, keys and values of other sizes, a sink for each head.
KINDS = {"sinks": {"sinks": True}, "latent": {"n": 4, "m": 4, "d": 192, "e": 128}}
PARTS = ("out", "dq", "dk", "dv", "dsinks")
# Times the error of plain attention in the same precision, as flash attention has it.
ALLOWED = (2.0, 3.0, 3.0, 3.0, 3.0)
# Relative, of every single layout: a working kernel is far below, a wrong term far above.
PLAUSIBLE = 0.05


def kernel_variants(device_type: str) -> dict[str, tuple[Scoring, dict[str, str]]]:
    """Name -> (scoring, attention_kernel and attention_plan): every kernel of the registry under every rule that it knows, both
    forms of plan and, where it has a backward, FlexAttention."""
    found = {
        "auto": (PLAIN, {}),
        "auto, one call": (PLAIN, {"attention_plan": "one_call"}),
        "auto, window": (WINDOW, {}),
    }
    names = [name for name, kernel in KERNELS.items() if kernel.device in (None, device_type)]
    for name in names + ["flex"] * (device_type == "cuda"):
        for rule, scoring in RULES.items():
            if rule != "softcap" or name == "flex" or KERNELS[name].softcap:
                found[f"{name}, {rule}" if rule else name] = (scoring, {"attention_kernel": name})
    return found


def lacking(variant: str, device_type: str) -> str | None:
    """What this machine lacks to run it."""
    name = kernel_variants(device_type)[variant][1].get("attention_kernel")
    return KERNELS[name].missing() if name in KERNELS else None


def make_case(
    rng, name: str, dtype: torch.dtype, scoring=PLAIN, how=None, n=8, m=2, d=64, e=None, sinks=False
) -> AttentionCase:
    """Fresh inputs of one layout of `CASES`, on the CPU: n heads of d channels, m of keys and of e of values."""
    forest, pad = CASES[name]
    real = 1 + max(max(rows, default=-1) for rows, _ in documents(forest))
    t = real + -real % pad
    e = e or d
    inputs = [randn(rng, t, *size).to(dtype) for size in ((n, d), (m, d), (m, e))]
    inputs += [randn(rng, n).to(dtype)] if sinks else []
    return AttentionCase(forest, pad, inputs, randn(rng, real, n, e).to(dtype), scoring, how or {})


def merge_cases(rng, dtype: torch.dtype) -> list[MergeCase]:
    """Rows that follow each other, and rows in any order."""
    cases = []
    for rows in (slice(5, 305), torch.randperm(400, generator=rng)[:300]):
        out, part = randn(rng, 400, 6, 80).to(dtype), randn(rng, 300, 6, 80).to(dtype)
        lse, part_lse = 8 * randn(rng, 400, 6).float(), 8 * randn(rng, 6, 300).float().t()
        cases.append(MergeCase(out, lse, part, part_lse, rows))
    return cases


def truth(case: AttentionCase) -> list[Tensor]:
    """What `scenarios.attention` gives, in fp64 on the CPU, one document after the other."""
    leaves = [x.double().requires_grad_() for x in case.inputs]
    out = plain_tree_attention(*leaves[:3], case.forest, **case.rules, sinks=None if len(leaves) == 3 else leaves[3])
    out.backward(case.grad.double())
    return [out.detach(), *(x.grad for x in leaves)]


@dataclass(frozen=True)
class Errors:
    """Of `PARTS`, over all layouts: a small layout's ratio is a matter of luck.

    Attributes:
        ours, plain: L2 errors against fp64.
        worst: the largest error of one part of one layout, over its size; where.
    """

    ours: list[float]
    plain: list[float]
    worst: float
    where: str

    @property
    def over_allowed(self) -> float:
        """At most 1 for a kernel that is as exact as plain attention, and nowhere wrong."""
        parts = [
            a / (allowed * b) if b else float(a > 0)
            for a, b, allowed in zip(self.ours, self.plain, ALLOWED, strict=True)
        ]
        return float(torch.tensor([*parts, self.worst / PLAUSIBLE]).max())  # not Python's max: it may leave out a NaN


def errors(
    names: Sequence[str], results: Sequence[dict[str, list[Tensor]]], truths: Sequence[list[Tensor]], dtype: torch.dtype
) -> Errors:
    """Of what `scenarios.attention` gave for the layouts of these names."""
    totals, worst, where = torch.zeros(2, len(PARTS), dtype=torch.float64), 0.0, ""
    for name, result, exact in zip(names, results, truths, strict=True):
        for i, right in enumerate(exact):
            assert result["grouped"][i].dtype == dtype, f"{PARTS[i]} of {name} is {result['grouped'][i].dtype}"
            ours, plain = ((result[kind][i].double() - right).norm() for kind in ("grouped", "plain"))
            relative = float(ours / (right.norm() + 1e-6 / PLAUSIBLE))
            if not (relative <= worst or math.isnan(worst)):  # what is no number is the worst
                worst, where = relative, f"{PARTS[i]} of {name}"
            totals[:, i] += torch.stack((ours, plain)).square()
    ours, plain = totals.sqrt().tolist()
    return Errors(ours, plain, worst, where)
