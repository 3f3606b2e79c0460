"""A server that says anything with equal probability, as a model does whose output layer is 0: a whole run can train on it."""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipes.data.tokenizer import Tokenizer, load_tokenizer
from tests.data_cases import EOS, write_tokenizer
from tests.hf_models import make_hf_model
from tests.vllm_faults import Faulty, Handler, served

__all__ = ["Uniform", "make_uniform_model", "uniform_server"]

VOCABULARY = 512


def make_uniform_model(folder: Path) -> Path:
    """A Hugging Face folder with a tokenizer of fewer tokens."""
    write_tokenizer(folder, eos_token=EOS)
    make_hf_model(
        folder, "llama", torch.Generator().manual_seed(1), vocab_size=VOCABULARY, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["lm_head.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    return folder


class Uniform(Faulty):
    """
    Attributes:
        gate: responses are answered while it is set.
        waiting: requests that wait for that.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(_Handler)
        self.tokenizer, self.gate, self.waiting = tokenizer, threading.Event(), 0
        self.gate.set()
        self.records["/v1/models"] = 200, {"data": [{"id": "uniform", "max_model_len": 1 << 20}]}


class _Handler(Handler):
    server: Uniform

    def posted(self, body: dict | None) -> None:
        if self.path == "/tokenize":
            self.answer(200, {"tokens": self.server.tokenizer.encode(body["prompt"])})
        elif self.path == "/inference/v1/generate":
            self._generate(body)
        elif self.path == "/v1/completions" and "prompt_logprobs" in body:
            told = [{str(token): {"logprob": -math.log(VOCABULARY)}} for token in body["prompt"][1:]]
            self.answer(200, {"choices": [{"prompt_logprobs": [None, *told]}]})
        elif self.path == "/v1/completions":
            one = {"token_ids": [1], "logprobs": {"token_logprobs": [-math.log(VOCABULARY)]}}
            self.answer(200, {"choices": [one] * body["n"]})
        else:
            super().posted(body)

    def _generate(self, body: dict) -> None:
        server, params = self.server, body["sampling_params"]
        with server.lock:
            server.waiting += 1
        server.gate.wait(120)
        with server.lock:
            server.waiting -= 1
        choices = [self._choice(body["token_ids"], i, params["max_tokens"]) for i in range(params.get("n", 1))]
        self.answer(200, {"prompt_token_ids": body["token_ids"], "choices": choices})

    def _choice(self, prompt: list[int], index: int, count: int) -> dict:
        draw = random.Random(f"{prompt} {index}")
        tokens = [draw.randrange(20, self.server.tokenizer.vocab_size) for _ in range(count)]
        return {
            "index": index, "token_ids": tokens, "finish_reason": "length", "stop_reason": None,
            "logprobs": {"content": [{"token_id": t, "logprob": -math.log(VOCABULARY)} for t in tokens]},
            "weight_versions": [{"version": self.server.tag, "start": 0, "end": count}],
        }  # fmt: skip


@contextlib.contextmanager
def uniform_server(model: Path) -> Iterator[Uniform]:
    with served(Uniform(load_tokenizer(model))) as server:
        try:
            yield server
        finally:
            server.gate.set()
