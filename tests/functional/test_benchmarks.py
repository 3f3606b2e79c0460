"""Benchmarks that need no more than this project run, at their smallest, and write down their numbers: what those are is not
looked at here."""

from __future__ import annotations

import json
import math
import re

import pytest

from tests.harness import ROOT
from tests.recipe_runs import run

pytestmark = pytest.mark.functional

ONCE = ("--repeats", 1, "--threads", 1)
SHAPE = ("--shapes", "24,2,5", *ONCE)
GPT = ("--layers", 2, "--hidden", 32, "--heads", 2, "--ffn", 48, "--vocab", 64)
# What makes each small. Of those that write elsewhere than --json the option stands last.
SMALL = {
    "bench_attention": (*SHAPE, "--heads", 2, "--head-dim", 8, "--no-package", "--json"),
    "bench_attention_forms": (*SHAPE, "--head-dim", 8, "--json"),
    "bench_bytes": (*ONCE, "--layers", 1, "--tokens", 32, "--rows", 4, "--vocabularies", 64, "--json"),
    "bench_convert": (
        "--layers", 1, "--hidden", 32, "--heads", 2, "--groups", 1, "--ffn", 48, "--vocab", 64, *ONCE, "--folder", "FOLDER",
        "--json",
    ),
    "bench_latent": (*SHAPE, "--heads", 2, "--latent", 16, "--plain", 8, "--rotated", 4, "--value", 8, "--json"),
    "bench_lftf": (*ONCE, *GPT, "--blocks", 1, "--prompts", 4, "--length", 6, "--text-tokens", 8, "--json"),
    "bench_lora": (*SHAPE, *GPT, "--dims", 2, "--json"),
    "bench_offload": (*SHAPE, *GPT, "--json"),
    "bench_sft": (*SHAPE, *GPT, "--kv-heads", 1, "--prompts", 4, "--budget", 256, "--json"),
    "bench_step": (
        *SHAPE, *GPT, "--parts", "step", "logprobs", "--logprob-tokens", 16, "--logprob-vocab", 64, "--logprob-hidden", 16,
        "--json",
    ),
    "bench_tower": (*ONCE, *GPT, "--frames", 2, "--samples", 2, "--tower-layers", 1, "--tower-hidden", 64, "--json"),
    "bench_rotary": (*ONCE, "--json"),
    "bench_decoding": ("--steps", 2, "--clips", 1, "--step", 0, "--workers", 1, "--out"),
    "bench_start": ("--runs", 1, "--out"),
}  # fmt: skip
# Not run here: they stand beside a real TRL, a vLLM or an older checkout, or lengths are their point.
OTHERS = {
    "bench_attention_growth",
    "bench_common",
    "bench_grpo",
    "bench_rollouts",
    "bench_rows",
    "bench_staleness",
    "bench_trl_curve",
    "bench_vllm",
}


def test_every_benchmark_is_here():
    assert {path.stem for path in (ROOT / "tools").glob("bench_*.py")} == SMALL.keys() | OTHERS


@pytest.mark.parametrize("name", SMALL)
def test_it_runs_and_writes_numbers(name, tmp_path):
    out, places = tmp_path / "found.json", {"FOLDER": tmp_path}
    done = run(f"tools/{name}.py", *(places.get(given, given) for given in SMALL[name]), out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert re.fullmatch(r"[0-9a-f]{7,40}.*", found["commit"]) and found["machine"]
    numbers = list(
        numbers_in({key: value for key, value in found.items() if key not in ("machine", "versions", "settings")})
    )
    assert numbers and all(map(math.isfinite, numbers))


def numbers_in(found):
    if isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from numbers_in(value)
    elif isinstance(found, int | float):
        yield float(found)
