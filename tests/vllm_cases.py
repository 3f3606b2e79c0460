"""Models for a real vLLM, sources that start one, and where one is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import Request, Trajectory
from megatron_ext.rollouts.vllm import Home, VllmSource
from megatron_ext.vllm_servers import VllmOptions
from recipes.data.tokenizer import Tokenizer, load_tokenizer
from tests.gpt_cases import randomize
from tests.harness import ROOT

__all__ = [
    "NEEDS_VLLM", "PYTHON", "QUICK", "WORDS", "canary_of", "home_of", "largest_difference", "make_model", "make_tokenizer",
    "recorded", "source_of",
]  # fmt: skip

MADE = ROOT / ".venv-vllm"
PYTHON = Path(os.environ.get("VLLM_PYTHON", MADE / "bin/python"))
NEEDS_VLLM = pytest.mark.skipif(
    not (PYTHON.exists() if "VLLM_PYTHON" in os.environ else (MADE / "stamp").exists()),
    reason=f"no vLLM in {PYTHON}: `make vllm` installs it, or VLLM_PYTHON names an interpreter that has one",
)
# Without compilation a server is up in half of the time.
QUICK = ("--enforce-eager", "--max-num-seqs", "32")
WORDS = "a b c d e what is 1 2 3 4 5 + - = ? the answer".split()
# The least that the server for CPUs takes is a head of 32.
SHAPE = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 32,
    "ffn_hidden_size": 96, "encoder_seq_length": 256, "precision": "32",
}  # fmt: skip
FAMILIES = {"llama": {}, "qwen3": {"qk_layernorm": True}}


def make_tokenizer(folder: Path) -> Tokenizer:
    """A word for a token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *WORDS])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(str(folder))
    return load_tokenizer(folder)


def make_model(rng: torch.Generator, device: torch.device, family: str, vocab_size: int, **changes) -> PrefixGroupedGPT:
    """Of random weights in which every term counts."""
    model = build_gpt(GPTModelConfig(**(SHAPE | FAMILIES[family] | {"vocab_size": vocab_size} | changes)), device)
    randomize(model, rng)
    return model


def canary_of(rng: torch.Generator, vocab_size: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocab_size, (170,), generator=rng).tolist())


def home_of(folder: Path, tokenizer: Tokenizer, rng: torch.Generator) -> Home:
    text = "what is 1 + 2 ?"
    return Home(folder, tokenizer.save, text, tuple(tokenizer.encode(text)), canary_of(rng, tokenizer.vocab_size))


@contextlib.contextmanager
def source_of(model: PrefixGroupedGPT, home: Home, **options) -> Iterator[VllmSource]:
    """One that starts a server, unless it is told otherwise."""
    given = {"start": 1, "python": str(PYTHON), "arguments": QUICK, "patience": 500.0} | options
    source = VllmSource(model, VllmOptions(**given), home)
    try:
        yield source
    finally:
        source.close()


def largest_difference(
    model: PrefixGroupedGPT, requests: Sequence[Request], found: Sequence[Sequence[Trajectory]]
) -> float:
    """|sampler - trainer| log-probability, over all sampled tokens."""
    largest = 0.0
    for request, samples in zip(requests, found, strict=True):
        for sample in samples:
            tokens, start = torch.tensor(sample.tokens), len(request.prompt) - 1
            logits = text_logits(model, [*request.prompt, *sample.tokens])[start:-1] / request.params.temperature
            expected = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            difference = (expected - torch.tensor(sample.logprobs))[torch.tensor(sample.mask)]
            largest = max(largest, difference.abs().max().item())
    return largest


def recorded(name: str) -> dict:
    """A real server's answer, see tests/programs/record_vllm.py."""
    return json.loads((ROOT / f"tests/fixtures/vllm_0.32/{name}.json").read_text())
