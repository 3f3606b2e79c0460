"""TFLOP/s of attention, forward and backward: prefix-grouped by every kernel, and plain flash attention on repeated sequences.

Useful operations over time, causal attention as half a square, backward twice the forward (megatron_ext.flops). Grouped and
repeated forms do not do the same number of them, so the last column says how many times as fast as the fastest plain one each
is. Variants are timed in turns, after a round that is not counted; medians and quartiles.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
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
SECONDS = 15  # that a shape may take, all variants together
# Of two bf16 results from the same inputs: rounding is far below, a wrong term far above.
PLAUSIBLE = 2e-2
Run = Callable[[], object]


def run(findings: Findings) -> None:
    device = device_of(findings)
    sizes = SimpleNamespace(**(TINY_HEADS if findings.tiny else HEADS))
    for text in TINY_SHAPES if findings.tiny else SHAPES:
        if findings.enough_time(SECONDS, text):
            _shape(findings, Group.parse(text), sizes, device)


def _shape(findings: Findings, group: Group, sizes: SimpleNamespace, device: torch.device) -> None:
    x = make_inputs(group, sizes, device)
    runs: dict[str, tuple[Run, bool]] = {}  # name -> (run, whether prompts are shared)
    outputs = {}
    for name, make, shared in _variants(x, device):
        with findings.attempt(f"{name} at P,G,S={group.text}"):
            run = make()
            out = run()[0]
            outputs[name] = out if shared else _responses(x, out)
            runs[name] = (run, shared)
    _agree(findings, x, runs, outputs)
    del outputs
    rounds = TINY_ROUNDS if findings.tiny else ROUNDS
    times = interleave({name: run for name, (run, _) in runs.items()}, rounds, device)
    medians = {name: spread(seconds) for name, seconds in times.items()}
    plain = min((medians[name].median for name, (_, shared) in runs.items() if not shared), default=None)
    lengths = [(group.prompt, group.responses)]
    for name, (_, shared) in runs.items():
        operations = attention_flops(lengths, sizes.heads, sizes.head_dim, shared)
        found = medians[name]
        findings.row(
            f"attention forward + backward at P,G,S={group.text}: {sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} "
            f"key/value, {sizes.dtype}",
            variant=name,
            milliseconds=1e3 * found.median,
            low=1e3 * found.low,
            high=1e3 * found.high,
            TFLOPs=operations / found.median / 1e12,
            faster_than_plain=None if plain is None else plain / found.median,
        )


def _variants(x: Inputs, device: torch.device) -> Iterator[tuple[str, Callable[[], Run], bool]]:
    """(name, what makes the run, whether prompts are shared), of what is there."""
    for name, kernel in KERNELS.items():
        if kernel.device == device.type and not kernel.missing():
            for plan in ("levels", "one_call"):
                how = {"attention_kernel": name, "attention_plan": plan}
                yield f"grouped, {name}, {plan}", lambda how=how: ours(x, **how), True
    if device.type == "cuda":
        yield "grouped, flex", lambda: ours(x, attention_kernel="flex"), True
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            yield f"plain, torch's {name}", lambda backend=backend: _plain(x, _torch_attention(backend), False), False
    else:
        yield "plain, torch", lambda: _plain(x, _torch_attention(None), False), False
    for kernel, module in (("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")):
        if not KERNELS[kernel].missing() and importlib.util.find_spec(module):
            yield f"plain, {kernel}", lambda module=module: _plain(x, _flash_attention(module), True), False


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


def _torch_attention(backend: SDPBackend | None) -> Callable:
    def attend(q, k, v, gqa):
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return attend


def _flash_attention(module: str) -> Callable:
    def attend(q, k, v, gqa):
        out = importlib.import_module(module).flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # flash-attn 3 of some months gives the log-sum-exp, too

    return attend


def _responses(x: Inputs, out: torch.Tensor) -> torch.Tensor:
    """[G, P + S, n, d] -> rows of the stream, each prompt row from the first sequence."""
    p = x.group.prompt
    return torch.cat((out[0, :p], out[:, p:].flatten(0, 1)))


def _agree(findings: Findings, x: Inputs, runs: dict, outputs: dict) -> None:
    """Every output is that of the first variant; gradients were compared by the section kernels."""
    first = next(iter(outputs.values()), None)
    for name, out in outputs.items():
        difference = (out.detach().float() - first.detach().float()).norm() / first.detach().float().norm()
        findings.check(f"{name} at P,G,S={x.group.text}: differs from the first", difference, PLAUSIBLE)
        if not difference <= PLAUSIBLE:
            del runs[name]  # no time is told of what is wrong
