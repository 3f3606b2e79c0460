"""Every attention kernel against fp64 at odd lengths, forward and every gradient, by the rules of tests/gpu."""

from __future__ import annotations

import dataclasses

import torch

from tests.gpu.cases import (
    ALLOWED,
    CASES,
    DTYPES,
    KINDS,
    PARTS,
    PLAIN,
    WINDOW,
    errors,
    kernel_variants,
    lacking,
    make_case,
    merge_cases,
    truth,
)
from tests.gpu.scenarios import attention, layer_without_sync, merge
from tools.gpu.runner import Findings
from tools.gpu.worlds import device_of, world

__all__ = ["run"]

TINY = ("unequal responses", "no prefix", "empty responses", "several groups, pad")
SECONDS, COMPILING = 5, 30  # that a variant may take, and one that torch compiles


def run(findings: Findings) -> None:
    device = device_of(findings)
    rng = torch.Generator().manual_seed(findings.settings.seed)
    names = TINY if findings.tiny else tuple(CASES)
    dtypes = dict(list(DTYPES.items())[: 1 if findings.tiny else None])
    cases = {name: [make_case(rng, layout, dtype) for layout in names] for name, dtype in dtypes.items()}
    compiled = [variant for variant in kernel_variants(device.type) if variant.startswith("flex")]
    others = [variant for variant in kernel_variants(device.type) if variant not in compiled]
    for name in dtypes:
        _variants(findings, device, names, name, cases[name], others, SECONDS)
    for kind, sizes in KINDS.items():
        name, dtype = next(iter(dtypes.items()))
        besides = [make_case(rng, layout, dtype, **sizes) for layout in names]
        _variants(findings, device, names, name, besides, others, SECONDS, kind)
    _no_waiting(findings, rng, names)
    if not findings.tiny:
        _merge(findings, device, rng)
    for name in dtypes:  # last: compiling takes long
        _variants(findings, device, names, name, cases[name], compiled, COMPILING)


def _variants(
    findings: Findings, device: torch.device, names, dtype_name: str, cases, variants, seconds: float, kind: str = ""
) -> None:
    dtype = DTYPES[dtype_name]
    truths: dict = {}  # one for each rule of scoring
    for variant in variants:
        scoring, how = kernel_variants(device.type)[variant]
        named = f"{variant}, {kind}" if kind else variant
        if needed := lacking(variant, device.type):
            findings.row("left out", variant=named, dtype=dtype_name, needs=needed)
            continue
        if not findings.enough_time(seconds, f"{named} in {dtype_name}"):
            continue
        with findings.attempt(f"{named}, {dtype_name}"):
            asked = [dataclasses.replace(case, scoring=scoring, how=how) for case in cases]
            if scoring not in truths:
                truths[scoring] = [truth(case) for case in asked]
            found = errors(names, attention(device, asked), truths[scoring], dtype)
            over = {
                f"{part} (at most {allowed:.0f})": a / b if b else 0.0
                for part, allowed, a, b in zip(PARTS, ALLOWED, found.ours, found.plain, strict=True)
            }
            findings.row("error against fp64, over that of plain attention", variant=named, dtype=dtype_name, **over)
            findings.check(f"{named}, {dtype_name}: error over what is allowed", found.over_allowed, 1.0)


def _no_waiting(findings: Findings, rng, names) -> None:
    """A layer forward and backward with every wait of the host made an error."""
    device = world(findings)
    for how in ({}, {"attention_plan": "one_call"}):
        for scoring in (PLAIN, WINDOW):
            form = how.get("attention_plan", "auto") + (", window" if scoring.window else "")
            with findings.attempt(f"a layer makes the host wait: {form}"):
                for name in names:
                    good = layer_without_sync(device, make_case(rng, name, torch.bfloat16, scoring, how))
                    findings.equal(f"{form}, {name}: output repeats bitwise, gradients are numbers", all(good), True)


def _merge(findings: Findings, device: torch.device, rng) -> None:
    """The compiled Triton merge against torch operations."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        with findings.attempt(f"merge, {dtype}"):
            for result in merge(device, merge_cases(rng, dtype)):
                difference = (result["out"].float() - result["torch out"]) / (1 + result["torch out"].abs())
                findings.check(f"merge, {dtype}: output differs from torch's", difference.abs().max(), bound)
                findings.check(
                    f"merge, {dtype}: lse differs from torch's", (result["lse"] - result["torch lse"]).abs().max(), 1e-5
                )
