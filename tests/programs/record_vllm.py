"""Write down what a real vLLM answers, for the tests of the protocol.

    python -m tests.programs.record_vllm        into tests/fixtures/vllm_0.32/, by the interpreter of tests/vllm_cases.py

Each file holds a body that was sent (null: GET), the status and the answer.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import httpx
import torch

from megatron_ext.rollouts import Request, SamplingParams
from megatron_ext.rollouts.vllm.client import opened
from megatron_ext.rollouts.vllm.protocol import as_calls, completion_body
from megatron_ext.rollouts.vllm.spans import ROUTE, generate_body
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
from tests.harness import ROOT
from tests.vllm_cases import home_of, make_model, make_tokenizer, source_of


def bodies(prompt: list[int]) -> dict[str, tuple[str, dict | None]]:
    def completion(**params) -> tuple[str, dict]:
        (call,) = as_calls([Request(prompt, 6, SamplingParams(max_new_tokens=8, **params))])
        return "/v1/completions", completion_body("policy", call)

    canary = {"model": "policy", "prompt": prompt, "max_tokens": 1, "ignore_eos": True, "prompt_logprobs": 0,
              "return_token_ids": True}  # fmt: skip
    return {
        "stop": completion(stop_token_ids=(0, 2, 3, 4)),
        "stop_string": completion(stop_strings=("what", "is", "the")),
        "hot": completion(temperature=2.0, top_k=5),
        "canary": ("/v1/completions", canary),
        "too_long": ("/v1/completions", canary | {"prompt": prompt * 100}),
        "tokens": ("/tokenize", {"model": "policy", "prompt": "what is 1 + 2 ?", "add_special_tokens": False}),
        "models": ("/v1/models", None),
        "version": ("/version", None),
        "weight_info": ("/weight_info", None),
        "unknown_route": ("/v1/nothing", {}),
    }  # fmt: skip


async def spans(http: httpx.AsyncClient, url: str, prompt: list[int]) -> dict:
    """An answer that has lived through an update of the weights, and was ended in the midst by the next."""
    (call,) = as_calls([Request(prompt, 2, SamplingParams(max_new_tokens=240))])
    body = generate_body("policy", call, 0)
    before = await said(http, url)
    asked = asyncio.ensure_future(http.post(url + ROUTE, json=body))
    for number, mode in enumerate(("keep", "abort"), 1):
        while (await said(http, url)) < before + 60 * number:
            await asyncio.sleep(0.02)
        await http.post(f"{url}/pause?mode={mode}")
        await http.post(f"{url}/update_weight_version", json={"new_version": f"{number}.run.tag"})
        await http.post(f"{url}/resume")
    answer = await asked
    return {"path": ROUTE, "body": body, "status": answer.status_code, "answer": answer.json()}


async def said(http: httpx.AsyncClient, url: str) -> float:
    """Tokens that have been sampled for answers of which not all are there yet, and others."""
    lines = (await http.get(f"{url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


async def ask(key: str, url: str, asked: dict[str, tuple[str, dict | None]]) -> dict[str, dict]:
    answers = {}
    async with opened(key, 60) as http:
        for name, (path, body) in asked.items():
            answer = await http.request("GET" if body is None else "POST", url + path, json=body)
            answers[name] = {"path": path, "body": body, "status": answer.status_code, "answer": answer.json()}
        answers["spans"] = await spans(http, url, [5, 7, 3, 9, 11, 6])
        refused = await http.post(f"{url}/pause", headers={"Authorization": "Bearer other"})
        answers["wrong_key"] = {"path": "/pause", "status": refused.status_code, "answer": refused.json()}
    return answers


def main() -> None:
    torch.set_num_threads(1)
    device, rng = initialize(ParallelSizes()), torch.Generator().manual_seed(5)
    set_seed(1)
    folder = Path(tempfile.mkdtemp())
    tokenizer = make_tokenizer(folder / "tokenizer")
    model = make_model(rng, device, "qwen3", tokenizer.vocab_size)
    with source_of(model, home_of(folder, tokenizer, rng)) as source:
        source.update_weights(0)
        answers = asyncio.run(ask(source.processes.key, source.processes.urls[0], bodies([5, 7, 3, 9, 11, 6])))
    target = ROOT / "tests/fixtures/vllm_0.32"
    target.mkdir(parents=True, exist_ok=True)
    for name, answer in answers.items():
        (target / f"{name}.json").write_text(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
