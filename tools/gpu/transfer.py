"""Weights by NCCL from this GPU to a vLLM server on the second one: does the server have them, and how long does it take?"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path

import torch

from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import Request, SamplingParams
from tests.gpt_cases import randomize
from tools.gpu.runner import Findings, Skip
from tools.gpu.worlds import world

__all__ = ["run"]

NEEDED = ("httpx", "psutil", "pytest", "tokenizers", "transformers")
SHAPE = {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8, "kv_channels": 128,
         "ffn_hidden_size": 5632, "encoder_seq_length": 256, "precision": "bf16"}  # fmt: skip
UPDATES = 3
LIMIT = 0.1  # nats on average, between two engines in bf16; see TOLERANCES of megatron_ext/vllm_servers/options.py


def run(findings: Findings) -> None:
    device = world(findings)
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skip("it needs two GPUs")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Skip(f"it needs {', '.join(lacking)}")
    from megatron_ext.rollouts.vllm import VllmSource
    from megatron_ext.vllm_servers import VllmOptions
    from tests.vllm_cases import PYTHON, home_of, make_tokenizer

    if not PYTHON.exists():
        raise Skip(f"no vLLM in {PYTHON}: `make vllm` installs it, or VLLM_PYTHON names an interpreter that has one")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    rng = torch.Generator().manual_seed(findings.settings.seed)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = make_tokenizer(Path(name) / "tokenizer")
        model = build_gpt(GPTModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size), device)
        arguments = ("--enforce-eager", "--gpu-memory-utilization", "0.5")
        options = VllmOptions(
            start=1, python=str(PYTHON), weights="nccl", cuda_devices=(visible[1],), arguments=arguments,
            patience=findings.seconds_left(),
        )  # fmt: skip
        source = VllmSource(model, options, home_of(Path(name), tokenizer, rng))
        try:
            _update(findings, source, rng)
        finally:
            source.close()


def _update(findings: Findings, source, rng: torch.Generator) -> None:
    """The canary is in each update, which raises where it dies."""
    size = sum(p.numel() * p.element_size() for p in source.model.parameters())
    requests = Request.each([[1, 2, 3], [4] * 100], 4, SamplingParams(max_new_tokens=64))
    for number in range(UPDATES):
        randomize(source.model, rng)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        source.update_weights(number)
        findings.row("updates", number=number, bytes=size, seconds=time.perf_counter() - begun)
        apart = []
        for request, samples in zip(requests, source.sample(requests), strict=True):
            for sample in samples:
                logits = text_logits(source.model, [*request.prompt, *sample.tokens])[
                    len(request.prompt) - 1 : -1
                ].float()
                expected = logits.log_softmax(-1).cpu().gather(1, torch.tensor(sample.tokens).unsqueeze(1)).squeeze(1)
                apart += (expected - torch.tensor(sample.logprobs)).abs().tolist()
        findings.check(f"update {number}: nats between the engines, on average", sum(apart) / len(apart), LIMIT)
