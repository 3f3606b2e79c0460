"""Time one layer's attention, forward and backward: this package against repeated sequences and against prefix_grouper.

    python tools/bench_attention.py
    python tools/bench_attention.py --shapes 4096,8,256 4096,8,~512 --threads 4 --repeats 21

A shape is P,G,S: prompt length, responses, response length. ~512 draws unequal lengths, log-normal with mean 512, sigma
0.8, the same every time; they are kept with the results.

- ours: one stream [P | S1 .. SG], `prefix_grouped_attention` as it chooses by itself.
- one_call: the same with the prompt's keys copied for each response.
- flex: PyTorch's FlexAttention over the stream, with a mask; on a GPU only, for it has no backward on the CPU.
- repeated: G sequences [prefix, response] in one batch [G, n, P + S, d], torch's scaled_dot_product_attention with
  is_causal, the same flash kernel; of unequal length, one after the other. No padding, contiguous (its fastest layout),
  and the cost of making the copies is not counted.
- package: the published `prefix_grouper` on scaled_dot_product_attention, the same flash kernel. Two adapters, because
  the package leaves the attention function to its user: "package" is the fastest we could write (is_causal for the
  prefix, one additive [S, P + S] mask made before timing, possible because padding comes last), "package_masks" turns
  the padding masks that the package hands over into causal masks, as its interface asks for.

Nothing is timed before all of them agree with fp64. It leaves out everything around attention: see bench_step.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench_common import (
    DTYPES,
    add_common_options,
    device_and_threads,
    interleave,
    parse_shapes,
    print_table,
    ratios,
    record,
    spread,
    write_results,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.attention import prefix_grouped_attention
from megatron_ext.flops import attention_pairs, ideal_attention_speedup
from megatron_ext.grouping import PrefixGroups

SHAPES = (
    "512,8,128",
    "1024,8,128",
    "4096,8,256",
    "4096,8,1024",
    "4096,16,512",
    "16384,8,512",
    "4096,8,~512",
)
LOGNORMAL_SIGMA = 0.8
LARGE = 5e8  # query-key pairs of the repeated form beyond which three rounds must do: they take minutes each
# A relative error that no working kernel reaches, bf16 included: guards the comparison itself.
PLAUSIBLE_ERROR = 2e-2


@dataclass(frozen=True)
class Group:
    """The lengths of one prompt and its responses, and how they were asked for."""

    text: str
    prompt: int
    responses: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Group:
        lognormal = text.count(",~") == 1
        ((p, g, s),) = parse_shapes([text.replace("~", "")])
        if not lognormal:
            return cls(text, p, (s,) * g)
        rng = random.Random(0)
        mu = math.log(s) - LOGNORMAL_SIGMA**2 / 2
        drawn = (round(rng.lognormvariate(mu, LOGNORMAL_SIGMA)) for _ in range(g))
        return cls(text, p, tuple(min(max(n, 16), 4 * s) for n in drawn))

    @property
    def equal(self) -> bool:
        return len(set(self.responses)) == 1

    @property
    def num_tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Inputs:
    """One group's attention: q [t, n, d], k and v [t, m, d], and the gradient of the output [t, n, d]."""

    group: Group
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @property
    def groups(self) -> PrefixGroups:
        return PrefixGroups.from_lengths([(self.group.prompt, self.group.responses)], device=self.q.device)

    @property
    def gqa(self) -> bool:
        return self.q.size(1) != self.k.size(1)

    def sequences(self) -> list[Tensor]:
        """int64 [P + S]: the rows of each [prefix, response]."""
        rows = torch.arange(self.group.num_tokens, device=self.q.device)
        prompt, *responses = rows.split([self.group.prompt, *self.group.responses])
        return [torch.cat((prompt, response)) for response in responses]


# What a run returns is (out, (dq, dk, dv)) in its own layout; of "repeated" a list of (out, dq, dk, dv), one per batch.
Run = Callable[[], object]


def make_inputs(group: Group, args, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    tensors = (torch.randn(group.num_tokens, n, args.head_dim, dtype=torch.float64) for n in heads)
    return Inputs(group, *(x.to(device=device, dtype=DTYPES[args.dtype]) for x in tensors))


def same_kernel(device: torch.device):
    """Torch's flash attention and nothing else, so that no variant is served by another kernel."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else contextlib.nullcontext()


def ours(x: Inputs, **how) -> Run:
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    groups = x.groups

    def run():
        out = prefix_grouped_attention(q, k, v, groups, **how)
        return out, torch.autograd.grad(out, (q, k, v), x.grad)

    return run


def repeated(x: Inputs) -> Run:
    rows = x.sequences()
    batches = []
    for index in [torch.stack(rows)] if x.group.equal else [r.unsqueeze(0) for r in rows]:
        q, k, v, grad = (t[index].transpose(1, 2).contiguous() for t in (x.q, x.k, x.v, x.grad))  # [G, n, P + S, d]
        grad[:, :, : x.group.prompt] /= len(rows)  # the G copies of a prefix row share its gradient
        batches.append(([t.requires_grad_() for t in (q, k, v)], grad))

    def run():
        results = []
        for leaves, grad in batches:
            with same_kernel(x.q.device):
                out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=x.gqa)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        return results

    return run


def package(x: Inputs, honour_masks: bool) -> Run:
    from prefix_grouper import PrefixGrouper

    p, s = x.group.prompt, max(x.group.responses)
    grouper = PrefixGrouper([[p, *x.group.responses]], device=x.q.device)
    leaves = [t.unsqueeze(0).transpose(1, 2).contiguous().requires_grad_() for t in (x.q, x.k, x.v)]  # [1, n, t, d]
    # Additive: torch would turn a boolean mask into this one at every call.
    bias = torch.full((s, p + s), float("-inf"), dtype=x.q.dtype, device=x.q.device).triu(p + 1)
    grad = x.grad.unsqueeze(0)

    def without_padding(q, k, v, padding_mask):
        if q.size(2) == k.size(2):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=x.gqa)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=x.gqa)
        return out.transpose(1, 2)

    def with_padding(q, k, v, padding_mask):
        causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
        mask = causal & padding_mask[:, None, None, :]  # [b, 1, rows, columns]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=x.gqa).transpose(1, 2)

    attention = with_padding if honour_masks else without_padding

    def run():
        out = grouper.forward(attention, *leaves)
        return out, torch.autograd.grad(out, leaves, grad)

    return run


def comparable(name: str, x: Inputs, run: Run) -> list[Tensor]:
    """Run once; [out, dq, dk, dv] of the stream in fp64: copies of a prefix row agree in out and add up in gradients."""
    if name == "repeated":
        index = torch.cat(x.sequences())
        parts = [torch.cat([t.double().transpose(1, 2).flatten(0, 1) for t in ts]) for ts in zip(*run(), strict=True)]
        result = [t.new_zeros(x.q.size(0), *t.shape[1:]) for t in parts]
        result[0][index] = parts[0]
        return [result[0], *(total.index_add_(0, index, t) for total, t in zip(result[1:], parts[1:], strict=True))]
    out, grads = run()
    if name in ("ours", "one_call", "flex"):
        return [t.double() for t in (out, *grads)]
    return [out.squeeze(0).double(), *(t.squeeze(0).transpose(0, 1).double() for t in grads)]


def truth(x: Inputs) -> list[Tensor]:
    """[out, dq, dk, dv] in fp64, one sequence at a time."""
    p, g = x.group.prompt, len(x.group.responses)
    result = [torch.zeros_like(t, dtype=torch.float64) for t in (x.q, x.q, x.k, x.v)]
    for rows in x.sequences():
        q, k, v, grad = (t[rows].double().transpose(0, 1).unsqueeze(0) for t in (x.q, x.k, x.v, x.grad))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=x.gqa)
        grad[:, :, :p] /= g
        grads = torch.autograd.grad(out, leaves, grad)
        result[0][rows] = out.detach().squeeze(0).transpose(0, 1)
        for total, t in zip(result[1:], grads, strict=True):
            total[rows] += t.squeeze(0).transpose(0, 1)
    return result


def check_agreement(x: Inputs, runs: dict[str, Run]) -> dict[str, list[float]]:
    """Relative errors of [out, dq, dk, dv] against fp64, for every variant.

    The tolerance is flash attention's: at most twice the error of the repeated form in the same precision, three times
    for gradients.

    Raises:
        SystemExit: a variant disagrees; no speed-up is printed then.
    """
    exact = truth(x)
    errors = {
        name: [float((a - b).norm() / b.norm()) for a, b in zip(comparable(name, x, run), exact, strict=True)]
        for name, run in runs.items()
    }
    for name, values in errors.items():
        for part, error, base in zip(("out", "dq", "dk", "dv"), values, errors["repeated"], strict=True):
            allowed = (2 if part == "out" else 3) * base
            if not (error <= allowed and base < PLAUSIBLE_ERROR):
                raise SystemExit(
                    f"{name} disagrees with fp64 in {part} at P,G,S={x.group.text}: relative error {error:.2e}, repeated "
                    f"sequences have {base:.2e}; no speed-up is reported"
                )
    return errors


def bench_group(group: Group, args, device: torch.device) -> dict:
    x = make_inputs(group, args, device)
    runs: dict[str, Run] = {"ours": ours(x), "repeated": repeated(x), "one_call": ours(x, attention_plan="one_call")}
    if device.type == "cuda":
        runs["flex"] = ours(x, attention_kernel="flex")
    if not args.no_package:
        runs |= {"package": package(x, False), "package_masks": package(x, True)}
    errors = check_agreement(x, runs)
    num_pairs = attention_pairs([(group.prompt, group.responses)], share_prefix=False)
    repeats = args.repeats if num_pairs < LARGE else min(args.repeats, 3)
    times = interleave(runs, repeats, device)
    ideal = ideal_attention_speedup([(group.prompt, group.responses)])
    result = {
        "shape": group.text,
        "prompt": group.prompt,
        "responses": group.responses,
        "flop_ideal": ideal,
        "relative_errors": errors,
        "seconds": times,
    }
    result["speedup_over"] = {name: vars(ratios(times, name, "ours")) for name in runs if name != "ours"}
    result["share_of_flop_ideal"] = result["speedup_over"]["repeated"]["median"] / ideal
    return result


def print_results(results: list[dict], args) -> None:
    rows = []
    for r in results:
        for name, seconds in r["seconds"].items():
            against = f"{ratios(r['seconds'], name, 'ours'):.2f}" if name != "ours" else ""
            share = f"{r['share_of_flop_ideal']:.2f} of {r['flop_ideal']:.2f}" if name == "repeated" else ""
            rows.append((r["shape"].replace(",", ", "), name, f"{spread(seconds):.3f}", against, share))
    title = f"Attention forward + backward, {args.heads} heads of {args.head_dim}, {args.kv_heads} key/value heads, {args.dtype}"
    header = ("P, G, S", "variant", "seconds [quartiles]", "ours is faster by [quartiles]", "share of FLOP-ideal")
    print_table(title, header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, SHAPES, repeats=11, name="attention")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--no-package", action="store_true", help="without the published prefix_grouper")
    args = parser.parse_args()
    device = device_and_threads(args.threads)
    args.kv_heads = args.kv_heads or args.heads
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    results = [bench_group(Group.parse(text), args, device) for text in args.shapes]
    print_results(results, args)
    settings = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "dtype", "repeats")}
    write_results(args.json, record(**settings) | {"results": results})


if __name__ == "__main__":
    main()
