"""TFLOP/s of attention, forward and backward: prefix-grouped by every kernel, and plain flash attention on repeated sequences.

Useful operations over time, causal attention as half a square, backward twice the forward (megatron_ext.flops). Grouped and
repeated forms do not do the same number of them, so the last column says how many times as fast as the fastest plain one each
is. Variants are timed in turns, after a round that is not counted; medians and quartiles.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench_attention import Group, Inputs, make_inputs, ours
from bench_common import interleave, spread
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.attention.kernels import KERNELS
from megatron_ext.flops import attention_flops
from tools.gpu.runner import Findings
from tools.gpu.worlds import device_of

__all__ = ["run"]

SHAPES, TINY_SHAPES = ("4096,8,512", "4096,16,128", "16384,8,512"), ("48,4,8",)
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bf16"}
TINY_HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "fp32"}
ROUNDS, TINY_ROUNDS = 10, 2
SECONDS, COMPILING = 15, 40  # that a shape may take, all variants together; and with what torch compiles
# Of two bf16 results from the same inputs: rounding is far below, a wrong term far above.
PLAUSIBLE = 2e-2
Run = Callable[[], object]


def run(findings: Findings) -> None:
    device = device_of(findings)
    sizes = SimpleNamespace(**(TINY_HEADS if findings.tiny else HEADS))
    shapes = TINY_SHAPES if findings.tiny else SHAPES
    for text in shapes:
        if findings.enough_time(SECONDS, text):
            _shape(findings, text, sizes, device, lambda x: [*_grouped(x), *_repeated(x)])
    if device.type == "cuda" and findings.enough_time(COMPILING, f"FlexAttention at {shapes[0]}"):
        _shape(findings, shapes[0], sizes, device, lambda x: [next(_grouped(x)), _flex(x)])


def _shape(findings: Findings, text: str, sizes: SimpleNamespace, device: torch.device, variants_of: Callable) -> None:
    group = Group.parse(text)
    x = make_inputs(group, sizes, device)
    runs: dict[str, Run] = {}
    outputs = {}
    variants = variants_of(x)
    for variant in variants:
        with (
            findings.attempt(f"{variant.name} at P,G,S={text}") if variant.shared else _their_limits(findings, variant)
        ):
            run = variant.make()
            out = run()[0]
            outputs[variant.name] = out if variant.shared else _rows_of_stream(x, out)
            runs[variant.name] = run
    runs = {name: runs[name] for name in _agreeing(findings, text, outputs)}
    del outputs
    if not runs:
        return
    times = interleave(runs, TINY_ROUNDS if findings.tiny else ROUNDS, device)
    medians = {name: spread(seconds) for name, seconds in times.items()}
    shared = {variant.name: variant.shared for variant in variants}
    plain = min((found.median for name, found in medians.items() if not shared[name]), default=None)
    for name, found in medians.items():
        operations = attention_flops([(group.prompt, group.responses)], sizes.heads, sizes.head_dim, shared[name])
        findings.row(
            f"attention forward + backward at P,G,S={text}: {sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} "
            f"key/value, {sizes.dtype}",
            variant=name,
            milliseconds=1e3 * found.median,
            low=1e3 * found.low,
            high=1e3 * found.high,
            TFLOPs=operations / found.median / 1e12,
            faster_than_plain=None if plain is None else plain / found.median,
        )


@contextlib.contextmanager
def _their_limits(findings: Findings, variant: Variant) -> Iterator[None]:
    """What a library cannot do is a note: it is no fault of ours."""
    try:
        yield
    except RuntimeError as error:
        findings.note(f"{variant.name} cannot: {' '.join(str(error).split())[:200]}")


@dataclass(frozen=True)
class Variant:
    """One way to compute it; `make` lays its inputs out. shared: prompts once, not once for each response."""

    name: str
    make: Callable[[], Run]
    shared: bool


def _grouped(x: Inputs) -> Iterator[Variant]:
    for name, kernel in KERNELS.items():
        if kernel.device == x.q.device.type and not kernel.missing():
            for plan in ("levels", "one_call"):
                how = {"attention_kernel": name, "attention_plan": plan}
                yield Variant(f"grouped, {name}, {plan}", functools.partial(ours, x, **how), shared=True)


def _flex(x: Inputs) -> Variant:
    return Variant("grouped, flex", functools.partial(ours, x, attention_kernel="flex"), shared=True)


def _repeated(x: Inputs) -> Iterator[Variant]:
    """Plain flash attention, by every library that is there."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if x.q.device.type == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        yield Variant(
            f"plain, torch's {name}", functools.partial(_plain, x, _torch_attention(backend), False), shared=False
        )
    for kernel, module in (("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")):
        if not KERNELS[kernel].missing():
            yield Variant(
                f"plain, {kernel}", functools.partial(_plain, x, _flash_attention(module), True), shared=False
            )


def _plain(x: Inputs, attend: Callable, rows_first: bool) -> Run:
    """All G sequences [prefix, response] in one batch, in the layout that is fastest for the library; making it is not timed."""
    assert x.group.equal, "sequences of one batch are of one length"
    index = torch.stack(x.sequences())
    q, k, v, grad = (t[index] for t in (x.q, x.k, x.v, x.grad))  # [G, P + S, n or m, d]
    if not rows_first:
        q, k, v, grad = (t.transpose(1, 2).contiguous() for t in (q, k, v, grad))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run():
        out = attend(*leaves, x.gqa)
        gradients = torch.autograd.grad(out, leaves, grad)
        return (out if rows_first else out.transpose(1, 2)), gradients

    return run


def _torch_attention(backend: SDPBackend) -> Callable:
    def attend(q, k, v, gqa):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return attend


def _flash_attention(module: str) -> Callable:
    def attend(q, k, v, gqa):
        out = importlib.import_module(module).flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # flash-attn 3 of some months gives the log-sum-exp, too

    return attend


def _rows_of_stream(x: Inputs, out: torch.Tensor) -> torch.Tensor:
    """[G, P + S, n, d] -> rows of the stream, each prompt row from the first sequence."""
    p = x.group.prompt
    return torch.cat((out[0, :p], out[:, p:].flatten(0, 1)))


def _agreeing(findings: Findings, text: str, outputs: dict[str, torch.Tensor]) -> Iterator[str]:
    """Whose output is that of the first variant: no time is told of what is wrong. Gradients are the section kernels' matter."""
    first = next((out.detach().float() for out in outputs.values()), None)
    for name, out in outputs.items():
        difference = (out.detach().float() - first).norm() / first.norm()
        findings.check(f"{name} at P,G,S={text}: differs from the first", difference, PLAUSIBLE)
        if difference <= PLAUSIBLE:
            yield name
