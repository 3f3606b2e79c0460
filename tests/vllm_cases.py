"""Models for a real vLLM, sources that start one, and where one is."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import Request, SamplingParams, Trajectory
from megatron_ext.rollouts.vllm import Home, VllmSource, source
from megatron_ext.rollouts.vllm.checks import WrongWeightsError
from megatron_ext.rollouts.vllm.nccl import Broadcasters
from megatron_ext.vllm_servers import VllmOptions
from recipes.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import fresh_generator
from tests.gpt_cases import randomize
from tests.harness import ROOT

__all__ = [
    "BOUND", "NEEDS_VLLM", "PLANTED", "PYTHON", "QUICK", "WORDS", "Served", "canary_of", "engine_of", "home_of",
    "largest_difference", "make_model", "make_tokenizer", "recorded", "source_of",
]  # fmt: skip

MADE = ROOT / ".venv-vllm"
PYTHON = Path(os.environ.get("VLLM_PYTHON", MADE / "bin/python"))
NEEDS_VLLM = pytest.mark.skipif(
    not (PYTHON.exists() if "VLLM_PYTHON" in os.environ else (MADE / "stamp").exists()),
    reason=f"no vLLM in {PYTHON}: `make vllm` installs it, or VLLM_PYTHON names an interpreter that has one",
)
BOUND = 1e-4  # in fp32; 3e-6 is seen
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
def source_of(
    model: PrefixGroupedGPT, home: Home, broadcasters: Broadcasters | None = None, **options
) -> Iterator[VllmSource]:
    """One that starts a server, unless it is told otherwise."""
    given = {"start": 1, "python": str(PYTHON), "arguments": QUICK, "patience": 500.0} | options
    opened = VllmSource(model, VllmOptions(**given), home, broadcasters=broadcasters)
    try:
        yield opened
    finally:
        opened.close()


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


class Served:
    """A model of random weights, and a source that has started a server for it.

    Args:
        options: of `source_of`, and `broadcasters`.
        changes: to the model.

    Attributes:
        version: of the weights that the server has.
    """

    def __init__(
        self, folder: Path, family: str, device: torch.device, options: dict[str, Any] | None = None, **changes
    ):
        self.rng, self.version = fresh_generator(), 0
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        self.vocab_size = self.tokenizer.vocab_size
        self.model = make_model(self.rng, device, family, self.vocab_size, **changes)
        self.home = home_of(folder, self.tokenizer, self.rng)
        self.opened = source_of(self.model, self.home, **({"weights_dir": str(folder)} if options is None else options))
        self.source = self.opened.__enter__()

    def update(self) -> None:
        self.version += 1
        self.source.update_weights(self.version)

    def stops_at(self, wrong: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Behind a training step at a learning rate of 1e-3 the canary finds what `wrong` does in place of `source`'s function
        of that name; and nothing, when that is done right."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=self.rng).sign())
        monkeypatch.setattr(source, name, wrong)
        with pytest.raises(
            WrongWeightsError, match=r"differ from the trainer's by [\d.e-]+ nats on average, at most 0\.0001"
        ):
            self.update()
        monkeypatch.undo()
        self.update()
        self.check()

    def requests(self, samples: int, params: SamplingParams, lengths=(1, 5, 40, 130)) -> list[Request]:
        prompts = [torch.randint(self.vocab_size, (n,), generator=self.rng).tolist() for n in lengths]
        return Request.each(prompts, samples, params)

    def check(self, samples: int = 4, lengths=(1, 5, 40, 130), **params) -> list:
        """Sample, and compare with the trainer; gives what was sampled."""
        given = {"max_new_tokens": 24, "stop_token_ids": (0, 3)} | params
        requests = self.requests(samples, SamplingParams(**given), lengths)
        found = self.source.sample(requests)
        assert [len(group) for group in found] == [samples] * len(requests)
        assert {t.passages[0].weight_version for group in found for t in group} == {self.version}
        assert largest_difference(self.model, requests, found) < BOUND
        return found


def engine_of(served: Served) -> psutil.Process:
    """The process of the server that answers HTTP; those that compute are its children."""
    guard = psutil.Process(served.source.processes._guards[0].pid)
    (server,) = guard.children()
    return server


def _swap_layers(new: dict, old: dict) -> dict:
    other = {"0": "1", "1": "0"}
    swap = lambda m: f"layers.{other.get(m[1], m[1])}."  # noqa: E731
    return {re.sub(r"layers\.(\d+)\.", swap, name): tensor for name, tensor in new.items()}


def _stale_shard(new: dict, old: dict) -> dict:
    """The second of two tensor-parallel ranks has written the last step's rows of one projection."""
    name = "model.layers.1.self_attn.q_proj.weight"
    half = len(new[name]) // 2
    return new | {name: torch.cat([new[name][:half], old[name][half:]])}


# By name, what a wrong sync makes of the tensors that servers should get and had before.
PLANTED = {
    "two layers swapped": _swap_layers,
    "one tensor-parallel shard stale": _stale_shard,
    "the last step's weights": lambda new, old: old,
}
