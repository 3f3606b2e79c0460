"""Grouped against repeated whole steps, forward and backward of a GPT: tokens per second and peak bytes.

Tokens are those of the repeated form in every row, so that rows compare. The forms and their agreement are
tools/bench_step.py's: nothing is timed before log-probabilities and gradients of all forms agree.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from bench_common import MIB, PeakMemory, interleave, ratios, spread
from bench_step import FORMS, PLAIN, check_agreement, make_step, model_settings, model_shape

from megatron_ext.flops import ideal_speedup, num_tokens
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.engine import Engine
from tools.gpu.runner import Findings
from tools.gpu.worlds import world

__all__ = ["run"]

LARGE = {"layers": 8, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn": 8192, "vocab": 32768, "precision": "bf16"}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 128, "precision": "32"}
SHAPES, TINY_SHAPES = ((4096, 8, 256), (4096, 8, 1024)), ((48, 4, 8),)
ROUNDS, TINY_ROUNDS = 6, 1
SECONDS = 20  # that a shape may take


def run(findings: Findings) -> None:
    device = world(findings)
    args = SimpleNamespace(**(TINY if findings.tiny else LARGE), **PLAIN)
    config = GPTModelConfig(**model_settings(args))
    engine = Engine(build_gpt(config, device))
    for shape in TINY_SHAPES if findings.tiny else SHAPES:
        if findings.enough_time(SECONDS, f"P,G,S={shape}"):
            with findings.attempt(f"steps at P,G,S={shape}"):
                _shape(findings, engine, args, shape, device)


def _shape(findings: Findings, engine: Engine, args, shape: tuple[int, int, int], device: torch.device) -> None:
    steps = {form: make_step(engine, shape, form, device) for form in FORMS}
    differences = check_agreement(engine, steps)
    rounds = TINY_ROUNDS if findings.tiny else ROUNDS
    times = interleave(steps, rounds, device)
    p, g, s = shape
    lengths = [(p, (s,) * g)]
    tokens = num_tokens(lengths, share_prefix=False)
    for form, step in steps.items():
        with PeakMemory(device) as peak:
            step()
        seconds, faster = spread(times[form]), ratios(times, form, "grouped")
        findings.row(
            f"step at P,G,S={p},{g},{s} (FLOP-ideal {ideal_speedup(model_shape(args), lengths):.2f})",
            form=form,
            milliseconds=1e3 * seconds.median,
            low=1e3 * seconds.low,
            high=1e3 * seconds.high,
            tokens_per_second=round(tokens / seconds.median),
            grouped_is_faster_by=faster.median,
            peak_MiB=peak.growth / MIB,
            gradient_differs_by=differences[f"{form}/gradient"],
        )
