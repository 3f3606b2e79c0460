"""Time what is made once against making it as often as it is used: rotary tables of a stream, and a decoding step's softmax.

    python tools/bench_bytes.py --threads 1

Rotary: queries and keys of all layers are turned by tables that are made once, by tables that each layer makes for itself, and by
Megatron's function, which makes cosines and sines of queries and of keys in each layer; forward and backward of a training
stream, forward of a decoding step. Choosing: a token and its log-probability from one softmax (`choose_tokens`), and from one for
the token and another for the log-probability. Nothing is timed before all forms give the same.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from bench_common import add_common_options, device_and_threads, interleave, print_table, ratios, record, write_results
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_ext.attention.rotation import RotaryTables
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.requests import SamplingParams

HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 64
ONCE = "once"


class Rotary:
    """Queries and keys of some layers."""

    def __init__(self, rows: int, layers: int, device: torch.device, trains: bool):
        pairs = HEAD_DIM // 2
        turns = torch.arange(rows, device=device).unsqueeze(1) / 1e4 ** (torch.arange(pairs, device=device) / pairs)
        self.angles = torch.cat((turns, turns), -1)[:, None, None]  # [s, 1, 1, d]
        self.trains = trains
        self.layers = [
            [torch.randn(rows, heads, HEAD_DIM, device=device, requires_grad=trains) for heads in (HEADS, KEY_HEADS)]
            for _ in range(layers)
        ]

    def once(self) -> list[Tensor]:
        tables = RotaryTables.of(self.angles, torch.float32)
        return [tables.rotate(x) for layer in self.layers for x in layer]

    def in_each_layer(self) -> list[Tensor]:
        found = []
        for layer in self.layers:
            tables = RotaryTables.of(self.angles, torch.float32)
            found += [tables.rotate(x) for x in layer]
        return found

    def megatrons(self) -> list[Tensor]:
        turned = [_apply_rotary_pos_emb_bshd(x.unsqueeze(1), self.angles) for layer in self.layers for x in layer]
        return [x.squeeze(1) for x in turned]

    def ran(self, form) -> list[Tensor]:
        """The results; of a training stream, the gradients."""
        with torch.set_grad_enabled(self.trains):
            out = form()
        if not self.trains:
            return out
        leaves = [x for layer in self.layers for x in layer]
        return list(torch.autograd.grad(out, leaves, [x.detach() for x in out]))

    def kept(self, form) -> int:
        """Bytes that autograd keeps."""
        storages = {}

        def keep(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with saved_tensors_hooks(keep, lambda x: x), torch.set_grad_enabled(self.trains):
            out = form()
        kept = sum(storage.nbytes() for storage in storages.values())
        del out
        return kept


def twice(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = logits.double().softmax(-1).cumsum_(-1)
    point = uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.size(1) - 1)
    return tokens.squeeze(1), logits.log_softmax(-1).gather(1, tokens).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, None, repeats=11, name="bytes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048, help="of a training stream")
    parser.add_argument("--rows", type=int, default=64, help="of a decoding step")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 49152, 151936])
    args = parser.parse_args()
    if min(args.layers, args.tokens, args.rows, *args.vocabularies) < 1:
        parser.error("--layers, --tokens, --rows and --vocabularies must be at least 1")
    device = device_and_threads(args.threads)
    results, kept = {}, {}
    for what, rows in (("training stream", args.tokens), ("decoding step", args.rows)):
        rotary = Rotary(rows, args.layers, device, what == "training stream")
        forms = {ONCE: rotary.once, "in each layer": rotary.in_each_layer, "Megatron's": rotary.megatrons}
        expected = rotary.ran(rotary.once)
        for name, form in forms.items():
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rotary.ran(form), expected, strict=True)):
                raise SystemExit(f"rotary, {what}: {name} gives something else; nothing is timed")
        results[f"rotary, {what}"] = interleave(
            {name: partial(rotary.ran, form) for name, form in forms.items()}, args.repeats, device
        )
        kept |= {f"rotary, {what}": {name: rotary.kept(form) for name, form in forms.items()}} if rotary.trains else {}
    for vocabulary in args.vocabularies:
        logits = torch.randn(args.rows, vocabulary, device=device)
        uniform = torch.rand(args.rows, dtype=torch.float64, device=device)
        forms = {
            ONCE: lambda x=logits, u=uniform: choose_tokens(x, SamplingParams(1), u),
            "two softmaxes": lambda x=logits, u=uniform: twice(x, u),
        }
        (tokens, said), (other, said_too) = (form() for form in forms.values())
        if not (torch.equal(tokens, other) and torch.allclose(said, said_too, atol=1e-4)):
            raise SystemExit(f"choosing of {vocabulary}: the forms differ; nothing is timed")
        results[f"choosing of {vocabulary:,}"] = interleave(forms, args.repeats, device)
    rows = [
        (
            what, name, f"{min(times) * 1e3:.3f}", f"{min(times) / min(seconds[ONCE]):.2f}", f"{ratios(seconds, name, ONCE):.2f}",
            f"{kept[what][name] / 2**20:.1f}" if what in kept else "-",
        )
        for what, seconds in results.items()
        for name, times in seconds.items()
    ]  # fmt: skip
    title = f"{args.layers} layers of {HEADS}/{KEY_HEADS} heads of {HEAD_DIM}; {args.tokens} tokens and {args.rows} rows; fp32"
    header = ("what", "form", "ms, least", "times once, least", "each round [quartiles]", "autograd keeps, MiB")
    print_table(title, header, rows)
    settings = {name: getattr(args, name) for name in ("layers", "tokens", "rows", "vocabularies", "repeats")}
    write_results(args.json, record(**settings) | {"seconds": results, "kept_bytes": kept})


if __name__ == "__main__":
    main()
